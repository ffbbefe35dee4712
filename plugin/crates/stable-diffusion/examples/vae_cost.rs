//! Seconds of encoding and decoding one picture: this crate's layers, and candle-transformers' autoencoder, in turn.
//!
//! `cargo run --release -p stable-diffusion --example vae_cost -- [side in pixels] [rounds]`
//! Weights are random ones of Stable Diffusion 1.5's shapes: they change nothing about the cost. `RAYON_NUM_THREADS` sets
//! the threads.
#![expect(clippy::print_stdout, reason = "the figures are the program's output")]

use std::{error::Error, time::Instant};

use candle_core::Device;
use stable_diffusion::{config::ModelConfig, rng::Rng, vae::Vae, weights::WeightMap};

fn main() -> Result<(), Box<dyn Error>> {
    let numbers: Vec<usize> = std::env::args()
        .skip(1)
        .map(|argument| argument.parse())
        .collect::<Result<_, _>>()?;
    let side = numbers.first().copied().unwrap_or(512);
    let n_rounds = numbers.get(1).copied().unwrap_or(2);
    let config = ModelConfig::sd_1_5().vae;
    let weights = WeightMap::random(0, |w| Vae::new(&config, w).map(drop))?;
    let forms = [
        ("own", weights.build("own", |w| Vae::new(&config, w))?),
        (
            "candle",
            weights.build("candle", |w| Vae::by_candle(&config, w))?,
        ),
    ];
    let mut rng = Rng::new(0, "vae cost", 0);
    let image = rng.normal(&[1, 3, side, side], &Device::Cpu)?;
    let cells = side / config.downsampling();
    let latents = rng.normal(&[1, config.latent_channels, cells, cells], &Device::Cpu)?;
    for round in 0..n_rounds {
        for (name, vae) in &forms {
            let start = Instant::now();
            vae.moments(&image)?;
            let encoded = start.elapsed().as_secs_f64();
            vae.decode(&latents)?;
            let decoded = start.elapsed().as_secs_f64() - encoded;
            println!("round {round}, {name}: encode {encoded:.2} s, decode {decoded:.2} s");
        }
    }
    Ok(())
}
