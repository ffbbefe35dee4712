//! One level of SD 1.5's true widths (320 channels, 8 heads of 40, context of 768), on a latent that
//! is not square. Its 25 million weights are made up on both sides and not shipped.

use candle_core::Var;
use stable_diffusion::config::UNetConfig;
use stable_diffusion::unet::{UNet, Watch};
use stable_diffusion::weights::WeightMap;

use crate::recording::{Comparison, Recording};
use crate::{hash_noise, losses};

#[test]
fn a_level_of_true_width_computes_what_the_reference_computes() {
    let recording = Recording::open("sd15-width.safetensors");
    let config =
        UNetConfig::from_json("recorded config", recording.text("config").as_bytes()).unwrap();
    let shapes = WeightMap::shapes(|w| UNet::build(&config, w)).unwrap();
    let fill = |(name, shape): (&String, &Vec<usize>)| {
        (
            name.clone(),
            hash_noise::weight(&format!("unet.{name}"), shape),
        )
    };
    let unet = UNet::new(&config, &WeightMap(shapes.iter().map(fill).collect()), None).unwrap();

    let (latents, target) = (
        hash_noise::noise("latents", &[1, 4, 32, 48]),
        hash_noise::noise("target", &[1, 4, 32, 48]),
    );
    let context = Var::from_tensor(&hash_noise::noise("context", &[1, 77, 768])).unwrap();
    let positions: Vec<usize> = recording.json("positions");
    let timestep: f32 = recording.json("timestep");
    let observed = unet
        .forward_observed(
            &latents,
            &[timestep],
            context.as_tensor(),
            Watch::All(&positions),
        )
        .unwrap();
    let mut comparison = Comparison::new(&recording);
    comparison.check("prediction", &observed.prediction);
    for map in &observed.attention {
        let name = &unet.cross_attention_layers()[map.layer].name;
        comparison.check(&format!("attention.{name}"), &map.probabilities);
    }
    let masked = losses::masked(&observed, &target, &recording.tensor("union"));
    let attention = losses::attention(&unet, &observed, &recording.tensor("masks"));
    comparison.check("masked_loss", &masked);
    comparison.check("attention_loss", &attention);
    for (key, loss) in [
        ("masked_gradient", masked),
        ("attention_gradient", attention),
    ] {
        comparison.check(key, loss.backward().unwrap().get(&context).unwrap());
    }
    comparison.finish("sd15-width.safetensors");
}
