//! Weights that lie as the kernels read them: packed once, when a model is made ready, and not for every product.
//!
//! Of a weight `[rows, columns]`, or of every tap of a kernel `[rows, columns, taps]`, a block of 32 rows and 32 columns is what
//! a step of a right factor of one part is ([`super::pack`]): `[rows / 32, columns / 32, taps, 2, 16, 16]` words, of which the
//! last three are half of the rows, pair of columns, row. x·Wᵀ takes them as they are; other products turn a block back into
//! rows first, which takes about as long as packing rows does.

use std::ops::Range;

use half::bf16;

use super::block::{BLOCK, STEP, TILE};
use super::convolution::pack_whole;
use super::kernel::Tiles;
use super::pack::{LINES, Side, TAPS, pack, step_words};
use crate::ops::host::{gemm::Matrix, memory::with_words};

/// Words of a block.
const BLOCK_WORDS: usize = step_words(1);

/// Puts a weight `[rows, columns, taps]` into this order: a matrix, or three by three kernels.
pub(crate) fn in_order(
    tiles: Tiles,
    numbers: &[bf16],
    dims: [usize; 2],
    n_taps: usize,
    words: &mut [u32],
) {
    match n_taps {
        1 => pack::<1, bf16>(tiles, Side::Right, Matrix::new(numbers, dims), words),
        TAPS => pack_whole(tiles, numbers, dims, words),
        _ => unreachable!("kernels of {n_taps} taps are not multiplied by tiles"),
    }
}

/// A weight in this order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ordered<'a> {
    tiles: Tiles,
    /// Rows and columns.
    dims: [usize; 2],
    n_taps: usize,
    words: &'a [u32],
}

impl<'a> Ordered<'a> {
    /// Whether a weight has whole blocks only, of either half of its rows too: a gate is one.
    pub(crate) fn has([n_rows, n_columns]: [usize; 2]) -> bool {
        let are_whole = n_rows.is_multiple_of(2 * BLOCK) && n_columns.is_multiple_of(STEP);
        are_whole && n_rows > 0 && n_columns > 0
    }

    /// The weight `[rows, columns, taps]` that these words are. Panics when they are another number.
    pub(crate) fn new(tiles: Tiles, dims: [usize; 2], n_taps: usize, words: &'a [u32]) -> Self {
        assert!(
            Self::has(dims) && n_taps > 0 && 2 * words.len() == dims[0] * dims[1] * n_taps,
            "{} words of a weight {dims:?} of {n_taps} taps",
            words.len()
        );
        Self {
            tiles,
            dims,
            n_taps,
            words,
        }
    }

    /// The weight as a matrix of these dimensions. Panics when it is none.
    pub(crate) fn matrix(self, dims: [usize; 2]) -> Blocks<'a> {
        assert!(
            self.n_taps == 1 && self.dims == dims,
            "a weight {:?} of {} taps as a matrix {dims:?}",
            self.dims,
            self.n_taps
        );
        self.tap(0)
    }

    /// The matrix of a tap.
    pub(crate) fn tap(self, tap: usize) -> Blocks<'a> {
        let beside = self.n_taps * BLOCK_WORDS;
        Blocks {
            tiles: self.tiles,
            words: &self.words[tap * BLOCK_WORDS..],
            dims: self.dims,
            distances: [self.dims[1] / STEP * beside, beside],
            is_turned: false,
        }
    }

    /// Of 32 rows, some steps of 32 columns, tap by tap.
    pub(super) fn steps(self, block: usize, steps: Range<usize>) -> &'a [u32] {
        let first = block * self.dims[1] / STEP;
        let words = [steps.start, steps.end].map(|step| (first + step) * self.n_taps * BLOCK_WORDS);
        &self.words[words[0]..words[1]]
    }

    /// Lends the numbers, `[rows, columns, taps]`.
    pub(crate) fn with_numbers<R>(self, work: impl FnOnce(&[bf16]) -> R) -> R {
        with_words(self.words.len(), |words| {
            let numbers: &mut [bf16] = bytemuck::cast_slice_mut(words);
            for tap in 0..self.n_taps {
                self.tap(tap).put(&mut numbers[tap..], self.n_taps);
            }
            work(numbers)
        })
    }
}

/// A matrix of such a weight, some of its blocks, or the transposed one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blocks<'a> {
    tiles: Tiles,
    /// From the first block on.
    words: &'a [u32],
    dims: [usize; 2],
    /// Words from a block to the one below it, and to the one beside it.
    distances: [usize; 2],
    is_turned: bool,
}

impl<'a> Blocks<'a> {
    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    pub(crate) fn t(self) -> Self {
        let ([rows, columns], [below, beside]) = (self.dims, self.distances);
        Self {
            dims: [columns, rows],
            distances: [beside, below],
            is_turned: !self.is_turned,
            ..self
        }
    }

