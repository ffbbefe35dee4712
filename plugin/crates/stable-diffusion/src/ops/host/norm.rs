//! Group and layer normalization: y = γ·(x - mean) / sqrt(var + ε) + β, statistics recomputed in the backward.

use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{
    layer::Layer,
    memory::unwritten,
    numbers::Numbers,
    simd::{items_per_thread, sigmoid, sum_by, sum_zip_by, vectorize},
};
use crate::ops::After;

/// The sizes of one group normalization of `[B, C, ..]`; γ and β are `[C]`.
#[derive(Debug, Clone)]
pub(crate) struct GroupNorm {
    shape: Shape,
    n_channels: usize,
    n_positions: usize,
    n_groups: usize,
    epsilon: f64,
    after: After,
}

/// Mean and 1/sqrt(var + ε) of a slice.
#[inline(always)]
fn moments(x: &[f32], epsilon: f64) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = (sum_by(x, |x| x) / n) as f32;
    let variance = sum_by(x, |x| (x - mean) * (x - mean)) / n;
    (mean, (1.0 / (variance + epsilon).sqrt()) as f32)
}

impl GroupNorm {
    pub(crate) fn new(x: &Tensor, n_groups: usize, epsilon: f64, after: After) -> Result<Self> {
        let [_, n_channels, positions @ ..] = x.dims() else {
            bail!("group_norm takes [B, C, ..], not {:?}", x.shape())
        };
        let (n_channels, n_positions) = (*n_channels, positions.iter().product());
        Ok(Self {
            shape: x.shape().clone(),
            n_channels,
            n_positions,
            n_groups,
            epsilon,
            after,
        })
    }

    fn group_channels(&self) -> usize {
        self.n_channels / self.n_groups
    }

    fn group_len(&self) -> usize {
        (self.group_channels() * self.n_positions).max(1)
    }

    /// Writes dL/d(γ·x̂ + β) of one channel to `out` and returns its sum and its sum weighted by x̂.
    #[inline(always)]
    fn before_affine(
        &self,
        [x, dy]: [&[f32]; 2],
        out: &mut [f32],
        [mean, rstd, gamma, beta]: [f32; 4],
    ) -> (f64, f64) {
        match self.after {
            After::Nothing => out.copy_from_slice(dy),
            After::Silu => {
                let scale = rstd * gamma;
                let shift = beta - mean * scale;
                for (out, (&x, &dy)) in out.iter_mut().zip(x.iter().zip(dy)) {
                    *out = dy * silu_slope(x * scale + shift);
                }
            }
        }
        let sum = sum_by(out, |d| d);
        (
            sum,
            sum_zip_by(out, x, |d, x| d * (x - mean)) * f64::from(rstd),
        )
    }

    /// Sums over positions of dL/d(γ·x̂ + β), plain and weighted by x̂, per sample and channel.
    fn affine_sums(&self, x: &[f32], weight: &[f32], bias: &[f32], dy: &[f32]) -> Vec<(f64, f64)> {
        let len = self.group_len();
        let groups: Vec<Vec<(f64, f64)>> = x
            .par_chunks(len)
            .zip(dy.par_chunks(len))
            .enumerate()
            .with_min_len(items_per_thread(len))
            .map(|(group, (x, dy))| {
                let mut scratch = vec![0.0; self.n_positions];
                vectorize(
                    #[inline(always)]
                    || {
                        let (mean, rstd) = moments(x, self.epsilon);
                        let first = group % self.n_groups * self.group_channels();
                        let planes = x.chunks(self.n_positions).zip(dy.chunks(self.n_positions));
                        planes
                            .zip(first..)
                            .map(|((x, dy), channel)| {
                                let affine = [mean, rstd, weight[channel], bias[channel]];
                                self.before_affine([x, dy], &mut scratch, affine)
                            })
                            .collect()
                    },
                )
            })
            .collect();
        groups.into_iter().flatten().collect()
    }

    fn sum_samples(&self, sums: &[(f64, f64)], of: impl Fn(&(f64, f64)) -> f64) -> Vec<f32> {
        let sum = |channel| {
            sums.iter()
                .skip(channel)
                .step_by(self.n_channels)
                .map(&of)
                .sum::<f64>()
        };
        (0..self.n_channels)
            .map(|channel| sum(channel) as f32)
            .collect()
    }
}

