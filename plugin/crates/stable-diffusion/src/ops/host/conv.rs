//! 2-D convolution of `[B, C, H, W]` by gathering windows (im2col) and one matrix product per tile of pixels; plain 3x3 ones by
//! [`super::winograd`] or [`super::tiles`], whichever takes less.

use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{
    gemm::{Matrix, MatrixMut, Write, gemm, parallel_gemm},
    layer::Layer,
    memory::{unwritten, with_scratch},
    numbers::Numbers,
    ordered::dims_of,
    projection::{channel_sums, shift},
    simd::items_per_thread,
    tiles::{Convolution3x3, Means},
    winograd::Winograd,
};
use crate::ops::Padding;

/// The sizes of one convolution.
#[derive(Debug, Clone)]
pub(crate) struct Conv {
    n_samples: usize,
    n_in: usize,
    n_out: usize,
    kernel: [usize; 2],
    input: [usize; 2],
    output: [usize; 2],
    stride: usize,
    padding: Padding,
    means: Means,
}

/// How a plain 3x3 convolution is computed.
enum Way {
    Tiles(Convolution3x3),
    Winograd(Winograd),
}

/// Output pixels per tile of windows that one thread gathers for itself.
const FORWARD_TILE: usize = 128;
/// Pixels up to which all windows of a picture are gathered once and shared by the threads.
const SHARED_LIMIT: usize = 512;
/// Input channels per work item of the backward pass, and output pixels per product within it. The product
/// reorders its part of the weight every time, so it takes many pixels.
const BACKWARD_CHANNELS: usize = 32;
const BACKWARD_TILE: usize = 1024;

impl Conv {
    pub(crate) fn new(
        x: &Tensor,
        weight: &Tensor,
        stride: usize,
        padding: Padding,
    ) -> Result<Self> {
        let (n_samples, n_in, height, width) = x.dims4()?;
        let [n_out, weight_in, kernel_height, kernel_width] = dims_of(weight)[..] else {
            bail!("a convolution of weight {:?}", weight.shape())
        };
        if n_in != weight_in {
            bail!("conv2d: the weight takes {weight_in} channels, the input has {n_in}");
        }
        let side = |input: usize, kernel: usize| -> Result<usize> {
            let padded = input + padding.before + padding.after;
            if stride == 0 || kernel == 0 || padded < kernel {
                bail!("conv2d: kernel {kernel} with stride {stride} on {padded} padded pixels");
            }
            Ok((padded - kernel) / stride + 1)
        };
        let output = [side(height, kernel_height)?, side(width, kernel_width)?];
        let (kernel, input) = ([kernel_height, kernel_width], [height, width]);
        Ok(Self {
            n_samples,
            n_in,
            n_out,
            kernel,
            input,
            output,
            stride,
            padding,
            means: Means::current(),
        })
    }

    /// Values per window: in-channels x kernel area.
    fn window(&self) -> usize {
        self.n_in * self.kernel_area()
    }