    /// Some of the rows: whole blocks.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        let ends = [range.start, range.end];
        assert!(
            range.start < range.end
                && range.end <= self.dims[0]
                && ends.iter().all(|n| n.is_multiple_of(BLOCK)),
            "rows {range:?} of {:?} in blocks",
            self.dims
        );
        Self {
            words: &self.words[range.start / BLOCK * self.distances[0]..],
            dims: [range.len(), self.dims[1]],
            ..self
        }
    }

    /// The words of a right factor of one part whose lines are the rows, and those from a block of lines to the next; if they
    /// lie like that.
    pub(super) fn as_right(self) -> Option<(&'a [u32], usize)> {
        let [below, beside] = self.distances;
        (!self.is_turned && beside == BLOCK_WORDS).then_some((self.words, below))
    }

    /// A step of a block of 32 rows as part of a factor.
    pub(super) fn pack<const P: usize>(self, side: Side, at: [usize; 2], words: &mut [u32]) {
        let mut rows = [0; BLOCK_WORDS];
        let numbers = self.block(at, &mut rows);
        for half in 0..2 {
            let words = &mut words[half * TILE..];
            if self.is_turned {
                let numbers = &numbers[half * LINES..];
                self.tiles
                    .across::<P, bf16>(numbers, STEP, words, 2 * TILE, side == Side::Left);
            } else {
                let numbers = &numbers[half * LINES * STEP..];
                self.tiles.neighbors::<P, bf16>(
                    numbers,
                    STEP,
                    words,
                    2 * TILE,
                    side == Side::Right,
                );
            }
        }
    }

    /// Lends the numbers.
    pub(crate) fn with_numbers<R>(self, work: impl FnOnce(Matrix<'_, bf16>) -> R) -> R {
        let of_weight = if self.is_turned { self.t() } else { self };
        with_words(self.dims[0] * self.dims[1] / 2, |words| {
            let numbers: &mut [bf16] = bytemuck::cast_slice_mut(words);
            of_weight.put(numbers, 1);
            let matrix = Matrix::new(&*numbers, of_weight.dims);
            work(if self.is_turned { matrix.t() } else { matrix })
        })
    }

    /// Puts the numbers of all rows to where they lie so far from each other.
    fn put(self, numbers: &mut [bf16], distance: usize) {
        let [n_rows, n_columns] = self.dims;
        for row in (0..n_rows).step_by(BLOCK) {
            for column in (0..n_columns).step_by(STEP) {
                let mut rows = [0; BLOCK_WORDS];
                let block = self.block([row / BLOCK, column / STEP], &mut rows);
                for (i, from) in block.as_chunks::<STEP>().0.iter().enumerate() {
                    let to = &mut numbers[((row + i) * n_columns + column) * distance..];
                    if distance == 1 {
                        to[..STEP].copy_from_slice(from);
                    } else {
                        let to = to.iter_mut().step_by(distance);
                        to.zip(from).for_each(|(to, from)| *to = *from);
                    }
                }
            }
        }
    }

    /// A block as 32 rows of the weight, of 32 numbers each.
    fn block(self, at: [usize; 2], rows: &mut [u32; BLOCK_WORDS]) -> &[bf16] {
        let first = at[0] * self.distances[0] + at[1] * self.distances[1];
        let tiles = self.words[first..][..BLOCK_WORDS].chunks_exact(TILE);
        for (tile, rows) in tiles.zip(rows.chunks_exact_mut(TILE)) {
            let tile: &[bf16] = bytemuck::cast_slice(tile);
            self.tiles.neighbors::<1, bf16>(tile, STEP, rows, 0, true);
        }
        bytemuck::cast_slice(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::gemm::{MatrixMut, Write};
    use super::super::super::numbers::Numbers;
    use super::super::{
        Convolution3x3, Factors, columns_of_both, multiply, multiply_both, numbers,
    };
    use super::*;

    fn weight(n: usize) -> Vec<bf16> {
        numbers(n, 43).into_iter().map(bf16::from_f32).collect()
    }

    fn words(tiles: Tiles, weight: &[bf16], dims: [usize; 2], n_taps: usize) -> Vec<u32> {
        let mut words = vec![7; weight.len() / 2];
        in_order(tiles, weight, dims, n_taps, &mut words);
        words
    }

    #[test]
    fn numbers_come_back_in_rows() {
        for (tiles, n_taps) in Tiles::all().into_iter().flat_map(|t| [(t, 1), (t, TAPS)]) {
            let dims = [128, 96];
            let weight = weight(dims[0] * dims[1] * n_taps);
            let words = words(tiles, &weight, dims, n_taps);
            let ordered = Ordered::new(tiles, dims, n_taps, &words);
            ordered.with_numbers(|found| assert!(found == weight));
            if n_taps == 1 {
                let some = ordered.matrix(dims).rows(64..128).t().rows(32..64);
                some.with_numbers(|found| {
                    assert_eq!(found.dims(), [32, 64]);
                    let [column, row] = found.strides();
                    for (i, j) in (0..32).flat_map(|i| (0..64).map(move |j| (i, j))) {
                        let expected = weight[(64 + j) * dims[1] + 32 + i];
                        assert_eq!(found.data()[i * column + j * row], expected);
                    }
                });
            }
        }
    }

    /// Both ways through a layer, the weight on either side, and more of k than is packed at a time.
    #[test]
    fn products_have_the_bits_of_those_of_rows() {
        for (tiles, [n_out, n_in], n_rows) in Tiles::all().into_iter().flat_map(|tiles| {
            [
                ([128, 96], 50),
                ([64, 32], 300),
                ([64, 1568], 33),
                ([1600, 64], 70),
            ]
            .map(|(dims, n_rows)| (tiles, dims, n_rows))
        }) {
            let weight = weight(n_out * n_in);
            let words = words(tiles, &weight, [n_out, n_in], 1);
            let both = [
                Numbers::Bf16(&weight),
                Numbers::Ordered(Ordered::new(tiles, [n_out, n_in], 1, &words)),
            ]
            .map(|weight| weight.matrix([n_out, n_in]));
            let (x, dy) = (numbers(n_rows * n_in, 31), numbers(n_rows * n_out, 29));
            let (x, dy) = (
                Matrix::new(&x, [n_rows, n_in]),
                Matrix::new(&dy, [n_rows, n_out]),
            );
            for factors in [Factors::Rounded, Factors::Paired, Factors::Exact] {
                let product = |dims: [usize; 2], lhs, rhs| {
                    let mut y = vec![0.5; dims[0] * dims[1]];
                    let dst = MatrixMut::new(&mut y, dims);
                    multiply(tiles, factors, dst, Write::Add, lhs, rhs, |_| {});
                    y
                };
                let [expected, found] = both.map(|weight| {
                    [
                        product([n_rows, n_out], x.into(), weight.t()),
                        product([n_rows, n_in], dy.into(), weight),
                        product([n_out, n_rows], weight, x.t().into()),
                        product([n_in, n_rows], weight.t(), dy.t().into()),
                    ]
                });
                assert!(expected == found, "{factors:?} {n_out} {n_in} {n_rows}");

                let width = n_out / 2;
                let [expected, found] = both.map(|weight| {
                    let columns = columns_of_both(factors, [width, n_in]);
                    let items = (0..width).step_by(columns).map(|start| {
                        let columns = start..width.min(start + columns);
                        (columns, Vec::new())
                    });
                    let halves = [0..width, width..n_out].map(|rows| weight.rows(rows).t());
                    let all = std::sync::Mutex::new(Vec::new());
                    multiply_both(
                        tiles,
                        factors,
                        x.into(),
                        halves,
                        items.collect(),
                        |seen, both| {
                            let n = both.rows.len() * both.width;
                            let [value, gate] = both.sums.map(|sums| &sums[..n]);
                            seen.extend(value.iter().chain(gate.iter()).map(|v| v.to_bits()));
                            if both.rows.end == n_rows {
                                let mut all = all.lock().unwrap();
                                all.push((both.cols.start, std::mem::take(seen)));
                            }
                        },
                    );
                    let mut all = all.into_inner().unwrap();
                    all.sort();
                    all
                });
                assert!(!found.is_empty() && expected == found, "{factors:?} gated");
            }
        }
    }

    #[test]
    fn convolutions_have_the_bits_of_those_of_rows() {
        // In several turns, the last of which has fewer channels; by all threads, and by one for all pixels.
        for (tiles, size, [n_out, n_in]) in Tiles::all().into_iter().flat_map(|tiles| {
            [([33, 32], [64, 1056]), ([5, 7], [128, 32])].map(|(size, dims)| (tiles, size, dims))
        }) {
            let weight = weight(n_out * n_in * TAPS);
            let words = words(tiles, &weight, [n_out, n_in], TAPS);
            let both = [
                Numbers::Bf16(&weight),
                Numbers::Ordered(Ordered::new(tiles, [n_out, n_in], TAPS, &words)),
            ];
            let n_pixels = 2 * size[0] * size[1];
            let (x, dy) = (numbers(n_pixels * n_in, 31), numbers(n_pixels * n_out, 29));
            for factors in [Factors::Rounded, Factors::Exact] {
                let forward = Convolution3x3 {
                    tiles,
                    factors,
                    size,
                    n_in,
                    n_out,
                };
                let backward = Convolution3x3 {
                    n_in: n_out,
                    n_out: n_in,
                    ..forward
                };
                let shift = |sample: usize, out: usize| (10 * sample + out) as f32;
                let [a, b] = both.map(|weight| forward.forward(&x, weight, shift));
                assert!(a == b, "{size:?} {factors:?} forward");
                let [a, b] = both.map(|weight| backward.backward(&dy, weight));
                assert!(a == b, "{size:?} {factors:?} backward");
            }
        }
    }
}
