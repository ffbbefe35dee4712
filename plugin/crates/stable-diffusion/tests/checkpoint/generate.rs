use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use stable_diffusion::Result;
use stable_diffusion::config::ModelConfig;
use stable_diffusion::generate::{
    Contexts, GenerateConfig, GenerateStep, Start, generate, generate_from, preview,
};
use stable_diffusion::model::DiffusionModel;
use stable_diffusion::rng::Rng;
use stable_diffusion::sampling::{Sampler, Schedule};

use crate::models::{shrunk, tokenizer};

const CONFIG: GenerateConfig = GenerateConfig {
    steps: 3,
    guidance: 4.0,
    sampler: Sampler::Ddim,
    schedule: Schedule::Normal,
    seed: 5,
    n_pictures: 2,
    start: Start::Noise([64, 64]),
};

fn model() -> DiffusionModel {
    DiffusionModel::random(&shrunk(ModelConfig::sd_1_5()), tokenizer(), 3, &Device::Cpu).unwrap()
}

/// Text embeddings of a prompt and of none.
fn embeddings(model: &DiffusionModel) -> (Tensor, Tensor) {
    let encode = |prompt: &str| {
        model
            .text_encoder
            .encode(&model.tokenizer.encode(prompt).unwrap().ids, None)
            .unwrap()
    };
    (encode("a dog on the grass"), encode(""))
}

/// Pictures of a conditional and an unconditional context.
fn painted(
    model: &DiffusionModel,
    [conditional, unconditional]: [&Tensor; 2],
    latents: Option<&Tensor>,
    config: &GenerateConfig,
) -> Result<Tensor> {
    let contexts = Contexts {
        conditional,
        unconditional,
    };
    let on_step = &mut |_: GenerateStep<'_>| ControlFlow::Continue(());
    generate(model, contexts, latents, config, on_step)
}

fn pictures(model: &DiffusionModel, config: &GenerateConfig) -> Vec<Vec<f32>> {
    let (conditional, unconditional) = embeddings(model);
    let out = painted(model, [&conditional, &unconditional], None, config).unwrap();
    assert_eq!(out.dims(), [config.n_pictures, 3, 64, 64]);
    out.flatten_from(1).unwrap().to_vec2().unwrap()
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let model = model();
    let both = pictures(&model, &CONFIG);
    assert_ne!(both[0], both[1]);
    assert!(both.iter().flatten().all(|x| (0.0..=1.0).contains(x)));
    // Whatever the number of threads, and however many pictures are asked for.
    let one = GenerateConfig {
        n_pictures: 1,
        ..CONFIG
    };
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        assert_eq!(
            pool.install(|| pictures(&model, &one))[0],
            both[0],
            "{threads} threads"
        );
    }
    assert_eq!(pictures(&self::model(), &one)[0], both[0]);
    for other in [
        GenerateConfig {
            seed: 6,
            ..one.clone()
        },
        GenerateConfig {
            guidance: 1.0,
            ..one.clone()
        },
        GenerateConfig {
            steps: 4,
            ..one.clone()
        },
        GenerateConfig {
            sampler: Sampler::DpmPp2m,
            ..one.clone()
        },
    ] {
        assert_ne!(pictures(&model, &other)[0], both[0], "{other:?}");
    }
}

