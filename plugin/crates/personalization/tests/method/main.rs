//! The method on a small model with random weights (tests/fixtures/parity/sd2-small): what has to hold whatever the
//! model has learned.
//!
//! | file | what |
//! | --- | --- |
//! | `same_bits` | the same seed, less memory, a stop and a kill: the same bits |
//! | `stages` | what each stage changes, and the losses |

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests; a failure is a failed test"
)]

mod same_bits;
mod stages;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use personalization::config::{EmConfig, ExtractionConfig, JointConfig, JointScope};
use personalization::loss::{cross_attention_loss, masked_diffusion_loss};
use personalization::{
    Checkpoint, Concept, EmOutcome, EmStart, EmState, Error, Event, JointState, Keeper,
    LearnedConcepts, MaskMode, Observer, Picture, PreparedScene, Role, SamplePrompts, Sampled,
    Scene, SceneMasks, ScenePicture, Silent, Size, TokenInit, TokenPlan, checkpoint, em,
    first_rows, joint_stage, learn_tokens, m_step, observe, sample, sample_from,
};
use stable_diffusion::memory::Memory;
use stable_diffusion::ops::{Backend, Precision};
use stable_diffusion::{
    CheckpointSource, DiffusionModel, GenerateConfig, Sampler, Schedule, Start,
};

fn model() -> DiffusionModel {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../tests/fixtures/parity/sd2-small"
    );
    DiffusionModel::load(&CheckpointSource::Path(path.into()), &Device::Cpu).unwrap()
}

fn concept(token: &str, word: &str, role: Role) -> Concept {
    Concept {
        token: token.into(),
        class_word: word.into(),
        role,
    }
}

/// Two pictures; the second is not square, and shows only the first concept and the background.
fn scene(model: &DiffusionModel) -> Scene {
    let (side, unit) = (model.image_size(), model.image_unit());
    let picture = |shift: usize| {
        let size = Size::new(side + shift.div_ceil(side) * unit, side);
        let rgb: Vec<u8> = (0..size.area())
            .flat_map(|i| {
                let (x, y) = ((i + shift) % size.width, i / size.width);
                if x < size.width / 3 && y > size.height / 2 {
                    [220, 40, 30]
                } else {
                    [30, (y * 3) as u8, 90]
                }
            })
            .collect();
        Picture::from_rgb8(size, &rgb, size).unwrap()
    };
    let concepts = vec![
        concept("<a>", "dog", Role::Object),
        concept("<b>", "car", Role::Object),
        concept("<c>", "sea", Role::Background),
    ];
    let pictures = vec![
        ScenePicture {
            picture: picture(0),
            concepts: vec![0, 1, 2],
        },
        ScenePicture {
            picture: picture(5),
            concepts: vec![0, 2],
        },
    ];
    Scene::new(concepts, pictures).unwrap()
}

fn short() -> EmConfig {
    let likelihood = EmConfig::likelihood();
    let mut extraction = likelihood.extraction;
    (extraction.n_timesteps_initial, extraction.n_timesteps) = (3, 2);
    EmConfig {
        steps: 4,
        e_step_every: 2,
        extraction,
        ..likelihood
    }
}

fn run(model: &DiffusionModel, scene: &Scene, config: &EmConfig) -> EmOutcome {
    let prepared = PreparedScene::new(model, scene).unwrap();
    em(model, &prepared, EmStart::Fresh, config, 7, &mut Silent).unwrap()
}

/// What learning the tokens begins with.
fn initial(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    config: &EmConfig,
    seed: u64,
) -> LearnedConcepts {
    let first = first_rows(model, scene, &config.tokens, seed).unwrap();
    let plan = TokenPlan {
        first: &first,
        inversion_steps: config.tokens.inversion_steps(),
        masks: None,
        steps: 0,
    };
    learn_tokens(model, scene, &plan, &config.m_step, None, &mut Silent).unwrap()
}

/// The joint stage on what was learned.
fn tune(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    outcome: &EmOutcome,
    joint: &JointConfig,
    config: &EmConfig,
) -> (DiffusionModel, LearnedConcepts) {
    joint_stage(
        model,
        scene,
        &outcome.masks,
        &outcome.learned,
        joint,
        &config.m_step,
        None,
        &mut Silent,
    )
    .unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap()
        .into_iter()
        .map(f32::to_bits)
        .collect()
}
