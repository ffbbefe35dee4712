//! 3x3 convolutions by tiles, the picture being the right factor as it lies: a tile of it is 16 pixels in a row and 32
//! channels, and the nine taps read the same words at nine places.
//!
//! Rows of the packed picture are one zero longer than the picture's, which stands left of the next row as it stands right
//! of its own; sums of that column are thrown away.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::super::{
    gemm::{MatrixMut, Tile, Write},
    memory::{unwritten, with_words},
    numbers::{Number, Numbers},
};
use super::Factors;
use super::block::{BLOCK, Right, STEP, Sums, TILE};
use super::kernel::Tiles;
use super::pack::{Side, pack_lines, step_words};
use super::product::lines_per_item;

const TAPS: usize = 9;
/// Pixels of one work item, about: as many as make up for bringing a block of the weight into the cache.
const ITEM_PIXELS: usize = 1024;
/// Of an item of a small picture, which is split for the sake of the threads.
const LEAST_PIXELS: usize = 256;

/// Steps of 32 channels that are packed at a time: with so many, pixels of an item and a block of the weight are in a
/// second-level cache together.
const fn most_steps(n_parts: usize) -> usize {
    30 / n_parts
}

/// A convolution of stride 1 with a padding of 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Convolution3x3 {
    pub(crate) tiles: Tiles,
    pub(crate) factors: Factors,
    /// Height and width.
    pub(crate) size: [usize; 2],
    /// Channels of the picture that it reads.
    pub(crate) n_in: usize,
    /// And of the one that it makes.
    pub(crate) n_out: usize,
}

/// Which way a weight `[out, in, 3, 3]` is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    /// From the gradient of the output to that of the input: in and out changed, taps mirrored.
    Backward,
}

impl Convolution3x3 {
    /// Pictures `x` `[B, in, H, W]` to `[B, out, H, W]`; `shift(sample, channel)` is added.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        weight: Numbers<'_>,
        shift: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Vec<f32> {
        self.run(Direction::Forward, x, weight, shift)
    }

    /// Gradients `[B, in, H, W]`, here those of the output, to those of the input `[B, out, H, W]`; the weight is `[in, out,
    /// 3, 3]`.
    pub(crate) fn backward(&self, dy: &[f32], weight: Numbers<'_>) -> Vec<f32> {
        self.run(Direction::Backward, dy, weight, |_, _| 0.0)
    }

