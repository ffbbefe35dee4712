//! What the noise says: under which concept the model predicts it best (P: "we compute the Eq. (3) to update the
//! mask", and Eq. 3 is the diffusion loss).
//!
//! All concepts of a picture are asked about the same noisy latent, each under a prompt of its own, so that only their
//! differences count:
//!
//! ```text
//! e_c(x)  = Σ_channels (ε_θ(z_t, t, "a photo of a v_c")(x) - target(x))²
//! σ_t²    = mean over concepts, channels and pixels of the squared error of this draw
//! ℓ_c(x)  = Σ_draws -e_c(x) / (2 (σ_t² + σ_m²))                   the log-likelihood of Gaussian errors
//! ```
//! | symbol | shape | meaning |
//! | --- | --- | --- |
//! | ℓ_c | `[h · w]`, nats | log-likelihood of a latent cell under concept c, less the mean over the concepts |
//! | σ_t² | scalar | variance of the errors at this timestep |
//! | σ_m² | scalar | variance of what the model gets wrong whatever the concept: without it late timesteps, whose errors are tiny, decide alone |
//!
//! Draws of later rounds are added, of the noise and of the attention: the words are evidence too. A forgetting factor
//! lets old ones fade. Draws of one picture share what the model gets wrong about it, so n of them say no more than
//!
//! ```text
//! n' = n / (1 + (n - 1) ρ)                                         independent ones (Kish 1965, design effect)
//! ```

use candle_core::Tensor;

use crate::error::Result;
use crate::maps::{AttentionMaps, upsample_linear};
use crate::size::Size;

/// What was seen of one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// Attention of the tokens as they are now.
    pub maps: AttentionMaps,
    /// Evidence of all rounds so far; only for [`crate::config::Labeling::Posterior`].
    pub evidence: Option<Evidence>,
}

/// The evidence on one picture: sums over all draws so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Evidence {
    /// Width and height of the latent.
    pub size: Size,
    /// ℓ_c of every concept of the picture, in its order; zeros for those that do not compete.
    pub log_likelihoods: Vec<Vec<f32>>,
    /// Draws in the sums; old ones count less if they are forgotten.
    pub n_draws: f64,
    /// Attention, the mean over the draws of all rounds; draws of tokens that say nothing count as what
    /// [`crate::discover`] found in them.
    pub attention: MeanAttention,
    /// Which cells look at each other.
    pub affinity: Affinity,
}

/// Cross-attention of every concept, the mean over the draws so far.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MeanAttention {
    /// `[C][H · W]`; empty before the first draw.
    pub maps: Vec<Vec<f32>>,
    /// Weight of the draws in it.
    pub weight: f64,
}

impl MeanAttention {
    /// Adds the mean over further draws of this weight.
    pub(crate) fn add(&mut self, maps: &AttentionMaps, weight: f64) {
        self.weight += weight;
        if self.maps.is_empty() {
            self.maps.clone_from(&maps.maps);
            return;
        }
        let part = (weight / self.weight) as f32;
        let added = maps.maps.iter().flatten();
        for (mean, new) in self.maps.iter_mut().flatten().zip(added) {
            *mean += part * (new - *mean);
        }
    }
}

/// Self-attention among the cells of one level of the U-Net, the mean over layers and heads, summed over draws.
#[derive(Debug, Clone, PartialEq)]
pub struct Affinity {
    size: Size,
    /// `[n · n]` for n cells, symmetric.
    sums: Vec<f32>,
    n_draws: f64,
}

impl Affinity {
    /// Of a grid of this size, before any draw.
    #[must_use]
    pub fn empty(size: Size) -> Self {
        Self {
            size,
            sums: vec![0.0; size.area().pow(2)],
            n_draws: 0.0,
        }
    }

    /// From its parts, as [`Self::parts`] gives them.
    #[must_use]
    pub fn from_parts(size: Size, sums: Vec<f32>, n_draws: f64) -> Option<Self> {
        (sums.len() == size.area().saturating_pow(2)).then_some(Self {
            size,
            sums,
            n_draws,
        })
    }

