//! Products of factors that lie as vectors of f32 read them: for those that are used up before packing them would pay.
#![expect(
    unsafe_code,
    reason = "single numbers of checked views are read without checking each of them again"
)]

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::gemm::{Matrix, MatrixMut, Write};

/// Numbers of the longest vectors there are.
pub(crate) const VECTORS: usize = 16;

/// dst (+)= lhs · rhs on the calling thread. Rows of `dst` and `rhs` are contiguous, `lhs` may lie in any way. Fast where both
/// factors fit the cache and columns of `rhs` fill whole [`VECTORS`]; those beyond the columns of `dst` are read and left out.
/// Panics when the shapes do not fit.
pub(crate) fn gemm_unpacked(dst: MatrixMut<'_>, write: Write, lhs: Matrix<'_>, rhs: Matrix<'_>) {
    product(dst, write, lhs, rhs, Sums::Several);
}

/// [`gemm_unpacked`] with one sum where that has several: fewer reads per product, for many columns of `lhs`, and more rounding.
pub(crate) fn gemm_of_panel(dst: MatrixMut<'_>, write: Write, lhs: Matrix<'_>, rhs: Matrix<'_>) {
    product(dst, write, lhs, rhs, Sums::Many);
}

/// What registers hold: several parts of every sum, or more sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sums {
    Several,
    Many,
}

fn product(dst: MatrixMut<'_>, write: Write, lhs: Matrix<'_>, rhs: Matrix<'_>, sums: Sums) {
    let ([m, n], k) = (dst.dims(), lhs.dims()[1]);
    assert!(
        lhs.dims() == [m, k] && rhs.dims()[0] == k && rhs.dims()[1] >= n && rhs.strides()[1] == 1,
        "product {:?} x {:?} into {:?}",
        lhs.dims(),
        rhs.dims(),
        dst.dims()
    );
    Arch::new().dispatch(Product {
        dst,
        write,
        lhs,
        rhs,
        sums,
    });
}

struct Product<'a> {
    dst: MatrixMut<'a>,
    write: Write,
    lhs: Matrix<'a>,
    rhs: Matrix<'a>,
    sums: Sums,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let [_, n_columns] = self.dst.dims();
        let vectors = n_columns.div_ceil(S::F32_LANES);
        let mut done = 0;
        while self.sums == Sums::Many && S::REGISTER_COUNT >= 32 && vectors - done > 3 {
            self.four_vectors::<S>(simd, done * S::F32_LANES);
            done += 4;
        }
        while vectors - done > 3 {
            self.columns::<S, 2>(simd, done * S::F32_LANES);
            done += 2;
        }
        match vectors - done {
            3 => self.columns::<S, 3>(simd, done * S::F32_LANES),
            2 => self.columns::<S, 2>(simd, done * S::F32_LANES),
            1 => self.columns::<S, 1>(simd, done * S::F32_LANES),
            _ => {}
        }
    }
}

impl<'a> Product<'a> {
    /// V vectors of columns, the last of which may be a part of one. Every sum is made of several, as many as there are
    /// registers for, so that it loses less to rounding.
    #[inline(always)]
    fn columns<S: Simd, const V: usize>(&mut self, simd: S, column: usize) {
        let [n_rows, _] = self.dst.dims();
        let fours = n_rows / 4 * 4;
        match (S::REGISTER_COUNT >= 32, V) {
            (false, _) => self.rows::<S, V, 4, 1>(simd, 0..fours, column),
            (true, 3) => self.rows::<S, V, 4, 2>(simd, 0..fours, column),
            (true, _) => self.rows::<S, V, 4, 3>(simd, 0..fours, column),
        }
        self.rows::<S, V, 1, 3>(simd, fours..n_rows, column);
    }

