//! y = x·Wᵀ + b at every position: linear layers, 1x1 convolutions, and the two that change between them.

use candle_core::{Result, Shape, Tensor, bail};

use super::{
    gemm::{Matrix, MatrixMut, Write, parallel_gemm},
    layer::Layer,
    memory::unwritten,
    numbers::Numbers,
    simd::{sum_by, vectorize},
    tiles::Means,
};
use crate::ops::weight_dims;

/// How the channels of an activation lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrangement {
    /// `[.., channels]`: the channels of one position are neighbors.
    Tokens,
    /// `[B, channels, ..]`: the positions of one channel are neighbors.
    Channels,
}

/// The sizes of one projection.
#[derive(Debug, Clone)]
pub(crate) struct Projection {
    n_samples: usize,
    n_positions: usize,
    n_in: usize,
    n_out: usize,
    input: Arrangement,
    output: Arrangement,
    output_shape: Shape,
    means: Means,
}

impl Projection {
    /// `[.., in]` to `[.., out]`.
    pub(crate) fn tokens(x: &Tensor, weight: &Tensor) -> Result<Self> {
        let (n_out, n_in) = weight_dims(weight)?;
        let dims = x.dims();
        let Some((_, leading)) = dims.split_last() else {
            bail!("linear of a scalar")
        };
        let mut output_shape = leading.to_vec();
        output_shape.push(n_out);
        Ok(Self {
            n_samples: 1,
            n_positions: leading.iter().product(),
            n_in,
            n_out,
            input: Arrangement::Tokens,
            output: Arrangement::Tokens,
            output_shape: output_shape.into(),
            means: Means::current(),
        })
    }

    /// The same of another number of positions, for slices.
    pub(crate) fn of_positions(&self, n_positions: usize) -> Self {
        Self {
            n_positions,
            ..self.clone()
        }
    }

    /// `[B, in, h, w]` to `[B, out, h, w]`, or to `[B, h·w, out]`.
    pub(crate) fn from_channels(x: &Tensor, weight: &Tensor, output: Arrangement) -> Result<Self> {
        let (n_out, n_in) = weight_dims(weight)?;
        let (n_samples, _, height, width) = x.dims4()?;
        let n_positions = height * width;
        let output_shape = match output {
            Arrangement::Tokens => Shape::from((n_samples, n_positions, n_out)),
            Arrangement::Channels => Shape::from((n_samples, n_out, height, width)),
        };
        let input = Arrangement::Channels;
        Ok(Self {
            n_samples,
            n_positions,
            n_in,
            n_out,
            input,
            output,
            output_shape,
            means: Means::current(),
        })
    }

    /// `[B, h·w, in]` to `[B, out, h, w]`.
    pub(crate) fn to_channels(x: &Tensor, weight: &Tensor, [h, w]: [usize; 2]) -> Result<Self> {
        let (n_out, n_in) = weight_dims(weight)?;
        let (n_samples, n_positions, _) = x.dims3()?;
        if n_positions != h * w {
            bail!("{n_positions} tokens do not make a plane of {h} x {w}");
        }
        let (input, output) = (Arrangement::Tokens, Arrangement::Channels);
        let output_shape = Shape::from((n_samples, n_out, h, w));
        Ok(Self {
            n_samples,
            n_positions,
            n_in,
            n_out,
            input,
            output,
            output_shape,
            means: Means::current(),
        })
    }

    fn strides(arrangement: Arrangement, n_positions: usize, n_channels: usize) -> [usize; 2] {
        match arrangement {
            Arrangement::Tokens => [n_channels, 1],
            Arrangement::Channels => [1, n_positions],
        }
    }

    /// Sample `index` of an activation as `[positions, channels]`.
    fn view<'a>(
        &self,
        values: &'a [f32],
        index: usize,
        n_channels: usize,
        arrangement: Arrangement,
    ) -> Matrix<'a> {
        let len = self.n_positions * n_channels;
        let strides = Self::strides(arrangement, self.n_positions, n_channels);
        Matrix::strided(
            &values[index * len..(index + 1) * len],
            [self.n_positions, n_channels],
            strides,
        )
    }

    /// Σ over samples and positions of dyᵀ·x, `[out, in]`.
    fn accumulate_weight_gradient(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let dims = [self.n_out, self.n_in];
        let mut dw = vec![0.0; self.n_out * self.n_in];
        for sample in 0..self.n_samples {
            let x = self.view(x, sample, self.n_in, self.input);
            let dy = self.view(dy, sample, self.n_out, self.output);
            let dst = MatrixMut::new(&mut dw, dims);
            parallel_gemm(self.means, dst, Write::Add, dy.t(), x, |_| {});
        }
        dw
    }
}

