//! Element-wise activations, the gated one of the feed-forward layers, and nearest-neighbor enlargement.

use std::ops::Range;

use candle_core::{Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{
    memory::{Values, tensor, unwritten},
    norm::silu_slope,
    numbers::Number,
    simd::{erf, exp, items_per_thread, map, sigmoid, vectorize, zip_map},
};
use crate::ops::{
    Activation,
    function::{Function, Reads},
};

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
    pub(crate) fn new(width: usize) -> Self {
        Self { width }
    }

    /// Values per parallel work item of x and y: about as many as an element-wise loop takes.
    fn pieces(&self) -> (usize, usize) {
        let n_rows = (16_384 / self.width).max(1);
        (n_rows * 2 * self.width, n_rows * self.width)
    }

    pub(crate) fn values(&self, x: &[f32]) -> Vec<f32> {
        let width = self.width;
        let mut y = unwritten(x.len() / 2);
        let (of_x, of_y) = self.pieces();
        let pieces = y.par_chunks_mut(of_y).zip(x.par_chunks(of_x));
        pieces.for_each(|(y, x)| {
            vectorize(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_mut(width).zip(x.chunks(2 * width)) {
                        let (value, gate) = x.split_at(width);
                        geglu(value, gate, y);
                    }
                },
            );
        });
        y
    }

    /// From x to dL/dx.
    fn gradient(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let width = self.width;
        let mut dx = unwritten(x.len());
        let (of_x, of_y) = self.pieces();
        let inputs = x.par_chunks(of_x).zip(dy.par_chunks(of_y));
        let pieces = dx.par_chunks_mut(of_x).zip(inputs);
        pieces.for_each(|(dx, (x, dy))| {
            vectorize(
                #[inline(always)]
                || {
                    let inputs = x.chunks(2 * width).zip(dy.chunks(width));
                    for (dx, (x, dy)) in dx.chunks_mut(2 * width).zip(inputs) {
                        let (d_value, d_gate) = dx.split_at_mut(width);
                        let (value, gate) = x.split_at(width);
                        geglu_gradient(value, gate, dy, d_value, d_gate);
                    }
                },
            );
        });
        dx
    }

    /// From what was kept of some rows to dL/dx, and their dL/dy.
    pub(crate) fn gradient_of_kept(&self, kept: &Kept, rows: Range<usize>, dy: &[f32]) -> Vec<f32> {
        let width = self.width;
        let mut dx = unwritten(rows.len() * 2 * width);
        let (of_x, of_y) = self.pieces();
        let pieces = dx.par_chunks_mut(of_x).zip(dy.par_chunks(of_y));
        pieces.enumerate().for_each(|(piece, (dx, dy))| {
            let first = rows.start + piece * of_y / width;
            vectorize(
                #[inline(always)]
                || {
                    for (i, (dx, dy)) in dx.chunks_mut(2 * width).zip(dy.chunks(width)).enumerate()
                    {
                        let (d_value, d_gate) = dx.split_at_mut(width);
                        for (value, gate, cols) in kept.row(first + i) {
                            let (d_value, d_gate) =
                                (&mut d_value[cols.clone()], &mut d_gate[cols.clone()]);
                            geglu_gradient(value, gate, &dy[cols], d_value, d_gate);
                        }
                    }
                },
            );
        });
        dx
    }

    /// Puts dL/dx in the place of x.
    pub(crate) fn turn_into_gradient(&self, x: &mut [f32], dy: &[f32]) {
        let width = self.width;
        let (of_x, of_y) = self.pieces();
        let pieces = x.par_chunks_mut(of_x).zip(dy.par_chunks(of_y));
        pieces.for_each(|(x, dy)| {
            vectorize(
                #[inline(always)]
                || {
                    for (x, dy) in x.chunks_mut(2 * width).zip(dy.chunks(width)) {
                        let (value, gate) = x.split_at_mut(width);
                        for ((value, gate), &dy) in value.iter_mut().zip(gate).zip(dy) {
                            (*value, *gate) = geglu_slopes(*value, *gate, dy);
                        }
                    }
                },
            );
        });
    }
}

/// (value, gate) of all rows, rounded: columns by columns, in these row by row, in these first the values.
pub(crate) struct Kept {
    pub(crate) numbers: Vec<bf16>,
    pub(crate) n_rows: usize,
    pub(crate) width: usize,
    /// How many columns lie together; the last may be fewer.
    pub(crate) columns: usize,
}

impl Kept {
    /// Values, gates and columns of a row.
    #[inline(always)]
    fn row(&self, row: usize) -> impl Iterator<Item = (&[bf16], &[bf16], Range<usize>)> {
        (0..self.width).step_by(self.columns).map(move |start| {
            let cols = start..self.width.min(start + self.columns);
            let at = 2 * (start * self.n_rows + row * cols.len());
            let (value, gate) = self.numbers[at..at + 2 * cols.len()].split_at(cols.len());
            (value, gate, cols)
        })
    }
}

/// y = value·gelu(gate), inside of a vectorized loop.
#[inline(always)]
pub(crate) fn geglu(value: &[f32], gate: &[f32], y: &mut [f32]) {
    for (y, (&value, &gate)) in y.iter_mut().zip(value.iter().zip(gate)) {
        *y = value * gate * normal_cdf(gate);
    }
}

#[inline(always)]
fn geglu_gradient<T: Number>(
    value: &[T],
    gate: &[T],
    dy: &[f32],
    d_value: &mut [f32],
    d_gate: &mut [f32],
) {
    let outputs = d_value.iter_mut().zip(d_gate);
    let inputs = value.iter().zip(gate).zip(dy);
    for ((d_value, d_gate), ((value, gate), &dy)) in outputs.zip(inputs) {
        (*d_value, *d_gate) = geglu_slopes(value.to_f32(), gate.to_f32(), dy);
    }
}

/// dL/dvalue and dL/dgate.
#[inline(always)]
fn geglu_slopes(value: f32, gate: f32, dy: f32) -> (f32, f32) {
    (dy * gate * normal_cdf(gate), dy * value * gelu_slope(gate))
}

impl Function for Geglu {
    const NAME: &'static str = "geglu";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = operands[0].contiguous()?;
        let y = self.values(Values::of(&x)?.as_slice()?);
        tensor(y, with_last(x.dims(), self.width), x.device())
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
        let dx = self.gradient(x_values.as_slice()?, dy_values.as_slice()?);
        Ok(vec![Some(tensor(dx, x.shape(), x.device())?)])
    }
}

/// Dimensions with another last one.
pub(crate) fn with_last(dims: &[usize], last: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(old) = dims.last_mut() {
        *old = last;
    }
    dims
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

    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::Shape
    }
}
