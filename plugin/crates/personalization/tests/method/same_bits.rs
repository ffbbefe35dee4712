//! The same seed gives the same bits, in less memory and after a stop too.

use super::*;

/// All states of a run, each in a file.
struct States {
    folder: tempfile::TempDir,
    n: usize,
}

impl States {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            n: 0,
        }
    }

    fn file(&self, n: usize) -> PathBuf {
        self.folder.path().join(format!("{n}.safetensors"))
    }

    fn save(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        if let Event::Checkpoint(checkpoint) = event {
            checkpoint.save(&self.file(self.n)).unwrap();
            self.n += 1;
        }
        ControlFlow::Continue(())
    }
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
    let mut states = States::new();
    let mut save = |event: &Event<'_>| states.save(event);
    let whole = em(&model, &prepared, EmStart::Fresh, &config, 7, &mut save).unwrap();
    let saved = states.n;
    let (mut inverting, mut looking) = (0, 0);
    for n in 0..saved {
        let state = EmState::load(&states.file(n), &Device::Cpu).unwrap();
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
fn tokens_by_themselves_that_were_stopped_anywhere_go_on_with_the_same_bits() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let outcome = run(&model, &scene, &config);
    let first = first_rows(&model, &prepared, &config.tokens, 7).unwrap();
    // From their start, and from where they stand.
    for (first, inversion_steps) in [(&first, 2), (&outcome.learned, 0)] {
        let plan = TokenPlan {
            first,
            inversion_steps,
            masks: Some(&outcome.masks),
            steps: 3,
        };
        let learn = |resumed, observer: &mut dyn Observer| {
            learn_tokens(&model, &prepared, &plan, &config.m_step, resumed, observer).unwrap()
        };
        let mut states = States::new();
        let whole = learn(None, &mut |event: &Event<'_>| states.save(event));
        assert_eq!(
            (whole.step, states.n),
            (first.step + 3, inversion_steps + 3 + 1)
        );
        for n in 0..states.n {
            let state = EmState::load(&states.file(n), &Device::Cpu).unwrap();
            let mut steps = Vec::new();
            let resumed = learn(Some(state), &mut |event: &Event<'_>| {
                if let Event::Step { step, total, .. } = *event {
                    steps.push((step, total));
                }
                ControlFlow::Continue(())
            });
            assert_eq!(bits(&whole.rows), bits(&resumed.rows), "{n}");
            assert_eq!(
                bits(&whole.optimizer.m[0]),
                bits(&resumed.optimizer.m[0]),
                "{n}"
            );
            assert_eq!(steps.len(), (states.n - 1).saturating_sub(n + 1), "{n}");
            assert!(steps.last().is_none_or(|last| *last == (3, 3)), "{steps:?}");
        }
        let load = || EmState::load(&states.file(states.n - 1), &Device::Cpu).unwrap();
        let changes: [fn(&mut EmState); 7] = [
            |state| {
                state.is_inverting = true;
                // More than any inversion here.
                state.learned.step = state.learned.step.max(3);
            },
            |state| state.learned.seed += 1,
            |state| state.learned.step = usize::MAX,
            |state| state.learned.optimizer.t = usize::MAX,
            |state| state.learned.initial_rows = state.learned.rows.clone(),
            |state| state.round = 1,
            |state| state.energies.push(1.0),
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut state = load();
            change(&mut state);
            let (plan, m_step) = (&plan, &config.m_step);
            let told = learn_tokens(&model, &prepared, plan, m_step, Some(state), &mut Silent);
            assert!(matches!(told, Err(Error::StateOfOtherWork { .. })), "{n}");
        }
    }
}

