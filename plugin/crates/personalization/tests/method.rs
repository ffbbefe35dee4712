//! The method on a small model with random weights (tests/fixtures/parity/sd2-small): what has to hold whatever the
//! model has learned.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests; a failure is a failed test"
)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use personalization::config::{EmConfig, ExtractionConfig, JointConfig, JointScope};
use personalization::loss::{cross_attention_loss, masked_diffusion_loss};
use personalization::{
    Checkpoint, Concept, EmOutcome, EmStart, EmState, Error, Event, JointState, Keeper,
    LearnedConcepts, MaskMode, Picture, PreparedScene, Role, SamplePrompts, Sampled, Scene,
    SceneMasks, ScenePicture, Silent, Size, TokenInit, checkpoint, em, init_tokens, joint_stage,
    m_step, sample, sample_from,
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

#[test]
fn the_same_seed_gives_the_same_bits_and_another_one_does_not() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let (first, second) = (run(&model, &scene, &config), run(&model, &scene, &config));
    assert_eq!(bits(&first.learned.rows), bits(&second.learned.rows));
    assert_eq!(first.masks, second.masks);
    assert_ne!(bits(&first.learned.rows), bits(&first.learned.initial_rows));
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let other = em(&model, &prepared, EmStart::Fresh, &config, 8, &mut Silent).unwrap();
    assert_ne!(bits(&first.learned.rows), bits(&other.learned.rows));
}

#[test]
fn less_memory_gives_the_same_bits() {
    let config = short();
    let outcomes = [Memory::Fast, Memory::Lean].map(|memory| {
        let whole = model();
        let model = DiffusionModel {
            // One of the pictures is larger than the model's: tiles would change it.
            vae: whole.vae.clone(),
            ..whole.with_memory(memory).unwrap()
        };
        let scene = scene(&model);
        let outcome = run(&model, &scene, &config);
        let prepared = PreparedScene::new(&model, &scene).unwrap();
        let scopes = [
            JointScope::Full,
            JointScope::KeyValue,
            JointScope::Lora { rank: 2 },
        ];
        let tuned = scopes.map(|scope| {
            let joint = JointConfig {
                steps: 3,
                learning_rate: 1e-3,
                scope,
                ..JointConfig::break_a_scene()
            };
            let (tuned, learned) = tune(&model, &prepared, &outcome, &joint, &config);
            assert_eq!(tuned.unet.memory(), memory);
            let weights: Vec<_> = tuned.tensors().map(bits).collect();
            (bits(&learned.rows), weights)
        });
        (outcome, tuned)
    });
    let [(fast, fast_tuned), (lean, lean_tuned)] = outcomes;
    assert_eq!(bits(&fast.learned.rows), bits(&lean.learned.rows));
    assert_eq!(fast.masks, lean.masks);
    assert_eq!(fast.observations, lean.observations);
    assert!(fast_tuned == lean_tuned, "the joint stage differs");
}

/// Losses of every step, by their bits, and masks and tokens after every round of two steps.
#[derive(Default)]
struct Seen {
    losses: Vec<u32>,
    rounds: Vec<(SceneMasks, LearnedConcepts)>,
}