    /// Four vectors of columns: six rows at a time are ten reads for 24 products.
    #[inline(always)]
    fn four_vectors<S: Simd>(&mut self, simd: S, column: usize) {
        let [n_rows, _] = self.dst.dims();
        let sixes = n_rows / 6 * 6;
        let twos = n_rows / 2 * 2;
        let whole = column + 4 * S::F32_LANES <= self.rhs.dims()[1];
        for (rows, n_pairs) in [(0..sixes, 3), (sixes..twos, 1)] {
            if whole && !rows.is_empty() {
                let product = &mut *self;
                match n_pairs {
                    3 => simd.vectorize(Pairs::<'_, 'a, 3> {
                        product,
                        rows,
                        column,
                    }),
                    _ => simd.vectorize(Pairs::<'_, 'a, 1> {
                        product,
                        rows,
                        column,
                    }),
                }
            }
        }
        let done = if whole { twos } else { 0 };
        self.rows::<S, 4, 1, 3>(simd, done..n_rows, column);
    }

    #[inline(always)]
    fn rows<S: Simd, const V: usize, const R: usize, const D: usize>(
        &mut self,
        simd: S,
        rows: Range<usize>,
        column: usize,
    ) {
        if rows.is_empty() {
            return;
        }
        let product = self;
        if column + V * S::F32_LANES <= product.rhs.dims()[1] {
            simd.vectorize(Rows::<'_, 'a, V, R, D, true> {
                product,
                rows,
                column,
            });
        } else {
            simd.vectorize(Rows::<'_, 'a, V, R, D, false> {
                product,
                rows,
                column,
            });
        }
    }
}

/// Some columns of some rows, R of them at a time, of D sums each, one to three. A function of its own: the compiler keeps the
/// sums of one in registers, but not those of many.
struct Rows<'p, 'a, const V: usize, const R: usize, const D: usize, const WHOLE: bool> {
    product: &'p mut Product<'a>,
    rows: Range<usize>,
    column: usize,
}

impl<const V: usize, const R: usize, const D: usize, const WHOLE: bool> WithSimd
    for Rows<'_, '_, V, R, D, WHOLE>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.rows.step_by(R) {
            self.product
                .sums::<S, V, R, D, WHOLE>(simd, row, self.column);
        }
    }
}

/// Four vectors of columns of some rows, N pairs of rows at a time, of one sum each; one or three.
struct Pairs<'p, 'a, const N: usize> {
    product: &'p mut Product<'a>,
    rows: Range<usize>,
    column: usize,
}

impl<const N: usize> WithSimd for Pairs<'_, '_, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.rows.step_by(2 * N) {
            self.product.pairs::<S, N>(simd, row, self.column);
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn pairs<S: Simd, const N: usize>(&mut self, simd: S, row: usize, column: usize) {
        let zero = simd.splat_f32s(0.0);
        let n_steps = self.lhs.dims()[1];
        let factors = self.factors::<S, 4, 6>(row, column);
        let [a, b, c, d, e, f] = factors.starts;
        // By name: of an array of them the compiler keeps none in registers.
        let [mut first, mut second, mut third] = [[[zero; 4]; 2]; 3];
        for k in 0..n_steps {
            // SAFETY: columns of `lhs` and rows of `rhs`, which has whole vectors.
            unsafe {
                let rhs = factors.right::<S, 4, true>(simd, k);
                factors.add_products(simd, [a, b], k, rhs, &mut first);
                if N > 1 {
                    factors.add_products(simd, [c, d], k, rhs, &mut second);
                    factors.add_products(simd, [e, f], k, rhs, &mut third);
                }
            }
        }
        self.write(simd, row, column, &first);
        if N > 1 {
            self.write(simd, row + 2, column, &second);
            self.write(simd, row + 4, column, &third);
        }
    }

