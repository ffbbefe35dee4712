//! The forward process: how much noise a latent holds at a timestep, and what the U-Net should say of it.
//!
//! ```text
//! z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps         (Ho et al. 2020, Eq. 4)
//! v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) z         (Salimans and Ho 2022, Appendix D)
//! ```
//!
//! | name | symbol | shape, range |
//! |---|---|---|
//! | `latents` | z | [B, 4, h, w], scaled |
//! | `noise` | eps | as `latents`, standard normal |
//! | `timesteps` | t | one per batch entry, in 0..T |
//! | `alphas_cumprod` | abar | `[T]`, falling, in `[0, 1)` |

use candle_core::Tensor;

use crate::config::{BetaSchedule, Prediction, SchedulerConfig};
use crate::error::{Error, Result};

/// abar for every training timestep.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    alphas_cumprod: Vec<f64>,
    prediction: Prediction,
}

impl NoiseSchedule {
    /// The schedule that a checkpoint was trained with.
    pub fn new(config: &SchedulerConfig) -> Self {
        let betas = betas(config);
        let mut abar = 1.0;
        let mut alphas_cumprod: Vec<f64> = betas
            .iter()
            .map(|beta| {
                abar *= 1.0 - beta;
                abar
            })
            .collect();
        if config.rescale_betas_zero_snr {
            rescale_to_zero_snr(&mut alphas_cumprod);
        }
        Self {
            alphas_cumprod,
            prediction: config.prediction,
        }
    }

    /// T.
    pub fn n_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// What the U-Net predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// abar, one per timestep.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }

    /// z_t.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is not one timestep in 0..T per batch entry.
    pub fn add_noise(
        &self,
        latents: &Tensor,
        noise: &Tensor,
        timesteps: &[usize],
    ) -> Result<Tensor> {
        let (signal, sigma) = self.coefficients(latents, timesteps)?;
        Ok((latents.broadcast_mul(&signal)? + noise.broadcast_mul(&sigma)?)?)
    }

    /// What the U-Net should predict from z_t: eps or v_t.
    ///
    /// # Errors
    /// As [`NoiseSchedule::add_noise`].
    pub fn target(&self, latents: &Tensor, noise: &Tensor, timesteps: &[usize]) -> Result<Tensor> {
        let (signal, sigma) = self.coefficients(latents, timesteps)?;
        match self.prediction {
            Prediction::Epsilon => Ok(noise.clone()),
            Prediction::Velocity => {
                Ok((noise.broadcast_mul(&signal)? - latents.broadcast_mul(&sigma)?)?)
            }
        }
    }

    /// sqrt(abar_t) and sqrt(1 - abar_t), each [B, 1, 1, 1].
    fn coefficients(&self, latents: &Tensor, timesteps: &[usize]) -> Result<(Tensor, Tensor)> {
        let batch = latents.dims().first().copied().unwrap_or(0);
        if timesteps.len() != batch {
            return Err(Error::argument(
                "timesteps",
                format!("{} for a batch of {batch}", timesteps.len()),
            ));
        }
        let mut signal = Vec::with_capacity(batch);
        let mut sigma = Vec::with_capacity(batch);
        for &t in timesteps {
            let n = self.n_timesteps();
            let abar = self
                .alphas_cumprod
                .get(t)
                .ok_or_else(|| Error::argument("timesteps", format!("{t} is not below {n}")))?;
            signal.push(abar.sqrt() as f32);
            sigma.push((1.0 - abar).sqrt() as f32);
        }
        let mut shape = vec![1; latents.rank()];
        shape[0] = batch;
        let device = latents.device();
        Ok((
            Tensor::from_vec(signal, shape.as_slice(), device)?,
            Tensor::from_vec(sigma, shape.as_slice(), device)?,
        ))
    }
}

/// beta of every timestep.
fn betas(config: &SchedulerConfig) -> Vec<f64> {
    let n = config.num_train_timesteps;
    let line = |from: f64, to: f64, i: usize| from + (to - from) * i as f64 / (n.max(2) - 1) as f64;
    (0..n)
        .map(|i| match config.beta_schedule {
            BetaSchedule::Linear => line(config.beta_start, config.beta_end, i),
            BetaSchedule::ScaledLinear => {
                line(config.beta_start.sqrt(), config.beta_end.sqrt(), i).powi(2)
            }
        })
        .collect()
}

/// Shifts and scales sqrt(abar) so that it keeps its first value and ends at 0
/// (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", Algorithm 1).
fn rescale_to_zero_snr(alphas_cumprod: &mut [f64]) {
    let (Some(&first), Some(&last)) = (alphas_cumprod.first(), alphas_cumprod.last()) else {
        return;
    };
    let (first, last) = (first.sqrt(), last.sqrt());
    for abar in alphas_cumprod {
        *abar = ((abar.sqrt() - last) * first / (first - last)).powi(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use candle_core::Device;

    #[test]
    fn stable_diffusions_alphas_are_the_published_ones() {
        // Printed by diffusers 0.42.1: DDIMScheduler.from_config(SD 1.5).alphas_cumprod[[0, 1, 500, 999]].
        let schedule = NoiseSchedule::new(&ModelConfig::sd_1_5().scheduler);
        for (t, expected) in [
            (0, 0.999_149_98),
            (1, 0.998_296_02),
            (500, 0.276_332_47),
            (999, 0.004_660_095),
        ] {
            let abar = schedule.alphas_cumprod()[t];
            assert!((abar - expected).abs() < 1e-6, "{t}: {abar} {expected}");
        }
    }

    #[test]
    fn noise_and_target_recover_the_latent() {
        let device = Device::Cpu;
        let mut config = ModelConfig::sd_2_1().scheduler;
        config.rescale_betas_zero_snr = true;
        let schedule = NoiseSchedule::new(&config);
        assert_eq!(schedule.alphas_cumprod()[999], 0.0);
        let mut rng = crate::rng::Rng::new(1, "test", 0);
        let z = rng.normal(&[3, 4, 2, 2], &device).unwrap();
        let eps = rng.normal(&[3, 4, 2, 2], &device).unwrap();
        let t = [0, 421, 999];
        let z_t = schedule.add_noise(&z, &eps, &t).unwrap();
        let v = schedule.target(&z, &eps, &t).unwrap();
        // z = sqrt(abar) z_t - sqrt(1 - abar) v at every noise level, pure noise included.
        let (signal, sigma) = schedule.coefficients(&z, &t).unwrap();
        let back =
            (z_t.broadcast_mul(&signal).unwrap() - v.broadcast_mul(&sigma).unwrap()).unwrap();
        let error = (back - z)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(error < 1e-5, "{error}");
    }

    #[test]
    fn timesteps_are_checked() {
        let schedule = NoiseSchedule::new(&ModelConfig::sd_1_5().scheduler);
        let z = Tensor::zeros((2, 4, 2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        for (t, message) in [
            (vec![1], "timesteps: 1 for a batch of 2"),
            (vec![1, 1000], "timesteps: 1000 is not below 1000"),
        ] {
            assert_eq!(
                schedule.add_noise(&z, &z, &t).unwrap_err().to_string(),
                message
            );
        }
    }
}
