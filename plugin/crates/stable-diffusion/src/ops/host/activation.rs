//! Element-wise activations, the gated one of the feed-forward layers, and nearest-neighbor enlargement.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{
    memory::{Values, output, slice_of, tracked},
    norm::silu_slope,
    simd::{erf, exp, items_per_thread, map, sigmoid, vectorize, zip_map},
};
use crate::ops::Activation;

const QUICK: f32 = 1.702;
const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// 1/sqrt(2π)
const DENSITY: f32 = 0.398_942_3;

/// Φ(x)
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    0.5 + 0.5 * erf(x * SQRT_HALF)
}

/// d(x·Φ(x))/dx
#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    normal_cdf(x) + x * DENSITY * exp(-0.5 * x * x)
}

impl Activation {
    fn values(self, x: &[f32]) -> Vec<f32> {
        match self {
            Self::Silu => map(
                x,
                #[inline(always)]
                |x| x * sigmoid(x),
            ),
            Self::QuickGelu => map(
                x,
                #[inline(always)]
                |x| x * sigmoid(QUICK * x),
            ),
            Self::Gelu => map(
                x,
                #[inline(always)]
                |x| x * normal_cdf(x),
            ),
        }
    }

    fn gradient(self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        match self {
            Self::Silu => zip_map(
                x,
                dy,
                #[inline(always)]
                |x, dy| dy * silu_slope(x),
            ),
            Self::QuickGelu => zip_map(
                x,
                dy,
                #[inline(always)]
                |x, dy| {
                    let s = sigmoid(QUICK * x);
                    dy * (s + QUICK * x * s * (1.0 - s))
                },
            ),
            Self::Gelu => zip_map(
                x,
                dy,
                #[inline(always)]
                |x, dy| dy * gelu_slope(x),
            ),
        }
    }
}

/// Applies an operation of one tensor, keeping the graph only where a gradient can flow.
pub(crate) fn apply<Op: CustomOp1 + Send + Sync + 'static>(x: &Tensor, op: Op) -> Result<Tensor> {
    let x = x.contiguous()?;
    if tracked(Some(&x)) {
        x.apply_op1(op)
    } else {
        x.apply_op1_no_bwd(&op)
    }
}

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(output(self.values(slice_of(x, layout)?), layout.shape()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let dx = self.gradient(Values::of(x)?.as_slice()?, Values::of(&dy)?.as_slice()?);
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// `[.., 2·width]` = (value, gate) to `[.., width]`: y = value·gelu(gate).
pub(crate) struct Geglu {
    width: usize,
}

impl Geglu {
    pub(crate) fn new(x: &Tensor) -> Result<Self> {
        let width = x.dim(D::Minus1)? / 2;
        Ok(Self { width })
    }

    /// Rows per parallel work item: about as many values as an element-wise loop takes.
    fn rows(&self) -> usize {
        (16_384 / self.width).max(1)
    }
}

impl CustomOp1 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, width) = (slice_of(x, layout)?, self.width);
        let mut y = vec![0.0; x.len() / 2];
        let chunks = y
            .par_chunks_mut(self.rows() * width)
            .zip(x.par_chunks(self.rows() * 2 * width));
        chunks.for_each(|(y, x)| {
            vectorize(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_mut(width).zip(x.chunks(2 * width)) {
                        let (value, gate) = x.split_at(width);
                        for (y, (&value, &gate)) in y.iter_mut().zip(value.iter().zip(gate)) {
                            *y = value * gate * normal_cdf(gate);
                        }
                    }
                },
            );
        });
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = width;
        }
        Ok(output(y, dims))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (dy, width) = (dy.contiguous()?, self.width);
        let (x_values, dy_values) = (Values::of(x)?, Values::of(&dy)?);
        let (x_values, dy_values) = (x_values.as_slice()?, dy_values.as_slice()?);
        let mut dx = vec![0.0; x_values.len()];
        let (double, single) = (self.rows() * 2 * width, self.rows() * width);
        let chunks = dx.par_chunks_mut(double).zip(
            x_values
                .par_chunks(double)
                .zip(dy_values.par_chunks(single)),
        );
        chunks.for_each(|(dx, (x, dy))| {
            vectorize(
                #[inline(always)]
                || {
                    let inputs = x.chunks(2 * width).zip(dy.chunks(width));
                    for (dx, (x, dy)) in dx.chunks_mut(2 * width).zip(inputs) {
                        let (d_value, d_gate) = dx.split_at_mut(width);
                        let (value, gate) = x.split_at(width);
                        let outputs = d_value.iter_mut().zip(d_gate);
                        let inputs = value.iter().zip(gate).zip(dy);
                        for ((d_value, d_gate), ((&value, &gate), &dy)) in outputs.zip(inputs) {
                            *d_value = dy * gate * normal_cdf(gate);
                            *d_gate = dy * value * gelu_slope(gate);
                        }
                    }
                },
            );
        });
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// Nearest-neighbor enlargement of `[B, C, h, w]` to `[B, C, height, width]`.
///
/// candle's own has a backward that overwrites the gradient of an input with another consumer.
pub(crate) struct Nearest {
    pub(crate) height: usize,
    pub(crate) width: usize,
}

impl Nearest {
    /// The input row or column that an output one shows: floor(output·input / outputs), as in PyTorch.
    fn sources(n_outputs: usize, n_inputs: usize) -> Vec<usize> {
        (0..n_outputs).map(|i| i * n_inputs / n_outputs).collect()
    }
}

impl CustomOp1 for Nearest {
    fn name(&self) -> &'static str {
        "upsample_nearest"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, c, h, w) = layout.shape().dims4()?;
        let x = slice_of(x, layout)?;
        let (rows, cols) = (Self::sources(self.height, h), Self::sources(self.width, w));
        let mut y = vec![0.0; b * c * self.height * self.width];
        y.par_chunks_mut(self.height * self.width)
            .zip(x.par_chunks(h * w))
            .with_min_len(items_per_thread(self.height * self.width))
            .for_each(|(y, x)| {
                for (y, &row) in y.chunks_mut(self.width).zip(&rows) {
                    let x = &x[row * w..][..w];
                    for (y, &col) in y.iter_mut().zip(&cols) {
                        *y = x[col];
                    }
                }
            });
        Ok(output(y, (b, c, self.height, self.width)))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, h, w) = x.dims4()?;
        let dy = dy.contiguous()?;
        let dy = Values::of(&dy)?;
        let (rows, cols) = (Self::sources(self.height, h), Self::sources(self.width, w));
        let mut dx = vec![0.0; x.elem_count()];
        let planes = dy.as_slice()?.par_chunks(self.height * self.width);
        let planes = dx.par_chunks_mut(h * w).zip(planes);
        let planes = planes.with_min_len(items_per_thread(self.height * self.width));
        planes.for_each(|(dx, dy)| {
            for (dy, &row) in dy.chunks(self.width).zip(&rows) {
                let dx = &mut dx[row * w..][..w];
                for (&dy, &col) in dy.iter().zip(&cols) {
                    dx[col] += dy;
                }
            }
        });
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}
