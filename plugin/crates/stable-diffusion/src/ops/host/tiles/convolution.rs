//! 3x3 convolutions by tiles, the picture being the left factor as it lies: a tile of it is 16 pixels and 32 channels, pixel
//! by pixel, and the nine taps read the same words at nine places.

use std::collections::BTreeMap;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::super::{
    gemm::{MatrixMut, Tile},
    memory::{unwritten, with_words},
    numbers::{Number, Numbers},
};
use super::Factors;
use super::block::{BLOCK, Left, STEP, Steps, TALL, TILE, TallSums};
use super::kernel::Tiles;
use super::order::Ordered;
use super::pack::{LINES, Side, TAPS, pack_lines, step_words};
use super::product::lines_per_item;
use super::sheet::{PIXEL, Sheet};

/// Pixels of one work item, about: as many as make up for bringing a block of the weight into the cache.
const ITEM_PIXELS: usize = 1024;
/// Of an item of a small picture, which is split for the sake of the threads.
const LEAST_PIXELS: usize = 256;
/// Words of pictures that are packed together: 16 MiB.
const MOST_WORDS: usize = 1 << 22;

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
pub(crate) enum Direction {
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
        let n_parts = P * most_steps(P).min(self.n_steps());
        let n_together = (1..=n_samples)
            .rev()
            .find(|&n| Sheet::of(n, self.size).part() * n_parts <= MOST_WORDS)
            .unwrap_or(1);
        let pictures = y
            .chunks_mut(n_together * self.n_out * n_pixels)
            .zip(x.chunks(n_together * self.n_in * n_pixels));
        for (i, (y, x)) in pictures.enumerate() {
            let shift = |sample, channel| shift(i * n_together + sample, channel);
            self.convolve_together::<P>(direction, x, weight, shift, y);
        }
        y
    }

    /// [`Self::convolved`] of pictures that are packed together.
    fn convolve_together<const P: usize>(
        &self,
        direction: Direction,
        x: &[f32],
        weight: Numbers<'_>,
        shift: impl Fn(usize, usize) -> f32 + Sync,
        y: &mut [f32],
    ) {
        let n_samples = x.len() / (self.n_in * self.size[0] * self.size[1]);
        let sheet = Sheet::of(n_samples, self.size);
        let n_together = most_steps(P).min(self.n_steps());
        let n_blocks = self.n_out.div_ceil(BLOCK);
        let rows_per_item = self.rows_per_item(n_samples);
        let ready = match weight {
            Numbers::Ordered(weight) if P == 1 && direction == Direction::Forward => Some(weight),
            _ => None,
        };
        // Else a block of the weight is multiplied once, and packed where that is done.
        let packs_ahead = ready.is_none() && rows_per_item < n_samples * self.size[0];
        let weight_words = match packs_ahead {
            true => n_blocks * block_words(P, n_together),
            false => 0,
        };
        let picture_words = n_together * P * sheet.part();
        with_words(picture_words + weight_words, |words| {
            let (left, right) = words.split_at_mut(picture_words);
            for first in (0..self.n_steps()).step_by(most_steps(P)) {
                let steps = first..self.n_steps().min(first + most_steps(P));
                let len = block_words(P, steps.len());
                let pack = |block: usize, words: &mut [u32]| {
                    let steps = steps.clone();
                    match weight {
                        Numbers::F32(weight) => {
                            self.pack_weight::<P, f32>(direction, weight, steps, block, words);
                        }
                        Numbers::Bf16(weight) => {
                            self.pack_weight::<P, bf16>(direction, weight, steps, block, words);
                        }
                        Numbers::Ordered(weight) => {
                            pack_ordered_weight::<P>(direction, weight, steps, block, words);
                        }
                    }
                };
                if packs_ahead {
                    // The last steps may be fewer than the memory is for.
                    let blocks = right.par_chunks_exact_mut(len).take(n_blocks);
                    blocks
                        .enumerate()
                        .for_each(|(block, words)| pack(block, words));
                }
                let left = &mut left[..steps.len() * P * sheet.part()];
                sheet.pack::<P>(self.tiles, x, self.n_in, steps.start, left);
                let (left, right) = (&*left, &*right);
                let product = Product {
                    sheet,
                    left,
                    steps: sheet.steps(P, steps.len()),
                };
                let items = self.items(y, rows_per_item);
                items.into_par_iter().for_each(|(rows, mut parts)| {
                    let outs = parts[0].1.rows.clone();
                    let block = outs.start / BLOCK;
                    let shift = |sample| {
                        let mut shifts = [0.0; BLOCK];
                        for (to, out) in shifts.iter_mut().zip(outs.clone()) {
                            *to = shift(sample, out);
                        }
                        (first == 0).then_some(shifts)
                    };
                    let mut multiply = |right: &[u32]| {
                        product.multiply::<P>(self.tiles, rows.clone(), right, &mut parts, shift);
                    };
                    if let Some(weight) = ready {
                        return multiply(weight.steps(block, steps.clone()));
                    }
                    if packs_ahead {
                        return multiply(&right[block * len..][..len]);
                    }
                    with_words(len, |words| {
                        pack(block, words);
                        multiply(words);
                    });
                });
            }
        });
    }

    /// Steps of k for one tap.
    fn n_steps(&self) -> usize {
        self.n_in.div_ceil(STEP)
    }

    /// Rows of pictures that an item has: some of one picture, or all of several.
    fn rows_per_item(&self, n_samples: usize) -> usize {
        let [height, width] = self.size;
        let n_pixels = n_samples * height * width;
        let for_all_threads = lines_per_item(n_pixels, self.n_out.div_ceil(BLOCK));
        let pixels = for_all_threads.clamp(LEAST_PIXELS, ITEM_PIXELS);
        let rows = pixels.div_ceil(width);
        if rows < height {
            rows
        } else {
            (rows / height).min(n_samples) * height
        }
    }

    /// What is done by one thread each: packed rows, and the parts of `y` that they make, with the number of their picture.
    /// Those of the same rows are neighbors: pixels that are in the cache are multiplied with all of the weight.
    fn items<'a>(&self, y: &'a mut [f32], rows_per_item: usize) -> Vec<Item<'a>> {
        let [height, width] = self.size;
        let n_pixels = height * width;
        let samples_per_item = (rows_per_item / height).max(1);
        let mut items: BTreeMap<[usize; 3], Item<'a>> = BTreeMap::new();
        for (sample, y) in y.chunks_exact_mut(self.n_out * n_pixels).enumerate() {
            let dst = MatrixMut::new(y, [self.n_out, n_pixels]);
            for part in dst.tiles([BLOCK, rows_per_item.min(height) * width]) {
                let at = [sample / samples_per_item, part.cols.start, part.rows.start];
                let [first, end] = [part.cols.start, part.cols.end]
                    .map(|pixel| sample * (height + 1) + pixel / width);
                let (rows, parts) = items.entry(at).or_insert((first..end, Vec::new()));
                rows.end = end;
                parts.push((sample, part));
            }
        }
        items.into_values().collect()
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
            // Numbers that lie apart are read with their neighbors.
            let has_neighbors =
                direction == Direction::Forward || T::IS_F32 || ends != [self.n_out, self.n_in];
            if is_whole && has_neighbors {
                self.pack_taps::<P, T>(direction, weight, at, words);
                continue;
            }
            let lines = self.taps_of(direction, weight, at);
            let taps = words.chunks_exact_mut(step_words(P));
            for (lines, words) in lines.iter().zip(taps) {
                for (half, lines) in lines.chunks_exact(BLOCK / 2 * STEP).enumerate() {
                    let words = &mut words[half * TILE..];
                    pack_lines::<P, f32>(self.tiles, Side::Right, lines, STEP, words);
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
        for half in 0..2 {
            let (row, words) = (row + half * BLOCK / 2, &mut words[half * TILE..]);
            match direction {
                Direction::Forward => {
                    let taps = &weight[(row * self.n_in + k) * TAPS..];
                    let distance = self.n_in * TAPS;
                    self.tiles.neighbors_by_taps::<P, T>(taps, distance, words);
                }
                Direction::Backward => {
                    let taps = &weight[(k * self.n_out + row) * TAPS..];
                    let distance = self.n_out * TAPS;
                    self.tiles.across_by_taps::<P, T>(taps, distance, words);
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
}

/// Packed rows, and the parts of the output that they make, with the number of their picture.
type Item<'a> = (Range<usize>, Vec<(usize, Tile<'a>)>);

/// Some steps of a convolution, the pictures of which are packed.
struct Product<'a> {
    sheet: Sheet,
    left: &'a [u32],
    steps: Steps,
}

impl Product<'_> {
    /// What a block of the weight makes of packed rows: it is added to what is there, unless there are `shifts` to begin with.
    fn multiply<const P: usize>(
        &self,
        tiles: Tiles,
        rows: Range<usize>,
        right: &[u32],
        parts: &mut [(usize, Tile<'_>)],
        shifts: impl Fn(usize) -> Option<[f32; BLOCK]>,
    ) {
        let shifts: Vec<Option<[f32; BLOCK]>> =
            parts.iter().map(|(sample, _)| shifts(*sample)).collect();
        let places = self.sheet.tiles(rows);
        let mut sums = [const { TallSums([[[0.0; TILE]; TALL]; 2]) }; 2];
        let [mut next, mut last] = sums.each_mut();
        // Sums are put in their place while those of the next block are made, which takes other parts of the processor.
        let mut made: Option<&[usize]> = None;
        tiles.configured(|configured| {
            for places in places.chunks(TALL) {
                let left = Left {
                    words: self.left,
                    // Where there are fewer, one is computed again.
                    tiles: std::array::from_fn(|i| places[i.min(places.len() - 1)] * PIXEL),
                    part: self.sheet.part(),
                };
                configured.tall_block::<P>(left, &self.steps, right, next);
                if let Some(places) = made.replace(places) {
                    self.put(tiles, places, last, parts, &shifts);
                }
                std::mem::swap(&mut next, &mut last);
            }
        });
        if let Some(places) = made {
            self.put(tiles, places, last, parts, &shifts);
        }
    }

    /// Sums of tiles, `[16 places, 16 outputs]` each, to the pixels of their places.
    fn put(
        &self,
        tiles: Tiles,
        places: &[usize],
        sums: &TallSums,
        parts: &mut [(usize, Tile<'_>)],
        shifts: &[Option<[f32; BLOCK]>],
    ) {
        let first_sample = parts[0].0;
        for (i, run) in places
            .iter()
            .enumerate()
            .flat_map(|(i, &place)| self.sheet.runs(place).map(move |run| (i, run)))
        {
            let index = run.sample.checked_sub(first_sample);
            // Places behind the rows of the item are those of another.
            let Some((index, (_, part))) = index.and_then(|i| Some((i, parts.get_mut(i)?))) else {
                continue;
            };
            let pixels = run.pixels.start.max(part.cols.start)..run.pixels.end.min(part.cols.end);
            if pixels.is_empty() {
                continue;
            }
            let first_place = run.place + pixels.start - run.pixels.start;
            for (half, sums) in sums.0.iter().enumerate() {
                let first_out = half * LINES;
                let n_outs = part.rows.len().saturating_sub(first_out).min(LINES);
                if n_outs == 0 {
                    continue;
                }
                let shifts = shifts[index].as_ref();
                let shifts = shifts.and_then(|shifts| shifts[first_out..].first_chunk());
                let at = [first_out, pixels.start - part.cols.start];
                let dims = [n_outs, pixels.len()];
                tiles.put_turned(&sums[i], first_place, shifts, &mut part.values, at, dims);
            }
        }
    }
}

/// A weight `[out, in, 3, 3]` in the order in which [`Convolution3x3::forward`] reads it.
pub(super) fn pack_whole(tiles: Tiles, weight: &[bf16], dims: [usize; 2], words: &mut [u32]) {
    let [n_out, n_in] = dims;
    let convolution = Convolution3x3 {
        tiles,
        factors: Factors::Rounded,
        size: [1, 1],
        n_in,
        n_out,
    };
    let steps = 0..convolution.n_steps();
    let blocks = words.par_chunks_exact_mut(block_words(1, steps.len()));
    blocks.enumerate().for_each(|(block, words)| {
        let steps = steps.clone();
        convolution.pack_weight::<1, bf16>(Direction::Forward, weight, steps, block, words);
    });
}

/// [`Convolution3x3::pack_weight`] of one in the order of tiles.
fn pack_ordered_weight<const P: usize>(
    direction: Direction,
    weight: Ordered<'_>,
    steps: Range<usize>,
    block: usize,
    words: &mut [u32],
) {
    let taps = words.chunks_exact_mut(step_words(P)).enumerate();
    for (i, words) in taps {
        let (step, tap) = (steps.start + i / TAPS, i % TAPS);
        let lines = match direction {
            Direction::Forward => weight.tap(tap),
            Direction::Backward => weight.tap(TAPS - 1 - tap).t(),
        };
        lines.pack::<P>(Side::Right, [block, step], words);
    }
}

/// Words of a block of the weight with so many steps.
fn block_words(n_parts: usize, n_steps: usize) -> usize {
    n_steps * TAPS * step_words(n_parts)
}

#[cfg(test)]
mod tests {
    use super::super::numbers;
    use super::*;

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

    #[test]
    fn pictures_of_a_batch_are_what_they_are_alone() {
        // Of the first, all that are together; of the second, as many as are packed at a time and one more.
        for (size, n_in, n_samples) in [([8, 8], 64, 3), ([64, 64], 960, 3)] {
            for tiles in Tiles::all() {
                let convolution = Convolution3x3 {
                    tiles,
                    factors: Factors::Rounded,
                    size,
                    n_in,
                    n_out: 32,
                };
                let x = numbers(n_samples * n_in * size[0] * size[1], 31);
                let weight = numbers(32 * n_in * TAPS, 43);
                let shift = |sample: usize, out: usize| (10 * sample + out) as f32;
                let together = convolution.forward(&x, Numbers::F32(&weight), shift);
                let alone = x.chunks_exact(n_in * size[0] * size[1]).enumerate();
                let alone = alone.flat_map(|(sample, x)| {
                    let shift = |_: usize, out: usize| shift(sample, out);
                    convolution.forward(x, Numbers::F32(&weight), shift)
                });
                assert!(together.into_iter().eq(alone), "{size:?}");
            }
        }
    }
}
