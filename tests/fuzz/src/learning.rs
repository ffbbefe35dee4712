//! What the method reads beside weights: prompts, and the states that interrupted work left.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::Device;
use personalization::{
    Concept, EmConfig, EmStart, EmState, Event, ImageMasks, JointConfig, JointScope, JointState,
    LearnedConcepts, MStepConfig, Observer, Picture, PreparedScene, Role, SamplePrompts, Sampled,
    Scene, ScenePicture, Silent, Size, TokenConfig, TokenInit, TokenPlan, em, first_rows,
    joint_stage, learn_tokens, observe, sample, sample_from,
};
use stable_diffusion::{DiffusionModel, GenerateConfig, Sampler, Schedule, Start};

use crate::files::in_file;

/// Of a picture, in pixels.
const SIDE: usize = 8;
/// What work says before it is stopped: what a state holds was taken up by then.
const N_EVENTS: usize = 6;

/// A model, a scene and tokens on which everything is quick.
#[derive(Debug)]
pub(crate) struct SmallWork {
    pub(crate) model: DiffusionModel,
    scene: Scene,
    learned: LearnedConcepts,
}

/// Steps that are enough to use everything.
fn config() -> EmConfig {
    let mut config = EmConfig::likelihood();
    config.extraction.n_timesteps_initial = 2;
    config.extraction.n_timesteps = 2;
    (config.steps, config.e_step_every) = (4, 2);
    config
}

impl SmallWork {
    pub(crate) fn new(model: DiffusionModel) -> Result<Self, String> {
        let concept = |token: &str, word: &str, role| Concept {
            token: token.to_owned(),
            class_word: word.to_owned(),
            role,
        };
        let concepts = vec![
            concept("<x>", "a", Role::Object),
            concept("<y>", "b", Role::Background),
        ];
        let size = Size::square(SIDE);
        let pixels: Vec<u8> = (0..size.area() * 3).map(|i| (i % 251) as u8).collect();
        let picture = Picture::from_rgb8(size, &pixels, size).map_err(said)?;
        let pictures = vec![ScenePicture {
            picture,
            concepts: vec![0, 1],
        }];
        let scene = Scene::new(concepts, pictures).map_err(said)?;
        let prepared = PreparedScene::new(&model, &scene).map_err(said)?;
        let tokens = TokenConfig {
            init: TokenInit::Class,
            vectors_per_concept: 2,
        };
        let learned = first_rows(&model, &prepared, &tokens, 5).map_err(said)?;
        drop(prepared);
        Ok(Self {
            model,
            scene,
            learned,
        })
    }
}

fn said(error: personalization::Error) -> String {
    error.to_string()
}

/// Stops after some events.
struct Impatient(usize);

impl Observer for Impatient {
    fn on_event(&mut self, _: &Event<'_>) -> ControlFlow<()> {
        match self.0.checked_sub(1) {
            Some(left) => {
                self.0 = left;
                ControlFlow::Continue(())
            }
            None => ControlFlow::Break(()),
        }
    }
}

fn generation() -> GenerateConfig {
    GenerateConfig {
        steps: 2,
        guidance: 7.5,
        sampler: Sampler::Euler,
        schedule: Schedule::Normal,
        seed: 1,
        n_pictures: 1,
        start: Start::Noise([SIDE, SIDE]),
    }
}

fn joint() -> JointConfig {
    JointConfig {
        steps: 2,
        scope: JointScope::KeyValue,
        ..JointConfig::lora()
    }
}

/// The object at the left, the background at the right.
fn halves() -> personalization::Result<ImageMasks> {
    let plane = |is_left: bool| {
        let pixels = (0..SIDE * SIDE).map(|i| u8::from((i % SIDE < SIDE / 2) == is_left));
        pixels.collect::<Vec<u8>>()
    };
    ImageMasks::new(Size::square(SIDE), vec![plane(true), plane(false)])
}

/// A prompt, and behind a line `---` what it is steered away from: a picture of numbers comes of it, or a sentence.
pub(crate) fn prompt(work: &SmallWork, bytes: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(bytes);
    let (prompt, negative) = text.split_once("\n---\n").unwrap_or((&text, ""));
    let prompts = SamplePrompts {
        prompts: &[prompt],
        negative,
        latents: None,
    };
    let learned = Some(&work.learned);
    let painted = sample(&work.model, learned, &prompts, &generation(), &mut Silent);
    let Ok(painted) = painted else {
        return Ok(());
    };
    let values = painted.flatten_all().and_then(|all| all.to_vec1::<f32>());
    let values = values.map_err(|error| error.to_string())?;
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err("the picture holds values that are no numbers".to_owned()),
    }
}

/// What interrupted work left, of any kind: work goes on from it for a moment.
pub(crate) fn state(folder: &Path, work: &SmallWork, bytes: &[u8]) -> Result<(), String> {
    let SmallWork {
        model,
        scene,
        learned,
    } = work;
    in_file(folder, bytes, |path| {
        let scene = PreparedScene::new(model, scene).map_err(said)?;
        let mut impatient = Impatient(N_EVENTS);
        if let Ok(state) = EmState::load(path, &Device::Cpu) {
            let halves = [halves().map_err(said)?];
            let m_step = MStepConfig::break_a_scene();
            for (inversion_steps, masks) in
                [(4, None), (4, Some(&halves[..])), (0, Some(&halves[..]))]
            {
                let plan = TokenPlan {
                    first: learned,
                    inversion_steps,
                    masks,
                    steps: 2,
                };
                let state = Some(state.clone());
                let _ = learn_tokens(
                    model,
                    &scene,
                    &plan,
                    &m_step,
                    state,
                    &mut Impatient(N_EVENTS),
                );
            }
            let extraction = config().extraction;
            let looking = Some(state.clone());
            let mut stop = Impatient(N_EVENTS);
            let _ = observe(
                model,
                &scene,
                learned,
                &extraction,
                2,
                &[],
                looking,
                &mut stop,
            );
            let start = EmStart::Resume(Box::new(state));
            let _ = em(model, &scene, start, &config(), 5, &mut impatient);
        }
        if let Ok(state) = JointState::load(path, &Device::Cpu) {
            let masks = halves().map_err(said)?;
            let joint = joint();
            let m_step = MStepConfig::break_a_scene();
            let resume = Some(state);
            let _ = joint_stage(
                model,
                &scene,
                &[masks],
                learned,
                &joint,
                &m_step,
                resume,
                &mut impatient,
            );
        }
        if let Ok(sampled) = Sampled::load(path, &Device::Cpu) {
            let prompts = SamplePrompts {
                prompts: &["a <x>", "b"],
                negative: "",
                latents: None,
            };
            let (learned, config) = (Some(learned), generation());
            let _ = sample_from(model, learned, &prompts, &config, sampled, &mut impatient);
        }
        Ok(())
    })
}
