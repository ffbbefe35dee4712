//! Mean field (Krähenbühl and Koltun 2011, algorithm 1) for the Potts model.

use rayon::prelude::*;

use crate::lattice::LatticeValues;
use crate::lattice::band::{self, Band};
use crate::simd::vectorize;
use crate::softmax::{self, softmax};
use crate::unary::check_finite;
use crate::{CrfConfig, CrfError, Lattice};

/// Most labels of one picture.
pub const MAX_LABELS: usize = 32;

/// The CRF of one picture: its filters, ready to be asked again with other unary energies.
#[derive(Debug)]
pub struct DenseCrf {
    n_pixels: usize,
    /// `w_k K̃_k`, those with a weight above zero.
    kernels: Vec<Lattice>,
}

/// What mean field believes: `Q_i(l)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Marginals {
    /// `[L, H·W]`, in [0, 1]; sums to 1 over L.
    pub q: Vec<f32>,
    /// L.
    pub n_labels: usize,
}

impl DenseCrf {
    /// Builds the lattices and their normalization.
    ///
    /// | name | meaning |
    /// | --- | --- |
    /// | `rgb` | `[H, W, 3]`, sRGB bytes in 0..=255, row by row |
    ///
    /// # Errors
    /// [`CrfError::EmptyPicture`], [`CrfError::PictureTooLarge`], [`CrfError::PictureSize`],
    /// [`CrfError::FeatureRange`], or a constant of `config` out of range.
    pub fn new(
        width: usize,
        height: usize,
        rgb: &[u8],
        config: &CrfConfig,
    ) -> Result<Self, CrfError> {
        config.validate()?;
        let n_pixels = check_picture(width, height, rgb)?;
        let CrfConfig {
            smoothness,
            appearance,
            ..
        } = *config;
        let position =
            |pixel: usize, std: f32| [(pixel % width) as f32 / std, (pixel / width) as f32 / std];
        let build_smoothness = || {
            let features: Vec<_> = (0..n_pixels)
                .map(|pixel| position(pixel, smoothness.xy_std))
                .collect();
            Lattice::build::<2>(&features).map(|lattice| lattice.normalized(smoothness.weight))
        };
        let build_appearance = || {
            let features: Vec<_> = rgb
                .chunks_exact(3)
                .enumerate()
                .map(|(pixel, color)| {
                    let [x, y] = position(pixel, appearance.xy_std);
                    let [r, g, b] =
                        std::array::from_fn(|c| f32::from(color[c]) / appearance.rgb_std);
                    [x, y, r, g, b]
                })
                .collect();
            Lattice::build::<5>(&features).map(|lattice| lattice.normalized(appearance.weight))
        };
        let (smoothness, appearance) = rayon::join(
            || (smoothness.weight > 0.0).then(build_smoothness).transpose(),
            || (appearance.weight > 0.0).then(build_appearance).transpose(),
        );
        Ok(Self {
            n_pixels,
            kernels: smoothness?.into_iter().chain(appearance?).collect(),
        })
    }

    /// Number of pixels H·W.
    pub fn n_pixels(&self) -> usize {
        self.n_pixels
    }

    /// Runs mean field for a number of iterations (usually [`CrfConfig::iterations`]).
    ///
    /// ```text
    /// Q⁰ = softmax_l(-U)
    /// Q  ← softmax_l(-U + Σ_k w_k K̃_k Q)
    /// ```
    ///
    /// | name | meaning |
    /// | --- | --- |
    /// | `unary` | U, `[L, H·W]`, finite energies |
    /// | returns | Q, `[L, H·W]`; below 1e-20 exactly 0 |
    ///
    /// The sum includes the message from a pixel to itself; Potts compatibility -w_k \[l ≠ l'\] and +w_k \[l = l'\]
    /// differ by a constant over labels, which the softmax does not see.
    ///
    /// # Errors
    /// [`CrfError::NoLabels`], [`CrfError::TooManyLabels`], [`CrfError::PlaneSize`], [`CrfError::NotFinite`].
    pub fn infer(
        &self,
        unary: &[f32],
        n_labels: usize,
        iterations: usize,
    ) -> Result<Marginals, CrfError> {
        self.check_unary(unary, n_labels)?;
        // Labels lie side by side, few of them as many as there are, in softmax padded to what registers hold.
        let q = match n_labels {
            1..=2 => self.mean_field::<2, 2>(unary, iterations),

            3..=4 => self.mean_field::<4, 4>(unary, iterations),

            5 => self.mean_field::<5, 8>(unary, iterations),
            6..=8 => self.mean_field::<8, 8>(unary, iterations),
            9..=16 => self.mean_field::<16, 16>(unary, iterations),
            _ => self.mean_field::<MAX_LABELS, MAX_LABELS>(unary, iterations),
        };
        Ok(Marginals { q, n_labels })
    }