    #[inline(always)]
    fn sums<S: Simd, const V: usize, const R: usize, const D: usize, const WHOLE: bool>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let zero = simd.splat_f32s(0.0);
        let n_steps = self.lhs.dims()[1];
        let factors = self.factors::<S, V, R>(row, column);
        // By name: of an array of them the compiler keeps none in registers.
        let [mut sums, mut second, mut third] = [[[zero; V]; R]; 3];
        let whole = n_steps / D * D;
        for k in (0..whole).step_by(D) {
            // SAFETY: columns of `lhs` and rows of `rhs` from `k` on, which has whole vectors if that is said.
            unsafe {
                factors.add::<S, V, WHOLE>(simd, k, &mut sums);
                if D > 1 {
                    factors.add::<S, V, WHOLE>(simd, k.wrapping_add(1), &mut second);
                }
                if D > 2 {
                    factors.add::<S, V, WHOLE>(simd, k.wrapping_add(2), &mut third);
                }
            }
        }
        for k in whole..n_steps {
            // SAFETY: as above.
            unsafe { factors.add::<S, V, WHOLE>(simd, k, &mut sums) };
        }
        let others = second.as_flattened().iter().zip(third.as_flattened());
        for (sum, (second, third)) in sums.as_flattened_mut().iter_mut().zip(others) {
            *sum = simd.add_f32s(*sum, simd.add_f32s(*second, *third));
        }
        self.write(simd, row, column, &sums);
    }

    /// What R rows and V vectors of columns are made of.
    #[inline(always)]
    fn factors<S: Simd, const V: usize, const R: usize>(
        &self,
        row: usize,
        column: usize,
    ) -> Factors<'_, R> {
        let [_, n_columns] = self.dst.dims();
        let [row_stride, step] = self.lhs.strides();
        let lhs = self.lhs.data()[row * row_stride..].as_ptr();
        let mut starts = [lhs; R];
        for (r, start) in starts.iter_mut().enumerate() {
            *start = lhs.wrapping_add(r * row_stride);
        }
        Factors {
            starts,
            step,
            rhs: &self.rhs.data()[column..],
            rhs_stride: self.rhs.strides()[0],
            width: n_columns.min(column + V * S::F32_LANES) - column,
        }
    }

    /// Sums of R rows and V vectors of columns to the destination.
    #[inline(always)]
    fn write<S: Simd, const V: usize, const R: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
        sums: &[[S::f32s; V]; R],
    ) {
        let [_, n_columns] = self.dst.dims();
        let width = n_columns.min(column + V * S::F32_LANES) - column;
        for (r, sums) in sums.iter().enumerate() {
            let dst = &mut self.dst.row_mut(row + r)[column..][..width];
            if width == V * S::F32_LANES {
                let (dst, _) = S::as_mut_simd_f32s(dst);
                for (dst, sum) in dst.iter_mut().zip(sums) {
                    *dst = match self.write {
                        Write::Replace => *sum,
                        Write::Add => simd.add_f32s(*dst, *sum),
                    };
                }
                continue;
            }
            let before = part::<S, V>(simd, dst);
            let vectors = dst.chunks_mut(S::F32_LANES).zip(before);
            for ((dst, before), sum) in vectors.zip(sums) {
                let sum = match self.write {
                    Write::Replace => *sum,
                    Write::Add => simd.add_f32s(before, *sum),
                };
                simd.partial_store_f32s(dst, sum);
            }
        }
    }
}

/// What the sums of some rows and columns are made of.
struct Factors<'a, const R: usize> {
    /// Where rows of the left begin, and the distance of its columns.
    starts: [*const f32; R],
    step: usize,
    /// The right from the first of these columns on, and the distance of its rows.
    rhs: &'a [f32],
    rhs_stride: usize,
    /// Columns.
    width: usize,
}