impl Seen {
    fn hear(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        match event {
            Event::Step {
                masked_diffusion, ..
            } => self.losses.push(masked_diffusion.to_bits()),
            Event::Checkpoint(Checkpoint::Alternation(moment))
                if moment.learned.step == 2 * moment.round && moment.looking.is_none() =>
            {
                let round = (moment.masks.to_vec(), moment.learned.clone());
                self.rounds.push(round);
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

#[test]
fn training_noise_does_not_depend_on_where_masks_come_from() {
    // By attention alone: its masks follow the tokens closely enough to differ after one round.
    let (model, short) = (model(), short());
    let extraction = ExtractionConfig {
        n_timesteps_initial: 3,
        n_timesteps: 2,
        ..EmConfig::attention().extraction
    };
    let config = EmConfig {
        extraction,
        ..short
    };
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let run = |masks| {
        let (mut seen, config) = (Seen::default(), EmConfig { masks, ..config });
        let mut hear = |event: &Event<'_>| seen.hear(event);
        em(&model, &prepared, EmStart::Fresh, &config, 7, &mut hear).unwrap();
        seen
    };
    let (re_estimated, baseline) = (run(MaskMode::Em), run(MaskMode::Baseline));
    assert_eq!((re_estimated.losses.len(), baseline.losses.len()), (4, 4));
    assert_eq!(re_estimated.losses[..2], baseline.losses[..2]);
    // From the second round on the masks differ. The baseline's tokens under the other run's masks: same losses, if
    // the E-step in between moved no noise.
    let (masks, learned) = (&re_estimated.rounds[1].0, &baseline.rounds[1].1);
    assert_ne!(*masks, baseline.rounds[1].0);
    let mut second = Seen::default();
    let mut hear = |event: &Event<'_>| second.hear(event);
    m_step(
        &model,
        &prepared,
        masks,
        learned,
        &config.m_step,
        2,
        &mut hear,
    )
    .unwrap();
    assert_eq!(second.losses, re_estimated.losses[2..]);
}

#[test]
fn a_run_that_was_stopped_anywhere_goes_on_with_the_same_bits() {
    let (model, short) = (model(), short());
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    // More timesteps than one pass takes.
    let extraction = ExtractionConfig {
        n_timesteps_initial: 12,
        n_timesteps: 11,
        ..short.extraction
    };
    let mut config = EmConfig {
        extraction,
        ..short
    };
    config.tokens.init = TokenInit::Inversion { steps: 2 };
    let folder = tempfile::tempdir().unwrap();
    let file = |n: usize| folder.path().join(format!("{n}.safetensors"));
    let mut saved = 0;
    let mut save = |event: &Event<'_>| {
        if let Event::Checkpoint(checkpoint) = event {
            checkpoint.save(&file(saved)).unwrap();
            saved += 1;
        }
        ControlFlow::Continue(())
    };
    let whole = em(&model, &prepared, EmStart::Fresh, &config, 7, &mut save).unwrap();
    let (mut inverting, mut looking) = (0, 0);
    for n in 0..saved {
        let state = EmState::load(&file(n), &Device::Cpu).unwrap();
        inverting += usize::from(state.is_inverting);
        looking += usize::from(state.is_looking());
        // Half of them: each is most of a run.
        if n % 2 == 1 && n + 1 < saved {
            continue;
        }
        let mut events = 0;
        let resumed = em(
            &model,
            &prepared,
            EmStart::Resume(Box::new(state)),
            &config,
            7,
            &mut |event: &Event<'_>| {
                events += usize::from(matches!(event, Event::Checkpoint(_)));
                ControlFlow::Continue(())
            },
        )
        .unwrap();
        assert_eq!(
            bits(&whole.learned.rows),
            bits(&resumed.learned.rows),
            "{n}"
        );
        assert_eq!(whole.masks, resumed.masks, "{n}");
        assert!(whole.observations == resumed.observations, "{n}");
        assert!(events <= saved - n + 1, "{n}: {events} states of {saved}");
    }
    // Two steps of inversion; two pictures in two passes each, three times.
    assert_eq!((inverting, looking), (2, 12));
}

#[test]
fn a_state_that_is_damaged_gives_way_to_the_one_before() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let open = || {
        let load = |path: &Path| EmState::load(path, &Device::Cpu);
        Keeper::open(folder.path(), checkpoint::EM, load)
    };
    let (mut keeper, state, said) = open();
    assert!(state.is_none() && said.is_empty());
    let mut keep = |event: &Event<'_>| {
        if let Event::Checkpoint(checkpoint) = event {
            keeper.keep(checkpoint).unwrap();
        }
        ControlFlow::Continue(())
    };
    em(&model, &prepared, EmStart::Fresh, &config, 7, &mut keep).unwrap();
    let last = open().1.unwrap();
    let files: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(files.len(), 2);
    let newest = |path: &PathBuf| path.metadata().unwrap().modified().unwrap();
    let newest = files.iter().max_by_key(|path| newest(path)).unwrap();
    let whole = std::fs::read(newest).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    for bytes in [&damaged[..], &whole[..whole.len() - 1], &[]] {
        std::fs::write(newest, bytes).unwrap();
        let (_, state, said) = open();
        assert_eq!(state.unwrap().round, last.round);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(
            said[0].ends_with("; going on from the one before it"),
            "{said:?}"
        );
    }
    for file in &files {
        std::fs::write(file, "nothing").unwrap();
    }
    let (_, state, said) = open();
    assert!(state.is_none());
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].ends_with("; starting anew"), "{said:?}");
}