#[test]
fn an_extraction_by_itself_that_was_stopped_anywhere_goes_on_with_the_same_bits() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let outcome = run(&model, &scene, &config);
    let seen = outcome.observations.iter();
    let earlier: Vec<_> = seen.filter_map(|seen| seen.evidence.clone()).collect();
    let observe =
        |learned: &LearnedConcepts, earlier: &[_], resumed, observer: &mut dyn Observer| {
            let config = &config.extraction;
            // More timesteps than one pass takes.
            observe(
                &model, &prepared, learned, config, 12, earlier, resumed, observer,
            )
        };
    let mut states = States::new();
    let mut save = |event: &Event<'_>| states.save(event);
    let whole = observe(&outcome.learned, &earlier, None, &mut save).unwrap();
    assert_eq!(states.n, 4, "two pictures in two passes each");
    for n in 0..states.n {
        let state = EmState::load(&states.file(n), &Device::Cpu).unwrap();
        assert!(state.is_looking());
        let resumed = observe(&outcome.learned, &earlier, Some(state), &mut Silent);
        assert!(whole == resumed.unwrap(), "{n}");
    }
    let load = || EmState::load(&states.file(1), &Device::Cpu).unwrap();
    let start = first_rows(&model, &prepared, &config.tokens, 7).unwrap();
    let other = observe(&start, &earlier, Some(load()), &mut Silent);
    assert!(matches!(other, Err(Error::StateOfOtherWork { .. })));
    let mut of_one_picture = load();
    of_one_picture.learned.concepts.pop();
    let other = observe(
        &outcome.learned,
        &earlier,
        Some(of_one_picture),
        &mut Silent,
    );
    assert!(matches!(other, Err(Error::StateOfOtherWork { .. })));
    // The pictures are of two sizes.
    let reversed: Vec<_> = earlier.iter().rev().cloned().collect();
    for other in [&reversed[..], &earlier[..1]] {
        let told = observe(&outcome.learned, other, None, &mut Silent);
        assert!(matches!(told, Err(Error::EvidenceDoesNotFit)));
    }
}

#[test]
fn a_state_of_other_work_is_refused() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let mut states = States::new();
    let mut save = |event: &Event<'_>| states.save(event);
    em(&model, &prepared, EmStart::Fresh, &config, 7, &mut save).unwrap();
    let load = || EmState::load(&states.file(states.n - 1), &Device::Cpu).unwrap();
    load().check(&model, &prepared, &config).unwrap();
    let changes: [fn(&mut EmState); 9] = [
        |state| state.learned.base_fingerprint.push('x'),
        |state| state.learned.concepts.reverse(),
        |state| state.learned.vectors[0] = 0,
        |state| state.learned.rows = state.learned.rows.t().unwrap(),
        |state| state.learned.optimizer.m.clear(),
        |state| state.round = usize::MAX,
        |state| state.energies.clear(),
        |state| drop(state.observations[1].maps.maps.pop()),
        |state| drop(state.masks.pop()),
    ];
    for (n, change) in changes.iter().enumerate() {
        let mut state = load();
        change(&mut state);
        let start = EmStart::Resume(Box::new(state));
        let error = em(&model, &prepared, start, &config, 7, &mut Silent).unwrap_err();
        let is_told = matches!(
            error,
            Error::StateOfOtherWork { .. } | Error::MasksDoNotFit { .. }
        );
        assert!(is_told, "{n}: {error}");
    }
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
            said[0].ends_with("; going on from the other one"),
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
    let mut states = States::new();
    let mut save = |event: &Event<'_>| states.save(event);
    let whole = sample(&model, None, &prompts, &config, &mut save).unwrap();
    let saved = states.n;
    assert_eq!(saved, 12);
    let sampled = Sampled::load(&states.file(saved - 1), &Device::Cpu).unwrap();
    let larger = GenerateConfig {
        start: Start::Noise([model.image_size() * 2; 2]),
        ..config
    };
    let resumed = sample_from(&model, None, &prompts, &larger, sampled, &mut Silent);
    assert!(matches!(resumed, Err(Error::StateOfOtherWork { .. })));
    for n in 0..saved {
        let sampled = Sampled::load(&states.file(n), &Device::Cpu).unwrap();
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
    let mut other = JointState::load(&file(0), &Device::Cpu).unwrap();
    other.optimizer.m[0] = other.optimizer.m[0].flatten_all().unwrap();
    let resumed = stage(Some(other), &mut Silent).map(drop);
    assert!(matches!(resumed, Err(Error::StateOfOtherWork { .. })));
    for n in 0..saved {
        let state = JointState::load(&file(n), &Device::Cpu).unwrap();
        assert_eq!(state.step, n + 1);
        let (_, resumed) = stage(Some(state), &mut Silent).unwrap();
        assert_eq!(bits(&whole.rows), bits(&resumed.rows), "{n}");
    }
}
