//! Matrix views and products. Raw pointers are touched here and in [`super::tiles`] only.
//!
//! No layers and no tensors here. [`Matrix`] and [`MatrixMut`] are checked strided views of f32 slices; every
//! product is single-threaded, and parallel callers hand out disjoint tiles of one destination. A product of
//! given shapes and strides therefore has the same bits however many threads run.
#![expect(
    unsafe_code,
    reason = "the gemm crate takes raw pointers; the views below prove their bounds"
)]

use std::{marker::PhantomData, ops::Range};

use rayon::prelude::*;

use super::memory::with_scratch;
use super::numbers::Operand;
use super::packed;
use super::tiles::{Means, multiply};

/// What a product does with the values already in its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// dst = lhs·rhs
    Replace,
    /// dst = dst + lhs·rhs
    Add,
}

/// A read-only strided view `[rows, cols]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a, T = f32> {
    data: &'a [T],
    dims: [usize; 2],
    strides: [usize; 2],
}

impl<'a, T> Matrix<'a, T> {
    /// A contiguous row-major matrix. Panics when `data` is too short.
    pub(crate) fn new(data: &'a [T], dims: [usize; 2]) -> Self {
        Self::strided(data, dims, [dims[1], 1])
    }

    /// A view with explicit strides, in elements. Panics when an element lies outside `data`.
    pub(crate) fn strided(data: &'a [T], dims: [usize; 2], strides: [usize; 2]) -> Self {
        assert_within(data.len(), dims, strides);
        Self {
            data,
            dims,
            strides,
        }
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    pub(crate) fn strides(&self) -> [usize; 2] {
        self.strides
    }

    /// The slice that the view begins in, from its first element.
    pub(crate) fn data(&self) -> &'a [T] {
        self.data
    }

    /// [`Self::data`] up to its last element.
    pub(crate) fn used(&self) -> &'a [T] {
        let [rows, cols] = self.dims;
        if rows == 0 || cols == 0 {
            return &[];
        }
        let last = (rows - 1) * self.strides[0] + (cols - 1) * self.strides[1];
        &self.data[..=last]
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        let ([rows, cols], [row_stride, col_stride]) = (self.dims, self.strides);
        Self {
            data: self.data,
            dims: [cols, rows],
            strides: [col_stride, row_stride],
        }
    }

    /// Some of the rows.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.dims[0],
            "rows {range:?} of {:?}",
            self.dims
        );
        let start = (range.start * self.strides[0]).min(self.data.len());
        Self {
            data: &self.data[start..],
            dims: [range.len(), self.dims[1]],
            strides: self.strides,
        }
    }

    /// Some of the columns.
    pub(crate) fn cols(self, range: Range<usize>) -> Self {
        self.t().rows(range).t()
    }
}

/// A writable strided view `[rows, cols]` in which no two elements share an address.
#[derive(Debug)]
pub(crate) struct MatrixMut<'a> {
    start: *mut f32,
    dims: [usize; 2],
    strides: [usize; 2],
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `MatrixMut` is an exclusive borrow of its elements, as `&mut [f32]` is, and `f32` is `Send`.
unsafe impl Send for MatrixMut<'_> {}

/// One tile of a destination and where it lies in it.
#[derive(Debug)]
pub(crate) struct Tile<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
    pub(crate) values: MatrixMut<'a>,
}

impl<'a> MatrixMut<'a> {
    /// A contiguous row-major matrix. Panics when `data` is too short.
    pub(crate) fn new(data: &'a mut [f32], dims: [usize; 2]) -> Self {
        Self::strided(data, dims, [dims[1], 1])
    }