    /// The free energy that mean field lowers, per pixel in nats:
    ///
    /// ```text
    /// F(Q) = 1/n Σ_i [ Σ_l Q_i(l) (ln Q_i(l) + U_i(l))  +  ½ Σ_l (1 - Q_i(l)) Σ_k w_k (K̃_k Q)_i(l) ]
    /// ```
    ///
    /// The first part is the distance from the unary energies, the second what neighbors disagree on; an upper bound
    /// on -ln Z of the normalized kernels, self-messages included.
    ///
    /// # Errors
    /// As [`infer`](Self::infer), for `unary` and for marginals of another size.
    pub fn free_energy(&self, unary: &[f32], marginals: &Marginals) -> Result<f64, CrfError> {
        let Marginals { q, n_labels } = marginals;
        self.check_unary(unary, *n_labels)?;
        self.check_unary(q, *n_labels)?;
        Ok(match n_labels {
            1..=2 => self.energy_of::<2>(unary, q),
            3..=4 => self.energy_of::<4>(unary, q),
            5..=8 => self.energy_of::<8>(unary, q),
            9..=16 => self.energy_of::<16>(unary, q),
            _ => self.energy_of::<MAX_LABELS>(unary, q),
        })
    }

    fn energy_of<const LANES: usize>(&self, unary: &[f32], planes: &[f32]) -> f64 {
        let n = self.n_pixels;
        let mut q = vec![[0.0; LANES]; n];
        for (label, plane) in planes.chunks_exact(n).enumerate() {
            for (q, &value) in q.iter_mut().zip(plane) {
                q[label] = value;
            }
        }
        let messages: Vec<_> = self
            .kernels
            .iter()
            .map(|kernel| kernel.filter(&q))
            .collect();
        let of_pixel = |(pixel, q): (usize, &[f32; LANES])| {
            let message = |label: usize| -> f64 {
                let of_kernel = |messages: &Vec<[f32; LANES]>| f64::from(messages[pixel][label]);
                messages.iter().map(of_kernel).sum()
            };
            let n_labels = unary.len() / n;
            let of_label = |l: usize| {
                let (q, u) = (f64::from(q[l]), f64::from(unary[l * n + pixel]));
                let entropy = if q > 0.0 { q * q.ln() } else { 0.0 };
                entropy + q * u + 0.5 * (1.0 - q) * message(l)
            };
            (0..n_labels).map(of_label).sum::<f64>()
        };
        // One after the other, so that the sum is the same for any number of threads.
        q.iter().enumerate().map(of_pixel).sum::<f64>() / n as f64
    }

    fn check_unary(&self, unary: &[f32], n_labels: usize) -> Result<(), CrfError> {
        if n_labels == 0 {
            return Err(CrfError::NoLabels);
        }
        if n_labels > MAX_LABELS {
            return Err(CrfError::TooManyLabels {
                n_labels,
                max: MAX_LABELS,
            });
        }
        let expected = n_labels * self.n_pixels;
        if unary.len() != expected {
            let (n_pixels, actual) = (self.n_pixels, unary.len());
            return Err(CrfError::PlaneSize {
                n_labels,
                n_pixels,
                expected,
                actual,
            });
        }
        check_finite(unary, self.n_pixels)
    }

    /// With LANES ≥ L values for each lattice point, and WIDTH ≥ LANES, a power of two, for each pixel.
    fn mean_field<const LANES: usize, const WIDTH: usize>(
        &self,
        unary: &[f32],
        iterations: usize,
    ) -> Vec<f32> {
        let evidence = evidence_from_unary::<WIDTH>(unary, self.n_pixels);
        let mut messages: Vec<_> = self.kernels.iter().map(Lattice::zeros::<LANES>).collect();
        let mut planes = vec![0.0; unary.len()];
        for iteration in 0..=iterations {
            for (kernel, messages) in self.kernels.iter().zip(&mut messages) {
                if iteration > 0 {
                    kernel.blur(messages);
                }
            }
            let answer = (iteration == iterations).then_some(&mut planes[..]);
            self.update(&evidence, &mut messages, answer);
        }
        planes
    }