#[test]
fn sampling_that_was_stopped_anywhere_goes_on_with_the_same_bits() {
    let model = model();
    let config = GenerateConfig {
        steps: 3,
        guidance: 3.0,
        sampler: Sampler::DpmPp2mSde,
        schedule: Schedule::Karras,
        seed: 4,
        n_pictures: 2,
        start: Start::Noise([model.image_size(); 2]),
    };
    let prompts = SamplePrompts {
        prompts: &["a dog", "a car"],
        negative: "",
        latents: None,
    };
    let folder = tempfile::tempdir().unwrap();
    let file = |n: usize| folder.path().join(format!("{n}.safetensors"));
    let mut saved = 0;
    let mut save = |event: &Event<'_>| {
        if let Event::Checkpoint(checkpoint) = event {
            checkpoint.save(&file(saved)).unwrap();
            saved += 1;
        }
        ControlFlow::Continue(())
    };
    let whole = sample(&model, None, &prompts, &config, &mut save).unwrap();
    assert_eq!(saved, 12);
    for n in 0..saved {
        let sampled = Sampled::load(&file(n), &Device::Cpu).unwrap();
        let mut steps = 0;
        let mut count = |event: &Event<'_>| {
            steps += usize::from(matches!(event, Event::Denoised { .. }));
            ControlFlow::Continue(())
        };
        let resumed = sample_from(&model, None, &prompts, &config, sampled, &mut count);
        assert_eq!(bits(&whole), bits(&resumed.unwrap()), "{n}");
        assert_eq!(steps, saved - n - 1);
    }
}

#[test]
fn a_stop_is_honored_within_one_step() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let mut steps = 0;
    let stopped = em(
        &model,
        &prepared,
        EmStart::Fresh,
        &config,
        7,
        &mut |event: &Event<'_>| {
            steps += usize::from(matches!(event, Event::Step { .. }));
            if steps == 1 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    );
    assert!(matches!(stopped, Err(Error::Canceled)));
    assert_eq!(steps, 1);
}

#[test]
fn a_token_of_one_piece_starts_as_its_word() {
    let model = model();
    let size = Size::square(model.image_size());
    let picture = Picture::from_rgb8(size, &vec![90; size.area() * 3], size).unwrap();
    let one = ScenePicture {
        picture,
        concepts: vec![0],
    };
    let scene = Scene::new(vec![concept("<a>", "a", Role::Object)], vec![one]).unwrap();
    let config = EmConfig::paper();
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let learned = init_tokens(
        &model,
        &prepared,
        &config.tokens,
        &config.m_step,
        0,
        &mut Silent,
    )
    .unwrap();
    let encode = |text: &str, rows| {
        let ids = learned.tokenizer(&model).unwrap().encode(text).unwrap().ids;
        bits(&model.text_encoder.encode(&ids, rows).unwrap())
    };
    assert_eq!(
        encode("a photo of <a>", Some(&learned.rows)),
        encode("a photo of a", None)
    );
}

#[test]
fn inversion_moves_the_tokens_and_starts_a_new_optimizer() {
    let (model, mut config) = (model(), short());
    config.tokens.init = TokenInit::Inversion { steps: 2 };
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let learned = init_tokens(
        &model,
        &prepared,
        &config.tokens,
        &config.m_step,
        1,
        &mut Silent,
    )
    .unwrap();
    assert_ne!(bits(&learned.rows), bits(&learned.initial_rows));
    assert_eq!((learned.step, learned.optimizer.t), (0, 0));
}

#[test]
fn the_joint_stage_changes_its_own_weights_and_no_others() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let outcome = run(&model, &scene, &config);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let base = model.unet.weights().clone();
    for scope in [
        JointScope::Full,
        JointScope::KeyValue,
        JointScope::Lora { rank: 2 },
    ] {
        let joint = JointConfig {
            steps: 2,
            learning_rate: 1e-3,
            scope,
            ..JointConfig::break_a_scene()
        };
        let (tuned, learned) = tune(&model, &prepared, &outcome, &joint, &config);
        assert_ne!(bits(&learned.rows), bits(&outcome.learned.rows));
        for (name, weight) in &base.0 {
            assert_eq!(
                bits(weight),
                bits(&model.unet.weights().0[name]),
                "the base model's {name} was written"
            );
            let same = bits(weight) == bits(&tuned.unet.weights().0[name]);
            let trained = match scope {
                JointScope::Full => true,
                JointScope::KeyValue => name.contains("attn2.to_k") || name.contains("attn2.to_v"),
                JointScope::Lora { .. } => false,
            };
            assert_eq!(same, !trained, "{scope:?}: {name}");
            assert!(
                !tuned.unet.weights().0[name].is_variable(),
                "{name} is still a variable"
            );
        }
        let moved = tuned
            .lora
            .iter()
            .flat_map(|lora| lora.factors.values())
            .filter(|factors| bits(&factors.up).iter().any(|&v| v != 0));
        assert_eq!(moved.count() > 0, matches!(scope, JointScope::Lora { .. }));
    }
}