    fn run(
        &self,
        direction: Direction,
        x: &[f32],
        weight: Numbers<'_>,
        shift: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Vec<f32> {
        match self.factors {
            Factors::Rounded => self.convolved::<1>(direction, x, weight, shift),
            Factors::Paired => self.convolved::<2>(direction, x, weight, shift),
            Factors::Exact => self.convolved::<3>(direction, x, weight, shift),
        }
    }

    fn convolved<const P: usize>(
        &self,
        direction: Direction,
        x: &[f32],
        weight: Numbers<'_>,
        shift: impl Fn(usize, usize) -> f32 + Sync,
    ) -> Vec<f32> {
        let n_pixels = self.size[0] * self.size[1];
        let n_samples = x.len() / (self.n_in * n_pixels).max(1);
        let mut y = unwritten(n_samples * self.n_out * n_pixels);
        let plane = Plane::of(self.size);
        let n_together = most_steps(P).min(self.n_steps());
        let n_blocks = self.n_out.div_ceil(BLOCK);
        let left_words = match self.packs_ahead() {
            true => n_blocks * block_words(P, n_together),
            false => 0,
        };
        let right_words = n_together * STEP / 2 * P * plane.len;
        with_words(left_words + right_words, |words| {
            let (left, right) = words.split_at_mut(left_words);
            for first in (0..self.n_steps()).step_by(most_steps(P)) {
                let steps = first..self.n_steps().min(first + most_steps(P));
                let pack = |block: usize, words: &mut [u32]| {
                    let steps = steps.clone();
                    match weight {
                        Numbers::F32(weight) => {
                            self.pack_weight::<P, f32>(direction, weight, steps, block, words);
                        }
                        Numbers::Bf16(weight) => {
                            self.pack_weight::<P, bf16>(direction, weight, steps, block, words);
                        }
                    }
                };
                if self.packs_ahead() {
                    // The last steps may be fewer than the memory is for.
                    let blocks = left.par_chunks_exact_mut(block_words(P, steps.len()));
                    blocks
                        .take(n_blocks)
                        .enumerate()
                        .for_each(|(block, words)| pack(block, words));
                }
                let samples = y.chunks_exact_mut(self.n_out * n_pixels);
                for (sample, (y, x)) in samples
                    .zip(x.chunks_exact(self.n_in * n_pixels))
                    .enumerate()
                {
                    let right = &mut right[..steps.len() * STEP / 2 * P * plane.len];
                    self.pack_picture::<P>(&plane, x, steps.start * STEP / 2, right);
                    let shift = |channel| (first == 0).then(|| shift(sample, channel));
                    let with_weight = |block: usize, work: &mut dyn FnMut(&[u32])| {
                        let len = block_words(P, steps.len());
                        if self.packs_ahead() {
                            return work(&left[block * len..][..len]);
                        }
                        with_words(len, |words| {
                            pack(block, words);
                            work(words);
                        });
                    };
                    self.multiply::<P>(&plane, with_weight, right, steps.len(), y, shift);
                }
            }
        });
        y
    }

    /// Steps of k for one tap.
    fn n_steps(&self) -> usize {
        self.n_in.div_ceil(STEP)
    }

    /// Whether a block of the weight is multiplied more than once: else it is packed where that is done.
    fn packs_ahead(&self) -> bool {
        self.rows_per_item() < self.size[0]
    }

    fn rows_per_item(&self) -> usize {
        let [height, width] = self.size;
        let for_all_threads = lines_per_item(height * width, self.n_out.div_ceil(BLOCK));
        let pixels = for_all_threads.clamp(LEAST_PIXELS, ITEM_PIXELS);
        pixels.div_ceil(width).min(height)
    }

    /// A block of 32 output channels, 32 input channels by 32 of these steps, tap by tap.
    fn pack_weight<const P: usize, T: Number>(
        &self,
        direction: Direction,
        weight: &[T],
        steps: Range<usize>,
        block: usize,
        words: &mut [u32],
    ) {
        let words = words.chunks_exact_mut(TAPS * step_words(P));
        for (step, words) in steps.zip(words) {
            let at = [block * BLOCK, step * STEP];
            let ends = [at[0] + BLOCK, at[1] + STEP];
            let is_whole = ends[0] <= self.n_out && ends[1] <= self.n_in;
            // Numbers that are gathered may be read with their neighbors.
            if is_whole && (T::IS_F32 || ends != [self.n_out, self.n_in]) {
                self.pack_taps::<P, T>(direction, weight, at, words);
                continue;
            }
            let lines = self.taps_of(direction, weight, at);
            let taps = words.chunks_exact_mut(step_words(P));
            for (lines, words) in lines.iter().zip(taps) {
                for (half, lines) in lines.chunks_exact(BLOCK / 2 * STEP).enumerate() {
                    let words = &mut words[half * TILE..];
                    pack_lines::<P, f32>(self.tiles, Side::Left, lines, STEP, words);
                }
            }
        }
    }

    /// 32 output channels and as many input channels, tap by tap.
    fn pack_taps<const P: usize, T: Number>(
        &self,
        direction: Direction,
        weight: &[T],
        [row, k]: [usize; 2],
        words: &mut [u32],
    ) {
        for (tap, words) in words.chunks_exact_mut(step_words(P)).enumerate() {
            for half in 0..2 {
                let (row, words) = (row + half * BLOCK / 2, &mut words[half * TILE..]);
                match direction {
                    Direction::Forward => {
                        let taps = &weight[(row * self.n_in + k) * TAPS + tap..];
                        let distance = self.n_in * TAPS;
                        self.tiles
                            .neighbors::<P, TAPS, T>(taps, distance, words, 2 * TILE, false);
                    }
                    Direction::Backward => {
                        let taps = &weight[(k * self.n_out + row) * TAPS + TAPS - 1 - tap..];
                        let distance = self.n_out * TAPS;
                        self.tiles
                            .across::<P, TAPS, T>(taps, distance, words, 2 * TILE, true);
                    }
                }
            }
        }
    }

    /// `[tap][row][k]` of 32 output and 32 input channels; zeros beyond the last.
    fn taps_of<T: Number>(
        &self,
        direction: Direction,
        weight: &[T],
        [row, k]: [usize; 2],
    ) -> [[f32; BLOCK * STEP]; TAPS] {
        let mut lines = [[0.0; BLOCK * STEP]; TAPS];
        let n_rows = (self.n_out - row).min(BLOCK);
        let n_k = (self.n_in - k).min(STEP);
        match direction {
            Direction::Forward => {
                for i in 0..n_rows {
                    let weights = &weight[((row + i) * self.n_in + k) * TAPS..][..n_k * TAPS];
                    for (j, taps) in weights.as_chunks::<TAPS>().0.iter().enumerate() {
                        for (lines, &value) in lines.iter_mut().zip(taps) {
                            lines[i * STEP + j] = value.to_f32();
                        }
                    }
                }
            }
            Direction::Backward => {
                for j in 0..n_k {
                    let weights = &weight[((k + j) * self.n_out + row) * TAPS..][..n_rows * TAPS];
                    for (i, taps) in weights.as_chunks::<TAPS>().0.iter().enumerate() {
                        for (lines, &value) in lines.iter_mut().rev().zip(taps) {
                            lines[i * STEP + j] = value.to_f32();
                        }
                    }
                }
            }
        }
        lines
    }

    /// Pair by pair of channels, from one of them on; a word is one pixel of both.
    fn pack_picture<const P: usize>(
        &self,
        plane: &Plane,
        x: &[f32],
        first_pair: usize,
        words: &mut [u32],
    ) {
        let [height, width] = self.size;
        let channel =
            |c: usize| (c < self.n_in).then(|| &x[c * height * width..][..height * width]);
        let no_channel = vec![0.0; height * width];
        // A plane for every part.
        let pairs = words.par_chunks_exact_mut(P * plane.len);
        pairs.enumerate().for_each(|(pair, words)| {
            words.fill(0);
            let pair = 2 * (first_pair + pair);
            let Some(first) = channel(pair) else {
                return;
            };
            let second = channel(pair + 1).unwrap_or(&no_channel);
            let rows = first.chunks_exact(width).zip(second.chunks_exact(width));
            for (row, (first, second)) in rows.enumerate() {
                let at = plane.lead + row * plane.pitch;
                let mut planes = words.chunks_exact_mut(plane.len);
                let parts = std::array::from_fn(|_| match planes.next() {
                    Some(plane) => &mut plane[at..],
                    None => &mut [][..],
                });
                self.tiles.across_rows::<P>([first, second], parts);
            }
        });
    }

    /// What some steps contribute to `y`: sums are added to what is there, unless there is a `shift` to begin with.
    fn multiply<const P: usize>(
        &self,
        plane: &Plane,
        with_weight: impl Fn(usize, &mut dyn FnMut(&[u32])) + Sync,
        right: &[u32],
        n_steps: usize,
        y: &mut [f32],
        shift: impl Fn(usize) -> Option<f32> + Sync,
    ) {
        let [height, width] = self.size;
        let row_words = P * plane.len;
        let steps: Vec<usize> = (0..n_steps)
            .flat_map(|step| {
                let taps = (0..TAPS).map(|tap| tap / 3 * plane.pitch + tap % 3);
                taps.map(move |tap| step * STEP / 2 * row_words + tap)
            })
            .collect();
        let dst = MatrixMut::new(y, [self.n_out, height * width]);
        let mut items = dst.tiles([BLOCK, self.rows_per_item() * width]);
        // Pixels that are in the cache are multiplied with all of the weight.
        items.sort_by_key(|item| item.cols.start);
        items.into_par_iter().for_each(|mut item: Tile<'_>| {
            with_weight(item.rows.start / BLOCK, &mut |left| {
                self.multiply_item::<P>(plane, left, right, &steps, &mut item, &shift);
            });
        });
    }

