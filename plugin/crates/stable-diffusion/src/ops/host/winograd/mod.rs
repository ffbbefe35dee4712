//! 3x3 convolutions of planes with fewer products (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308).
//!
//! ```text
//! Y = Aᵀ [ Σ_read (G g Gᵀ) ∘ (Bᵀ d B) ] A
//! ```
//! | symbol | here | shape |
//! |---|---|---|
//! | d | a tile of what is read, two pixels wider than what is made of it | `[T, T]` |
//! | g | the kernel between two channels | `[3, 3]` |
//! | V = Bᵀ d B | `seen` | `[read, T², tiles]`, by groups of channels: `[T², tiles, group]` |
//! | U = G g Gᵀ | `kernels`, of a group and some channels that are made | `[group, T², made]` |
//! | Σ U ∘ V | `sums`, of these | `[T², tiles, made]` |
//! | Y | a tile of what is made | `[T - 2, T - 2]` |
//!
//! The sums over channels are T² matrix products for (T - 2)² pixels, where the plain convolution needs 9 products per
//! pixel: four times as many for T = 6. Rounding errors are those of the plain convolution, about. Kernels are transformed where they are multiplied, for as many channels as leave everything in the
//! second-level cache: transformed as a whole they would be four times the weight, and take longer to read than to make.
//!
//! The gradient of what is read is a convolution too, of the gradient of what is made, with the kernels turned around.
//!
//! | file | what |
//! |---|---|
//! | `transforms.rs` | B, G and A |

mod transforms;

use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use self::transforms::{See, Show, TransformKernels};
use super::{
    gemm::{Matrix, MatrixMut, Write},
    memory::{unwritten, with_scratch},
    numbers::{Number, Numbers},
    tiles::Direction,
    turn::{Lanes, SIDE, turn},
    unpacked::gemm_unpacked,
};

/// Side of a tile of what is read.
const T: usize = 6;
/// Side of a tile of what is made.
const M: usize = T - 2;
/// Numbers of a tile.
const PLACES: usize = T * T;
const TAPS: usize = 9;

/// Tiles that are multiplied at a time: their sums stay in the second-level cache.
const MOST_TILES: usize = 128;
/// Channels that are read at a time, and those that are made. What of them meets in one product stays in the first-level
/// cache. Sums over few channels, which are added up, lose less to rounding than those over many: twice as many take a tenth
/// less time, and latents after ten steps differ twice as much.
const GROUP: usize = 32;
const MADE: usize = 2 * SIDE;
/// Numbers of V that are kept at a time: 32 MiB.
const MOST_SEEN: usize = 1 << 23;
/// What lies a power of two apart falls into the same few lines of the cache.
const APART: usize = 16;
/// Numbers of U from one channel that is read to the next.
const CHANNEL: usize = PLACES * MADE + APART;

/// A convolution with 3x3 kernels, stride 1 and one row of zeros on every side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Winograd {
    n_in: usize,
    n_out: usize,
    size: [usize; 2],
}

impl Winograd {
    /// Where it takes less time than the plain convolution (measured): tiles may hang over the picture's edge a little, and
    /// there are enough of them for the kernels to be transformed.
    pub(crate) fn suited(
        n_samples: usize,
        [n_in, n_out]: [usize; 2],
        size: [usize; 2],
    ) -> Option<Self> {
        let [n_tiles, n_pixels] = [size.map(|n| n.div_ceil(M)), size].map(|[h, w]| h * w);
        let has_vectors = n_in > 0 && n_in % SIDE == 0 && n_out > 0 && n_out % SIDE == 0;
        let is_suited = has_vectors && n_samples * n_tiles >= 4 && n_tiles * PLACES <= 5 * n_pixels;
        is_suited.then_some(Self { n_in, n_out, size })
    }

    /// All samples; `weight` is `[out, in, 3, 3]`, `shift(sample, out)` is added to every pixel.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        weight: Numbers<'_>,
        shift: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Vec<f32> {
        self.convolved(Direction::Forward, x, weight, shift)
    }

    /// dL/dx of all samples from dL/dy.
    pub(crate) fn backward(&self, dy: &[f32], weight: Numbers<'_>) -> Vec<f32> {
        self.convolved(Direction::Backward, dy, weight, |_, _| 0.0)
    }