/// d(x·sigmoid(x))/dx
#[inline(always)]
pub(crate) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s + x * s * (1.0 - s)
}

impl Layer for GroupNorm {
    const NAME: &'static str = "group_norm";
    const IS_LINEAR: bool = false;

    fn output_shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32]) -> Vec<f32> {
        let weight = weight.f32();
        let len = self.group_len();
        let mut y = unwritten(x.len());
        y.par_chunks_mut(len)
            .zip(x.par_chunks(len))
            .enumerate()
            .with_min_len(items_per_thread(len))
            .for_each(|(group, (y, x))| {
                vectorize(
                    #[inline(always)]
                    || {
                        let (mean, rstd) = moments(x, self.epsilon);
                        let first = group % self.n_groups * self.group_channels();
                        let planes = y
                            .chunks_mut(self.n_positions)
                            .zip(x.chunks(self.n_positions));
                        for ((y, x), channel) in planes.zip(first..) {
                            let scale = rstd * weight[channel];
                            let shift = bias[channel] - mean * scale;
                            match self.after {
                                After::Nothing => {
                                    for (y, &x) in y.iter_mut().zip(x) {
                                        *y = x * scale + shift;
                                    }
                                }
                                After::Silu => {
                                    for (y, &x) in y.iter_mut().zip(x) {
                                        let pre = x * scale + shift;
                                        *y = pre * sigmoid(pre);
                                    }
                                }
                            }
                        }
                    },
                );
            });
        y
    }

    // With d = dL/dy·γ and n values per group: dx = rstd·(d - mean(d) - x̂·mean(d·x̂)).
    fn input_gradient(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32], dy: &[f32]) -> Vec<f32> {
        let weight = weight.f32();
        let len = self.group_len();
        let mut dx = unwritten(x.len());
        let groups = dx
            .par_chunks_mut(len)
            .zip(x.par_chunks(len).zip(dy.par_chunks(len)))
            .with_min_len(items_per_thread(len));
        groups.enumerate().for_each(|(group, (dx, (x, dy)))| {
            vectorize(
                #[inline(always)]
                || {
                    let (mean, rstd) = moments(x, self.epsilon);
                    let first = group % self.n_groups * self.group_channels();
                    let n = self.n_positions;
                    let (mut sum, mut weighted) = (0.0f64, 0.0f64);
                    let planes = dx.chunks_mut(n).zip(x.chunks(n).zip(dy.chunks(n)));
                    for ((dx, (x, dy)), channel) in planes.zip(first..) {
                        let gamma = weight[channel];
                        let affine = [mean, rstd, gamma, bias[channel]];
                        let sums = self.before_affine([x, dy], dx, affine);
                        sum += sums.0 * f64::from(gamma);
                        weighted += sums.1 * f64::from(gamma);
                    }
                    let mean_d = (sum / x.len() as f64) as f32;
                    let slope = (weighted / x.len() as f64) as f32 * rstd;
                    for ((dx, x), channel) in dx.chunks_mut(n).zip(x.chunks(n)).zip(first..) {
                        let gamma = weight[channel];
                        for (dx, &x) in dx.iter_mut().zip(x) {
                            *dx = rstd * (*dx * gamma - mean_d - (x - mean) * slope);
                        }
                    }
                },
            );
        });
        dx
    }

    fn weight_gradient(
        &self,
        x: &[f32],
        weight: Numbers<'_>,
        bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        self.sum_samples(&self.affine_sums(x, weight.f32(), bias, dy), |sums| sums.1)
    }

    fn bias_gradient(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32], dy: &[f32]) -> Vec<f32> {
        self.sum_samples(&self.affine_sums(x, weight.f32(), bias, dy), |sums| sums.0)
    }
}

/// The sizes of one layer normalization of `[.., width]`; γ and β are `[width]`.
#[derive(Debug, Clone)]
pub(crate) struct LayerNorm {
    shape: Shape,
    width: usize,
    epsilon: f64,
}