/// With f16 the loss is scaled on its way back; what is trained is f32 in any case.
#[test]
fn half_precision_learns_as_f32_does() {
    let config = short();
    let learn = |backend: Backend, precision: Precision| {
        backend.within(|| {
            let model = model().with_precision(precision).unwrap();
            let scene = scene(&model);
            let outcome = run(&model, &scene, &config);
            let prepared = PreparedScene::new(&model, &scene).unwrap();
            let tuned = [JointScope::KeyValue, JointScope::Lora { rank: 2 }].map(|scope| {
                let joint = JointConfig {
                    steps: 2,
                    scope,
                    ..JointConfig::break_a_scene()
                };
                let (tuned, learned) = tune(&model, &prepared, &outcome, &joint, &config);
                for (name, weight) in &tuned.unet.weights().0 {
                    if scope == JointScope::KeyValue && name.contains("attn2.to_k.weight") {
                        assert_eq!(weight.dtype(), DType::F32, "{name} was trained");
                    }
                }
                learned.rows
            });
            [
                &[outcome.learned.initial_rows, outcome.learned.rows],
                &tuned[..],
            ]
            .concat()
        })
    };
    let largest = |a: &Tensor, b: &Tensor| -> f32 {
        let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        difference.max(0).unwrap().to_scalar().unwrap()
    };
    let expected = learn(Backend::Host, Precision::F32);
    for (backend, precision) in [
        (Backend::Host, Precision::Bf16),
        (Backend::Device, Precision::Bf16),
        (Backend::Device, Precision::F16),
    ] {
        let found = learn(backend, precision);
        for (stage, (found, expected_rows)) in found.iter().zip(&expected).enumerate().skip(1) {
            assert_eq!(found.dtype(), DType::F32);
            let moved = largest(expected_rows, &expected[0]);
            let error = largest(found, expected_rows);
            // Adam's first steps have the sign of a gradient: one near zero may go the other way.
            assert!(
                error.is_finite() && error <= 2.0 * moved,
                "{precision:?} {stage}: {error} of {moved}"
            );
            let mean = |rows: &Tensor| -> f32 {
                let step = (rows - &expected[0]).unwrap();
                let along = (step * (expected_rows - &expected[0]).unwrap()).unwrap();
                along.sum_all().unwrap().to_scalar().unwrap()
            };
            let agreement = mean(found) / mean(expected_rows);
            assert!(
                agreement > 0.8,
                "{precision:?} on {backend:?}, {stage}: {agreement}"
            );
        }
    }
}

#[test]
fn a_joint_stage_that_was_stopped_goes_on_with_the_same_bits() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let EmOutcome { learned, masks, .. } = run(&model, &scene, &config);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let scope = JointScope::Lora { rank: 2 };
    let joint = JointConfig {
        steps: 4,
        learning_rate: 1e-3,
        scope,
        ..JointConfig::break_a_scene()
    };
    let stage = |resume, observer: &mut dyn personalization::Observer| {
        joint_stage(
            &model,
            &prepared,
            &masks,
            &learned,
            &joint,
            &config.m_step,
            resume,
            observer,
        )
    };
    let folder = tempfile::tempdir().unwrap();
    let file = |n: usize| folder.path().join(format!("{n}.safetensors"));
    let mut saved = 0;
    let (_, whole) = stage(None, &mut |event: &Event<'_>| {
        if let Event::Checkpoint(checkpoint) = event {
            checkpoint.save(&file(saved)).unwrap();
            saved += 1;
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(saved, joint.steps);
    for n in 0..saved {
        let state = JointState::load(&file(n), &Device::Cpu).unwrap();
        assert_eq!(state.step, n + 1);
        let (_, resumed) = stage(Some(state), &mut Silent).unwrap();
        assert_eq!(bits(&whole.rows), bits(&resumed.rows), "{n}");
    }
}

#[test]
fn given_masks_may_overlap_and_empty_ones_are_refused() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let size = |picture: usize| scene.pictures()[picture].picture.size();
    let full = |picture: usize, n: usize, v: u8| {
        let size = size(picture);
        personalization::ImageMasks::new(size, vec![vec![v; size.area()]; n]).unwrap()
    };
    let learned = init_tokens(
        &model,
        &prepared,
        &config.tokens,
        &config.m_step,
        1,
        &mut Silent,
    )
    .unwrap();
    let overlapping = vec![full(0, 3, 1), full(1, 2, 1)];
    m_step(
        &model,
        &prepared,
        &overlapping,
        &learned,
        &config.m_step,
        1,
        &mut Silent,
    )
    .unwrap();
    let empty = vec![full(0, 3, 0), full(1, 2, 1)];
    let refused = m_step(
        &model,
        &prepared,
        &empty,
        &learned,
        &config.m_step,
        1,
        &mut Silent,
    )
    .unwrap_err();
    assert!(
        refused.to_string().contains("in picture 1 is empty"),
        "{refused}"
    );
    let given = EmConfig {
        masks: MaskMode::Given,
        ..config
    };
    let refused = em(&model, &prepared, EmStart::Fresh, &given, 1, &mut Silent).unwrap_err();
    assert!(refused.to_string().contains("needs masks"), "{refused}");
}