impl<const R: usize> Factors<'_, R> {
    /// Adds the products of one column of the left and one row of the right.
    ///
    /// # Safety
    /// There are such a column and row. If they are `WHOLE`, V vectors of the right can be read.
    #[inline(always)]
    unsafe fn add<S: Simd, const V: usize, const WHOLE: bool>(
        &self,
        simd: S,
        k: usize,
        sums: &mut [[S::f32s; V]; R],
    ) {
        // SAFETY: by the caller.
        unsafe {
            let rhs = self.right::<S, V, WHOLE>(simd, k);
            self.add_products(simd, self.starts, k, rhs, sums);
        }
    }

    /// A row of the right.
    ///
    /// # Safety
    /// As [`Self::add`].
    #[inline(always)]
    unsafe fn right<S: Simd, const V: usize, const WHOLE: bool>(
        &self,
        simd: S,
        k: usize,
    ) -> [S::f32s; V] {
        if WHOLE {
            let columns = self.rhs.as_ptr();
            let columns = columns.wrapping_add(k.wrapping_mul(self.rhs_stride));
            // SAFETY: by the caller; vectors need no alignment.
            unsafe { columns.cast::<[S::f32s; V]>().read_unaligned() }
        } else {
            part::<S, V>(simd, &self.rhs[k * self.rhs_stride..][..self.width])
        }
    }

    /// # Safety
    /// There is such a column of the left in the rows that begin there.
    #[inline(always)]
    unsafe fn add_products<S: Simd, const V: usize, const N: usize>(
        &self,
        simd: S,
        starts: [*const f32; N],
        k: usize,
        rhs: [S::f32s; V],
        sums: &mut [[S::f32s; V]; N],
    ) {
        let offset = k.wrapping_mul(self.step);
        for (sums, start) in sums.iter_mut().zip(starts) {
            // SAFETY: by the caller.
            let factor = simd.splat_f32s(unsafe { *start.wrapping_add(offset) });
            for (sum, rhs) in sums.iter_mut().zip(rhs) {
                *sum = simd.mul_add_e_f32s(factor, rhs, *sum);
            }
        }
    }
}

/// Vectors of numbers, with zeros behind the last one.
#[inline(always)]
fn part<S: Simd, const V: usize>(simd: S, numbers: &[f32]) -> [S::f32s; V] {
    let mut vectors = [simd.splat_f32s(0.0); V];
    for (vector, numbers) in vectors.iter_mut().zip(numbers.chunks(S::F32_LANES)) {
        *vector = simd.partial_load_f32s(numbers);
    }
    vectors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_any_strides() {
        for [m, k, n] in [
            [1, 1, 1],
            [8, 40, 128],
            [13, 7, 48],
            [40, 50, 40],
            [5, 9, 77],
            [9, 3, 21],
        ] {
            let lhs: Vec<f32> = (0..m * k).map(|i| (i % 13) as f32 - 6.0).collect();
            let wide: Vec<f32> = (0..k * (n + 20)).map(|i| (i % 7) as f32 - 3.0).collect();
            let rhs = |n_read: usize| Matrix::strided(&wide, [k, n_read], [n + 20, 1]);
            let rows = Matrix::new(&lhs, [m, k]);
            let columns = Matrix::strided(&lhs, [m, k], [1, m]);
            let lefts = [rows, columns].map(|lhs| [(lhs, n), (lhs, n.next_multiple_of(VECTORS))]);
            for (lhs, n_read) in lefts.into_iter().flatten() {
                let strides = lhs.strides();
                let value = |row: usize, k: usize| lhs.data()[row * strides[0] + k * strides[1]];
                for (write, before) in [(Write::Replace, 0.0), (Write::Add, 1.0)] {
                    let mut dst = vec![1.0; m * n];
                    gemm_unpacked(MatrixMut::new(&mut dst, [m, n]), write, lhs, rhs(n_read));
                    for (i, &found) in dst.iter().enumerate() {
                        let (row, column) = (i / n, i % n);
                        let products = (0..k).map(|k| value(row, k) * wide[k * (n + 20) + column]);
                        assert_eq!(found, before + products.sum::<f32>(), "{row} {column}");
                    }
                }
            }
        }
    }
}
