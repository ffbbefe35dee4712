//! 3x3 convolutions of planes with fewer products (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308).
//!
//! ```text
//! Y = Aᵀ [ Σ_in (G g Gᵀ) ∘ (Bᵀ d B) ] A
//! ```
//! | symbol | here | shape |
//! |---|---|---|
//! | d | a tile of the input, two pixels wider than its output | `[T, T]` |
//! | g | the kernel between two channels | `[3, 3]` |
//! | U = G g Gᵀ | `kernels` | `[out, T², in]` |
//! | V = Bᵀ d B | `seen` | `[in, T², tiles]` |
//! | Y | a tile of the output | `[T - 2, T - 2]` |
//!
//! The sums over channels are T² matrix products for (T - 2)² pixels, where the plain convolution needs 9 products per
//! pixel: four times as many for T = 6. Rounding errors are about 1e-5 of the largest value then. Transforming the kernels
//! takes as long as the products of some dozens of tiles, so that small planes are convolved as they are.

use rayon::prelude::*;

use super::{
    gemm::{Matrix, MatrixMut, Write, gemm},
    memory::{unwritten, with_scratch},
    simd::{items_per_thread, vectorize},
};

/// Side of a tile of the input.
const T: usize = 6;
/// Side of a tile of the output.
const M: usize = T - 2;

/// The matrices of tiles.
#[derive(Debug)]
struct Transforms {
    /// Bᵀ
    input: [[f32; T]; T],
    /// G
    kernel: [[f32; 3]; T],
    /// Aᵀ
    output: [[f32; T]; M],
}

