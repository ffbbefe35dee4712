//! DDIM (Song, Meng, Ermon 2020, "Denoising Diffusion Implicit Models"), eta = 0.
//!
//! ```text
//! z_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) eps        (Eq. 12 with sigma = 0)
//! ```
//!
//! | name | symbol |
//! |---|---|
//! | `sample` | z_t |
//! | returned | z_s, s = t - T / steps |
//! | `Denoised` | x0, eps, both from the U-Net's output |
//! | `final_alpha_cumprod` | abar_s for s < 0 |

use candle_core::Tensor;

use super::{Denoised, LastPoint, Scheduler, SchedulerStep, spaced_timesteps};
use crate::config::{SchedulerConfig, TimestepSpacing};
use crate::error::{Error, Result};
use crate::noise_schedule::NoiseSchedule;

/// See the module.
#[derive(Debug, Clone)]
pub struct Ddim {
    schedule: NoiseSchedule,
    timesteps: Vec<usize>,
    stride: usize,
    final_alpha_cumprod: f64,
    clip_sample: bool,
}

impl Ddim {
    /// The sampler for `steps` steps, with the spacing, offset and end of the checkpoint's file.
    ///
    /// # Errors
    /// [`Error::Argument`] if `steps` is out of range.
    pub fn new(config: &SchedulerConfig, steps: usize) -> Result<Self> {
        let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Leading);
        let timesteps = spaced_timesteps(config, spacing, steps, LastPoint::Visited)?;
        let schedule = NoiseSchedule::new(config);
        let final_alpha_cumprod = if config.set_alpha_to_one {
            1.0
        } else {
            schedule.alphas_cumprod()[0]
        };
        let stride = config.num_train_timesteps / steps;
        Ok(Self {
            schedule,
            timesteps,
            stride,
            final_alpha_cumprod,
            clip_sample: config.clip_sample,
        })
    }
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[usize] {
        &self.timesteps
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
    ) -> Result<SchedulerStep> {
        let n = self.timesteps.len();
        let reason = || Error::argument("step_index", format!("{step_index} is not below {n}"));
        let t = *self.timesteps.get(step_index).ok_or_else(reason)?;
        let abar = self.schedule.alphas_cumprod();
        let abar_t = abar[t];
        // The previous timestep is one stride away even where the spacing is uneven, as in diffusers.
        let abar_s = t
            .checked_sub(self.stride)
            .map_or(self.final_alpha_cumprod, |s| abar[s]);
        let prediction = self.schedule.prediction();
        let Denoised { mut clean, noise } = Denoised::new(
            prediction,
            model_output,
            sample,
            abar_t.sqrt(),
            (1.0 - abar_t).sqrt(),
        )?;
        if self.clip_sample {
            clean = clean.clamp(-1.0, 1.0)?;
        }
        let sample = ((&clean * abar_s.sqrt())? + (noise * (1.0 - abar_s).sqrt())?)?;
        Ok(SchedulerStep { sample, clean })
    }
}