    fn multiply_item<const P: usize>(
        &self,
        plane: &Plane,
        left: &[u32],
        right: &[u32],
        steps: &[usize],
        item: &mut Tile<'_>,
        shift: impl Fn(usize) -> Option<f32>,
    ) {
        let [_, width] = self.size;
        let shifts: Vec<Option<f32>> = item.rows.clone().map(shift).collect();
        let first_row = item.cols.start / width;
        let n_positions = item.cols.len() / width * plane.pitch;
        self.tiles.configured(|tiles| {
            let mut sums = Sums([0.0; BLOCK * BLOCK]);
            for start in (0..n_positions).step_by(BLOCK) {
                let right = Right {
                    words: &right[first_row * plane.pitch + start..],
                    row: P * plane.len,
                    second: 16,
                    part: plane.len,
                };
                let mut block = MatrixMut::new(&mut sums.0, [BLOCK, BLOCK]);
                tiles.block::<P>(left, right, steps, Write::Replace, &mut block, [0, 0]);
                let positions = start..n_positions.min(start + BLOCK);
                for (at, pixels) in plane.pixels_of(positions, width) {
                    for (row, shift) in shifts.iter().enumerate() {
                        let sums = &sums.0[row * BLOCK + at..];
                        let dst = item.values.row_mut(row)[pixels.clone()].iter_mut();
                        match shift {
                            Some(shift) => dst.zip(sums).for_each(|(dst, sum)| *dst = sum + shift),
                            None => dst.zip(sums).for_each(|(dst, sum)| *dst += sum),
                        }
                    }
                }
            }
        });
    }
}

