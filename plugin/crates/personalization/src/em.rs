//! The alternation: stages 1 and 2 of the method.
//!
//! ```text
//! v ← start;  M ← E-step(v, 50 timesteps)                          round 0
//! repeat:  v ← K × M-step(v, M);  M ← E-step(v, n timesteps)       rounds 1, 2, …
//! ```
//!
//! Built of the very functions that the single-step nodes call, so a hand-wired round gives the same bits.

use stable_diffusion::DiffusionModel;

use crate::checkpoint::Checkpoint;
use crate::config::{EmConfig, Labeling, MaskMode, TokenInit};
use crate::e_step::{Earlier, Estimate, by_attention_alone, e_step_from};
use crate::error::{Error, Result};
use crate::evidence::{Evidence, Observation};
use crate::learned::LearnedConcepts;
use crate::m_step::{check_masks, inversion, m_step};
use crate::mask::SceneMasks;
use crate::observer::{Event, Observer, offer, tell};
use crate::prepared::PreparedScene;
use crate::state::{EmMoment, EmState};
use crate::token::first_rows;
use crate::within::Within;

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

/// Runs the alternation. The observer gets an [`Event::Checkpoint`] after every step; a run that starts from it gives the same
/// bits as one that was never stopped.
///
/// # Errors
/// A configuration out of range, mode `Given` without masks, a state of other work, those of the steps, or a stop.
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
    let mut state = begin(model, scene, start, config, seed)?;
    first_masks(model, scene, &mut state, config, &mut rounds, observer)?;
    offer(observer, Checkpoint::Alternation(state.moment()));
    loop {
        let begun = state.round * config.e_step_every;
        if begun >= config.steps {
            break;
        }
        let end = (begun + config.e_step_every).min(config.steps);
        if state.learned.step < end {
            let n_steps = end - state.learned.step;
            let mut within = Within {
                inner: observer,
                moment: state.moment(),
                steps: Some((state.learned.step, config.steps)),
            };
            state.learned = m_step(
                model,
                scene,
                &state.masks,
                &state.learned,
                &config.m_step,
                n_steps,
                &mut within,
            )?;
        }
        let is_estimated = config.masks == MaskMode::Em && end - begun == config.e_step_every;
        if is_estimated {
            let n_timesteps = config.extraction.n_timesteps;
            estimate(model, scene, &mut state, config, n_timesteps, observer)?;
        }
        state.round += 1;
        if is_estimated {
            record(&state, &mut rounds, observer)?;
        }
        offer(observer, Checkpoint::Alternation(state.moment()));
    }
    let last = EmMoment {
        is_last: true,
        ..state.moment()
    };
    offer(observer, Checkpoint::Alternation(last));
    Ok(EmOutcome {
        learned: state.learned,
        masks: state.masks,
        observations: state.observations,
        rounds,
    })
}

/// An E-step, from what the rounds before left.
fn estimate(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    state: &mut EmState,
    config: &EmConfig,
    n_timesteps: usize,
    observer: &mut dyn Observer,
) -> Result<()> {
    let looked = std::mem::take(&mut state.looked);
    // The state stays whole: it is offered on the way.
    let seen = state.observations.iter();
    let evidence: Vec<Evidence> = seen.filter_map(|seen| seen.evidence.clone()).collect();
    let masks = (!state.masks.is_empty()).then_some(&*state.masks);
    let earlier = Earlier {
        masks,
        evidence: &evidence,
    };
    let mut within = Within {
        inner: observer,
        moment: state.moment(),
        steps: None,
    };
    let estimates = e_step_from(
        model,
        scene,
        &state.learned,
        &config.extraction,
        &config.crf,
        n_timesteps,
        earlier,
        looked,
        &mut within,
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

/// Where the alternation begins.
fn begin(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    start: EmStart,
    config: &EmConfig,
    seed: u64,
) -> Result<EmState> {
    let masks = match start {
        EmStart::Resume(state) => {
            state.check(model, scene, config)?;
            return Ok(*state);
        }
        EmStart::Masks(masks) => masks,
        EmStart::Fresh if config.masks == MaskMode::Given => {
            return Err(Error::MasksMissing);
        }
        EmStart::Fresh => Vec::new(),
    };
    let learned = first_rows(model, scene, &config.tokens, seed)?;
    Ok(EmState {
        masks,
        ..EmState::beginning(learned, true)
    })
}

/// Textual inversion and the first masks, as far as they are not there.
fn first_masks(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    state: &mut EmState,
    config: &EmConfig,
    rounds: &mut Vec<RoundRecord>,
    observer: &mut dyn Observer,
) -> Result<()> {
    if !state.is_inverting && !state.masks.is_empty() {
        return Ok(());
    }
    if let TokenInit::Inversion { steps } = config.tokens.init
        && state.is_inverting
    {
        let mut within = Within {
            inner: observer,
            moment: state.moment(),
            steps: None,
        };
        state.learned = inversion(
            model,
            scene,
            &state.learned,
            &config.m_step,
            steps,
            &mut within,
        )?;
    }
    state.is_inverting = false;
    if state.masks.is_empty() {
        let n_timesteps = config.extraction.n_timesteps_initial;
        estimate(model, scene, state, config, n_timesteps, observer)?;
        compare(scene, state, config, observer)?;
    }
    check_masks(scene, &state.masks)?;
    record(state, rounds, observer)
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
