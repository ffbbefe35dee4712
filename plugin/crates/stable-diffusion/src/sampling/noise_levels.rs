//! Which noise levels are visited.

use crate::noise_schedule::NoiseSchedule;

/// abar of pure noise, where a checkpoint was trained down to no signal at all: σ stays finite. ComfyUI's number.
const LEAST_ALPHA_CUMPROD: f64 = 4.897_345_189_085_343_5e-8;

/// Distances in ln σ that are called equal; timesteps are some 1e-3 apart.
const TIE: f64 = 1e-5;

/// Curvature of [`Schedule::Karras`].
const RHO: f64 = 7.0;

/// σ of every training timestep.
#[derive(Debug, Clone)]
pub struct NoiseLevels {
    /// ln σ, rising.
    log_sigmas: Vec<f64>,
}

impl NoiseLevels {
    /// Those of a forward process.
    #[must_use]
    pub fn new(schedule: &NoiseSchedule) -> Self {
        let log_sigma = |&abar: &f64| {
            let abar = abar.max(LEAST_ALPHA_CUMPROD);
            0.5 * ((1.0 - abar) / abar).ln()
        };
        let log_sigmas = schedule.alphas_cumprod().iter().map(log_sigma).collect();
        Self { log_sigmas }
    }

    /// T.
    #[must_use]
    pub fn n_timesteps(&self) -> usize {
        self.log_sigmas.len()
    }

    /// σ at a timestep in [0, T - 1], linear in ln σ between whole ones.
    #[must_use]
    pub fn sigma(&self, timestep: f64) -> f64 {
        let last = self.n_timesteps() - 1;
        let timestep = timestep.clamp(0.0, last as f64);
        let below = timestep as usize;
        let part = timestep - below as f64;
        let (a, b) = (
            self.log_sigmas[below],
            self.log_sigmas[(below + 1).min(last)],
        );
        ((1.0 - part) * a + part * b).exp()
    }

    /// The timestep whose ln σ is nearest; the lower one of two that are as near.
    #[must_use]
    pub fn timestep(&self, sigma: f64) -> usize {
        let log = sigma.ln();
        let distance = |t: usize| (self.log_sigmas[t] - log).abs();
        let above = self.log_sigmas.partition_point(|&own| own < log);
        let last = self.n_timesteps() - 1;
        let (a, b) = (above.saturating_sub(1), above.min(last));
        // Rounding must not decide.
        if distance(b) + TIE < distance(a) {
            b
        } else {
            a
        }
    }

    /// The most noise.
    #[must_use]
    pub fn largest(&self) -> f64 {
        self.sigma((self.n_timesteps() - 1) as f64)
    }

    /// The least noise.
    #[must_use]
    pub fn smallest(&self) -> f64 {
        self.sigma(0.0)
    }
}

/// How the visited noise levels are spaced, under ComfyUI's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// `normal`: evenly in timesteps, from the last to the first.
    Normal,
    /// `karras`: evenly in σ^(1/7), Karras et al. 2022, Eq. 5.
    Karras,
}

impl Schedule {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Normal, Self::Karras];

    /// ComfyUI's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Karras => "karras",
        }
    }

    /// `n` levels, falling from the largest to the smallest.
    pub(super) fn falling(self, levels: &NoiseLevels, n: usize) -> Vec<f64> {
        let last = (n.max(2) - 1) as f64;
        let share = (0..n).map(|i| i as f64 / last);
        match self {
            Self::Normal => {
                let first = (levels.n_timesteps() - 1) as f64;
                share.map(|s| levels.sigma(first * (1.0 - s))).collect()
            }
            Self::Karras => {
                let root = |sigma: f64| sigma.powf(1.0 / RHO);
                let (from, to) = (root(levels.largest()), root(levels.smallest()));
                share.map(|s| (from + s * (to - from)).powf(RHO)).collect()
            }
        }
    }
}
