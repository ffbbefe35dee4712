//! Matrix products by tiles.

use rayon::prelude::*;

use super::super::{
    gemm::{Matrix, MatrixMut, Tile, Write},
    memory::with_words,
    simd::vectorize,
};
use super::Factors;
use super::block::{BLOCK, Right, STEP, Sums};
use super::kernel::Tiles;
use super::pack::{Side, pack, pack_alone, packed_len, step_words};

/// Words of the right factor that a thread goes over again and again: half of a second-level cache.
const RIGHT_WORDS: usize = 1 << 17;
/// Rows of one work item.
const ITEM_ROWS: usize = 8 * BLOCK;

/// dst (+)= lhs · rhs over all threads; rows of `dst` are contiguous. `finish` sees every part of it once its values are
/// final, while they are still in the cache. The same shapes give the same bits, whatever the number of threads.
pub(crate) fn multiply(
    tiles: Tiles,
    factors: Factors,
    dst: MatrixMut<'_>,
    write: Write,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    finish: impl Fn(&mut Tile<'_>) + Sync,
) {
    match factors {
        Factors::Rounded => product::<1>(tiles, dst, write, lhs, rhs, finish),
        Factors::Exact => product::<3>(tiles, dst, write, lhs, rhs, finish),
    }
}

fn product<const P: usize>(
    tiles: Tiles,
    dst: MatrixMut<'_>,
    write: Write,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    finish: impl Fn(&mut Tile<'_>) + Sync,
) {
    let ([m, n], k) = (dst.dims(), lhs.dims()[1]);
    assert!(
        lhs.dims() == [m, k] && rhs.dims() == [k, n],
        "product {:?} x {:?} into {:?}",
        lhs.dims(),
        rhs.dims(),
        dst.dims()
    );
    let n_steps = k.div_ceil(STEP);
    let block_words = n_steps * step_words(P);
    let steps: Vec<usize> = (0..n_steps).map(|step| step * step_words(P)).collect();
    with_words(packed_len(P, m, k), |left| {
        with_words(packed_len(P, n, k), |right| {
            pack::<P>(tiles, Side::Left, lhs, left);
            pack::<P>(tiles, Side::Right, rhs.t(), right);
            let (left, right) = (&*left, &*right);
            let columns = (RIGHT_WORDS / block_words).max(1) * BLOCK;
            let items = dst.tiles([ITEM_ROWS, columns]);
            items.into_par_iter().for_each(|mut item| {
                tiles.configured(|tiles| {
                    let mut sums = Sums([0.0; BLOCK * BLOCK]);
                    let start = |line: usize| line / BLOCK * block_words;
                    for row in (0..item.rows.len()).step_by(BLOCK) {
                        let left = &left[start(item.rows.start + row)..];
                        for column in (0..item.cols.len()).step_by(BLOCK) {
                            let right = &right[start(item.cols.start + column)..];
                            let right = Right::packed(right);
                            tiles.block::<P>(left, right, &steps, &mut sums);
                            put(&sums, write, 1.0, [row, column], &mut item.values);
                        }
                    }
                });
                finish(&mut item);
            });
        });
    });
}

/// A factor that is multiplied more than once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed<'a> {
    factors: Factors,
    side: Side,
    n_lines: usize,
    n_steps: usize,
    words: &'a [u32],
}

impl<'a> Packed<'a> {
    /// Words that a factor `[lines, k]` takes.
    pub(crate) fn len(factors: Factors, [n_lines, k]: [usize; 2]) -> usize {
        packed_len(factors.n_parts(), n_lines, k)
    }

    /// A left factor, on the calling thread; `words` has its length.
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
            Factors::Rounded => pack_alone::<1>(tiles, side, lines, words),
            Factors::Exact => pack_alone::<3>(tiles, side, lines, words),
        }
        let [n_lines, k] = lines.dims();
        let n_steps = k.div_ceil(STEP);
        Self {
            factors,
            side,
            n_lines,
            n_steps,
            words,
        }
    }

    fn block(&self, line: usize) -> &'a [u32] {
        &self.words[line / BLOCK * self.n_steps * step_words(self.factors.n_parts())..]
    }
}