    fn kernel_area(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    fn n_inputs(&self) -> usize {
        self.input[0] * self.input[1]
    }

    fn n_outputs(&self) -> usize {
        self.output[0] * self.output[1]
    }

    /// Calls `visit(tap row, first column in the tile, first input pixel or none, length)` for every run of
    /// output pixels `pixels` that one kernel tap reads from one input row; none stands for padding. Taps are
    /// those of a single channel, in the order of the weight.
    #[inline(always)]
    fn for_each_run(
        &self,
        pixels: &std::ops::Range<usize>,
        mut visit: impl FnMut(usize, usize, Option<usize>, usize),
    ) {
        let [height, width] = self.input;
        let out_width = self.output[1];
        for tap in 0..self.kernel_area() {
            let (ky, kx) = (tap / self.kernel[1], tap % self.kernel[1]);
            // Output columns whose input column stride·ox + kx - before lies inside the row.
            let first = self
                .padding
                .before
                .saturating_sub(kx)
                .div_ceil(self.stride)
                .min(out_width);
            let inside = (width + self.padding.before)
                .saturating_sub(kx)
                .div_ceil(self.stride);
            let inside = inside.clamp(first, out_width);
            let mut pixel = pixels.start;
            while pixel < pixels.end {
                let (oy, from) = (pixel / out_width, pixel % out_width);
                let to = out_width.min(from + pixels.end - pixel);
                let column = pixel - pixels.start;
                let iy = (oy * self.stride + ky).wrapping_sub(self.padding.before);
                if iy < height {
                    let (lo, hi) = (first.clamp(from, to), inside.clamp(from, to));
                    if lo > from {
                        visit(tap, column, None, lo - from);
                    }
                    if hi > lo {
                        let ix = lo * self.stride + kx - self.padding.before;
                        visit(tap, column + lo - from, Some(iy * width + ix), hi - lo);
                    }
                    if to > hi {
                        visit(tap, column + hi - from, None, to - hi);
                    }
                } else {
                    visit(tap, column, None, to - from);
                }
                pixel += to - from;
            }
        }
    }

    /// Windows of one channel `x` `[H, W]` for some output pixels: `columns` `[kernel area, pixels]`.
    fn gather(&self, x: &[f32], pixels: &std::ops::Range<usize>, columns: &mut [f32]) {
        let n = pixels.len();
        self.for_each_run(pixels, |tap, column, source, len| {
            let columns = &mut columns[tap * n + column..][..len];
            match source {
                None => columns.fill(0.0),
                Some(start) if self.stride == 1 => columns.copy_from_slice(&x[start..start + len]),
                Some(start) => {
                    for (column, x) in columns
                        .iter_mut()
                        .zip(x[start..].iter().step_by(self.stride))
                    {
                        *column = *x;
                    }
                }
            }
        });
    }

    /// Adds windows back onto the channel they were gathered from: the transpose of [`Self::gather`].
    fn scatter(&self, columns: &[f32], pixels: &std::ops::Range<usize>, dx: &mut [f32]) {
        let n = pixels.len();
        self.for_each_run(pixels, |tap, column, source, len| {
            let columns = &columns[tap * n + column..][..len];
            match source {
                None => {}
                Some(start) if self.stride == 1 => {
                    for (dx, column) in dx[start..start + len].iter_mut().zip(columns) {
                        *dx += column;
                    }
                }
                Some(start) => {
                    for (dx, column) in dx[start..].iter_mut().step_by(self.stride).zip(columns) {
                        *dx += column;
                    }
                }
            }
        });
    }

    fn gather_all(&self, x: &[f32], pixels: &std::ops::Range<usize>, columns: &mut [f32]) {
        let len = self.kernel_area() * pixels.len();
        for (x, columns) in x
            .chunks_exact(self.n_inputs())
            .zip(columns.chunks_exact_mut(len))
        {
            self.gather(x, pixels, columns);
        }
    }

    /// All windows of one sample `x`, gathered by all threads, to `columns` `[window, pixels]`.
    fn gather_shared(&self, x: &[f32], pixels: &std::ops::Range<usize>, columns: &mut [f32]) {
        let len = self.kernel_area() * pixels.len();
        let channels = columns.par_chunks_mut(len);
        channels
            .zip(x.par_chunks(self.n_inputs()))
            .with_min_len(items_per_thread(len))
            .for_each(|(columns, x)| {
                self.gather(x, pixels, columns);
            });
    }

    /// Three by three, and the picture keeps its size.
    fn is_plain(&self) -> bool {
        self.kernel == [3, 3] && self.stride == 1 && self.padding == Padding::around(1)
    }

    /// By the processor's tiles, where it has them and this is a convolution for them; from `n_in` to `n_out` channels.
    fn by_tiles(&self, n_in: usize, n_out: usize) -> Option<Convolution3x3> {
        let means = self.is_plain().then_some(self.means)?;
        let (tiles, factors) = means.for_convolution(self.n_inputs(), [n_in, n_out])?;
        Some(Convolution3x3 {
            tiles,
            factors,
            size: self.input,
            n_in,
            n_out,
        })
    }

    /// The way that takes least, where there is one for this convolution: a matrix unit multiplies faster than transforms save
    /// products, vectors do not.
    fn way(&self, n_in: usize, n_out: usize) -> Option<Way> {
        let tiles = self.by_tiles(n_in, n_out).map(Way::Tiles);
        let suited = || Winograd::suited(self.n_samples, [self.n_in, self.n_out], self.input);
        let winograd = self.is_plain().then(suited).flatten().map(Way::Winograd);
        if self.means.multiplies_fast() {
            tiles.or(winograd)
        } else {
            winograd.or(tiles)
        }
    }

    fn bias_of(&self, bias: &[f32], sample: usize, out: usize) -> f32 {
        if bias.len() == self.n_out {
            bias[out]
        } else {
            bias[sample * self.n_out + out]
        }
    }

    /// The convolution with windows that every thread gathers for itself, some pixels at a time.
    fn convolved_by_parts(&self, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let (n_pixels, window) = (self.n_outputs(), self.window());
        let weight = Matrix::new(weight, [self.n_out, window]);
        let mut y = unwritten(self.n_samples * self.n_out * n_pixels);
        let samples = y
            .chunks_exact_mut(self.n_out * n_pixels)
            .zip(x.chunks_exact(self.n_in * self.n_inputs()))
            .enumerate();
        let tiles: Vec<_> = samples
            .flat_map(|(sample, (y, x))| {
                let tiles =
                    MatrixMut::new(y, [self.n_out, n_pixels]).tiles([self.n_out, FORWARD_TILE]);
                tiles.into_iter().map(move |tile| (sample, x, tile))
            })
            .collect();
        tiles.into_par_iter().for_each(|(sample, x, mut tile)| {
            with_scratch(window * tile.cols.len(), |columns| {
                self.gather_all(x, &tile.cols, columns);
                let columns = Matrix::new(columns, [window, tile.cols.len()]);
                gemm(tile.values.reborrow(), Write::Replace, weight, columns);
            });
            for out in (0..self.n_out).filter(|_| !bias.is_empty()) {
                shift(tile.values.row_mut(out), self.bias_of(bias, sample, out));
            }
        });
        y
    }

    /// The convolution with the windows of a picture gathered once for all threads.
    fn convolved_by_all_windows(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32]) -> Vec<f32> {
        let (n_pixels, window) = (self.n_outputs(), self.window());
        let weight = weight.matrix([self.n_out, window]);
        let mut y = unwritten(self.n_samples * self.n_out * n_pixels);
        let samples = y
            .chunks_exact_mut(self.n_out * n_pixels)
            .zip(x.chunks_exact(self.n_in * self.n_inputs()))
            .enumerate();
        for (sample, (y, x)) in samples {
            with_scratch(window * n_pixels, |columns| {
                self.gather_shared(x, &(0..n_pixels), columns);
                let columns = Matrix::new(columns, [window, n_pixels]);
                let dst = MatrixMut::new(y, [self.n_out, n_pixels]);
                parallel_gemm(self.means, dst, Write::Replace, weight, columns, |tile| {
                    for (row, out) in tile.rows.clone().enumerate().filter(|_| !bias.is_empty()) {
                        shift(tile.values.row_mut(row), self.bias_of(bias, sample, out));
                    }
                });
            });
        }
        y
    }