    /// Sums `[n · n]`, and the draws in them.
    #[must_use]
    pub fn parts(&self) -> (&[f32], f64) {
        (&self.sums, self.n_draws)
    }

    /// Width and height of the grid.
    #[must_use]
    pub fn size(&self) -> Size {
        self.size
    }

    /// Whether nothing was added yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n_draws == 0.0
    }

    /// W_ij ≥ 0, symmetric: how much two cells look at each other, up to a factor.
    #[must_use]
    pub fn between(&self, i: usize, j: usize) -> f64 {
        f64::from(self.sums[i * self.size.area() + j])
    }

    /// Adds the mean over layers of self-attention `[B, n, n]`, made symmetric.
    pub(crate) fn add(&mut self, layers: &[&Tensor]) -> Result<()> {
        let Some(first) = layers.first() else {
            return Ok(());
        };
        let n_cells = self.size.area();
        let n_draws = first.dim(0)?;
        for layer in layers {
            let seen = layer.sum(0)?.flatten_all()?.to_vec1::<f32>()?;
            let scale = 0.5 / layers.len() as f32;
            for i in 0..n_cells {
                for j in 0..n_cells {
                    self.sums[i * n_cells + j] +=
                        scale * (seen[i * n_cells + j] + seen[j * n_cells + i]);
                }
            }
        }
        self.n_draws += n_draws as f64;
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn from_mean(size: Size, mean: Vec<f32>) -> Self {
        Self {
            size,
            sums: mean,
            n_draws: 1.0,
        }
    }
}

impl Evidence {
    /// Before any draw.
    #[must_use]
    pub fn empty(size: Size, n_concepts: usize, affinity: Size) -> Self {
        Self {
            size,
            log_likelihoods: vec![vec![0.0; size.area()]; n_concepts],
            n_draws: 0.0,
            attention: MeanAttention::default(),
            affinity: Affinity::empty(affinity),
        }
    }

    /// What the sums count for: independent draws for each draw, if two of them are correlated by ρ.
    #[must_use]
    pub fn worth(&self, correlation: f64) -> f64 {
        1.0 / (1.0 + (self.n_draws - 1.0).max(0.0) * correlation)
    }

    /// What is left of the sums when a round begins; `keep` in [0, 1].
    #[must_use]
    pub fn faded(mut self, keep: f64) -> Self {
        if keep < 1.0 {
            let fade = |v: &mut f32| *v *= keep as f32;
            self.log_likelihoods.iter_mut().flatten().for_each(fade);
            self.affinity.sums.iter_mut().for_each(fade);
            self.n_draws *= keep;
            self.attention.weight *= keep;
            self.affinity.n_draws *= keep;
        }
        self
    }

    /// ℓ of a concept at picture size, `[H · W]`.
    #[must_use]
    pub fn at_size(&self, concept: usize, size: Size) -> Vec<f32> {
        upsample_linear(&self.log_likelihoods[concept], self.size, size)
    }