    /// A view with explicit strides. Panics when an element lies outside `data` or two elements coincide.
    pub(crate) fn strided(data: &'a mut [f32], dims: [usize; 2], strides: [usize; 2]) -> Self {
        assert_within(data.len(), dims, strides);
        let apart = |n: usize, stride: usize, other: usize, other_stride: usize| {
            stride >= 1 && (other <= 1 || other_stride > (n.max(1) - 1) * stride)
        };
        let ([rows, cols], [row_stride, col_stride]) = (dims, strides);
        assert!(
            apart(cols, col_stride, rows, row_stride) || apart(rows, row_stride, cols, col_stride),
            "elements of a destination overlap: dims {dims:?}, strides {strides:?}"
        );
        Self {
            start: data.as_mut_ptr(),
            dims,
            strides,
            lifetime: PhantomData,
        }
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// Whether rows are contiguous.
    pub(crate) fn has_rows(&self) -> bool {
        self.strides[1] == 1
    }

    /// A shorter exclusive borrow of the same elements.
    pub(crate) fn reborrow(&mut self) -> MatrixMut<'_> {
        MatrixMut {
            start: self.start,
            dims: self.dims,
            strides: self.strides,
            lifetime: PhantomData,
        }
    }

    /// Some of the rows.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        assert!(
            range.start < range.end && range.end <= self.dims[0] && self.dims[1] > 0,
            "rows {range:?} of {:?}",
            self.dims
        );
        Self {
            // SAFETY: (range.start, 0) is an element of the view, so its address lies in the borrowed slice.
            start: unsafe { self.start.add(range.start * self.strides[0]) },
            dims: [range.len(), self.dims[1]],
            ..self
        }
    }

    /// Some of the columns.
    pub(crate) fn cols(self, range: Range<usize>) -> Self {
        let [n_rows, n_cols] = self.dims;
        assert!(
            range.start < range.end && range.end <= n_cols && n_rows > 0,
            "columns {range:?} of {:?}",
            self.dims
        );
        Self {
            // SAFETY: (0, range.start) is an element of the view, so its address lies in the borrowed slice.
            start: unsafe { self.start.add(range.start * self.strides[1]) },
            dims: [n_rows, range.len()],
            ..self
        }
    }

    /// Row `index` as a slice. Panics unless rows are contiguous.
    pub(crate) fn row_mut(&mut self, index: usize) -> &mut [f32] {
        assert!(index < self.dims[0], "row {index} of {:?}", self.dims);
        assert!(
            self.strides[1] == 1 || self.dims[1] <= 1,
            "rows of stride {}",
            self.strides[1]
        );
        // SAFETY: the constructor checked that the last element of every row lies in the borrowed slice, and
        // `&mut self` makes this the only live path to the row.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(index * self.strides[0]), self.dims[1])
        }
    }

    /// Where some rows and columns begin, `at` a row and a column, and the distance of the rows. Panics unless they lie in the
    /// view and rows are contiguous.
    pub(crate) fn rectangle_mut(&mut self, at: [usize; 2], dims: [usize; 2]) -> (*mut f32, usize) {
        let ends = [at[0] + dims[0], at[1] + dims[1]];
        assert!(
            dims.into_iter().all(|n| n > 0)
                && ends[0] <= self.dims[0]
                && ends[1] <= self.dims[1]
                && self.strides[1] == 1,
            "{dims:?} at {at:?} of {:?}",
            self.dims
        );
        // SAFETY: (row, column) is an element of the view, so its address lies in the borrowed slice.
        let start = unsafe { self.start.add(at[0] * self.strides[0] + at[1]) };
        (start, self.strides[0])
    }

    /// Cuts the matrix into tiles of at most `tile` rows and columns, in row-major order.
    pub(crate) fn tiles(self, tile: [usize; 2]) -> Vec<Tile<'a>> {
        let [n_rows, n_cols] = self.dims;
        let mut tiles = Vec::with_capacity(n_rows.div_ceil(tile[0]) * n_cols.div_ceil(tile[1]));
        for row in (0..n_rows).step_by(tile[0]) {
            for col in (0..n_cols).step_by(tile[1]) {
                let rows = row..n_rows.min(row + tile[0]);
                let cols = col..n_cols.min(col + tile[1]);
                // SAFETY: (row, col) is an element of the view, so its address lies in the borrowed slice.
                let start = unsafe {
                    self.start
                        .add(row * self.strides[0] + col * self.strides[1])
                };
                let dims = [rows.len(), cols.len()];
                // The ranges of two tiles are disjoint and elements do not coincide, so the tiles are disjoint.
                let values = MatrixMut {
                    start,
                    dims,
                    strides: self.strides,
                    lifetime: PhantomData,
                };
                tiles.push(Tile { rows, cols, values });
            }
        }
        tiles
    }
}