/// Rows per parallel work item.
const ROWS: usize = 32;

impl LayerNorm {
    pub(crate) fn new(x: &Tensor, epsilon: f64) -> Self {
        let width = x.dims().last().copied().unwrap_or(0);
        Self {
            shape: x.shape().clone(),
            width: width.max(1),
            epsilon,
        }
    }

    /// Σ over rows of `of(dy, x̂)`, per column; chunks of rows are summed in order.
    fn column_sums(&self, x: &[f32], dy: &[f32], of: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
        let len = ROWS * self.width;
        let partial: Vec<Vec<f32>> = x
            .par_chunks(len)
            .zip(dy.par_chunks(len))
            .with_min_len(items_per_thread(len))
            .map(|(x, dy)| {
                let mut sums = vec![0.0f32; self.width];
                for (x, dy) in x.chunks(self.width).zip(dy.chunks(self.width)) {
                    let (mean, rstd) = moments(x, self.epsilon);
                    for (sum, (&x, &dy)) in sums.iter_mut().zip(x.iter().zip(dy)) {
                        *sum += of(dy, (x - mean) * rstd);
                    }
                }
                sums
            })
            .collect();
        let mut total = vec![0.0f64; self.width];
        for sums in partial {
            for (total, sum) in total.iter_mut().zip(sums) {
                *total += f64::from(sum);
            }
        }
        total.into_iter().map(|total| total as f32).collect()
    }
}

impl Layer for LayerNorm {
    const NAME: &'static str = "layer_norm";
    const IS_LINEAR: bool = false;

    fn output_shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32]) -> Vec<f32> {
        let weight = weight.f32();
        let (len, width) = (ROWS * self.width, self.width);
        let mut y = unwritten(x.len());
        y.par_chunks_mut(len)
            .zip(x.par_chunks(len))
            .with_min_len(items_per_thread(len))
            .for_each(|(y, x)| {
                vectorize(
                    #[inline(always)]
                    || {
                        for (y, x) in y.chunks_mut(width).zip(x.chunks(width)) {
                            let (mean, rstd) = moments(x, self.epsilon);
                            let affine = weight.iter().zip(bias);
                            for ((y, &x), (&gamma, &beta)) in y.iter_mut().zip(x).zip(affine) {
                                *y = (x - mean) * rstd * gamma + beta;
                            }
                        }
                    },
                );
            });
        y
    }

    fn input_gradient(
        &self,
        x: &[f32],
        weight: Numbers<'_>,
        _bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        let weight = weight.f32();
        let (len, width) = (ROWS * self.width, self.width);
        let mut dx = unwritten(x.len());
        let chunks = dx
            .par_chunks_mut(len)
            .zip(x.par_chunks(len).zip(dy.par_chunks(len)))
            .with_min_len(items_per_thread(len));
        chunks.for_each(|(dx, (x, dy))| {
            vectorize(
                #[inline(always)]
                || {
                    let rows = dx
                        .chunks_mut(width)
                        .zip(x.chunks(width).zip(dy.chunks(width)));
                    for (dx, (x, dy)) in rows {
                        let (mean, rstd) = moments(x, self.epsilon);
                        for ((dx, &dy), &gamma) in dx.iter_mut().zip(dy).zip(weight) {
                            *dx = dy * gamma;
                        }
                        let mean_d = (sum_by(dx, |d| d) / width as f64) as f32;
                        let weighted = sum_zip_by(dx, x, |d, x| d * (x - mean)) / width as f64;
                        let slope = weighted as f32 * rstd * rstd;
                        for (dx, &x) in dx.iter_mut().zip(x) {
                            *dx = rstd * (*dx - mean_d - (x - mean) * slope);
                        }
                    }
                },
            );
        });
        dx
    }

    fn weight_gradient(
        &self,
        x: &[f32],
        _weight: Numbers<'_>,
        _bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        self.column_sums(x, dy, |dy, normalized| dy * normalized)
    }

    fn bias_gradient(
        &self,
        x: &[f32],
        _weight: Numbers<'_>,
        _bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        self.column_sums(x, dy, |dy, _| dy)
    }
}
