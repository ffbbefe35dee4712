//! The alternation: stages 1 and 2 of the method.
//!
//! ```text
//! v ← start;  M ← E-step(v, 50 timesteps)                          round 0
//! repeat:  v ← K × M-step(v, M);  M ← E-step(v, n timesteps)       rounds 1, 2, …
//! ```
//!
//! Built of the very functions that the single-step nodes call, so a hand-wired round gives the same bits.

use stable_diffusion::DiffusionModel;

use crate::m_step::check_masks;
use crate::observer::tell;
use crate::{
    AttentionMaps, EmConfig, EmState, Error, Event, LearnedConcepts, MaskMode, Observer,
    PreparedScene, Result, SceneMasks, e_step, init_tokens, m_step,
};

/// Where the alternation begins.
#[derive(Debug, Clone)]
pub enum EmStart {
    /// With new tokens, and masks from their attention.
    Fresh,
    /// With new tokens and masks that the user brought; mode `Given` keeps them.
    Masks(SceneMasks),
    /// Where an earlier run stopped.
    Resume(EmState),
}

/// Masks at the end of one round.
#[derive(Debug, Clone)]
pub struct RoundRecord {
    /// 0 for the initial masks.
    pub round: usize,
    /// Optimizer steps before them.
    pub step: usize,
    /// The masks.
    pub masks: SceneMasks,
}

/// The result of [`em`].
#[derive(Debug, Clone)]
pub struct EmOutcome {
    /// The tokens.
    pub learned: LearnedConcepts,
    /// The last masks.
    pub masks: SceneMasks,
    /// The maps that they came from, one per picture; empty if the masks were given.
    pub maps: Vec<AttentionMaps>,
    /// All rounds of this call, the first one included.
    pub rounds: Vec<RoundRecord>,
}

/// Runs the alternation. The observer gets an [`Event::Checkpoint`] after every round; a run that starts from it gives
/// the same bits as one that was never stopped.
///
/// # Errors
/// A configuration out of range, mode `Given` without masks, those of the steps, or a stop.
pub fn em(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    start: EmStart,
    config: &EmConfig,
    seed: u64,
    observer: &mut dyn Observer,
) -> Result<EmOutcome> {
    config.validate()?;
    let mut rounds = Vec::new();
    let mut state = first_state(model, scene, start, config, seed, &mut rounds, observer)?;
    tell(observer, &Event::Checkpoint(&state))?;
    while state.learned.step < config.steps {
        let n_steps = config.e_step_every.min(config.steps - state.learned.step);
        let mut offset = StepOffset {
            inner: observer,
            done: state.learned.step,
            total: config.steps,
        };
        state.learned = m_step(
            model,
            scene,
            &state.masks,
            &state.learned,
            &config.m_step,
            n_steps,
            &mut offset,
        )?;
        state.round += 1;
        if config.masks == MaskMode::Em && n_steps == config.e_step_every {
            let n = config.extraction.n_timesteps;
            let previous = Some(state.masks.as_slice());
            let (masks, maps) = e_step(
                model,
                scene,
                &state.learned,
                &config.extraction,
                &config.crf,
                n,
                previous,
                observer,
            )?;
            (state.masks, state.maps) = (masks, maps);
            record(&state, &mut rounds, observer)?;
        }
        tell(observer, &Event::Checkpoint(&state))?;
    }
    Ok(EmOutcome {
        learned: state.learned,
        masks: state.masks,
        maps: state.maps,
        rounds,
    })
}

fn first_state(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    start: EmStart,
    config: &EmConfig,
    seed: u64,
    rounds: &mut Vec<RoundRecord>,
    observer: &mut dyn Observer,
) -> Result<EmState> {
    let masks = match start {
        EmStart::Resume(state) => {
            check_masks(scene, &state.masks)?;
            return Ok(state);
        }
        EmStart::Masks(masks) => Some(masks),
        EmStart::Fresh if config.masks == MaskMode::Given => {
            return Err(Error::scene(
                "the mode `given` needs masks; link them, or choose another mode",
            ));
        }
        EmStart::Fresh => None,
    };
    let learned = init_tokens(model, scene, &config.tokens, &config.m_step, seed, observer)?;
    let (masks, maps) = match masks {
        Some(masks) => (masks, Vec::new()),
        None => {
            let n = config.extraction.n_timesteps_initial;
            e_step(
                model,
                scene,
                &learned,
                &config.extraction,
                &config.crf,
                n,
                None,
                observer,
            )?
        }
    };
    check_masks(scene, &masks)?;
    let state = EmState {
        learned,
        masks,
        maps,
        round: 0,
    };
    record(&state, rounds, observer)?;
    Ok(state)
}

fn record(
    state: &EmState,
    rounds: &mut Vec<RoundRecord>,
    observer: &mut dyn Observer,
) -> Result<()> {
    for (picture, masks) in state.masks.iter().enumerate() {
        let maps = state.maps.get(picture);
        tell(
            observer,
            &Event::Masks {
                round: state.round,
                picture,
                masks,
                maps,
            },
        )?;
    }
    let (round, step, masks) = (state.round, state.learned.step, state.masks.clone());
    rounds.push(RoundRecord { round, step, masks });
    Ok(())
}

/// Counts the steps of a round as steps of the whole stage.
struct StepOffset<'a> {
    inner: &'a mut dyn Observer,
    done: usize,
    total: usize,
}

impl Observer for StepOffset<'_> {
    fn on_event(&mut self, event: &Event<'_>) -> std::ops::ControlFlow<()> {
        match *event {
            Event::Step {
                stage,
                step,
                masked_diffusion,
                cross_attention,
                ..
            } => {
                let (step, total) = (step + self.done, self.total);
                self.inner.on_event(&Event::Step {
                    stage,
                    step,
                    total,
                    masked_diffusion,
                    cross_attention,
                })
            }
            _ => self.inner.on_event(event),
        }
    }
}
