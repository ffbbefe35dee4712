//! Samplers: from pure noise to a latent in a few dozen steps. One file per paper.
//!
//! | name | file | order |
//! |---|---|---|
//! | [`Ddim`] | `ddim.rs`, Song et al. 2020 | 1 |
//! | [`DpmSolverMultistep`] | `dpm_solver.rs`, Lu et al. 2022 | 2 |

mod ddim;
mod dpm_solver;

use candle_core::Tensor;

pub use ddim::Ddim;
pub use dpm_solver::DpmSolverMultistep;

use crate::config::{Prediction, SchedulerConfig, TimestepSpacing};
use crate::error::{Error, Result};

/// A sampler in use. It is made for one latent and thrown away after the last step.
pub trait Scheduler {
    /// The training timesteps to visit, falling; step i evaluates the U-Net at `timesteps()[i]`.
    fn timesteps(&self) -> &[usize];

    /// One step towards the picture.
    ///
    /// * `model_output`: the U-Net's (guided) prediction for `sample`, [B, 4, h, w]
    /// * `step_index`: 0 for the first step, then one more each time
    /// * `sample`: the latent of this timestep, [B, 4, h, w]
    ///
    /// # Errors
    /// [`Error::Argument`] if `step_index` is out of range.
    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
    ) -> Result<SchedulerStep>;
}

/// What a step gives.
#[derive(Debug, Clone)]
pub struct SchedulerStep {
    /// The latent of the next, less noisy timestep, [B, 4, h, w].
    pub sample: Tensor,
    /// x0, the clean latent that this timestep's prediction amounts to, [B, 4, h, w].
    pub clean: Tensor,
}

/// The samplers by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulerKind {
    /// DDIM with eta = 0.
    Ddim,
    /// DPM-Solver++(2M), midpoint.
    DpmSolverPlusPlus2M,
}

impl SchedulerKind {
    /// A sampler of this kind for `steps` steps.
    ///
    /// # Errors
    /// [`Error::Argument`] if `steps` is 0 or more than the checkpoint's timesteps allow.
    pub fn build(
        self,
        config: &SchedulerConfig,
        steps: usize,
    ) -> Result<Box<dyn Scheduler + Send>> {
        Ok(match self {
            Self::Ddim => Box::new(Ddim::new(config, steps)?),
            Self::DpmSolverPlusPlus2M => Box::new(DpmSolverMultistep::new(config, steps)?),
        })
    }
}

/// Where a sampler's evenly spaced timesteps end: DDIM's n steps visit n points, the last being
/// the least noisy; DPM-Solver's visit n of n + 1 points and leave out the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LastPoint {
    Visited,
    LeftOut,
}

/// Falling timesteps (Lin et al. 2024, Table 2), rounded as diffusers rounds: half to even.
fn spaced_timesteps(
    config: &SchedulerConfig,
    spacing: TimestepSpacing,
    steps: usize,
    last_point: LastPoint,
) -> Result<Vec<usize>> {
    let n = config.num_train_timesteps;
    if steps == 0 || steps > n {
        return Err(Error::argument(
            "steps",
            format!("{steps} is not in 1..={n}"),
        ));
    }
    let points = steps + usize::from(last_point == LastPoint::LeftOut);
    let skipped = points - steps;
    let timesteps: Vec<usize> = match spacing {
        TimestepSpacing::Leading => (skipped..points)
            .rev()
            .map(|i| i * (n / points) + config.steps_offset)
            .collect(),
        TimestepSpacing::Linspace => {
            let gap = (n - 1) as f64 / (points.max(2) - 1) as f64;
            (skipped..points)
                .rev()
                .map(|i| (i as f64 * gap).round_ties_even() as usize)
                .collect()
        }
        TimestepSpacing::Trailing => {
            let gap = n as f64 / steps as f64;
            (0..steps)
                .map(|i| (n as f64 - i as f64 * gap).round_ties_even() as usize - 1)
                .collect()
        }
    };
    match timesteps.first() {
        Some(&first) if first >= n => {
            let reason = format!(
                "{steps} steps would start at timestep {first}, the model has {n}: take fewer"
            );
            Err(Error::argument("steps", reason))
        }
        _ => Ok(timesteps),
    }
}

/// Predicted clean latent and noise from a U-Net's output.
///
/// ```text
/// epsilon:   x0 = (z_t - sigma eps) / alpha          eps = output
/// velocity:  x0 = alpha z_t - sigma v                eps = alpha v + sigma z_t
/// ```
/// with alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t).
struct Denoised {
    clean: Tensor,
    noise: Tensor,
}

impl Denoised {
    fn new(
        prediction: Prediction,
        output: &Tensor,
        sample: &Tensor,
        alpha: f64,
        sigma: f64,
    ) -> Result<Self> {
        Ok(match prediction {
            Prediction::Epsilon => Self {
                clean: ((sample - (output * sigma)?)? * (1.0 / alpha))?,
                noise: output.clone(),
            },
            Prediction::Velocity => Self {
                clean: ((sample * alpha)? - (output * sigma)?)?,
                noise: ((output * alpha)? + (sample * sigma)?)?,
            },
        })
    }
}

#[cfg(test)]
mod tests;