/// dst (+)= lhs · rhs on the calling thread. Panics when the shapes do not fit.
pub(crate) fn gemm(dst: MatrixMut<'_>, write: Write, lhs: Matrix<'_>, rhs: Matrix<'_>) {
    let ([m, n], k) = (dst.dims, lhs.dims[1]);
    assert!(
        lhs.dims == [m, k] && rhs.dims == [k, n],
        "product {:?} x {:?} into {:?}",
        lhs.dims,
        rhs.dims,
        dst.dims
    );
    if m == 0 || n == 0 {
        return;
    }
    let stride = |stride: usize| isize::try_from(stride).unwrap_or(isize::MAX);
    let keep = if write == Write::Add { 1.0 } else { 0.0 };
    // SAFETY: all three views were checked on construction to lie within their slices for these dims and
    // strides (k = 0 reads nothing); the destination is borrowed exclusively and its elements are distinct;
    // `lhs` and `rhs` are shared borrows, so they cannot alias it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.start,
            stride(dst.strides[1]),
            stride(dst.strides[0]),
            write == Write::Add,
            lhs.data.as_ptr(),
            stride(lhs.strides[1]),
            stride(lhs.strides[0]),
            rhs.data.as_ptr(),
            stride(rhs.strides[1]),
            stride(rhs.strides[0]),
            keep,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// dst (+)= lhs · rhs over all threads, in tiles whose grid depends on the shapes alone. `finish` sees every
/// tile once its values are final, while they are still in the cache.
pub(crate) fn parallel_gemm<'a>(
    means: Means,
    dst: MatrixMut<'_>,
    write: Write,
    lhs: impl Into<Operand<'a>>,
    rhs: impl Into<Operand<'a>>,
    finish: impl Fn(&mut Tile<'_>) + Sync,
) {
    let (lhs, rhs) = (lhs.into(), rhs.into());
    let ([m, n], [_, k]) = (dst.dims, lhs.dims());
    if let Some((tiles, factors)) = means.for_product([m, n, k])
        && dst.strides[1] == 1
    {
        return multiply(tiles, factors, dst, write, lhs, rhs, finish);
    }
    lhs.with_f32(|lhs| rhs.with_f32(|rhs| gemm_by_vectors(dst, write, lhs, rhs, finish)));
}

fn gemm_by_vectors(
    dst: MatrixMut<'_>,
    write: Write,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    finish: impl Fn(&mut Tile<'_>) + Sync,
) {
    let dst = match packed::multiply(dst, write, lhs, rhs, &finish) {
        Ok(()) => return,
        Err(dst) => dst,
    };
    // The kernel vectorizes along the rows of the destination, and copies `rhs` into another order first unless
    // its rows are contiguous too. For few rows that costs more than the product; the transposed product reads
    // `rhs` as it lies, and its few results are put in their places afterwards.
    let [n_rows, _] = dst.dims;
    let through_transposed = write == Write::Replace
        && dst.strides[1] == 1
        && rhs.strides[1] != 1
        && 3 * n_rows < 2 * lhs.dims[1];
    let run = |mut tile: Tile<'_>| {
        let (lhs, rhs) = (lhs.rows(tile.rows.clone()), rhs.cols(tile.cols.clone()));
        if through_transposed {
            gemm_through_transposed(&mut tile.values, lhs, rhs);
        } else {
            gemm(tile.values.reborrow(), write, lhs, rhs);
        }
        finish(&mut tile);
    };
    let along_rows = dst.strides[1] == 1 && !through_transposed;
    let tile = tile_for(dst.dims, along_rows);
    let n_products = dst.dims[0] * dst.dims[1] * lhs.dims[1];
    let tiles = dst.tiles(tile);
    if tiles.len() < 2 || n_products < SERIAL_PRODUCTS {
        tiles.into_iter().for_each(run);
    } else {
        tiles.into_par_iter().for_each(run);
    }
}

/// Multiplications that take less time than waking another thread.
const SERIAL_PRODUCTS: usize = 1 << 20;

/// dst = (rhsᵀ·lhsᵀ)ᵀ; rows of `dst` are contiguous.
fn gemm_through_transposed(dst: &mut MatrixMut<'_>, lhs: Matrix<'_>, rhs: Matrix<'_>) {
    let [n_rows, n_cols] = dst.dims;
    with_scratch(n_rows * n_cols, |transposed| {
        let view = MatrixMut::new(transposed, [n_cols, n_rows]);
        gemm(view, Write::Replace, rhs.t(), lhs.t());
        for row in 0..n_rows {
            let column = transposed[row..].iter().step_by(n_rows);
            for (dst, value) in dst.row_mut(row).iter_mut().zip(column) {
                *dst = *value;
            }
        }
    });
}

/// Tile sizes that keep both operands of a tile in the second-level cache and still give work to all threads.
/// The kernel vectorizes along rows or along columns.
fn tile_for(dims: [usize; 2], along_rows: bool) -> [usize; 2] {
    const VECTORS: usize = 128;
    const N_TILES: usize = 8;
    let side = |vectors: usize, others: usize| {
        let n_tiles = N_TILES.div_ceil(vectors.div_ceil(VECTORS).max(1));
        [
            VECTORS,
            others
                .div_ceil(n_tiles)
                .next_multiple_of(24)
                .clamp(48, 1008),
        ]
    };
    let [rows, cols] = dims;
    if along_rows {
        let [cols, rows] = side(cols, rows);
        [rows, cols]
    } else {
        side(rows, cols)
    }
}

fn assert_within(len: usize, dims: [usize; 2], strides: [usize; 2]) {
    if dims[0] == 0 || dims[1] == 0 {
        return;
    }
    let last = |axis: usize| (dims[axis] - 1).checked_mul(strides[axis]);
    let last = last(0).and_then(|row| last(1).and_then(|col| row.checked_add(col)));
    assert!(
        last.is_some_and(|last| last < len),
        "a view of dims {dims:?} and strides {strides:?} does not fit a slice of {len}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(lhs: &[f32], rhs: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
        let mut out = vec![0.0; m * n];
        for row in 0..m {
            for col in 0..n {
                out[row * n + col] = (0..k).map(|i| lhs[row * k + i] * rhs[i * n + col]).sum();
            }
        }
        out
    }

    #[test]
    fn tiles_add_up_to_the_whole_product() {
        for dims @ [m, k, n] in [[1, 1, 1], [3, 5, 7], [130, 17, 300], [1030, 3, 2]] {
            let lhs: Vec<f32> = (0..m * k).map(|i| (i % 13) as f32 - 6.0).collect();
            let rhs: Vec<f32> = (0..k * n).map(|i| (i % 7) as f32 - 3.0).collect();
            let expected = naive(&lhs, &rhs, dims);
            let (lhs, rhs) = (Matrix::new(&lhs, [m, k]), Matrix::new(&rhs, [k, n]));

            let mut rows = vec![1.0; m * n];
            parallel_gemm(
                Means::current(),
                MatrixMut::new(&mut rows, [m, n]),
                Write::Replace,
                lhs,
                rhs,
                |_| {},
            );
            assert_eq!(rows, expected, "{dims:?}");

            let mut columns = vec![1.0; m * n];
            let dst = MatrixMut::strided(&mut columns, [m, n], [1, m]);
            parallel_gemm(Means::current(), dst, Write::Add, lhs, rhs, |_| {});
            for (i, value) in columns.iter().enumerate() {
                assert_eq!(*value, expected[i % m * n + i / m] + 1.0, "{dims:?}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_view_past_the_end_is_refused() {
        Matrix::strided(&[0.0; 5], [2, 3], [3, 1]);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn a_destination_that_overlaps_itself_is_refused() {
        MatrixMut::strided(&mut [0.0; 9], [3, 3], [2, 1]);
    }
}