    fn convolved(
        &self,
        direction: Direction,
        x: &[f32],
        weight: Numbers<'_>,
        shift: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Vec<f32> {
        let [n_read, n_made] = match direction {
            Direction::Forward => [self.n_in, self.n_out],
            Direction::Backward => [self.n_out, self.n_in],
        };
        let planes = Planes {
            n_read,
            n_made,
            size: self.size,
        };
        match weight {
            Numbers::Ordered(_) => {
                weight.in_rows(|weight| self.convolved(direction, x, weight, shift))
            }
            Numbers::F32(weight) => planes.convolved(
                x,
                &Kernels {
                    direction,
                    planes,
                    weight,
                },
                shift,
            ),
            Numbers::Bf16(weight) => planes.convolved(
                x,
                &Kernels {
                    direction,
                    planes,
                    weight,
                },
                shift,
            ),
        }
    }
}

/// The kernels between channels.
struct Kernels<'a, N> {
    direction: Direction,
    planes: Planes,
    /// `[made, read, 3, 3]`, or `[read, made, 3, 3]` backward.
    weight: &'a [N],
}

impl<N: Number> Kernels<'_, N> {
    /// Those between sixteen channels that are read and sixteen that are made, a lane for each of these.
    fn taps(&self, read: usize, made: usize, taps: &mut [[Lanes; TAPS]; SIDE]) {
        let Planes { n_read, n_made, .. } = self.planes;
        match self.direction {
            Direction::Forward => {
                let rows = &self.weight[(made * n_read + read) * TAPS..];
                let (squares, _) = taps.as_flattened_mut().as_chunks_mut();
                for (i, square) in squares.iter_mut().enumerate() {
                    turn(&rows[SIDE * i..], n_read * TAPS, SIDE * TAPS, square);
                }
            }
            Direction::Backward => {
                /// Channels by which rows are asked for before they are needed.
                const AHEAD: usize = 4;
                for (i, taps) in taps.iter_mut().enumerate() {
                    let rows = &self.weight[((read + i) * n_made + made) * TAPS..];
                    let mut columns = [[0.0; SIDE]; SIDE];
                    turn_taps(rows, AHEAD * n_made * TAPS, &mut columns);
                    for (tap, column) in taps.iter_mut().rev().zip(columns) {
                        *tap = column;
                    }
                }
            }
        }
    }
}

/// The columns of sixteen rows of nine, which may be the last there are.
fn turn_taps<N: Number>(rows: &[N], ahead: usize, columns: &mut [Lanes; SIDE]) {
    /// What is read with the last row and is not used.
    const BEYOND: usize = SIDE - TAPS;
    let n = SIDE * TAPS;
    if rows.len() >= n + BEYOND {
        return turn(rows, TAPS, ahead, columns);
    }
    let mut padded = [rows[0]; SIDE * TAPS + BEYOND];
    padded[..n].copy_from_slice(&rows[..n]);
    turn(&padded, TAPS, ahead, columns);
}

/// Rows of tiles that are multiplied at a time, of one sample or several.
struct Block {
    spans: Vec<Span>,
    n_tiles: usize,
}

/// Some rows of tiles of one sample.
struct Span {
    sample: usize,
    rows: Range<usize>,
    /// Which tile of the block is the first.
    first_tile: usize,
}

/// Channels that are made of a block: for every span and channel the pixels.
struct Item<'a> {
    block: usize,
    made: Range<usize>,
    pixels: Vec<&'a mut [f32]>,
}

/// The pictures that are read and made.
#[derive(Debug, Clone, Copy)]
struct Planes {
    n_read: usize,
    n_made: usize,
    size: [usize; 2],
}