    /// The input's gradient, channel by channel.
    fn input_gradient_by_parts(&self, weight: &[f32], dy: &[f32]) -> Vec<f32> {
        let (n_pixels, area) = (self.n_outputs(), self.kernel_area());
        let weight = Matrix::new(weight, [self.n_out, self.window()]);
        let mut dx = vec![0.0; self.n_samples * self.n_in * self.n_inputs()];
        let items: Vec<_> = dx
            .chunks_exact_mut(self.n_in * self.n_inputs())
            .zip(dy.chunks_exact(self.n_out * n_pixels))
            .flat_map(|(dx, dy)| {
                let chunks = dx.chunks_mut(BACKWARD_CHANNELS * self.n_inputs());
                chunks
                    .enumerate()
                    .map(move |(chunk, dx)| (chunk * BACKWARD_CHANNELS, dx, dy))
            })
            .collect();
        items.into_par_iter().for_each(|(first_channel, dx, dy)| {
            let dy = Matrix::new(dy, [self.n_out, n_pixels]);
            let n_rows = dx.len() / self.n_inputs() * area;
            let rows = first_channel * area..first_channel * area + n_rows;
            let weight = weight.cols(rows).t();
            for start in (0..n_pixels).step_by(BACKWARD_TILE) {
                let pixels = start..n_pixels.min(start + BACKWARD_TILE);
                with_scratch(n_rows * pixels.len(), |columns| {
                    let dst = MatrixMut::new(columns, [n_rows, pixels.len()]);
                    gemm(dst, Write::Replace, weight, dy.cols(pixels.clone()));
                    let channels = dx.chunks_exact_mut(self.n_inputs());
                    for (dx, columns) in channels.zip(columns.chunks_exact(area * pixels.len())) {
                        self.scatter(columns, &pixels, dx);
                    }
                });
            }
        });
        dx
    }
}

