//! The alternation: stages 1 and 2 of the method.
//!
//! ```text
//! v ← start;  M ← E-step(v, 50 timesteps)                          round 0
//! repeat:  v ← K × M-step(v, M);  M ← E-step(v, n timesteps)       rounds 1, 2, …
//! ```
//!
//! Built of the very functions that the single-step nodes call, so a hand-wired round gives the same bits.

use stable_diffusion::DiffusionModel;

use crate::config::{EmConfig, Labeling, MaskMode};
use crate::e_step::{Earlier, Estimate, by_attention_alone, e_step};
use crate::error::{Error, Result};
use crate::evidence::Observation;
use crate::learned::LearnedConcepts;
use crate::m_step::{check_masks, m_step};
use crate::mask::SceneMasks;
use crate::observer::{Event, Observer, tell};
use crate::prepared::PreparedScene;
use crate::state::EmState;
use crate::token::init_tokens;

/// Where the alternation begins.
#[derive(Debug, Clone)]
pub enum EmStart {
    /// With new tokens, and masks from their attention.
    Fresh,
    /// With new tokens and masks that the user brought; mode `Given` keeps them.
    Masks(SceneMasks),
    /// Where an earlier run stopped.
    Resume(Box<EmState>),
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
    /// Free energy of each picture's CRF, in nats per pixel; empty if the masks were given.
    pub energies: Vec<f64>,
}

/// The result of [`em`].
#[derive(Debug, Clone)]
pub struct EmOutcome {
    /// The tokens.
    pub learned: LearnedConcepts,
    /// The last masks.
    pub masks: SceneMasks,
    /// What they were concluded from, one per picture; empty if the masks were given.
    pub observations: Vec<Observation>,
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
            re_estimate(model, scene, &mut state, config, observer)?;
            record(&state, &mut rounds, observer)?;
        }
        tell(observer, &Event::Checkpoint(&state))?;
    }
    Ok(EmOutcome {
        learned: state.learned,
        masks: state.masks,
        observations: state.observations,
        rounds,
    })
}

/// The E-step of a later round, from what the rounds before left.
fn re_estimate(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    state: &mut EmState,
    config: &EmConfig,
    observer: &mut dyn Observer,
) -> Result<()> {
    let evidence = state.take_evidence();
    let earlier = Earlier {
        masks: Some(&state.masks),
        evidence: &evidence,
    };
    let estimates = e_step(
        model,
        scene,
        &state.learned,
        &config.extraction,
        &config.crf,
        config.extraction.n_timesteps,
        earlier,
        observer,
    )?;
    take_over(state, estimates);
    Ok(())
}

/// What an E-step found takes the place of what was known.
fn take_over(state: &mut EmState, estimates: Vec<Estimate>) {
    state.masks.clear();
    state.observations.clear();
    state.energies.clear();
    for estimate in estimates {
        state.masks.push(estimate.masks);
        state.observations.push(estimate.observation);
        state.energies.push(estimate.energy);
    }
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
            return Ok(*state);
        }
        EmStart::Masks(masks) => Some(masks),
        EmStart::Fresh if config.masks == MaskMode::Given => {
            return Err(Error::MasksMissing);
        }
        EmStart::Fresh => None,
    };
    let learned = init_tokens(model, scene, &config.tokens, &config.m_step, seed, observer)?;
    let mut state = EmState {
        learned,
        masks: Vec::new(),
        observations: Vec::new(),
        energies: Vec::new(),
        round: 0,
    };
    match masks {
        Some(masks) => state.masks = masks,
        None => {
            let estimates = e_step(
                model,
                scene,
                &state.learned,
                &config.extraction,
                &config.crf,
                config.extraction.n_timesteps_initial,
                Earlier::default(),
                observer,
            )?;
            take_over(&mut state, estimates);
            compare(scene, &state, config, observer)?;
        }
    }
    check_masks(scene, &state.masks)?;
    record(&state, rounds, observer)?;
    Ok(state)
}

/// Tells what attention alone would have made of the first masks, where the noise had its say.
fn compare(
    scene: &PreparedScene<'_>,
    state: &EmState,
    config: &EmConfig,
    observer: &mut dyn Observer,
) -> Result<()> {
    let has_noise = matches!(config.extraction.labeling, Labeling::Posterior(_));
    if !has_noise || state.learned.is_blank() {
        return Ok(());
    }
    let masks = by_attention_alone(scene, &state.learned, &state.observations, &config.crf)?;
    for (picture, masks) in masks.iter().enumerate() {
        tell(observer, &Event::AttentionAlone { picture, masks })?;
    }
    Ok(())
}

fn record(
    state: &EmState,
    rounds: &mut Vec<RoundRecord>,
    observer: &mut dyn Observer,
) -> Result<()> {
    for (picture, masks) in state.masks.iter().enumerate() {
        tell(
            observer,
            &Event::Masks {
                round: state.round,
                picture,
                masks,
                observation: state.observations.get(picture),
                energy: state.energies.get(picture).copied(),
            },
        )?;
    }
    rounds.push(RoundRecord {
        round: state.round,
        step: state.learned.step,
        masks: state.masks.clone(),
        energies: state.energies.clone(),
    });
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