impl Planes {
    fn convolved<N: Number>(
        &self,
        x: &[f32],
        kernels: &Kernels<'_, N>,
        shift: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Vec<f32> {
        let plane = self.size[0] * self.size[1];
        let n_samples = x.len() / (self.n_read * plane);
        let mut y = unwritten(n_samples * self.n_made * plane);
        let blocks = self.blocks(n_samples);
        let mut items = self.items(&blocks, &mut y).into_iter().peekable();
        let len = |block: &Block| seen_len(self.n_read, block.n_tiles);
        let at_once = (MOST_SEEN / blocks.iter().map(len).fold(1, usize::max)).max(1);
        for (pass, some) in blocks.chunks(at_once).enumerate() {
            let first = pass * at_once;
            with_scratch(some.iter().map(len).sum(), |seen| {
                self.see(x, some, seen);
                let mut seen = &*seen;
                let mut parts = Vec::new();
                for block in some {
                    let (part, rest) = seen.split_at(len(block));
                    parts.push(part);
                    seen = rest;
                }
                let is_in = |item: &Item<'_>| item.block < first + some.len();
                let now: Vec<_> = std::iter::from_fn(|| items.next_if(is_in)).collect();
                now.into_par_iter().for_each(|item| {
                    let index = item.block - first;
                    self.make(kernels, &some[index], parts[index], item, &shift);
                });
            });
        }
        drop(items);
        y
    }

    fn tiles_across(&self) -> usize {
        self.size[1].div_ceil(M)
    }

    fn blocks(&self, n_samples: usize) -> Vec<Block> {
        let (across, down) = (self.tiles_across(), self.size[0].div_ceil(M));
        let n_rows = n_samples * down;
        // Blocks of one size: threads that take them end together.
        let n_blocks = n_rows.div_ceil((MOST_TILES / across).max(1)).max(1);
        let at_once = n_rows.div_ceil(n_blocks).max(1);
        let block = |start: usize| {
            let end = n_rows.min(start + at_once);
            let span = |sample: usize| {
                let rows = start.max(sample * down)..end.min((sample + 1) * down);
                Span {
                    sample,
                    first_tile: (rows.start - start) * across,
                    rows: rows.start - sample * down..rows.end - sample * down,
                }
            };
            Block {
                spans: (start / down..end.div_ceil(down)).map(span).collect(),
                n_tiles: (end - start) * across,
            }
        };
        (0..n_rows).step_by(at_once).map(block).collect()
    }

    /// All of `y`, block by block.
    fn items<'a>(&self, blocks: &[Block], y: &'a mut [f32]) -> Vec<Item<'a>> {
        let [height, width] = self.size;
        let n_chunks = self.n_made.div_ceil(MADE);
        let item = |index: usize| {
            let start = index % n_chunks * MADE;
            Item {
                block: index / n_chunks,
                made: start..self.n_made.min(start + MADE),
                pixels: Vec::new(),
            }
        };
        let mut items: Vec<_> = (0..blocks.len() * n_chunks).map(item).collect();
        let spans: Vec<_> = blocks
            .iter()
            .enumerate()
            .flat_map(|(block, of)| of.spans.iter().map(move |span| (block, span)))
            .collect();
        let planes = y.chunks_exact_mut(height * width).enumerate();
        for (index, mut rest) in planes {
            let (sample, made) = (index / self.n_made, index % self.n_made);
            for (block, span) in spans.iter().filter(|(_, span)| span.sample == sample) {
                let n_rows = height.min(span.rows.end * M) - span.rows.start * M;
                let (pixels, after) = rest.split_at_mut(n_rows * width);
                items[block * n_chunks + made / MADE].pixels.push(pixels);
                rest = after;
            }
        }
        items
    }

    /// V of all channels that are read, block by block.
    fn see(&self, x: &[f32], blocks: &[Block], mut seen: &mut [f32]) {
        let mut parts = Vec::new();
        for block in blocks {
            for start in (0..self.n_read).step_by(GROUP) {
                let group = start..self.n_read.min(start + GROUP);
                let (part, rest) = seen.split_at_mut(seen_len(group.len(), block.n_tiles));
                parts.push((block, group, part));
                seen = rest;
            }
        }
        let plane = self.size[0] * self.size[1];
        // Of a row of tiles, with the zeros around it; read in whole vectors of pixels.
        let width = self.tiles_across() * M + T - M + SIDE;
        parts.into_par_iter().for_each(|(block, group, seen)| {
            with_scratch(T * width * SIDE, |strip| {
                let (strip, _) = strip.as_chunks_mut();
                for span in &block.spans {
                    for (number, row) in span.rows.clone().enumerate() {
                        let tile = span.first_tile + number * self.tiles_across();
                        for channel in group.clone().step_by(SIDE) {
                            let first = span.sample * self.n_read + channel;
                            let x = &x[first * plane..][..SIDE * plane];
                            self.bring(x, row, strip, width);
                            Arch::new().dispatch(See {
                                pixels: strip,
                                width,
                                n_tiles: self.tiles_across(),
                                seen: &mut seen[tile * group.len() + channel - group.start..],
                                place: block.n_tiles * group.len() + APART,
                                tile: group.len(),
                            });
                        }
                    }
                }
            });
        });
    }

    /// The pixels of a row of tiles, of sixteen channels `x`.
    fn bring(&self, x: &[f32], row: usize, strip: &mut [Lanes], strip_width: usize) {
        let [height, width] = self.size;
        for (number, strip) in strip.chunks_exact_mut(strip_width).enumerate() {
            let y = (row * M + number).wrapping_sub(1);
            if y >= height {
                strip.fill([0.0; SIDE]);
                continue;
            }
            strip[0] = [0.0; SIDE];
            let (pixels, behind) = strip[1..].split_at_mut(width);
            behind.fill([0.0; SIDE]);
            let (squares, _) = pixels.as_chunks_mut();
            for (i, square) in squares.iter_mut().enumerate() {
                turn(&x[y * width + SIDE * i..], height * width, SIDE, square);
            }
            let n_done = width / SIDE * SIDE;
            for (i, pixel) in pixels.iter_mut().enumerate().skip(n_done) {
                let channels = x[y * width + i..].iter().step_by(height * width);
                pixel.iter_mut().zip(channels).for_each(|(to, &x)| *to = x);
            }
        }
    }

    /// Some channels of a block.
    fn make<N: Number>(
        &self,
        kernels: &Kernels<'_, N>,
        block: &Block,
        mut seen: &[f32],
        mut item: Item<'_>,
        shift: impl Fn(usize, usize) -> f32,
    ) {
        let (n_tiles, n_made) = (block.n_tiles, item.made.len());
        let mut taps = [[[0.0; SIDE]; TAPS]; SIDE];
        with_scratch(
            GROUP * CHANNEL + PLACES * (n_tiles * MADE + APART),
            |scratch| {
                let (transformed, sums) = scratch.split_at_mut(GROUP * CHANNEL);
                for start in (0..self.n_read).step_by(GROUP) {
                    let group = start..self.n_read.min(start + GROUP);
                    for read in group.clone().step_by(SIDE) {
                        for made in (0..n_made).step_by(SIDE) {
                            kernels.taps(read, item.made.start + made, &mut taps);
                            Arch::new().dispatch(TransformKernels {
                                taps: &taps,
                                kernels: &mut transformed[(read - start) * CHANNEL + made..],
                                channel: CHANNEL,
                                place: MADE,
                            });
                        }
                    }
                    let write = if start == 0 {
                        Write::Replace
                    } else {
                        Write::Add
                    };
                    let (of_group, rest) = seen.split_at(seen_len(group.len(), n_tiles));
                    for place in 0..PLACES {
                        let dims = [n_tiles, n_made];
                        gemm_unpacked(
                            MatrixMut::strided(
                                &mut sums[place * (n_tiles * MADE + APART)..],
                                dims,
                                [MADE, 1],
                            ),
                            write,
                            Matrix::new(
                                &of_group[place * (n_tiles * group.len() + APART)..],
                                [n_tiles, group.len()],
                            ),
                            Matrix::strided(
                                &transformed[place * MADE..],
                                [group.len(), n_made],
                                [CHANNEL, 1],
                            ),
                        );
                    }
                    seen = rest;
                }
                let all = item.pixels.chunks_exact_mut(n_made);
                for (span, pixels) in block.spans.iter().zip(all) {
                    for (number, pixels) in pixels.chunks_exact_mut(SIDE).enumerate() {
                        let first = item.made.start + number * SIDE;
                        let shifts = std::array::from_fn(|lane| shift(span.sample, first + lane));
                        let sums = &sums[span.first_tile * MADE + number * SIDE..];
                        self.show(sums, n_tiles * MADE + APART, span, &shifts, pixels);
                    }
                }
            },
        );
    }

    /// Y of a span, for sixteen channels.
    fn show(
        &self,
        sums: &[f32],
        place: usize,
        span: &Span,
        shifts: &Lanes,
        pixels: &mut [&mut [f32]],
    ) {
        let [height, width] = self.size;
        let across = self.tiles_across();
        for (number, row) in span.rows.clone().enumerate() {
            for tile in 0..across {
                let mut values = [[0.0; SIDE]; M * M];
                let mut channels = values;
                Arch::new().dispatch(Show {
                    sums: &sums[(number * across + tile) * MADE..],
                    place,
                    shifts,
                    pixels: &mut values,
                });
                turn(values.as_flattened(), SIDE, 0, &mut channels);
                let n = M.min(width - tile * M);
                for (pixels, values) in pixels.iter_mut().zip(&channels) {
                    let rows = pixels[number * M * width..].chunks_mut(width);
                    let values = values.chunks_exact(M).take(height - row * M);
                    for (row, values) in rows.zip(values) {
                        row[tile * M..][..n].copy_from_slice(&values[..n]);
                    }
                }
            }
        }
    }
}

