//! The alternation: stages 1 and 2 of the method.
//!
//! ```text
//! v ← start;  M ← E-step(v, 50 timesteps)                          round 0
//! repeat:  v ← K × M-step(v, M);  M ← E-step(v, n timesteps)       rounds 1, 2, …
//! ```
//!
//! Built of the very functions that the single-step nodes call, so a hand-wired round gives the same bits.

use stable_diffusion::DiffusionModel;

use crate::binarize::gives_whole_parts;
use crate::config::{EmConfig, ExtractionConfig, MaskMode};
use crate::e_step::e_step;
use crate::error::{Error, Result};
use crate::learned::LearnedConcepts;
use crate::m_step::{check_masks, m_step};
use crate::maps::AttentionMaps;
use crate::mask::SceneMasks;
use crate::observer::{Event, Observer, tell};
use crate::prepared::PreparedScene;
use crate::scene::Role;
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
            re_estimate(model, scene, &mut state, config, observer)?;
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

/// The E-step of a later round. Where masks were whole parts, only whole parts replace them: once words are told
/// apart, a round in which their maps run together must not undo it.
fn re_estimate(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    state: &mut EmState,
    config: &EmConfig,
    observer: &mut dyn Observer,
) -> Result<()> {
    let extraction = &config.extraction;
    let (masks, maps) = e_step(
        model,
        scene,
        &state.learned,
        extraction,
        &config.crf,
        extraction.n_timesteps,
        Some(&state.masks),
        observer,
    )?;
    if state.maps.is_empty() {
        (state.masks, state.maps) = (masks, maps);
        return Ok(());
    }
    for (picture, (masks, maps)) in masks.into_iter().zip(maps).enumerate() {
        let roles = scene.scene.roles(picture);
        if !runs_together(&state.maps[picture], &maps, &roles, extraction) {
            (state.masks[picture], state.maps[picture]) = (masks, maps);
        }
    }
    Ok(())
}

/// Whether objects that had connected parts of their own no longer have them.
fn runs_together(
    old: &AttentionMaps,
    new: &AttentionMaps,
    roles: &[Role],
    extraction: &ExtractionConfig,
) -> bool {
    gives_whole_parts(old, roles, extraction) && !gives_whole_parts(new, roles, extraction)
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
            return Err(Error::MasksMissing);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_parts_replace_whole_parts() {
        let maps = |planes: [[f32; 4]; 3]| AttentionMaps {
            size: 2,
            maps: planes.iter().map(|plane| plane.to_vec()).collect(),
        };
        let rest = [0.1; 4];
        let apart = maps([[1.0, 0.0, 0.0, 0.2], [0.2, 0.0, 0.0, 1.0], rest]);
        let moved = maps([[0.0, 0.9, 0.0, 0.0], [0.0, 0.3, 0.8, 0.0], rest]);
        let touching = maps([[1.0, 0.0, 0.8, 0.2], [0.2, 0.0, 0.0, 1.0], rest]);
        let roles = [Role::Object, Role::Object, Role::Background];
        let recommended = EmConfig::recommended().extraction;
        let is_kept = |old, new| runs_together(old, new, &roles, &recommended);
        assert!(is_kept(&apart, &touching));
        assert!(!is_kept(&apart, &moved));
        assert!(!is_kept(&touching, &touching));
        assert!(!is_kept(&touching, &apart));
        assert!(!runs_together(
            &apart,
            &touching,
            &roles,
            &EmConfig::paper().extraction
        ));
    }
}
