//! Element-wise activations, the gated one of the feed-forward layers, and nearest-neighbor enlargement.

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::{
    memory::{Values, tensor, unwritten},
    norm::silu_slope,
    simd::{erf, exp, items_per_thread, map, sigmoid, vectorize, zip_map},
};
use crate::ops::{Activation, function::Function};

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

/// An activation of its one operand.
pub(crate) struct Elementwise(pub(crate) Activation);

impl Function for Elementwise {
    const NAME: &'static str = "activation";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = operands[0].contiguous()?;
        let y = self.0.values(Values::of(&x)?.as_slice()?);
        tensor(y, x.shape(), x.device())
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (x, dy) = (operands[0].contiguous()?, dy.contiguous()?);
        let (x_values, dy_values) = (Values::of(&x)?, Values::of(&dy)?);
        let dx = self.0.gradient(x_values.as_slice()?, dy_values.as_slice()?);
        Ok(vec![Some(tensor(dx, x.shape(), x.device())?)])
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

impl Function for Geglu {
    const NAME: &'static str = "geglu";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let operand = operands[0].contiguous()?;
        let (x, width) = (Values::of(&operand)?, self.width);
        let x = x.as_slice()?;
        let mut y = unwritten(x.len() / 2);
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
        let mut dims = operand.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = width;
        }
        tensor(y, dims, operand.device())
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (x, dy, width) = (operands[0].contiguous()?, dy.contiguous()?, self.width);
        let (x_values, dy_values) = (Values::of(&x)?, Values::of(&dy)?);
        let (x_values, dy_values) = (x_values.as_slice()?, dy_values.as_slice()?);
        let mut dx = unwritten(x_values.len());
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
        Ok(vec![Some(tensor(dx, x.shape(), x.device())?)])
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

impl Function for Nearest {
    const NAME: &'static str = "upsample_nearest";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let operand = operands[0].contiguous()?;
        let (b, c, h, w) = operand.dims4()?;
        let x = Values::of(&operand)?;
        let x = x.as_slice()?;
        let (rows, cols) = (Self::sources(self.height, h), Self::sources(self.width, w));
        let mut y = unwritten(b * c * self.height * self.width);
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
        tensor(y, (b, c, self.height, self.width), operand.device())
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let x = &operands[0];
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
        Ok(vec![Some(tensor(dx, x.shape(), x.device())?)])
    }

    fn reads(&self, _: usize, _: &[bool]) -> bool {
        false
    }
}
