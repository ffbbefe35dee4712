//! DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
//! Probabilistic Models", Algorithm 2), midpoint, ending at zero noise.
//!
//! ```text
//! D   = x0(s)                                            first step, and last step
//! D   = x0(s) + (h / (2 h')) (x0(s) - x0(s'))            otherwise
//! z_t = (sigma_t / sigma_s) z_s - alpha_t (exp(-h) - 1) D
//! ```
//!
//! | name | symbol |
//! |---|---|
//! | `Level` | alpha, sigma and lambda = ln(alpha / sigma) of one timestep |
//! | s', s, t | previous, current and next timestep |
//! | h, h' | lambda_t - lambda_s, lambda_s - lambda_s' |
//! | `clean` | x0, the U-Net's predicted clean latent |

use candle_core::Tensor;

use super::{Denoised, LastPoint, Scheduler, SchedulerStep, spaced_timesteps};
use crate::config::{Prediction, SchedulerConfig, TimestepSpacing};
use crate::error::{Error, Result};
use crate::noise_schedule::NoiseSchedule;

/// Least abar: with a schedule that ends at pure noise, lambda would be infinite.
const MIN_ALPHA_CUMPROD: f64 = 1.0 / (1 << 24) as f64;

#[derive(Debug, Clone, Copy)]
struct Level {
    alpha: f64,
    sigma: f64,
}

impl Level {
    /// The end of sampling.
    const CLEAN: Self = Self {
        alpha: 1.0,
        sigma: 0.0,
    };

    fn new(alpha_cumprod: f64) -> Self {
        let abar = alpha_cumprod.max(MIN_ALPHA_CUMPROD);
        Self {
            alpha: abar.sqrt(),
            sigma: (1.0 - abar).sqrt(),
        }
    }

    fn lambda(self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct DpmSolverMultistep {
    prediction: Prediction,
    timesteps: Vec<usize>,
    /// One per timestep, then the clean end.
    levels: Vec<Level>,
    /// x0 of the step before.
    previous: Option<Tensor>,
}

impl DpmSolverMultistep {
    /// The sampler for `steps` steps, with the spacing and offset of the checkpoint's file.
    ///
    /// # Errors
    /// [`Error::Argument`] if `steps` is out of range.
    pub fn new(config: &SchedulerConfig, steps: usize) -> Result<Self> {
        let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Linspace);
        let timesteps = spaced_timesteps(config, spacing, steps, LastPoint::LeftOut)?;
        let schedule = NoiseSchedule::new(config);
        let levels = timesteps
            .iter()
            .map(|&t| Level::new(schedule.alphas_cumprod()[t]));
        let levels = levels.chain([Level::CLEAN]).collect();
        Ok(Self {
            prediction: config.prediction,
            timesteps,
            levels,
            previous: None,
        })
    }
}

impl Scheduler for DpmSolverMultistep {
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
        if step_index >= n {
            return Err(Error::argument(
                "step_index",
                format!("{step_index} is not below {n}"),
            ));
        }
        let (s, t) = (self.levels[step_index], self.levels[step_index + 1]);
        let clean = Denoised::new(self.prediction, model_output, sample, s.alpha, s.sigma)?.clean;
        // The last step is of first order: lambda is infinite at its end.
        let direction = match &self.previous {
            Some(previous) if 0 < step_index && step_index + 1 < n => {
                let h = t.lambda() - s.lambda();
                let h_previous = s.lambda() - self.levels[step_index - 1].lambda();
                (&clean + ((&clean - previous)? * (0.5 * h / h_previous))?)?
            }
            _ => clean.clone(),
        };
        self.previous = Some(clean.clone());
        // alpha_t exp(-h) = sigma_t alpha_s / sigma_s, which is 0, not NaN, at the clean end.
        let coefficient = t.alpha - t.sigma * s.alpha / s.sigma;
        let sample = ((sample * (t.sigma / s.sigma))? + (direction * coefficient)?)?;
        Ok(SchedulerStep { sample, clean })
    }
}