/// dst (+)= scale · lhs · rhs on the calling thread; rows of `dst` are contiguous.
pub(crate) fn multiply_packed(
    tiles: Tiles,
    dst: MatrixMut<'_>,
    write: Write,
    scale: f32,
    lhs: Packed<'_>,
    rhs: Packed<'_>,
) {
    assert!(
        lhs.side == Side::Left && rhs.side == Side::Right && lhs.factors == rhs.factors,
        "a left factor times a right one of its kind"
    );
    assert!(lhs.n_steps == rhs.n_steps && dst.dims() == [lhs.n_lines, rhs.n_lines]);
    match lhs.factors {
        Factors::Rounded => product_packed::<1>(tiles, dst, write, scale, lhs, rhs),
        Factors::Exact => product_packed::<3>(tiles, dst, write, scale, lhs, rhs),
    }
}

fn product_packed<const P: usize>(
    tiles: Tiles,
    mut dst: MatrixMut<'_>,
    write: Write,
    scale: f32,
    lhs: Packed<'_>,
    rhs: Packed<'_>,
) {
    let steps: Vec<usize> = (0..lhs.n_steps).map(|step| step * step_words(P)).collect();
    let [m, n] = dst.dims();
    tiles.configured(|tiles| {
        let mut sums = Sums([0.0; BLOCK * BLOCK]);
        for row in (0..m).step_by(BLOCK) {
            for column in (0..n).step_by(BLOCK) {
                let right = Right::packed(rhs.block(column));
                tiles.block::<P>(lhs.block(row), right, &steps, &mut sums);
                put(&sums, write, scale, [row, column], &mut dst);
            }
        }
    });
}

/// Takes over as much of a block as the destination has.
fn put(sums: &Sums, write: Write, scale: f32, [row, column]: [usize; 2], dst: &mut MatrixMut<'_>) {
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
                            *dst = scale * sum;
                        }
                    }
                    Write::Add => {
                        for (dst, sum) in dst.iter_mut().zip(sums) {
                            *dst += scale * sum;
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
        let Some(tiles) = Tiles::get() else {
            return;
        };
        for dims @ [m, k, n] in [[1, 1, 1], [32, 32, 32], [37, 77, 50], [300, 41, 65]] {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let (a_turned, b_turned): (Vec<f32>, Vec<f32>) = (
                (0..m * k).map(|i| a[i % m * k + i / m]).collect(),
                (0..k * n).map(|i| b[i % k * n + i / k]).collect(),
            );
            let lefts = [Matrix::new(&a, [m, k]), Matrix::new(&a_turned, [k, m]).t()];
            let rights = [Matrix::new(&b, [k, n]), Matrix::new(&b_turned, [n, k]).t()];
            for (lhs, rhs) in lefts.into_iter().flat_map(|l| rights.map(|r| (l, r))) {
                for (factors, tolerance) in [(Factors::Exact, 2e-6), (Factors::Rounded, 2e-2)] {
                    let mut y = vec![1.0; m * n];
                    let dst = MatrixMut::new(&mut y, [m, n]);
                    multiply(tiles, factors, dst, Write::Replace, lhs, rhs, |_| {});
                    let [error, largest] = errors(&y, &a, &b, dims);
                    assert!(
                        error <= tolerance * largest.max(1.0),
                        "{dims:?} {factors:?}: {error}"
                    );

                    let mut packed = vec![1.0; m * n];
                    let (mut left, mut right) = (
                        vec![7; Packed::len(factors, [m, k])],
                        vec![7; Packed::len(factors, [n, k])],
                    );
                    let lhs = Packed::left(tiles, factors, lhs, &mut left);
                    let rhs = Packed::right(tiles, factors, rhs, &mut right);
                    let dst = MatrixMut::new(&mut packed, [m, n]);
                    multiply_packed(tiles, dst, Write::Add, 2.0, lhs, rhs);
                    for (packed, y) in packed.iter().zip(&y) {
                        assert!((packed - (1.0 + 2.0 * y)).abs() < 1e-5, "{dims:?}");
                    }
                }
            }
        }
    }
}
