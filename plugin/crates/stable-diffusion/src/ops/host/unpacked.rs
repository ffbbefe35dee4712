//! Products of factors that lie as vectors of f32 read them: for those that are used up before packing them would pay.
#![expect(
    unsafe_code,
    reason = "single numbers of checked views are read without checking each of them again"
)]

use pulp::{Arch, Simd, WithSimd};

use super::gemm::{Matrix, MatrixMut, Write};

/// Columns of a product are a multiple of this.
pub(crate) const COLUMNS: usize = 16;

/// dst (+)= lhs · rhs on the calling thread. Rows of `dst` and `rhs` are contiguous, `lhs` may lie in any way. Fast where both
/// factors fit the cache. Panics when the shapes do not fit.
pub(crate) fn gemm_unpacked(dst: MatrixMut<'_>, write: Write, lhs: Matrix<'_>, rhs: Matrix<'_>) {
    let ([m, n], k) = (dst.dims(), lhs.dims()[1]);
    assert!(
        lhs.dims() == [m, k]
            && rhs.dims() == [k, n]
            && n.is_multiple_of(COLUMNS)
            && rhs.strides()[1] == 1,
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
    });
}

struct Product<'a> {
    dst: MatrixMut<'a>,
    write: Write,
    lhs: Matrix<'a>,
    rhs: Matrix<'a>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let [n_rows, n_columns] = self.dst.dims();
        let width = 2 * S::F32_LANES;
        let mut column = 0;
        while column + width <= n_columns {
            self.columns::<S, 2>(simd, n_rows, column);
            column += width;
        }
        if column < n_columns {
            self.columns::<S, 1>(simd, n_rows, column);
        }
    }
}

impl Product<'_> {
    /// V vectors of columns. The sums of as many rows as there are registers for are made at a time.
    #[inline(always)]
    fn columns<S: Simd, const V: usize>(&mut self, simd: S, n_rows: usize, column: usize) {
        let mut row = 0;
        if S::REGISTER_COUNT >= 32 {
            while row + 8 <= n_rows {
                self.sums::<S, V, 8>(simd, row, column);
                row += 8;
            }
        }
        while row + 4 <= n_rows {
            self.sums::<S, V, 4>(simd, row, column);
            row += 4;
        }
        while row < n_rows {
            self.sums::<S, V, 1>(simd, row, column);
            row += 1;
        }
    }

    #[inline(always)]
    fn sums<S: Simd, const V: usize, const R: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let width = V * S::F32_LANES;
        let zero = simd.splat_f32s(0.0);
        let ([row_stride, step], n_steps) = (self.lhs.strides(), self.lhs.dims()[1]);
        let mut rows = [self.lhs.data()[row * row_stride..].as_ptr(); R];
        for (r, start) in rows.iter_mut().enumerate() {
            *start = start.wrapping_add(r * row_stride);
        }
        let columns = self.rhs.data()[column..].chunks(self.rhs.strides()[0]);
        let mut sums = [[zero; V]; R];
        for (k, columns) in columns.take(n_steps).enumerate() {
            let mut rhs = [zero; V];
            rhs.copy_from_slice(S::as_simd_f32s(&columns[..width]).0);
            let offset = k.wrapping_mul(step);
            for (sums, start) in sums.iter_mut().zip(rows) {
                // SAFETY: this is row `row + r` and column `k` of the view `lhs`, the constructor of which has shown that its
                // elements lie in its data.
                let factor = simd.splat_f32s(unsafe { *start.wrapping_add(offset) });
                for (sum, rhs) in sums.iter_mut().zip(rhs) {
                    *sum = simd.mul_add_e_f32s(factor, rhs, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let dst = &mut self.dst.row_mut(row + r)[column..][..width];
            let (dst, _) = S::as_mut_simd_f32s(dst);
            for (dst, sum) in dst.iter_mut().zip(sums) {
                *dst = match self.write {
                    Write::Replace => *sum,
                    Write::Add => simd.add_f32s(*dst, *sum),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_any_strides() {
        for [m, k, n] in [[1, 1, 16], [8, 40, 128], [13, 7, 48], [40, 256, 32]] {
            let lhs: Vec<f32> = (0..m * k).map(|i| (i % 13) as f32 - 6.0).collect();
            let wide: Vec<f32> = (0..k * (n + 3)).map(|i| (i % 7) as f32 - 3.0).collect();
            let rhs = Matrix::strided(&wide, [k, n], [n + 3, 1]);
            let rows = Matrix::new(&lhs, [m, k]);
            let columns = Matrix::strided(&lhs, [m, k], [1, m]);
            for lhs in [rows, columns] {
                let strides = lhs.strides();
                let value = |row: usize, k: usize| lhs.data()[row * strides[0] + k * strides[1]];
                for (write, before) in [(Write::Replace, 0.0), (Write::Add, 1.0)] {
                    let mut dst = vec![1.0; m * n];
                    gemm_unpacked(MatrixMut::new(&mut dst, [m, n]), write, lhs, rhs);
                    for (i, &found) in dst.iter().enumerate() {
                        let (row, column) = (i / n, i % n);
                        let products = (0..k).map(|k| value(row, k) * wide[k * (n + 3) + column]);
                        assert_eq!(found, before + products.sum::<f32>(), "{row} {column}");
                    }
                }
            }
        }
    }
}
