//! Two whole checkpoints: the bundled one, and a small one of SD 2.x's kind.

use candle_core::{Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use stable_diffusion::Result;
use stable_diffusion::generate::{Contexts, GuidedModel};
use stable_diffusion::model::{CheckpointSource, DiffusionModel};
use stable_diffusion::ops::Backend;
use stable_diffusion::sampling::{Problem, Sampler, Schedule};
use stable_diffusion::unet::Watch;

use crate::losses;
use crate::recording::{Comparison, Recording, device, fixtures, sprites};

const GUIDANCE: f64 = 5.0;
const STEPS: usize = 10;
const LAMBDA: f64 = 0.01;
/// Of latents after ten steps, as a fraction of their greatest magnitude.
const SAMPLED: f64 = 2e-4;

#[test]
fn the_bundled_checkpoint_computes_what_the_reference_computes() {
    compare(sprites(), "sprites.safetensors", Backend::Host);
}

#[test]
fn so_it_does_in_the_form_for_devices() {
    compare(sprites(), "sprites.safetensors", Backend::Device);
}

#[test]
fn a_small_sd_2_model_computes_what_the_reference_computes() {
    for backend in [Backend::Host, Backend::Device] {
        compare(
            fixtures().join("sd2-small"),
            "sd2-small.safetensors",
            backend,
        );
    }
}

/// A model, what was recorded of it, and what it makes of the recorded prompt.
struct Case<'a> {
    model: DiffusionModel,
    recording: &'a Recording,
    ids: Vec<u32>,
    positions: Vec<usize>,
}

fn compare(folder: std::path::PathBuf, name: &str, backend: Backend) {
    let recording = Recording::open(name);
    let model = DiffusionModel::load(&CheckpointSource::Path(folder), device()).unwrap();
    assert_eq!(
        model.fingerprint,
        recording.text("fingerprint"),
        "{name} was recorded with other weights; re-record with tests/reference/record.sh"
    );
    // The kernels for a CPU are on a CPU only: a GPU has one form, which does everything.
    let on_gpu = !device().is_cpu();
    let form = if on_gpu { Backend::Device } else { backend };
    let case = tokenize(model, &recording);
    let mut comparison = Comparison::new(&recording);
    form.within(|| {
        text(&case, &mut comparison);
        unet(&case, &mut comparison);
        training_step(&case, &mut comparison);
        // What samples only calls the U-Net, and the VAE has one form.
        if backend == Backend::Host || on_gpu {
            vae(&case, &mut comparison);
            sampling(&case, &mut comparison);
        }
    });
    comparison.finish(&format!("{name}, {form:?}"));
}

fn tokenize(model: DiffusionModel, recording: &Recording) -> Case<'_> {
    let placeholders = ["<v1>".to_owned(), "<v2>".to_owned()];
    let with = model.tokenizer.with_placeholders(&placeholders).unwrap();
    let prompt = with.encode(recording.text("prompt")).unwrap();
    assert_eq!(prompt.ids, recording.json::<Vec<u32>>("ids"));
    let first = model.tokenizer.base_vocab_size() as u32;
    let positions = [prompt.positions_of(first), prompt.positions_of(first + 1)].concat();
    assert_eq!(positions, recording.json::<Vec<usize>>("positions"));
    for (prompt, ids) in [
        (recording.text("plain_prompt"), "plain_ids"),
        ("", "empty_ids"),
    ] {
        assert_eq!(
            model.tokenizer.encode(prompt).unwrap().ids,
            recording.json::<Vec<u32>>(ids),
            "{prompt}"
        );
    }
    Case {
        model,
        recording,
        ids: prompt.ids,
        positions,
    }
}

fn text(case: &Case<'_>, comparison: &mut Comparison<'_>) {
    let encoder = &case.model.text_encoder;
    let plain: Vec<u32> = case.recording.json("plain_ids");
    comparison.check("text.plain", &encoder.encode(&plain, None).unwrap());
    let rows = case.recording.tensor("text.rows");
    comparison.check(
        "text.learned",
        &encoder.encode(&case.ids, Some(&rows)).unwrap(),
    );
}

fn unet(case: &Case<'_>, comparison: &mut Comparison<'_>) {
    let unet = &case.model.unet;
    let (latents, context) = (
        case.recording.tensor("unet.latents"),
        case.recording.tensor("text.learned"),
    );
    let timesteps: Vec<f32> = case.recording.json("timesteps");
    comparison.check(
        "unet.prediction",
        &unet.forward(&latents, &timesteps, &context).unwrap(),
    );
    let observed = unet
        .forward_observed(&latents, &timesteps, &context, Watch::All(&case.positions))
        .unwrap();
    comparison.check("unet.prediction", &observed.prediction);
    let mut names = Vec::new();
    for map in &observed.attention {
        let name = format!(
            "attention.{}",
            unet.cross_attention_layers()[map.layer].name
        );
        comparison.check(&name, &map.probabilities);
        names.push(name);
    }
    names.sort();
    assert_eq!(names, case.recording.names("attention."));
}