#[test]
fn guidance_one_ignores_the_unconditional_prompt() {
    let model = model();
    let (conditional, unconditional) = embeddings(&model);
    let config = GenerateConfig {
        guidance: 1.0,
        n_pictures: 1,
        ..CONFIG
    };
    let run = |unconditional: &Tensor| {
        let out = painted(&model, [&conditional, unconditional], None, &config).unwrap();
        out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(run(&unconditional), run(&conditional));
}

#[test]
fn every_step_is_reported_and_can_be_the_last() {
    let model = model();
    let (conditional, unconditional) = embeddings(&model);
    let run = |stop_at: usize| {
        let mut steps = Vec::new();
        let contexts = Contexts {
            conditional: &conditional,
            unconditional: &unconditional,
        };
        let result = generate(&model, contexts, None, &CONFIG, &mut |step| {
            assert_eq!(step.clean.dims(), [1, 4, 8, 8]);
            steps.push((step.picture, step.step, step.total));
            if step.step == stop_at {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        (steps, result.err().map(|e| e.to_string()))
    };
    let all = [
        (0, 1, 6),
        (0, 2, 6),
        (0, 3, 6),
        (1, 4, 6),
        (1, 5, 6),
        (1, 6, 6),
    ];
    assert_eq!(run(0), (all.to_vec(), None));
    assert_eq!(run(4), (all[..4].to_vec(), Some("canceled".to_owned())));
}

#[test]
fn a_call_that_was_stopped_anywhere_goes_on_with_the_same_bits() {
    let model = model();
    let (conditional, unconditional) = embeddings(&model);
    let contexts = Contexts {
        conditional: &conditional,
        unconditional: &unconditional,
    };
    let bits = |pictures: &Tensor| -> Vec<u32> {
        let values = pictures.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    for sampler in Sampler::ALL {
        let config = GenerateConfig { sampler, ..CONFIG };
        let mut at_step = Vec::new();
        let whole = generate(&model, contexts, None, &config, &mut |step| {
            at_step.push(step.progress.clone());
            ControlFlow::Continue(())
        });
        let whole = bits(&whole.unwrap());
        let total = config.steps * config.n_pictures;
        assert_eq!(at_step.len(), total);
        for (done, progress) in at_step.into_iter().enumerate() {
            let mut left = Vec::new();
            let on = generate_from(&model, contexts, None, &config, progress, &mut |step| {
                left.push(step.step);
                ControlFlow::Continue(())
            });
            assert!(bits(&on.unwrap()) == whole, "{} {done}", sampler.name());
            let expected: Vec<usize> = (done + 2..=total).collect();
            assert_eq!(left, expected, "{} {done}", sampler.name());
        }
    }
}

#[test]
fn pictures_have_the_size_that_is_asked_for() {
    let model = model();
    let (conditional, unconditional) = embeddings(&model);
    // 9 cells a side cannot be halved evenly.
    for [width, height] in [[96, 64], [72, 40], [8, 136]] {
        let config = GenerateConfig {
            start: Start::Noise([width, height]),
            n_pictures: 1,
            ..CONFIG
        };
        let found = painted(&model, [&conditional, &unconditional], None, &config).unwrap();
        assert_eq!(found.dims(), [1, 3, height, width]);
    }
}

#[test]
fn a_picture_to_start_from_is_kept_as_far_as_denoise_says() {
    let model = model();
    let (conditional, unconditional) = embeddings(&model);
    let z = Rng::new(1, "test", 0)
        .normal(&[2, 4, 8, 12], &model.device)
        .unwrap();
    let distance = |denoise: f64| {
        let config = GenerateConfig {
            start: Start::Latents { denoise },
            ..CONFIG
        };
        let contexts = [&conditional, &unconditional];
        let found = painted(&model, contexts, Some(&z), &config).unwrap();
        assert_eq!(found.dims(), [4, 3, 64, 96]);
        let kept = preview(&model, &z.narrow(0, 1, 1).unwrap()).unwrap();
        let third = found.narrow(0, 2, 1).unwrap();
        let difference = (third - kept).unwrap().abs().unwrap();
        difference.mean_all().unwrap().to_scalar::<f32>().unwrap()
    };
    let (little, much) = (distance(0.01), distance(1.0));
    assert!(little < 0.2 * much, "{little} {much}");
}

#[test]
fn a_preview_of_a_large_latent_is_the_picture_of_its_local_means() {
    let model = model();
    let small = Rng::new(0, "test", 0)
        .normal(&[1, 4, 16, 16], &model.device)
        .unwrap();
    let values = |clean: &Tensor| {
        let picture = preview(&model, clean).unwrap();
        assert_eq!(picture.dims(), [1, 3, 128, 128]);
        picture.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let expected = values(&small);
    assert!(expected.iter().all(|x| (0.0..=1.0).contains(x)));
    for side in [64, 96] {
        let large = small.upsample_nearest2d(side, side).unwrap();
        let errors = values(&large)
            .into_iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs());
        assert!(errors.fold(0.0, f32::max) < 1e-5, "{side}");
    }
}

#[test]
fn a_preview_of_a_long_latent_is_as_small_as_that_of_a_square_one() {
    let model = model();
    for (height, width) in [(8, 512), (512, 8), (1, 512)] {
        let long = Rng::new(0, "test", 0)
            .normal(&[1, 4, height, width], &model.device)
            .unwrap();
        let picture = preview(&model, &long).unwrap();
        assert!(picture.elem_count() <= 3 * 128 * 128 * 4, "{picture:?}");
    }
}

#[test]
fn impossible_requests_are_refused() {
    let model = model();
    let (conditional, unconditional) = embeddings(&model);
    let refuse = |config: GenerateConfig| {
        let found = painted(&model, [&conditional, &unconditional], None, &config);
        found.unwrap_err().to_string()
    };
    assert_eq!(
        refuse(GenerateConfig { steps: 0, ..CONFIG }),
        "steps: 0 is not in 1..=1000"
    );
    assert_eq!(
        refuse(GenerateConfig {
            n_pictures: 0,
            ..CONFIG
        }),
        "n_pictures: 0 is not in 1.."
    );
    assert_eq!(
        refuse(GenerateConfig {
            guidance: f64::NAN,
            ..CONFIG
        }),
        "guidance: NaN is not a number"
    );
    for (start, message) in [
        (
            Start::Noise([64, 60]),
            "size: 64 x 60 is not a size in multiples of 8 pixels",
        ),
        (Start::Latents { denoise: 0.5 }, "latents: there are none"),
    ] {
        assert_eq!(refuse(GenerateConfig { start, ..CONFIG }), message);
    }
}

#[test]
fn pictures_of_the_wrong_size_are_refused() {
    let model = model();
    let image = Tensor::zeros((1, 3, 20, 64), candle_core::DType::F32, &Device::Cpu).unwrap();
    let error = model.vae.moments(&image).unwrap_err().to_string();
    assert_eq!(
        error,
        "image: [1, 3, 20, 64] is not [B, 3, H, W] with H and W multiples of 8"
    );
    let error = model.vae.decode(&image).unwrap_err().to_string();
    assert_eq!(error, "latents: [1, 3, 20, 64] is not [B, 4, h, w]");
}