/// Numbers of V.
fn seen_len(n_channels: usize, n_tiles: usize) -> usize {
    PLACES * (n_channels * n_tiles + n_channels.div_ceil(GROUP) * APART)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn numbers(n: usize, step: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * step) % 101) as f32 / 50.0 - 1.0)
            .collect()
    }

    /// One pixel of a convolution of planes `x`, from the definition; `kernel(made, read, tap)`.
    fn pixel(
        x: &[f32],
        size: [usize; 2],
        kernel: impl Fn(usize, usize) -> f32,
        at: [usize; 2],
    ) -> f64 {
        let [height, width] = size;
        let channels = x.chunks_exact(height * width).enumerate();
        let products =
            channels.flat_map(|(channel, x)| (0..TAPS).map(move |tap| (channel, x, tap)));
        products
            .map(|(channel, x, tap)| {
                let [y, column] = [at[0] + tap / 3, at[1] + tap % 3].map(|n| n.wrapping_sub(1));
                let is_inside = y < height && column < width;
                let x = if is_inside {
                    x[y * width + column]
                } else {
                    0.0
                };
                f64::from(x) * f64::from(kernel(channel, tap))
            })
            .sum()
    }

    /// Sizes that tiles hang over, more channels than a group has, samples that share a block and ones that do not, and
    /// kernels of either precision: forward and backward.
    #[test]
    fn they_are_convolutions() {
        for (n_samples, [n_in, n_out], size) in [
            (1, [16, 32], [8, 8]),
            (3, [80, 48], [8, 8]),
            (2, [16, 16], [15, 23]),
            (5, [32, 16], [20, 16]),
            (1, [16, 16], [4, 268]),
        ] {
            let plane = size[0] * size[1];
            let winograd = Winograd::suited(n_samples, [n_in, n_out], size).unwrap();
            let weight = numbers(n_out * n_in * TAPS, 37);
            let halves: Vec<bf16> = weight.iter().map(|&n| bf16::from_f32(n)).collect();
            let widened: Vec<f32> = halves.iter().map(|n| n.to_f32()).collect();
            let x = numbers(n_samples * n_in * plane, 29);
            let dy = numbers(n_samples * n_out * plane, 31);
            let shift = |sample: usize, out: usize| (sample * 7 + out) as f32;
            for (numbers, weight) in [
                (Numbers::F32(&weight), &weight),
                (Numbers::Bf16(&halves), &widened),
            ] {
                let y = winograd.forward(&x, numbers, shift);
                let dx = winograd.backward(&dy, numbers);
                for i in (0..y.len()).step_by(17) {
                    let (out, sample) = (i / plane % n_out, i / plane / n_out);
                    let kernel = |read: usize, tap: usize| weight[(out * n_in + read) * TAPS + tap];
                    let at = [i % plane / size[1], i % size[1]];
                    let x = &x[sample * n_in * plane..][..n_in * plane];
                    let expected = pixel(x, size, kernel, at) + f64::from(shift(sample, out));
                    assert!(
                        (f64::from(y[i]) - expected).abs() < 5e-5,
                        "{i}: {} {expected}",
                        y[i]
                    );
                }
                for i in (0..dx.len()).step_by(17) {
                    let (input, sample) = (i / plane % n_in, i / plane / n_in);
                    let kernel =
                        |read: usize, tap: usize| weight[(read * n_in + input) * TAPS + 8 - tap];
                    let at = [i % plane / size[1], i % size[1]];
                    let dy = &dy[sample * n_out * plane..][..n_out * plane];
                    let expected = pixel(dy, size, kernel, at);
                    assert!(
                        (f64::from(dx[i]) - expected).abs() < 5e-5,
                        "{i}: {} {expected}",
                        dx[i]
                    );
                }
            }
        }
    }

    #[test]
    fn it_is_for_pictures_that_tiles_cover_well() {
        assert!(Winograd::suited(1, [16, 16], [8, 8]).is_some());
        assert!(Winograd::suited(1, [16, 16], [5, 5]).is_none());
        assert!(Winograd::suited(1, [16, 16], [4, 4]).is_none());
        assert!(Winograd::suited(1, [16, 4], [64, 64]).is_none());
    }
}
