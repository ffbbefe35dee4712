//! What long work tells, and how it is stopped.

use std::ops::ControlFlow;
use std::sync::Arc;

use candle_core::Tensor;
use stable_diffusion::UNet;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::evidence::Observation;
use crate::learned::LearnedConcepts;
use crate::mask::ImageMasks;

/// Something happened.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// `done` of `total` units of a stage that has no losses: an E-step, sampling, evaluation.
    Progress {
        /// Name of the stage.
        stage: &'static str,
        /// Units done.
        done: usize,
        /// Units in all.
        total: usize,
    },
    /// One optimizer step.
    Step {
        /// Name of the stage: `inversion`, `tokens` or `joint`.
        stage: &'static str,
        /// Steps done in this stage.
        step: usize,
        /// Steps of this stage.
        total: usize,
        /// L_mask.
        masked_diffusion: f32,
        /// L_attn, before λ.
        cross_attention: f32,
    },
    /// What is learned so far, after a step of `tokens` or `joint`.
    Learned {
        /// Optimizer steps so far, of all rounds of `tokens` or of `joint`.
        step: usize,
        /// The tokens.
        learned: &'a LearnedConcepts,
        /// The U-Net that they are learned with.
        unet: &'a Arc<UNet>,
    },
    /// New masks of one picture.
    Masks {
        /// 0 for the initial masks.
        round: usize,
        /// Index of the picture.
        picture: usize,
        /// The masks.
        masks: &'a ImageMasks,
        /// What they were concluded from, if they were not given.
        observation: Option<&'a Observation>,
        /// Free energy of the picture's CRF, in nats per pixel.
        energy: Option<f64>,
    },
    /// What the first masks would be without the noise: the paper's baseline, to compare them with.
    AttentionAlone {
        /// Index of the picture.
        picture: usize,
        /// The masks.
        masks: &'a ImageMasks,
    },
    /// A picture on its way.
    Denoised {
        /// Steps done over all pictures.
        step: usize,
        /// Steps in all.
        total: usize,
        /// The clean latent as it is predicted now, `[1, 4, h, w]`, scaled; see
        /// [`stable_diffusion::generate::preview`].
        clean: &'a Tensor,
    },
    /// From where the work can go on, after every step; the answer to it does not count.
    Checkpoint(Checkpoint<'a>),
}

/// Listens, and stops the work by returning `Break`: within one optimizer step or one pass through the U-Net.
pub trait Observer {
    /// Called for every event, and at least once per step.
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()>;
}

/// Listens to nothing.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Observer for Silent {
    fn on_event(&mut self, _event: &Event<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl<F: FnMut(&Event<'_>) -> ControlFlow<()>> Observer for F {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        self(event)
    }
}

/// Offers a state. Whether to stop is asked with other events: who stops keeps this one.
pub(crate) fn offer(observer: &mut dyn Observer, checkpoint: Checkpoint<'_>) {
    let _ = observer.on_event(&Event::Checkpoint(checkpoint));
}

/// Tells, and turns a request to stop into an error.
pub(crate) fn tell(observer: &mut dyn Observer, event: &Event<'_>) -> Result<()> {
    if observer.on_event(event).is_break() {
        Err(Error::Canceled)
    } else {
        Ok(())
    }
}
