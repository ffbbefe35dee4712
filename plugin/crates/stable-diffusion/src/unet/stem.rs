//! What a pass computes before it looks at a context: the same whatever the context is.

use candle_core::{DType, Tensor};

use super::{
    UNet,
    observation::{Observed, Pass, Watch},
    parts::{Part, Trail, Work, size, walked},
    transformer::Begun,
};
use crate::{Error, Result, ops};

/// Latents and their timesteps on the way through a [`UNet`], up to where it first looks at a context; for
/// [`UNet::forward_from`], any number of times.
#[derive(Debug, Clone)]
pub struct Stem {
    n_samples: usize,
    /// What residual blocks are told.
    time: Tensor,
    /// How many parts are done, and half of the next.
    n_parts: usize,
    begun: Begun,
    /// Planes that wait for the way up.
    waiting: Vec<Tensor>,
}

impl Stem {
    /// As many samples of the one.
    fn for_samples(self, n_samples: usize) -> Result<Self> {
        let repeated = |x: &Tensor| ops::for_samples(x, n_samples);
        Ok(Self {
            n_samples,
            time: repeated(&self.time)?,
            begun: self.begun.for_samples(n_samples)?,
            waiting: self.waiting.iter().map(repeated).collect::<Result<_>>()?,
            ..self
        })
    }
}

/// One for each sample, or of the only one with each context.
pub(super) fn n_predictions(n_samples: usize, context: &Tensor) -> Result<usize> {
    Ok(match n_samples {
        1 => context.dim(0)?,
        n_samples => n_samples,
    })
}

impl UNet {
    /// What passes of these latents share, whatever their contexts are. `watch` is that of all of them, or of the one that
    /// sees most.
    ///
    /// # Shapes
    /// latents `[B, 4, h, w]`; one timestep per sample, in [0, T).
    ///
    /// # Errors
    /// [`Error::Argument`] when the sizes do not fit.
    pub fn stem(&self, latents: &Tensor, timesteps: &[f32], watch: Watch<'_>) -> Result<Stem> {
        let size = self.check_latents(latents, timesteps)?;
        self.foresee_pass(latents.device(), timesteps.len(), size)?;
        self.begin(latents, timesteps, watch)
    }

    /// [`Self::stem`] of latents that were checked.
    pub(super) fn begin(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        watch: Watch<'_>,
    ) -> Result<Stem> {
        let x = latents.to_dtype(self.activations)?;
        self.compute(latents.device(), || {
            let time = self.network.time(&self.config, &x, timesteps)?;
            let mut trail = Trail::new(x);
            for (n_parts, part) in self.network.parts().into_iter().enumerate() {
                // On the way down: none takes what waits.
                match part.work {
                    Work::Blind(work) => trail.x = work.forward(&trail.x, None, &time)?,
                    Work::Looking(work) => {
                        return Ok(Stem {
                            n_samples: timesteps.len(),
                            begun: work.begin(&trail.x, &time, watch)?,
                            time,
                            n_parts,
                            waiting: trail.waiting,
                        });
                    }
                }
                trail = trail.after(&part);
            }
            Err(Error::argument("context", "no layer looks at it"))
        })
    }

    /// The prediction of a [`Stem`] with a context, and the attention to watched positions of the prompt.
    ///
    /// # Shapes
    /// context `[B, N, D]`, or `[1, N, D]` for all samples of the stem; `[M, N, D]` for M predictions of its only one.
    ///
    /// # Errors
    /// As [`Self::forward_observed`], and when the stem did not watch a self-attention that is watched here.
    pub fn forward_from(
        &self,
        stem: &Stem,
        context: &Tensor,
        watch: Watch<'_>,
    ) -> Result<Observed> {
        let n_samples = n_predictions(stem.n_samples, context)?;
        self.check_context(n_samples, context, watch)?;
        if let Some(finest) = stem.waiting.first() {
            self.foresee_pass(context.device(), n_samples, size(finest)?)?;
        }
        self.go_on(stem.clone(), context, watch)
    }

    /// [`Self::forward`] with each of these contexts; what that has in common is computed once.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_each<'c>(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        contexts: impl IntoIterator<Item = &'c Tensor>,
    ) -> Result<Vec<Tensor>> {
        let stem = self.stem(latents, timesteps, Watch::NOTHING)?;
        let one = |context| {
            let observed = self.forward_from(&stem, context, Watch::NOTHING)?;
            Ok(observed.prediction)
        };
        contexts.into_iter().map(one).collect()
    }

    /// [`Self::forward_from`] with a context that was checked.
    pub(super) fn go_on(&self, stem: Stem, context: &Tensor, watch: Watch<'_>) -> Result<Observed> {
        let n_samples = n_predictions(stem.n_samples, context)?;
        let context = context.to_dtype(self.activations)?;
        let mut pass = Pass {
            context: &context,
            watch,
            attention: Vec::new(),
        };
        let prediction = self.compute(context.device(), || {
            let Stem {
                time,
                n_parts,
                begun,
                waiting,
                ..
            } = stem.for_samples(n_samples)?;
            let parts = self.network.parts();
            let others = || Error::argument("stem", "it is another network's");
            let (part, rest) = parts
                .get(n_parts..)
                .and_then(<[Part<'_>]>::split_first)
                .ok_or_else(others)?;
            let Work::Looking(work) = part.work else {
                return Err(others());
            };
            let x = work.finish(begun, &time, &mut pass)?;
            let trail = Trail { x, waiting }.after(part);
            Ok(walked(rest, trail, &time, &mut pass)?.x)
        })?;
        Ok(Observed {
            prediction: prediction.to_dtype(DType::F32)?,
            attention: pass.attention,
        })
    }
}