    /// Adds draws: squared errors `[B, 4, h, w]` of each of these concepts, for the same noisy latents. `misfit` is σ_m².
    pub(crate) fn add(
        &mut self,
        concepts: &[usize],
        squares: &[Tensor],
        misfit: f64,
    ) -> Result<()> {
        let Some(first) = squares.first() else {
            return Ok(());
        };
        let n_draws = first.dim(0)?;
        let n_cells = self.size.area();
        let per_concept = squares
            .iter()
            .map(|square| Ok(square.sum(1)?.flatten_all()?.to_vec1::<f32>()?))
            .collect::<Result<Vec<_>>>()?;
        let n_channels = first.dim(1)?;
        for draw in 0..n_draws {
            let cells = draw * n_cells..(draw + 1) * n_cells;
            let sum: f64 = per_concept
                .iter()
                .flat_map(|errors| &errors[cells.clone()])
                .map(|&e| f64::from(e))
                .sum();
            let variance = sum / (per_concept.len() * n_channels * n_cells) as f64;
            let scale = (0.5 / (variance + misfit).max(1e-12)) as f32;
            for (cell, i) in cells.enumerate() {
                let mean = per_concept.iter().map(|e| e[i]).sum::<f32>() / per_concept.len() as f32;
                for (&concept, errors) in concepts.iter().zip(&per_concept) {
                    self.log_likelihoods[concept][cell] -= scale * (errors[i] - mean);
                }
            }
        }
        self.n_draws += n_draws as f64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn log_likelihoods_are_those_of_gaussian_errors() {
        // Two draws of 1x1 latents with one channel, two concepts.
        let square =
            |values: [f32; 2]| Tensor::from_vec(values.to_vec(), (2, 1, 1, 1), &Device::Cpu);
        let squares = [square([1.0, 8.0]).unwrap(), square([3.0, 4.0]).unwrap()];
        let mut evidence = Evidence::empty(Size::square(1), 3, Size::square(1));
        evidence.add(&[0, 2], &squares, 0.0).unwrap();
        // σ² = 2 and 6: ℓ_0 - ℓ_2 = (3 - 1) / 4 + (4 - 8) / 12.
        let difference = evidence.log_likelihoods[0][0] - evidence.log_likelihoods[2][0];
        assert!(
            (difference - (0.5 - 1.0 / 3.0)).abs() < 1e-6,
            "{difference}"
        );
        assert_eq!(evidence.log_likelihoods[1], [0.0]);
        assert_eq!(evidence.n_draws, 2.0);
        // With σ_m² = 1: (3 - 1) / 6 + (4 - 8) / 14.
        let mut doubtful = Evidence::empty(Size::square(1), 3, Size::square(1));
        doubtful.add(&[0, 2], &squares, 1.0).unwrap();
        let difference = doubtful.log_likelihoods[0][0] - doubtful.log_likelihoods[2][0];
        assert!(
            (difference - (1.0 / 3.0 - 2.0 / 7.0)).abs() < 1e-6,
            "{difference}"
        );
        let faded = evidence.clone().faded(0.5);
        assert_eq!(faded.n_draws, 1.0);
        assert_eq!(
            faded.log_likelihoods[0][0],
            0.5 * evidence.log_likelihoods[0][0]
        );
    }

    #[test]
    fn correlated_draws_are_worth_a_bounded_number() {
        let mut evidence = Evidence::empty(Size::square(1), 2, Size::square(1));
        for (n_draws, expected) in [(0.0, 0.0), (1.0, 1.0), (11.0, 5.5), (1e9, 10.0)] {
            evidence.n_draws = n_draws;
            assert!((n_draws * evidence.worth(0.1) - expected).abs() < 1e-6);
            assert_eq!(evidence.worth(0.0), 1.0);
        }
    }

    #[test]
    fn attention_is_the_mean_over_all_draws() {
        let maps = |v: f32| AttentionMaps {
            size: Size::square(1),
            maps: vec![vec![v]],
        };
        let mut mean = MeanAttention::default();
        mean.add(&maps(1.0), 3.0);
        mean.add(&maps(5.0), 1.0);
        assert_eq!((mean.maps[0][0], mean.weight), (2.0, 4.0));
    }

    #[test]
    fn affinity_is_symmetric() {
        let mut affinity = Affinity::empty(Size::square(1));
        let seen = Tensor::from_vec(vec![0.25f32, 0.75], (2, 1, 1), &Device::Cpu).unwrap();
        affinity.add(&[&seen, &seen]).unwrap();
        assert_eq!(affinity.between(0, 0), 1.0);
        let mut affinity = Affinity::empty(Size::square(2));
        let seen: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let seen = Tensor::from_vec(seen, (1, 4, 4), &Device::Cpu).unwrap();
        affinity.add(&[&seen]).unwrap();
        assert_eq!(affinity.between(1, 2), 0.5 * (6.0 + 9.0));
        assert_eq!(affinity.between(2, 1), affinity.between(1, 2));
    }
}
