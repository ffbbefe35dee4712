//! Matrix products by tiles.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::super::numbers::Operand;
use super::super::{
    gemm::{Matrix, MatrixMut, Tile, Write},
    memory::with_words,
    simd::vectorize,
};
use super::Factors;
use super::block::{BLOCK, STEP, Sums, Used};
use super::kernel::{Configured, Tiles};
use super::pack::{
    Side, pack, pack_alone, pack_ordered, pack_ordered_alone, packed_len, step_words,
};

/// Words of both factors that a thread goes over again and again: together they fit a second-level cache.
const LEFT_WORDS: usize = 3 << 16;
const RIGHT_WORDS: usize = 1 << 17;
/// Rows of one work item.
const ITEM_ROWS: usize = 8 * BLOCK;

/// k that is multiplied at a time.
const fn depth(n_parts: usize) -> usize {
    2 * LEFT_WORDS / ITEM_ROWS / n_parts / STEP * STEP
}

/// dst (+)= lhs · rhs over all threads; rows of `dst` are contiguous. `finish` sees every part of it once its values are
/// final, while they are still in the cache. The same shapes give the same bits, whatever the number of threads.
pub(crate) fn multiply(
    tiles: Tiles,
    factors: Factors,
    dst: MatrixMut<'_>,
    write: Write,
    lhs: Operand<'_>,
    rhs: Operand<'_>,
    finish: impl Fn(&mut Tile<'_>) + Sync,
) {
    match factors {
        Factors::Rounded => product::<1>(tiles, dst, write, lhs, rhs, finish),
        Factors::Paired => product::<2>(tiles, dst, write, lhs, rhs, finish),
        Factors::Exact => product::<3>(tiles, dst, write, lhs, rhs, finish),
    }
}

fn product<const P: usize>(
    tiles: Tiles,
    mut dst: MatrixMut<'_>,
    write: Write,
    lhs: Operand<'_>,
    rhs: Operand<'_>,
    finish: impl Fn(&mut Tile<'_>) + Sync,
) {
    let ([m, n], k) = (dst.dims(), lhs.dims()[1]);
    assert!(
        k > 0 && lhs.dims() == [m, k] && rhs.dims() == [k, n],
        "product {:?} x {:?} into {:?}",
        lhs.dims(),
        rhs.dims(),
        dst.dims()
    );
    for start in (0..k).step_by(depth(P)) {
        let range = start..k.min(start + depth(P));
        let write = if start == 0 { write } else { Write::Add };
        let is_last = range.end == k;
        let finish = |tile: &mut Tile<'_>| {
            if is_last {
                finish(tile);
            }
        };
        let (lhs, rhs) = (lhs.cols(range.clone()), rhs.rows(range));
        part_of_product::<P>(tiles, dst.reborrow(), write, lhs, rhs, finish);
    }
}

/// Lines of one of the items that some lines make, so that with `n_others` times as many items no thread waits long for
/// another; whole blocks.
pub(super) fn lines_per_item(n_lines: usize, n_others: usize) -> usize {
    /// Items for every thread.
    const ITEMS: usize = 4;
    let n_items = (ITEMS * rayon::current_num_threads()).div_ceil(n_others.max(1));
    n_lines.div_ceil(n_items).next_multiple_of(BLOCK)
}

/// Sums of some rows and columns of two products.
pub(crate) struct Both<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
    /// Of the first product and of the second, `[rows, width]`; some of the width is nothing.
    pub(crate) sums: [&'a mut [f32]; 2],
    pub(crate) width: usize,
}

/// Columns of a work item of [`multiply_both`], of factors `[n, k]`.
pub(crate) fn columns_of_both(factors: Factors, [n, k]: [usize; 2]) -> usize {
    /// Sums of more would not stay in the cache.
    const MOST_BLOCKS: usize = 4;
    let block_words = k.div_ceil(STEP) * step_words(factors.n_parts());
    let columns = (RIGHT_WORDS / 2 / block_words).clamp(1, MOST_BLOCKS) * BLOCK;
    columns.min(lines_per_item(n, 1))
}

/// lhs · rhs of two right factors of one size over all threads. `items` are their columns, each with what `finish` is given with
/// sums of them, once these are final and while they are in the cache.
pub(crate) fn multiply_both<S: Send>(
    tiles: Tiles,
    factors: Factors,
    lhs: Operand<'_>,
    rhs: [Operand<'_>; 2],
    items: Vec<(Range<usize>, S)>,
    finish: impl Fn(&mut S, Both<'_>) + Sync,
) {
    match factors {
        Factors::Rounded => products::<1, S>(tiles, lhs, rhs, items, finish),
        Factors::Paired => products::<2, S>(tiles, lhs, rhs, items, finish),
        Factors::Exact => products::<3, S>(tiles, lhs, rhs, items, finish),
    }
}

fn products<const P: usize, S: Send>(
    tiles: Tiles,
    lhs: Operand<'_>,
    rhs: [Operand<'_>; 2],
    items: Vec<(Range<usize>, S)>,
    finish: impl Fn(&mut S, Both<'_>) + Sync,
) {
    let [m, k] = lhs.dims();
    let n_steps = k.div_ceil(STEP);
    let block_words = n_steps * step_words(P);
    let rows_at_once = (LEFT_WORDS / block_words).clamp(1, ITEM_ROWS / BLOCK) * BLOCK;
    with_words(packed_len(P, m, k), |left| {
        pack_operand::<P>(tiles, Side::Left, lhs, left);
        let left = &*left;
        items.into_par_iter().for_each(|(cols, mut state)| {
            let width = cols.len().next_multiple_of(BLOCK);
            let lines = rhs.map(|rhs| rhs.t().rows(cols.clone()));
            let ready = lines.map(ready::<P>);
            let right_len = match ready {
                [Some(_), Some(_)] => 0,
                _ => packed_len(P, width, k),
            };
            let sums_len = rows_at_once * width;
            with_words(2 * (right_len + sums_len), |words| {
                let (words, sums) = words.split_at_mut(2 * right_len);
                let (first, second) = words.split_at_mut(right_len);
                let rights = [
                    ready[0].unwrap_or_else(|| packed_alone::<P>(tiles, lines[0], first)),
                    ready[1].unwrap_or_else(|| packed_alone::<P>(tiles, lines[1], second)),
                ];
                let (first, second) = bytemuck::cast_slice_mut(sums).split_at_mut(sums_len);
                let mut sums = [first, second];
                for start in (0..m).step_by(rows_at_once) {
                    let rows = start..m.min(start + rows_at_once);
                    let left = &left[start / BLOCK * block_words..];
                    let n_rows = rows.len().next_multiple_of(BLOCK);
                    tiles.configured(|tiles| {
                        for (sums, right) in sums.iter_mut().zip(rights) {
                            let mut dst = MatrixMut::new(sums, [n_rows, width]);
                            blocks::<P>(tiles, left, right, n_steps, Write::Replace, &mut dst);
                        }
                    });
                    let both = Both {
                        rows,
                        cols: cols.clone(),
                        sums: sums.each_mut().map(|sums| &mut **sums),
                        width,
                    };
                    finish(&mut state, both);
                }
            });
        });
    });
}

/// [`product`] of factors that are packed whole.
fn part_of_product<const P: usize>(
    tiles: Tiles,
    dst: MatrixMut<'_>,
    write: Write,
    lhs: Operand<'_>,
    rhs: Operand<'_>,
    finish: impl Fn(&mut Tile<'_>) + Sync,
) {
    let ([m, n], k) = (dst.dims(), lhs.dims()[1]);
    let n_steps = k.div_ceil(STEP);
    let block_words = n_steps * step_words(P);
    let n_row_items = m.div_ceil(ITEM_ROWS);
    let columns = (RIGHT_WORDS / block_words).max(1) * BLOCK;
    let columns = columns.min(lines_per_item(n, n_row_items));
    let run = |mut item: Tile<'_>, left: &[u32], right: Right<'_>| {
        let left = &left[item.rows.start / BLOCK * block_words..];
        tiles.configured(|tiles| blocks::<P>(tiles, left, right, n_steps, write, &mut item.values));
        finish(&mut item);
    };
    with_words(packed_len(P, m, k), |left| {
        pack_operand::<P>(tiles, Side::Left, lhs, left);
        let left = &*left;
        let items = dst.tiles([ITEM_ROWS, columns]).into_par_iter();
        if let Some(right) = ready::<P>(rhs.t()) {
            return items.for_each(|item| {
                let first = item.cols.start;
                run(item, left, right.starting_at(first));
            });
        }
        if m <= ITEM_ROWS {
            // Columns are multiplied once: where they are packed they are in the cache.
            return items.for_each(|item| {
                with_words(packed_len(P, item.cols.len(), k), |right| {
                    let lines = rhs.t().rows(item.cols.clone());
                    run(item, left, packed_alone::<P>(tiles, lines, right));
                });
            });
        }
        with_words(packed_len(P, n, k), |right| {
            pack_operand::<P>(tiles, Side::Right, rhs.t(), right);
            let right = Right {
                words: right,
                block_words,
            };
            items.for_each(|item| {
                let first = item.cols.start;
                run(item, left, right.starting_at(first));
            });
        });
    });
}

/// A packed right factor.
#[derive(Debug, Clone, Copy)]
struct Right<'a> {
    words: &'a [u32],
    /// From a block of columns to the next.
    block_words: usize,
}

impl Right<'_> {
    /// Columns from the first of a block on.
    fn starting_at(self, column: usize) -> Self {
        Self {
            words: &self.words[column / BLOCK * self.block_words..],
            ..self
        }
    }
}

/// The right factor of these lines, if they are kept packed.
fn ready<const P: usize>(lines: Operand<'_>) -> Option<Right<'_>> {
    let Operand::Ordered(lines) = lines else {
        return None;
    };
    let (words, block_words) = lines.as_right().filter(|_| P == 1)?;
    Some(Right { words, block_words })
}

/// That factor, packed into these words.
fn packed_alone<'w, const P: usize>(
    tiles: Tiles,
    lines: Operand<'_>,
    words: &'w mut [u32],
) -> Right<'w> {
    pack_operand_alone::<P>(tiles, Side::Right, lines, words);
    let block_words = lines.dims()[1].div_ceil(STEP) * step_words(P);
    Right { words, block_words }
}

/// [`pack`] of numbers of any kind.
fn pack_operand<const P: usize>(tiles: Tiles, side: Side, lines: Operand<'_>, words: &mut [u32]) {
    match lines {
        Operand::F32(lines) => pack::<P, f32>(tiles, side, lines, words),
        Operand::Bf16(lines) => pack::<P, bf16>(tiles, side, lines, words),
        Operand::Ordered(lines) => pack_ordered::<P>(side, lines, words),
    }
}

/// [`pack_alone`] of numbers of any kind.
fn pack_operand_alone<const P: usize>(
    tiles: Tiles,
    side: Side,
    lines: Operand<'_>,
    words: &mut [u32],
) {
    match lines {
        Operand::F32(lines) => pack_alone::<P, f32>(tiles, side, lines, words),
        Operand::Bf16(lines) => pack_alone::<P, bf16>(tiles, side, lines, words),
        Operand::Ordered(lines) => pack_ordered_alone::<P>(side, lines, words),
    }
}

/// A factor that is multiplied more than once, or a part of one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed<'a> {
    factors: Factors,
    side: Side,
    n_lines: usize,
    /// Steps of k that are multiplied, and those that a block has.
    n_steps: usize,
    block_steps: usize,
    /// Words of the last step that k fills.
    last_words: usize,
    words: &'a [u32],
}

impl<'a> Packed<'a> {
    /// Words that a factor `[lines, k]` takes.
    pub(crate) fn len(factors: Factors, [n_lines, k]: [usize; 2]) -> usize {
        packed_len(factors.n_parts(), n_lines, k)
    }

    /// A left factor, packed on the calling thread; `words` has its length.
    pub(crate) fn left(
        tiles: Tiles,
        factors: Factors,
        lhs: Matrix<'_>,
        words: &'a mut [u32],
    ) -> Self {
        Self::new(tiles, factors, Side::Left, lhs, words)
    }

    /// A right factor `[k, columns]`, as [`Self::left`].
    pub(crate) fn right(
        tiles: Tiles,
        factors: Factors,
        rhs: Matrix<'_>,
        words: &'a mut [u32],
    ) -> Self {
        Self::new(tiles, factors, Side::Right, rhs.t(), words)
    }

    fn new(
        tiles: Tiles,
        factors: Factors,
        side: Side,
        lines: Matrix<'_>,
        words: &'a mut [u32],
    ) -> Self {
        match factors {
            Factors::Rounded => pack_alone::<1, f32>(tiles, side, lines, words),
            Factors::Paired => pack_alone::<2, f32>(tiles, side, lines, words),
            Factors::Exact => pack_alone::<3, f32>(tiles, side, lines, words),
        }
        Self::of_words(factors, side, lines.dims(), words)
    }

    /// A factor that `words` hold already.
    pub(crate) fn of_words(
        factors: Factors,
        side: Side,
        [n_lines, k]: [usize; 2],
        words: &'a [u32],
    ) -> Self {
        let n_steps = k.div_ceil(STEP);
        Self {
            factors,
            side,
            n_lines,
            n_steps,
            block_steps: n_steps,
            last_words: (k - k.saturating_sub(1) / STEP * STEP).div_ceil(2),
            words,
        }
    }

    /// The lines from one on, the first of a block.
    pub(crate) fn starting_at(self, line: usize) -> Self {
        assert!(line.is_multiple_of(BLOCK) && line < self.n_lines);
        Self {
            n_lines: self.n_lines - line,
            words: self.block(line),
            ..self
        }
    }

    /// Some of k, from the first of a step on; the last step is taken whole.
    pub(crate) fn depth(self, range: Range<usize>) -> Self {
        let steps = range.start / STEP..range.end.div_ceil(STEP);
        assert!(range.start.is_multiple_of(STEP) && steps.end <= self.n_steps);
        let is_to_the_end = steps.end == self.n_steps;
        Self {
            n_steps: steps.len(),
            last_words: if is_to_the_end {
                self.last_words
            } else {
                STEP / 2
            },
            words: &self.words[steps.start * step_words(self.factors.n_parts())..],
            ..self
        }
    }

    fn block(&self, line: usize) -> &'a [u32] {
        &self.words[line / BLOCK * self.block_steps * step_words(self.factors.n_parts())..]
    }
}

/// dst (+)= lhs · rhs, the block of 32 rows and columns that begins `at` a row and a column, of the first lines of factors
/// of P parts. What is replaced is replaced as a whole; where it is added to, rows and columns that fill the factors up may stay
/// what they are.
pub(crate) fn block_product<const P: usize>(
    tiles: &Configured,
    write: Write,
    dst: &mut MatrixMut<'_>,
    at: [usize; 2],
    lhs: Packed<'_>,
    rhs: Packed<'_>,
) {
    let n_steps = lhs.n_steps;
    assert!(
        lhs.side == Side::Left && rhs.side == Side::Right && n_steps == rhs.n_steps,
        "a left factor times a right one of its depth"
    );
    assert!(lhs.factors == rhs.factors && lhs.factors.n_parts() == P);
    let dims = match write {
        Write::Replace => [BLOCK; 2],
        Write::Add => [lhs.n_lines, rhs.n_lines].map(|n| n.min(BLOCK)),
    };
    let used = Used {
        dims,
        last_words: lhs.last_words.max(rhs.last_words),
    };
    tiles.block::<P>(lhs.words, rhs.words, n_steps, used, write, (dst, at));
}

/// dst (+)= left · right of packed factors of so many steps, from the first lines of both on.
fn blocks<const P: usize>(
    tiles: &Configured,
    left: &[u32],
    right: Right<'_>,
    n_steps: usize,
    write: Write,
    dst: &mut MatrixMut<'_>,
) {
    let ([n_rows, n_columns], block_words) = (dst.dims(), n_steps * step_words(P));
    for row in (0..n_rows).step_by(BLOCK) {
        let left = &left[row / BLOCK * block_words..];
        for column in (0..n_columns).step_by(BLOCK) {
            block::<P>(
                tiles,
                left,
                right.starting_at(column).words,
                n_steps,
                write,
                (&mut *dst, [row, column]),
            );
        }
    }
}

/// dst (+)= left · right, as much of a block as the destination has from a row and a column on.
fn block<const P: usize>(
    tiles: &Configured,
    left: &[u32],
    right: &[u32],
    n_steps: usize,
    write: Write,
    (dst, at): (&mut MatrixMut<'_>, [usize; 2]),
) {
    let [n_rows, n_columns] = dst.dims();
    let is_whole = at[0] + BLOCK <= n_rows && at[1] + BLOCK <= n_columns;
    if is_whole {
        return tiles.block::<P>(left, right, n_steps, Used::WHOLE, write, (dst, at));
    }
    let mut sums = Sums([0.0; BLOCK * BLOCK]);
    let mut whole = MatrixMut::new(&mut sums.0, [BLOCK, BLOCK]);
    let square = (&mut whole, [0, 0]);
    tiles.block::<P>(left, right, n_steps, Used::WHOLE, Write::Replace, square);
    put(&sums, write, at, dst);
}

/// Takes over as much of a block as the destination has.
fn put(sums: &Sums, write: Write, [row, column]: [usize; 2], dst: &mut MatrixMut<'_>) {
    let [n_rows, _] = dst.dims();
    let n_rows = (n_rows - row).min(BLOCK);
    vectorize(
        #[inline(always)]
        || {
            for (i, sums) in sums.0.chunks_exact(BLOCK).enumerate().take(n_rows) {
                let dst = &mut dst.row_mut(row + i)[column..];
                let n = dst.len().min(BLOCK);
                let (dst, sums) = (&mut dst[..n], &sums[..n]);
                match write {
                    Write::Replace => {
                        for (dst, sum) in dst.iter_mut().zip(sums) {
                            *dst = *sum;
                        }
                    }
                    Write::Add => {
                        for (dst, sum) in dst.iter_mut().zip(sums) {
                            *dst += sum;
                        }
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pseudo-random numbers in (-1, 1).
    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let next = |state: &mut u32| {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some((*state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        std::iter::repeat_with(|| ())
            .scan(seed, |state, ()| next(state))
            .take(n)
            .collect()
    }

    /// The largest difference from the product in f64, and the largest value of that.
    fn errors(found: &[f32], a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> [f64; 2] {
        let mut worst = [0.0f64; 2];
        for row in 0..m {
            for column in 0..n {
                let products =
                    (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[i * n + column]));
                let exact: f64 = products.sum();
                let error = (f64::from(found[row * n + column]) - exact).abs();
                worst = [worst[0].max(error), worst[1].max(exact.abs())];
            }
        }
        worst
    }

    #[test]
    fn products_are_exact_to_the_bits_of_their_factors() {
        for (tiles, dims @ [m, k, n]) in Tiles::all().into_iter().flat_map(|tiles| {
            [[1, 1, 1], [32, 32, 32], [37, 300, 50], [300, 41, 65]].map(|dims| (tiles, dims))
        }) {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let (a_turned, b_turned): (Vec<f32>, Vec<f32>) = (
                (0..m * k).map(|i| a[i % m * k + i / m]).collect(),
                (0..k * n).map(|i| b[i % k * n + i / k]).collect(),
            );
            let lefts = [Matrix::new(&a, [m, k]), Matrix::new(&a_turned, [k, m]).t()];
            let rights = [Matrix::new(&b, [k, n]), Matrix::new(&b_turned, [n, k]).t()];
            for (lhs, rhs) in lefts.into_iter().flat_map(|l| rights.map(|r| (l, r))) {
                for (factors, tolerance) in [
                    (Factors::Exact, 2e-6),
                    (Factors::Paired, 2e-5),
                    (Factors::Rounded, 2e-2),
                ] {
                    let mut y = vec![1.0; m * n];
                    let dst = MatrixMut::new(&mut y, [m, n]);
                    multiply(
                        tiles,
                        factors,
                        dst,
                        Write::Replace,
                        lhs.into(),
                        rhs.into(),
                        |_| {},
                    );
                    let [error, largest] = errors(&y, &a, &b, dims);
                    assert!(
                        error <= tolerance * largest.max(1.0),
                        "{dims:?} {factors:?}: {error}"
                    );

                    let whole = [m, n].map(|n| n.next_multiple_of(BLOCK));
                    let mut packed = vec![1.0; whole[0] * whole[1]];
                    let mut words =
                        [[m, k], [n, k]].map(|dims| vec![7; Packed::len(factors, dims)]);
                    let [left, right] = &mut words;
                    let lhs = Packed::left(tiles, factors, lhs, left);
                    let rhs = Packed::right(tiles, factors, rhs, right);
                    let mut dst = MatrixMut::new(&mut packed, whole);
                    tiles.configured(|tiles| {
                        for at in (0..m)
                            .step_by(BLOCK)
                            .flat_map(|row| (0..n).step_by(BLOCK).map(move |column| [row, column]))
                        {
                            let (lhs, rhs) = (lhs.starting_at(at[0]), rhs.starting_at(at[1]));
                            let product = match factors {
                                Factors::Rounded => block_product::<1>,
                                Factors::Paired => block_product::<2>,
                                Factors::Exact => block_product::<3>,
                            };
                            product(tiles, Write::Add, &mut dst, at, lhs, rhs);
                        }
                    });
                    for (i, y) in y.iter().enumerate() {
                        let packed = packed[i / n * whole[1] + i % n];
                        // Sums that begin with what is added.
                        let difference = f64::from(packed - (1.0 + y)).abs();
                        assert!(difference < 1e-5 * largest.max(1.0), "{dims:?}");
                    }
                }
            }
        }
    }
}
