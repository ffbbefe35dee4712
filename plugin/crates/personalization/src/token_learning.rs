//! Tokens by themselves, without the alternation: from their start or from where they stand, under masks that somebody has.

use stable_diffusion::DiffusionModel;

use crate::checkpoint::Checkpoint;
use crate::config::MStepConfig;
use crate::error::Result;
use crate::learned::LearnedConcepts;
use crate::m_step::{check_masks, inversion, m_step};
use crate::mask::ImageMasks;
use crate::observer::{Observer, offer};
use crate::prepared::PreparedScene;
use crate::state::{EmMoment, EmState};
use crate::within::Within;

/// What [`learn_tokens`] does.
#[derive(Debug, Clone, Copy)]
pub struct TokenPlan<'a> {
    /// Where the tokens are: [`first_rows`](crate::first_rows), or what was learned before.
    pub first: &'a LearnedConcepts,
    /// Steps of textual inversion; 0 for tokens that have learned.
    pub inversion_steps: usize,
    /// The masks under which they then learn, if they do.
    pub masks: Option<&'a [ImageMasks]>,
    /// Optimizer steps under the masks.
    pub steps: usize,
}

impl TokenPlan<'_> {
    /// Whether a call with these arguments can go on from a state.
    ///
    /// # Errors
    /// [`Error::StateOfOtherWork`](crate::Error::StateOfOtherWork).
    pub fn check(
        &self,
        state: &EmState,
        model: &DiffusionModel,
        scene: &PreparedScene<'_>,
    ) -> Result<()> {
        let steps = (self.inversion_steps, self.steps);
        state.check_learning(model, scene, self.first, steps)
    }
}

/// Textual inversion, and stage 2 under masks that stay. The observer gets an [`Event::Checkpoint`](crate::Event::Checkpoint)
/// after every step; a call with the same arguments that is `resumed` from it gives the same bits.
///
/// # Errors
/// Tokens of another width, masks that do not fit the scene, a state of other work, a loss that is no longer finite, or a stop.
pub fn learn_tokens(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    plan: &TokenPlan<'_>,
    config: &MStepConfig,
    resumed: Option<EmState>,
    observer: &mut dyn Observer,
) -> Result<LearnedConcepts> {
    plan.first.check_width(model)?;
    if let Some(masks) = plan.masks {
        check_masks(scene, masks)?;
    }
    let mut state = match resumed {
        Some(state) => {
            plan.check(&state, model, scene)?;
            state
        }
        None => EmState::beginning(plan.first.clone(), plan.inversion_steps > 0),
    };
    if state.is_inverting {
        let mut within = Within {
            inner: observer,
            moment: state.moment(),
            steps: None,
        };
        let n_steps = plan.inversion_steps;
        state.learned = inversion(model, scene, &state.learned, config, n_steps, &mut within)?;
        state.is_inverting = false;
    }
    if let Some(masks) = plan.masks {
        // Textual inversion counts its own steps.
        let before = if plan.inversion_steps > 0 {
            0
        } else {
            plan.first.step
        };
        let n_done = state.learned.step - before;
        let mut within = Within {
            inner: observer,
            moment: state.moment(),
            steps: Some((n_done, plan.steps)),
        };
        let n_left = plan.steps - n_done;
        let learned = &state.learned;
        state.learned = m_step(model, scene, masks, learned, config, n_left, &mut within)?;
    }
    let last = EmMoment {
        is_last: true,
        ..state.moment()
    };
    offer(observer, Checkpoint::Alternation(last));
    Ok(state.learned)
}