    /// `Q_i = softmax_l(evidence_i + Σ_k what kernel k says)`. It is the answer, `[L, H·W]`, or said to the kernels in turn: a
    /// pixel's Q is not kept between iterations.
    fn update<const LANES: usize, const WIDTH: usize>(
        &self,
        evidence: &[[f32; WIDTH]],
        messages: &mut [LatticeValues<LANES>],
        answer: Option<&mut [f32]>,
    ) {
        let mut tasks: Vec<_> = evidence
            .chunks(band::FEATURES)
            .map(|evidence| (evidence, Vec::new(), Vec::new()))
            .collect();
        for (kernel, messages) in self.kernels.iter().zip(messages) {
            for ((_, kernels, _), band) in tasks.iter_mut().zip(kernel.bands(messages)) {
                kernels.push(band);
            }
        }
        for plane in answer
            .into_iter()
            .flat_map(|planes| planes.chunks_mut(self.n_pixels))
        {
            for ((_, _, answer), plane) in tasks.iter_mut().zip(plane.chunks_mut(band::FEATURES)) {
                answer.push(plane);
            }
        }
        tasks
            .into_par_iter()
            .for_each(|(evidence, mut kernels, mut answer)| {
                vectorize(
                    #[inline(always)]
                    || {
                        kernels.iter_mut().for_each(Band::hear);
                        let mut q = [[0.0; WIDTH]; softmax::PIXELS];
                        for (block, evidence) in evidence.chunks(softmax::PIXELS).enumerate() {
                            let first = block * softmax::PIXELS;
                            let n = evidence.len();
                            q[..n].copy_from_slice(evidence);
                            for kernel in &kernels {
                                kernel.slice_onto(first, &mut q[..n]);
                            }
                            softmax(&mut q);
                            if answer.is_empty() {
                                for kernel in &mut kernels {
                                    kernel.splat(first, &q[..n]);
                                }
                            }
                            for (label, plane) in answer.iter_mut().enumerate() {
                                for (value, q) in plane[first..first + n].iter_mut().zip(&q) {
                                    *value = q[label];
                                }
                            }
                        }
                    },
                );
            });
    }
}

impl Marginals {
    /// The most probable label of each pixel, `[H·W]`; the first of equals.
    pub fn labels(&self) -> Vec<u8> {
        let n_pixels = self.q.len() / self.n_labels;
        let mut best = self.q[..n_pixels].to_vec();
        let mut labels = vec![0; n_pixels];
        // MAX_LABELS fits a byte.
        for (label, plane) in (0_u8..).zip(self.q.chunks_exact(n_pixels)).skip(1) {
            for ((best, chosen), &q) in best.iter_mut().zip(&mut labels).zip(plane) {
                // Selections, not branches: the compiler turns the loop into vectors.
                let is_better = q > *best;
                *best = if is_better { q } else { *best };
                *chosen = if is_better { label } else { *chosen };
            }
        }
        labels
    }
}

/// Checks that the buffer is a picture that indices reach; returns its number of pixels.
fn check_picture(width: usize, height: usize, rgb: &[u8]) -> Result<usize, CrfError> {
    if width == 0 || height == 0 {
        return Err(CrfError::EmptyPicture { width, height });
    }
    // Six vertices per pixel, each with a 32-bit index.
    let n_pixels = width
        .checked_mul(height)
        .filter(|&n| n <= u32::MAX as usize / 6);
    let n_pixels = n_pixels.ok_or(CrfError::PictureTooLarge { width, height })?;
    if rgb.len() != n_pixels * 3 {
        return Err(CrfError::PictureSize {
            width,
            height,
            expected: n_pixels * 3,
            actual: rgb.len(),
        });
    }
    Ok(n_pixels)
}

/// -U with the labels of a pixel side by side; lanes without a label are impossible.
fn evidence_from_unary<const LANES: usize>(unary: &[f32], n_pixels: usize) -> Vec<[f32; LANES]> {
    let mut evidence = vec![[f32::NEG_INFINITY; LANES]; n_pixels];
    for (label, plane) in unary.chunks_exact(n_pixels).enumerate() {
        for (evidence, &energy) in evidence.iter_mut().zip(plane) {
            evidence[label] = -energy;
        }
    }
    evidence
}