impl Layer for Projection {
    const NAME: &'static str = "projection";
    const IS_LINEAR: bool = true;

    fn output_shape(&self) -> Shape {
        self.output_shape.clone()
    }

    fn forward(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32]) -> Vec<f32> {
        let len = self.n_positions * self.n_out;
        let mut y = unwritten(self.n_samples * len);
        let weight = weight.matrix([self.n_out, self.n_in]);
        for (sample, y) in y.chunks_exact_mut(len.max(1)).enumerate() {
            let x = self.view(x, sample, self.n_in, self.input);
            // Rows of the destination are contiguous: positions or channels.
            match self.output {
                Arrangement::Tokens => {
                    let dst = MatrixMut::new(y, [self.n_positions, self.n_out]);
                    parallel_gemm(self.means, dst, Write::Replace, x, weight.t(), |tile| {
                        if !bias.is_empty() {
                            let bias = &bias[tile.cols.clone()];
                            for row in 0..tile.rows.len() {
                                add_to(tile.values.row_mut(row), bias);
                            }
                        }
                    });
                }
                Arrangement::Channels => {
                    let dst = MatrixMut::new(y, [self.n_out, self.n_positions]);
                    parallel_gemm(self.means, dst, Write::Replace, weight, x.t(), |tile| {
                        if !bias.is_empty() {
                            for (row, &bias) in bias[tile.rows.clone()].iter().enumerate() {
                                shift(tile.values.row_mut(row), bias);
                            }
                        }
                    });
                }
            }
        }
        y
    }

    fn input_gradient(
        &self,
        _x: &[f32],
        weight: Numbers<'_>,
        _bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        let len = self.n_positions * self.n_in;
        let mut dx = unwritten(self.n_samples * len);
        let weight = weight.matrix([self.n_out, self.n_in]);
        for (sample, dx) in dx.chunks_exact_mut(len.max(1)).enumerate() {
            let dy = self.view(dy, sample, self.n_out, self.output);
            match self.input {
                Arrangement::Tokens => {
                    let dst = MatrixMut::new(dx, [self.n_positions, self.n_in]);
                    parallel_gemm(self.means, dst, Write::Replace, dy, weight, |_| {});
                }
                Arrangement::Channels => {
                    let dst = MatrixMut::new(dx, [self.n_in, self.n_positions]);
                    parallel_gemm(self.means, dst, Write::Replace, weight.t(), dy.t(), |_| {});
                }
            }
        }
        dx
    }

    fn weight_gradient(
        &self,
        x: &[f32],
        _weight: Numbers<'_>,
        _bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        self.accumulate_weight_gradient(x, dy)
    }

    fn bias_gradient(
        &self,
        _x: &[f32],
        _weight: Numbers<'_>,
        _bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        match self.output {
            Arrangement::Tokens => {
                let mut sums = vec![0.0f64; self.n_out];
                for row in dy.chunks_exact(self.n_out) {
                    for (sum, &dy) in sums.iter_mut().zip(row) {
                        *sum += f64::from(dy);
                    }
                }
                sums.into_iter().map(|sum| sum as f32).collect()
            }
            Arrangement::Channels => channel_sums(dy, self.n_out, self.n_positions, self.n_out),
        }
    }
}

/// Sums of dy `[B, channels, positions]` over positions, and over samples when the bias `[n_bias]` is shared
/// by all of them.
pub(crate) fn channel_sums(
    dy: &[f32],
    n_channels: usize,
    n_positions: usize,
    n_bias: usize,
) -> Vec<f32> {
    let mut sums = vec![0.0; n_bias];
    for (row, dy) in dy.chunks_exact(n_positions.max(1)).enumerate() {
        sums[if n_bias == n_channels {
            row % n_channels
        } else {
            row
        }] += sum_by(dy, |dy| dy) as f32;
    }
    sums
}

/// dst += src
pub(crate) fn add_to(dst: &mut [f32], src: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (dst, &src) in dst.iter_mut().zip(src) {
                *dst += src;
            }
        },
    );
}

/// dst += amount
pub(crate) fn shift(dst: &mut [f32], amount: f32) {
    vectorize(
        #[inline(always)]
        || {
            for dst in dst.iter_mut() {
                *dst += amount;
            }
        },
    );
}