/// Central differences of a scalar function against its gradient, relative to the largest component.
fn check_gradient(start: &Tensor, f: &dyn Fn(&Tensor) -> Tensor) {
    let var = Var::from_tensor(start).unwrap();
    let gradient = f(var.as_tensor())
        .backward()
        .unwrap()
        .get(var.as_tensor())
        .unwrap()
        .flatten_all()
        .unwrap();
    let gradient = gradient.to_vec1::<f32>().unwrap();
    let values = start.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let at = |i: usize, h: f32| {
        let mut moved = values.clone();
        moved[i] += h;
        let moved = Tensor::from_vec(moved, start.dims(), &Device::Cpu).unwrap();
        f64::from(f(&moved).to_scalar::<f32>().unwrap())
    };
    let scale = gradient.iter().map(|g| g.abs()).fold(1e-6, f32::max);
    for (i, gradient) in gradient.iter().enumerate() {
        let numeric = ((at(i, 1e-3) - at(i, -1e-3)) / 2e-3) as f32;
        assert!(
            (numeric - gradient).abs() < 0.01 * scale,
            "{i}: {numeric} against {gradient}"
        );
    }
}

#[test]
fn both_losses_have_the_gradient_of_their_formula() {
    let tensor = |n: usize, f: &dyn Fn(usize) -> f32, shape: &[usize]| {
        Tensor::from_vec((0..n).map(f).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
    };
    let wave = |i: usize| (i as f32 * 1.7).sin();
    let target = tensor(32, &|i| (i as f32 * 0.9).cos(), &[1, 2, 4, 4]);
    let union = tensor(16, &|i| f32::from(u8::from(i % 3 == 0)), &[1, 1, 4, 4]);
    let prediction = tensor(32, &wave, &[1, 2, 4, 4]);
    let value = masked_diffusion_loss(&prediction, &target, &union)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    let inside = |i: usize| (i % 16).is_multiple_of(3);
    let by_hand: f32 = (0..32)
        .filter(|&i| inside(i))
        .map(|i| (wave(i) - (i as f32 * 0.9).cos()).powi(2))
        .sum();
    assert!((value - by_hand / 32.0).abs() < 1e-6, "{value}");
    check_gradient(&prediction, &|x| {
        masked_diffusion_loss(x, &target, &union).unwrap()
    });

    // Two samples, nine pixels, two concepts; maps as a softmax leaves them.
    let maps = tensor(36, &|i| 0.2 + 0.1 * wave(i), &[2, 9, 2]);
    let masks = tensor(18, &|i| f32::from(u8::from(i % 4 == 1)), &[9, 2]);
    let value = cross_attention_loss(&maps, &masks)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    let map = |b: usize, p: usize, c: usize| 0.2 + 0.1 * wave(b * 18 + p * 2 + c);
    let mut by_hand = 0.0;
    for (b, c) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let largest = (0..9).map(|p| map(b, p, c)).fold(0.0, f32::max);
        let mask = |p: usize| f32::from(u8::from((p * 2 + c) % 4 == 1));
        by_hand += (0..9)
            .map(|p| (map(b, p, c) / largest - mask(p)).powi(2))
            .sum::<f32>()
            / 9.0
            / 2.0;
    }
    assert!((value - by_hand).abs() < 1e-5, "{value} {by_hand}");
    check_gradient(&maps, &|x| cross_attention_loss(x, &masks).unwrap());
}