fn vae(case: &Case<'_>, comparison: &mut Comparison<'_>) {
    let vae = &case.model.vae;
    let moments = vae.moments(&case.recording.tensor("vae.image")).unwrap();
    comparison.check("vae.mean", &moments.mean);
    comparison.check("vae.std", &moments.std);
    comparison.check("vae.latents", &vae.scaled(&moments.mean).unwrap());
    comparison.check(
        "vae.decoded",
        &vae.decode(&case.recording.tensor("vae.latents")).unwrap(),
    );
}

/// A problem whose noise was recorded.
struct Recorded<'a> {
    guided: GuidedModel<'a>,
    noise: Tensor,
    drawn: usize,
}

impl Problem for Recorded<'_> {
    fn clean(&mut self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        self.guided.clean(x, sigma)
    }
    fn noise(&mut self, _: &Tensor) -> Result<Tensor> {
        self.drawn += 1;
        Ok(self.noise.narrow(0, self.drawn - 1, 1)?)
    }
    fn on_step(&mut self, _: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// Every sampler and schedule, from noise and with the last steps of a longer run.
fn sampling(case: &Case<'_>, comparison: &mut Comparison<'_>) {
    let model = &case.model;
    let empty: Vec<u32> = case.recording.json("empty_ids");
    let unconditional = model.text_encoder.encode(&empty, None).unwrap();
    comparison.check("text.empty", &unconditional);
    let contexts = Contexts {
        conditional: &case.recording.tensor("text.plain"),
        unconditional: &unconditional,
    };
    let mut checked = Vec::new();
    for sampler in Sampler::ALL {
        for schedule in Schedule::ALL {
            for denoise in [1.0, 0.6] {
                let name = format!("{}.{}.{denoise:?}", sampler.name(), schedule.name());
                let mut problem = Recorded {
                    guided: GuidedModel::new(model, contexts, GUIDANCE),
                    noise: case.recording.tensor("sampling.noise"),
                    drawn: 0,
                };
                let levels = problem.guided.levels();
                let sigmas = sampler
                    .noise_levels(levels, schedule, STEPS, denoise)
                    .unwrap();
                let found: Vec<f32> = sigmas.iter().map(|&sigma| sigma as f32).collect();
                let found = Tensor::new(found.as_slice(), device()).unwrap();
                comparison.check(&format!("sampling.sigmas.{name}"), &found);
                let scale = (1.0 + sigmas[0] * sigmas[0]).sqrt();
                let x = (case.recording.tensor("sampling.start") * scale).unwrap();
                let end = sampler.sample(&mut problem, &x, &sigmas).unwrap();
                let name = format!("sampling.end.{name}");
                comparison.check_within(&name, &end, SAMPLED);
                checked.push(name);
            }
        }
    }
    checked.sort();
    assert_eq!(checked, case.recording.names("sampling.end."));
}

/// Both losses, their gradients with respect to the concepts' rows, and one step of AdamW.
fn training_step(case: &Case<'_>, comparison: &mut Comparison<'_>) {
    let (model, recorded) = (&case.model, |key: &str| case.recording.tensor(key));
    let t = case.recording.json::<Vec<usize>>("timesteps")[0];
    let (z, noise) = (recorded("step.latents"), recorded("step.noise"));
    let noisy = model.noise_schedule.add_noise(&z, &noise, &[t]).unwrap();
    comparison.check("step.noisy", &noisy);
    let target = model.noise_schedule.target(&z, &noise, &[t]).unwrap();
    comparison.check("step.target", &target);

    let rows = Var::from_tensor(&recorded("text.rows")).unwrap();
    let context = model
        .text_encoder
        .encode(&case.ids, Some(rows.as_tensor()))
        .unwrap();
    let watch = Watch::All(&case.positions);
    let observed = model
        .unet
        .forward_observed(&noisy, &[t as f32], &context, watch)
        .unwrap();
    let masked = losses::masked(&observed, &target, &recorded("step.union"));
    let attention = losses::attention(&model.unet, &observed, &recorded("step.masks"));
    comparison.check("step.masked_loss", &masked);
    comparison.check("step.attention_loss", &attention);
    let gradient = |loss: &Tensor| loss.backward().unwrap().get(&rows).unwrap().clone();
    comparison.check("step.masked_gradient", &gradient(&masked));
    comparison.check("step.attention_gradient", &gradient(&attention));

    let loss = (masked + (attention * LAMBDA).unwrap()).unwrap();
    let mut gradients = loss.backward().unwrap();
    let g = gradients.get(&rows).unwrap().clone();
    comparison.check("step.gradient", &g);
    let norm = f64::from(
        g.sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .sqrt()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
    );
    gradients.insert(&rows, (g * (1.0 / (norm + 1e-6)).min(1.0)).unwrap());
    let params = ParamsAdamW {
        lr: 5e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 1e-2,
    };
    let mut optimizer = AdamW::new(vec![rows.clone()], params).unwrap();
    optimizer.step(&gradients).unwrap();
    // The step alone: beside the rows themselves an error in it would vanish.
    comparison.check(
        "step.update",
        &(rows.as_tensor() - recorded("text.rows")).unwrap(),
    );
}