/// Words of a block of the weight with so many steps.
fn block_words(n_parts: usize, n_steps: usize) -> usize {
    n_steps * TAPS * step_words(n_parts)
}

/// How a packed picture lies.
#[derive(Debug, Clone, Copy)]
struct Plane {
    /// Words from a row to the next.
    pitch: usize,
    /// Zeros before the first row.
    lead: usize,
    /// Words of all of it; no multiple of the distance at which addresses share a place in the cache.
    len: usize,
}

impl Plane {
    fn of([height, width]: [usize; 2]) -> Self {
        let pitch = width + 1;
        let lead = pitch + 1;
        let n_positions = (height * pitch).next_multiple_of(BLOCK) + BLOCK;
        let lines = (lead + n_positions + lead).div_ceil(16);
        Self {
            pitch,
            lead,
            len: (lines | 1) * 16,
        }
    }

    /// Runs of positions that are pixels: where they begin within the range, and which pixels they are.
    fn pixels_of(
        &self,
        positions: Range<usize>,
        width: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>)> {
        let pitch = self.pitch;
        let rows = positions.start / pitch..positions.end.div_ceil(pitch);
        rows.filter_map(move |row| {
            let begin = positions.start.max(row * pitch);
            let end = positions.end.min(row * pitch + width);
            let pixel = |position: usize| row * width + position - row * pitch;
            (begin < end).then(|| (begin - positions.start, pixel(begin)..pixel(end)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, step: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * step) % 97) as f32 / 48.0 - 1.0)
            .collect()
    }

    /// By its definition; `[B, in, H, W]` to `[B, out, H, W]`.
    fn naive(x: &[f32], weight: &[f32], [height, width]: [usize; 2], n_in: usize) -> Vec<f32> {
        let n_out = weight.len() / n_in / TAPS;
        let n_samples = x.len() / n_in / height / width;
        let at = |sample: usize, channel: usize, y: usize, x_: usize| {
            let inside = (1..=height).contains(&y) && (1..=width).contains(&x_);
            let plane = (sample * n_in + channel) * height * width;
            if inside {
                x[plane + (y - 1) * width + x_ - 1]
            } else {
                0.0
            }
        };
        let mut out = Vec::new();
        for sample in 0..n_samples {
            for o in 0..n_out {
                for pixel in 0..height * width {
                    let (y, x) = (pixel / width, pixel % width);
                    let taps = (0..n_in * TAPS).map(|i| {
                        let (c, tap) = (i / TAPS, i % TAPS);
                        let value = at(sample, c, y + tap / 3, x + tap % 3);
                        f64::from(value) * f64::from(weight[o * n_in * TAPS + i])
                    });
                    out.push(taps.sum::<f64>() as f32);
                }
            }
        }
        out
    }

    fn worst(found: &[f32], expected: &[f32]) -> f32 {
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let errors = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
        errors.fold(0.0, f32::max) / largest
    }

    #[test]
    fn pictures_of_any_size_are_convolved_both_ways() {
        let sizes = [
            ([1, 1], 1, 1),
            ([5, 7], 33, 40),
            ([19, 33], 40, 34),
            // Channels that are packed in several turns, the last of which has fewer.
            ([33, 32], 330, 36),
        ];
        for (tiles, (size, n_in, n_out)) in Tiles::all()
            .into_iter()
            .flat_map(|tiles| sizes.map(|size| (tiles, size)))
        {
            for (factors, tolerance) in [(Factors::Exact, 1e-5), (Factors::Rounded, 2e-2)] {
                let convolution = Convolution3x3 {
                    tiles,
                    factors,
                    size,
                    n_in,
                    n_out,
                };
                let x = numbers(2 * n_in * size[0] * size[1], 31);
                let weight = numbers(n_out * n_in * TAPS, 43);
                let mut expected = naive(&x, &weight, size, n_in);
                let found = convolution.forward(&x, Numbers::F32(&weight), |_, _| 0.0);
                let error = worst(&found, &expected);
                assert!(error < tolerance, "{size:?} {factors:?}: {error}");

                let shift = |sample: usize, out: usize| (10 * sample + out) as f32;
                let planes = expected.chunks_exact_mut(size[0] * size[1]);
                for (i, plane) in planes.enumerate() {
                    plane
                        .iter_mut()
                        .for_each(|v| *v += shift(i / n_out, i % n_out));
                }
                let found = convolution.forward(&x, Numbers::F32(&weight), shift);
                assert!(worst(&found, &expected) < tolerance);

                // The gradient of the input is a convolution with the weight turned around.
                let turned: Vec<f32> = (0..weight.len())
                    .map(|i| {
                        let (o, c, tap) = (i / TAPS / n_in, i / TAPS % n_in, i % TAPS);
                        (c * n_out + o, TAPS - 1 - tap, weight[i])
                    })
                    .fold(vec![0.0; weight.len()], |mut turned, (pair, tap, value)| {
                        turned[pair * TAPS + tap] = value;
                        turned
                    });
                let backward = Convolution3x3 {
                    n_in: n_out,
                    n_out: n_in,
                    ..convolution
                };
                let dy = numbers(2 * n_out * size[0] * size[1], 29);
                let expected = naive(&dy, &turned, size, n_out);
                let error = worst(&backward.backward(&dy, Numbers::F32(&weight)), &expected);
                assert!(error < tolerance, "{size:?} {factors:?}: {error}");

                // The same numbers, kept in half of the memory.
                let half: Vec<bf16> = weight.iter().map(|&w| bf16::from_f32(w)).collect();
                let wide: Vec<f32> = half.iter().map(|w| w.to_f32()).collect();
                let both = [Numbers::Bf16(&half), Numbers::F32(&wide)];
                let [a, b] = both.map(|weight| convolution.forward(&x, weight, |_, _| 0.0));
                assert!(a == b, "{size:?} {factors:?} forward");
                let [a, b] = both.map(|weight| backward.backward(&dy, weight));
                assert!(a == b, "{size:?} {factors:?} backward");
            }
        }
    }
}