impl Layer for Conv {
    const NAME: &'static str = "conv2d";
    const IS_LINEAR: bool = true;

    fn output_shape(&self) -> Shape {
        Shape::from((self.n_samples, self.n_out, self.output[0], self.output[1]))
    }

    fn forward(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32]) -> Vec<f32> {
        let shift_of = |sample: usize, out: usize| match bias {
            [] => 0.0,
            bias => self.bias_of(bias, sample, out),
        };
        match self.way(self.n_in, self.n_out) {
            Some(Way::Tiles(convolution)) => return convolution.forward(x, weight, shift_of),
            Some(Way::Winograd(convolution)) => return convolution.forward(x, weight, shift_of),
            None => {}
        }
        if self.n_outputs() > SHARED_LIMIT {
            return weight.with_f32(|weight| self.convolved_by_parts(x, weight, bias));
        }
        weight.in_rows(|weight| self.convolved_by_all_windows(x, weight, bias))
    }

    fn input_gradient(
        &self,
        _x: &[f32],
        weight: Numbers<'_>,
        _bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        match self.way(self.n_out, self.n_in) {
            Some(Way::Tiles(convolution)) => return convolution.backward(dy, weight),
            Some(Way::Winograd(convolution)) => return convolution.backward(dy, weight),
            None => {}
        }
        weight.with_f32(|weight| self.input_gradient_by_parts(weight, dy))
    }

    fn weight_gradient(
        &self,
        x: &[f32],
        _weight: Numbers<'_>,
        _bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        let (n_pixels, window) = (self.n_outputs(), self.window());
        let mut dw = vec![0.0; self.n_out * window];
        let samples = x
            .chunks_exact(self.n_in * self.n_inputs())
            .zip(dy.chunks_exact(self.n_out * n_pixels));
        for (x, dy) in samples {
            let dy = Matrix::new(dy, [self.n_out, n_pixels]);
            for start in (0..n_pixels).step_by(SHARED_LIMIT) {
                let pixels = start..n_pixels.min(start + SHARED_LIMIT);
                with_scratch(window * pixels.len(), |columns| {
                    self.gather_shared(x, &pixels, columns);
                    let columns = Matrix::new(columns, [window, pixels.len()]);
                    let dst = MatrixMut::new(&mut dw, [self.n_out, window]);
                    parallel_gemm(
                        self.means,
                        dst,
                        Write::Add,
                        dy.cols(pixels),
                        columns.t(),
                        |_| {},
                    );
                });
            }
        }
        dw
    }

    fn bias_gradient(
        &self,
        _x: &[f32],
        _weight: Numbers<'_>,
        bias: &[f32],
        dy: &[f32],
    ) -> Vec<f32> {
        channel_sums(dy, self.n_out, self.n_outputs(), bias.len())
    }
}
