//! Samplers and schedules under the names that ComfyUI gives them: from noise to a clean latent in a few dozen steps.
//!
//! ```text
//! x = z + σ ε                     the variance-exploding form of Karras et al. 2022, which k-diffusion samples in
//! σ_t = sqrt((1 - abar_t) / abar_t)
//! dx/dσ = (x - D(x, σ)) / σ       D: the clean latent as the model predicts it
//! ```
//!
//! | name | [`Sampler`] | evaluations a step | source |
//! |---|---|---|---|
//! | `euler` | [`Sampler::Euler`] | 1 | Karras et al. 2022, Algorithm 1 without churn |
//! | `euler_ancestral` | [`Sampler::EulerAncestral`] | 1, and noise | k-diffusion |
//! | `heun` | [`Sampler::Heun`] | 2 | Karras et al. 2022, Algorithm 1 |
//! | `dpmpp_2m` | [`Sampler::DpmPp2m`] | 1 | Lu et al. 2022, DPM-Solver++ (2M) |
//! | `dpmpp_2m_sde` | [`Sampler::DpmPp2mSde`] | 1, and noise | the same as an SDE, midpoint |
//! | `ddim` | [`Sampler::Ddim`] | 1 | Song et al. 2020 with η = 0: in this form Euler's step |
//! | `uni_pc` | [`Sampler::UniPc`] | 1 | Zhao et al. 2023, B(h) = h, order 3 |
//!
//! Noise levels between those of the training's timesteps are asked about at the nearest timestep, as ComfyUI does.

mod noise_levels;
mod samplers;
mod uni_pc;

use candle_core::Tensor;

pub use noise_levels::{NoiseLevels, Schedule};

use crate::error::{Error, Result};

/// What a sampler solves.
pub trait Problem {
    /// D(x, σ): the clean latent that the model sees in `x` at the noise level `sigma`; both [B, 4, h, w].
    ///
    /// # Errors
    /// Those of the model.
    fn clean(&mut self, x: &Tensor, sigma: f64) -> Result<Tensor>;

    /// Standard normal noise of the shape of `x`, other noise each time.
    ///
    /// # Errors
    /// Those of the tensor library.
    fn noise(&mut self, x: &Tensor) -> Result<Tensor>;

    /// Called after each step with the clean latent that its prediction amounts to.
    ///
    /// # Errors
    /// [`Error::Canceled`] to stop there.
    fn on_step(&mut self, clean: &Tensor) -> Result<()>;
}

/// The samplers by name, see the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampler {
    /// `euler`
    Euler,
    /// `euler_ancestral`
    EulerAncestral,
    /// `heun`
    Heun,
    /// `dpmpp_2m`
    DpmPp2m,
    /// `dpmpp_2m_sde`
    DpmPp2mSde,
    /// `ddim`
    Ddim,
    /// `uni_pc`
    UniPc,
}

impl Sampler {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Euler,
        Self::EulerAncestral,
        Self::Heun,
        Self::DpmPp2m,
        Self::DpmPp2mSde,
        Self::Ddim,
        Self::UniPc,
    ];

    /// ComfyUI's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Euler => "euler",
            Self::EulerAncestral => "euler_ancestral",
            Self::Heun => "heun",
            Self::DpmPp2m => "dpmpp_2m",
            Self::DpmPp2mSde => "dpmpp_2m_sde",
            Self::Ddim => "ddim",
            Self::UniPc => "uni_pc",
        }
    }

    /// The noise levels of `steps` steps, falling, with 0 at the end: `steps + 1` of them.
    ///
    /// `denoise` below 1 leaves out the noisiest, as of a run with more steps of which these are the last.
    ///
    /// # Errors
    /// [`Error::Argument`] for no step, or a `denoise` that is not in (0, 1].
    pub fn noise_levels(
        self,
        levels: &NoiseLevels,
        schedule: Schedule,
        steps: usize,
        denoise: f64,
    ) -> Result<Vec<f64>> {
        if steps == 0 || steps > levels.n_timesteps() {
            let n = levels.n_timesteps();
            return Err(Error::argument(
                "steps",
                format!("{steps} is not in 1..={n}"),
            ));
        }
        if !(denoise > 0.0 && denoise <= 1.0) {
            return Err(Error::argument(
                "denoise",
                format!("{denoise} is not above 0 and at most 1"),
            ));
        }
        let all = (steps as f64 / denoise) as usize;
        let mut sigmas = if self == Self::UniPc {
            // Its last step is the longer one.
            let mut sigmas = schedule.falling(levels, all + 1);
            sigmas.pop();
            sigmas
        } else {
            schedule.falling(levels, all)
        };
        sigmas.push(0.0);
        Ok(sigmas.split_off(all - steps))
    }

    /// The clean latent at the end of `sigmas`; `x` [B, 4, h, w] has the first one's noise.
    ///
    /// # Errors
    /// Those of the problem.
    pub fn sample(self, problem: &mut dyn Problem, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
        match self {
            Self::Euler | Self::Ddim => samplers::euler(problem, x, sigmas),
            Self::EulerAncestral => samplers::euler_ancestral(problem, x, sigmas),
            Self::Heun => samplers::heun(problem, x, sigmas),
            Self::DpmPp2m => samplers::dpmpp_2m(problem, x, sigmas, 0.0),
            Self::DpmPp2mSde => samplers::dpmpp_2m(problem, x, sigmas, 1.0),
            Self::UniPc => uni_pc::uni_pc(problem, x, sigmas),
        }
    }
}

#[cfg(test)]
mod tests;