const TRANSFORMS: Transforms = Transforms {
    input: [
        [4.0, 0.0, -5.0, 0.0, 1.0, 0.0],
        [0.0, -4.0, -4.0, 1.0, 1.0, 0.0],
        [0.0, 4.0, -4.0, -1.0, 1.0, 0.0],
        [0.0, -2.0, -1.0, 2.0, 1.0, 0.0],
        [0.0, 2.0, -1.0, -2.0, 1.0, 0.0],
        [0.0, 4.0, 0.0, -5.0, 0.0, 1.0],
    ],
    kernel: [
        [1.0 / 4.0, 0.0, 0.0],
        [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
        [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
        [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
        [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
        [0.0, 0.0, 1.0],
    ],
    output: [
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
        [0.0, 1.0, -1.0, 2.0, -2.0, 0.0],
        [0.0, 1.0, 1.0, 4.0, 4.0, 0.0],
        [0.0, 1.0, -1.0, 8.0, -8.0, 1.0],
    ],
};

/// Tiles that are held at a time.
const MOST_TILES: usize = 1024;
/// Rows of a product that one thread takes.
const ROWS: usize = 128;
/// Pixels of a plane from which on it takes less time than the plain convolution.
const LEAST_PIXELS: usize = 2048;
/// Kernels that are transformed at a time.
const LANES: usize = 16;

/// A convolution with 3x3 kernels, stride 1 and one row of zeros on every side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Winograd {
    n_in: usize,
    n_out: usize,
    height: usize,
    width: usize,
}

impl Winograd {
    /// Where it takes less time than the plain convolution.
    pub(crate) fn suited([n_in, n_out]: [usize; 2], [height, width]: [usize; 2]) -> Option<Self> {
        let is_suited = n_in >= LANES && n_out >= LANES && height * width >= LEAST_PIXELS;
        is_suited.then_some(Self {
            n_in,
            n_out,
            height,
            width,
        })
    }

    /// All samples; `weight` is `[out, in, 3, 3]`, `shift(sample, out)` is added to every pixel.
    pub(crate) fn convolved(
        &self,
        x: &[f32],
        weight: &[f32],
        shift: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Vec<f32> {
        let (n_in, n_out, plane) = (self.n_in, self.n_out, self.height * self.width);
        let n_samples = x.len() / (n_in * plane).max(1);
        let mut y = unwritten(n_samples * n_out * plane);
        let tiles = Tiles {
            height: self.height,
            width: self.width,
            across: self.width.div_ceil(M),
        };
        let down = self.height.div_ceil(M);
        let at_once = (MOST_TILES / tiles.across).clamp(1, down);
        let places = T * T;
        let most = places * at_once * tiles.across;
        let n_kernels = n_out * places * n_in;
        with_scratch(n_kernels + (n_in + n_out) * most, |scratch| {
            let (kernels, rest) = scratch.split_at_mut(n_kernels);
            let (seen, sums) = rest.split_at_mut(n_in * most);
            self.transform_kernels(weight, kernels);
            let samples = y
                .chunks_exact_mut(n_out * plane)
                .zip(x.chunks_exact(n_in * plane));
            for (sample, (y, x)) in samples.enumerate() {
                for first in (0..down).step_by(at_once) {
                    let rows = first..down.min(first + at_once);
                    let n_tiles = rows.len() * tiles.across;
                    let seen = &mut seen[..n_in * places * n_tiles];
                    let sums = &mut sums[..n_out * places * n_tiles];
                    seen.par_chunks_exact_mut(places * n_tiles)
                        .zip(x.par_chunks_exact(plane))
                        .with_min_len(items_per_thread(places * n_tiles))
                        .for_each(|(seen, x)| {
                            for (number, row) in rows.clone().enumerate() {
                                tiles.see(x, row, |place, values| {
                                    let at = place * n_tiles + number * tiles.across;
                                    seen[at..at + tiles.across].copy_from_slice(values);
                                });
                            }
                        });
                    self.multiply(kernels, seen, sums, [places, n_tiles]);
                    y.par_chunks_exact_mut(plane)
                        .zip(sums.par_chunks_exact(places * n_tiles))
                        .enumerate()
                        .with_min_len(items_per_thread(places * n_tiles))
                        .for_each(|(out, (y, sums))| {
                            let shift = shift(sample, out);
                            for (number, row) in rows.clone().enumerate() {
                                let run = |place: usize| {
                                    let at = place * n_tiles + number * tiles.across;
                                    &sums[at..at + tiles.across]
                                };
                                tiles.show(run, row, shift, y);
                            }
                        });
                }
            }
        });
        y
    }

    /// The sums over channels, `[out, T², tiles]`: a product per place of a tile.
    fn multiply(
        &self,
        kernels: &[f32],
        seen: &[f32],
        sums: &mut [f32],
        [places, n_tiles]: [usize; 2],
    ) {
        let dst = MatrixMut::new(sums, [self.n_out, places * n_tiles]);
        dst.tiles([ROWS, n_tiles]).into_par_iter().for_each(|tile| {
            let place = tile.cols.start / n_tiles;
            let kernels = Matrix::strided(
                &kernels[place * self.n_in..],
                [self.n_out, self.n_in],
                [places * self.n_in, 1],
            );
            let seen = Matrix::strided(
                &seen[place * n_tiles..],
                [self.n_in, n_tiles],
                [places * n_tiles, 1],
            );
            let kernels = kernels.rows(tile.rows);
            gemm(tile.values, Write::Replace, kernels, seen);
        });
    }

    /// U, `[out, T², in]`.
    fn transform_kernels(&self, weight: &[f32], kernels: &mut [f32]) {
        let n_in = self.n_in;
        kernels
            .par_chunks_exact_mut(T * T * n_in)
            .zip(weight.par_chunks_exact(9 * n_in))
            .with_min_len(items_per_thread(T * T * n_in))
            .for_each(|(kernels, weight)| {
                vectorize(
                    #[inline(always)]
                    || {
                        for (chunk, weight) in weight.chunks(9 * LANES).enumerate() {
                            let n = weight.len() / 9;
                            let mut taps = [[0.0f32; LANES]; 9];
                            for (lane, kernel) in weight.chunks_exact(9).enumerate() {
                                for (tap, &value) in kernel.iter().enumerate() {
                                    taps[tap][lane] = value;
                                }
                            }
                            for row in 0..T {
                                let mut half = [[0.0f32; LANES]; 3];
                                for (column, half) in half.iter_mut().enumerate() {
                                    for tap in 0..3 {
                                        let factor = TRANSFORMS.kernel[row][tap];
                                        add(half, factor, &taps[3 * tap + column]);
                                    }
                                }
                                for (column, factors) in TRANSFORMS.kernel.iter().enumerate() {
                                    let mut value = [0.0f32; LANES];
                                    for (half, factor) in half.iter().zip(factors) {
                                        add(&mut value, *factor, half);
                                    }
                                    let at = (row * T + column) * n_in + chunk * LANES;
                                    kernels[at..at + n].copy_from_slice(&value[..n]);
                                }
                            }
                        }
                    },
                );
            });
    }
}

/// sum += factor · x
#[inline(always)]
fn add(sum: &mut [f32; LANES], factor: f32, x: &[f32; LANES]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
    }
}

/// out = Σ factors · inputs, element by element; the inputs are as long as `out`.
#[inline(always)]
fn combine<'a, const N: usize>(
    out: &mut [f32],
    factors: &[f32; N],
    input: impl Fn(usize) -> &'a [f32],
) {
    out.fill(0.0);
    for (i, &factor) in factors.iter().enumerate() {
        if factor != 0.0 {
            for (out, x) in out.iter_mut().zip(input(i)) {
                *out += factor * x;
            }
        }
    }
}

/// How a plane is cut into tiles.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    height: usize,
    width: usize,
    /// Tiles in a row.
    across: usize,
}

impl Tiles {
    /// V of a row of tiles of one plane `x` `[H, W]`: `write(place in the tile, one value per tile)`.
    fn see(&self, x: &[f32], row: usize, mut write: impl FnMut(usize, &[f32])) {
        // With the zeros around it, and to the end of the last tile.
        let padded = self.across * M + T - M;
        let n_phase = self.across + (T - M).div_ceil(M);
        with_scratch((T + 1) * padded + M * n_phase + self.across, |scratch| {
            let (rows, rest) = scratch.split_at_mut(T * padded);
            let (combined, rest) = rest.split_at_mut(padded);
            let (phases, values) = rest.split_at_mut(M * n_phase);
            rows.fill(0.0);
            for (number, row_values) in rows.chunks_exact_mut(padded).enumerate() {
                let y = (row * M + number).wrapping_sub(1);
                if y < self.height {
                    let source = &x[y * self.width..][..self.width];
                    row_values[1..=self.width].copy_from_slice(source);
                }
            }
            phases.fill(0.0);
            vectorize(
                #[inline(always)]
                || {
                    for (i, factors) in TRANSFORMS.input.iter().enumerate() {
                        combine(combined, factors, |k| &rows[k * padded..][..padded]);
                        for (phase, values) in phases.chunks_exact_mut(n_phase).enumerate() {
                            let source = combined[phase..].iter().step_by(M);
                            values
                                .iter_mut()
                                .zip(source)
                                .for_each(|(to, from)| *to = *from);
                        }
                        for (j, factors) in TRANSFORMS.input.iter().enumerate() {
                            combine(values, factors, |k| {
                                &phases[k % M * n_phase + k / M..][..self.across]
                            });
                            write(i * T + j, values);
                        }
                    }
                },
            );
        });
    }

    /// Y of a row of tiles, from `sums(place in the tile)`, one value per tile, into one plane `y` `[H, W]`.
    fn show<'a>(&self, sums: impl Fn(usize) -> &'a [f32], row: usize, shift: f32, y: &mut [f32]) {
        let across = self.across;
        with_scratch((T * M + 1) * across, |scratch| {
            let (half, values) = scratch.split_at_mut(T * M * across);
            vectorize(
                #[inline(always)]
                || {
                    for i in 0..T {
                        for (a, factors) in TRANSFORMS.output.iter().enumerate() {
                            let half = &mut half[(i * M + a) * across..][..across];
                            combine(half, factors, |j| sums(i * T + j));
                        }
                    }
                    let n_rows = M.min(self.height - row * M);
                    for (b, factors) in TRANSFORMS.output.iter().enumerate().take(n_rows) {
                        let y = &mut y[(row * M + b) * self.width..][..self.width];
                        for a in 0..M.min(self.width) {
                            combine(values, factors, |i| &half[(i * M + a) * across..][..across]);
                            let places = y[a..].iter_mut().step_by(M);
                            places
                                .zip(values.iter())
                                .for_each(|(y, value)| *y = value + shift);
                        }
                    }
                },
            );
        });
    }
}
