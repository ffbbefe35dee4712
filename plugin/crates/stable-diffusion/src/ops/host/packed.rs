//! Products of f32 by vectors, one factor of which is copied to where they read it fastest.
//!
//! Columns of the right factor are copied in panels, some rows at a time, so that they lie as they are read, and turned where they
//! lie the other way, as a linear layer's weight does. Where the weight has more numbers than what it is multiplied with,
//! the transposed product is computed instead: then the weight is read as it lies, and what is turned are activations.
//!
//! | product | left | right |
//! |---|---|---|
//! | `Y = X·W`, many rows of X | X, in a few parts | some columns of W, in panels |
//! | the same, few columns of W | X, in more parts | all of W, in panels |
//! | the same, few rows: `Yᵀ = Wᵀ·Xᵀ` | Wᵀ, which has contiguous rows | Xᵀ, in panels |

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Matrix, MatrixMut, Tile, Write};
use super::memory::with_scratch;
use super::turn::{Lanes, SIDE, turn};
use super::unpacked::{VECTORS, gemm_of_panel};

/// Columns of a panel: four of the longest vectors.
const PANEL: usize = 4 * VECTORS;
/// Columns of an item, and the fewest rows for which they are copied once more to have more items.
const COLUMNS: usize = 2 * PANEL;
const ROWS_OF_ITEM: usize = 512;
/// Items that let two to four threads end at about the same time.
const ITEMS: usize = 8;
/// Rows of a panel that are multiplied at a time: the sums of fewer would be added up more often than pays.
const DEPTH: usize = 512;
/// Rows of the right factor that are copied at a time: with the columns of an item, a part of the second-level cache.
const ROWS_COPIED: usize = 3 * DEPTH;
/// Rows of the left factor that meet all panels one after the other, and of an item of a transposed product, or half of them:
/// whole sixes and sixteens.
const ROWS: usize = SIX * SIDE;
/// Rows that are multiplied at once.
const SIX: usize = 6;
/// Products that are too few for anything to be copied.
const FEW: usize = 1 << 18;

/// How a product is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Straight,
    Transposed,
}

/// dst (+)= lhs · rhs over all threads, in tiles that depend on the shapes alone; `finish` sees each once. Rows of `dst` are
/// contiguous. Where this is not the way to go, the destination is handed back. Panics when the shapes do not fit.
pub(crate) fn multiply<'a>(
    dst: MatrixMut<'a>,
    write: Write,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    finish: &(impl Fn(&mut Tile<'_>) + Sync),
) -> Result<(), MatrixMut<'a>> {
    let ([m, n], [_, k]) = (dst.dims(), lhs.dims());
    assert!(
        lhs.dims() == [m, k] && rhs.dims() == [k, n],
        "product {:?} x {:?} into {:?}",
        lhs.dims(),
        rhs.dims(),
        dst.dims()
    );
    match way(&dst, write, lhs, rhs) {
        Some(Way::Straight) => straight(dst, write, lhs, rhs, finish),
        Some(Way::Transposed) => transposed(dst, lhs, rhs, finish),
        None => return Err(dst),
    }
    Ok(())
}

fn way(dst: &MatrixMut<'_>, write: Write, lhs: Matrix<'_>, rhs: Matrix<'_>) -> Option<Way> {
    let ([m, n], [_, k]) = (dst.dims(), lhs.dims());
    if !has_long_vectors() || !dst.has_rows() || m < SIDE || n < SIDE || k < SIDE || m * n * k < FEW
    {
        return None;
    }
    let is_straight = lhs.strides()[1] == 1 && rhs.strides().contains(&1);
    let can_turn = write == Write::Replace && rhs.strides()[0] == 1 && lhs.strides().contains(&1);
    // What is copied: the right factor, or the left one and the result.
    let is_less = m * (k + n) < k * n;
    match (is_straight, can_turn) {
        (true, true) if is_less => Some(Way::Transposed),
        (true, _) => Some(Way::Straight),
        (false, true) => Some(Way::Transposed),
        (false, false) => None,
    }
}

/// The kernel for panels wants 32 registers, and was measured with these alone.
fn has_long_vectors() -> bool {
    #[cfg(target_arch = "x86_64")]
    return pulp::x86::V4::is_available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Consecutive ranges of at most `most`, of about the same length.
fn parts(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let len = n.div_ceil(n.div_ceil(most).max(1)).max(1);
    (0..n)
        .step_by(len)
        .map(move |start| start..n.min(start + len))
}

/// In how many parts `n` rows are multiplied, at most: two threads, or four, take as many each.
fn row_parts(n: usize) -> usize {
    let parts = (n / ROWS_OF_ITEM).max(1);
    1 << parts.ilog2()
}

fn straight(
    dst: MatrixMut<'_>,
    write: Write,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    finish: &(impl Fn(&mut Tile<'_>) + Sync),
) {
    let [m, n] = dst.dims();
    let n_parts = n.div_ceil(COLUMNS);
    let n_row_parts = row_parts(m).min(ITEMS.div_ceil(n_parts).next_power_of_two());
    if n_parts * n_row_parts < ITEMS / 2 && rhs.dims()[0] <= ROWS_COPIED {
        return shared(dst, write, lhs, rhs, finish);
    }
    let n_columns = n.div_ceil(n_parts).next_multiple_of(PANEL);
    let tiles = dst.tiles([m.div_ceil(n_row_parts), n_columns]);
    tiles.into_par_iter().for_each(|mut tile| {
        let (lhs, rhs) = (lhs.rows(tile.rows.clone()), rhs.cols(tile.cols.clone()));
        let mut write = write;
        for copied in parts(rhs.dims()[0], ROWS_COPIED) {
            let (lhs, rhs) = (lhs.cols(copied.clone()), rhs.rows(copied));
            with_scratch(Panels::len(rhs.dims()), |panels| {
                let mut panels = Panels::of(panels, rhs.dims());
                for (panel, place) in panels.each() {
                    copy(rhs.cols(panel), place);
                }
                for rows in parts(tile.rows.len(), ROWS) {
                    let mut dst = tile.values.reborrow().rows(rows.clone());
                    panels.multiply(&mut dst, write, lhs.rows(rows));
                }
            });
            write = Write::Add;
        }
        finish(&mut tile);
    });
}

/// [`straight`] for a right factor that is small: all of it is copied once, and items are some rows of the left one.
fn shared(
    dst: MatrixMut<'_>,
    write: Write,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    finish: &(impl Fn(&mut Tile<'_>) + Sync),
) {
    let [m, n] = dst.dims();
    with_panels(rhs, |panels| {
        let n_rows = m.div_ceil(ITEMS).next_multiple_of(SIX).min(ROWS);
        let tiles = dst.tiles([n_rows, n]);
        tiles.into_par_iter().for_each(|mut tile| {
            panels.multiply(&mut tile.values, write, lhs.rows(tile.rows.clone()));
            finish(&mut tile);
        });
    });
}

/// Lends all panels of a right factor.
fn with_panels(rhs: Matrix<'_>, work: impl FnOnce(&Panels<'_>)) {
    with_scratch(Panels::len(rhs.dims()), |panels| {
        let mut panels = Panels::of(panels, rhs.dims());
        let places: Vec<_> = panels.each().collect();
        places
            .into_par_iter()
            .for_each(|(panel, place)| copy(rhs.cols(panel), place));
        work(&panels);
    });
}

/// dst = (rhsᵀ·lhsᵀ)ᵀ
fn transposed(
    dst: MatrixMut<'_>,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    finish: &(impl Fn(&mut Tile<'_>) + Sync),
) {
    let (left, right) = (rhs.t(), lhs.t());
    let [m, n] = dst.dims();
    with_panels(right, |panels| {
        let n_columns = if n < ITEMS * ROWS { ROWS / 2 } else { ROWS };
        let tiles = dst.tiles([m, n_columns]);
        tiles.into_par_iter().for_each(|mut tile| {
            let (n_rows, len) = (tile.cols.len(), m.next_multiple_of(SIDE));
            // Whole squares are turned.
            with_scratch(n_rows.next_multiple_of(SIDE) * len, |sums| {
                let mut dst = MatrixMut::strided(sums, [n_rows, m], [len, 1]);
                panels.multiply(&mut dst, Write::Replace, left.rows(tile.cols.clone()));
                turn_back(sums, len, &mut tile.values);
            });
            finish(&mut tile);
        });
    });
}

/// Rows of `dst` from columns of `sums`, whose rows are `len` long.
fn turn_back(sums: &[f32], len: usize, dst: &mut MatrixMut<'_>) {
    let [n_rows, n_columns] = dst.dims();
    let mut square: [Lanes; SIDE] = Default::default();
    for row in (0..n_rows).step_by(SIDE) {
        for column in (0..n_columns).step_by(SIDE) {
            turn(&sums[column * len + row..], len, SIDE, &mut square);
            let width = SIDE.min(n_columns - column);
            for (row, values) in (row..n_rows).zip(&square) {
                dst.row_mut(row)[column..][..width].copy_from_slice(&values[..width]);
            }
        }
    }
}

/// The right factor of a product, in panels of [`PANEL`] columns that lie behind each other, row by row; the last one may have
/// fewer.
struct Panels<'a> {
    values: &'a mut [f32],
    dims: [usize; 2],
}

impl<'a> Panels<'a> {
    fn len([n_rows, n_columns]: [usize; 2]) -> usize {
        n_rows * n_columns.next_multiple_of(PANEL)
    }

    /// Panels of a factor of these dims, not yet copied.
    fn of(values: &'a mut [f32], dims: [usize; 2]) -> Self {
        Self { values, dims }
    }

    fn columns(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let [_, n_columns] = self.dims;
        let panels = (0..n_columns).step_by(PANEL);
        panels.map(move |start| start..n_columns.min(start + PANEL))
    }

    /// The columns and the place of every panel.
    fn each(&mut self) -> impl Iterator<Item = (Range<usize>, &mut [f32])> {
        let columns = self.columns();
        columns.zip(self.values.chunks_exact_mut(self.dims[0] * PANEL))
    }

    /// dst (+)= lhs · these
    fn multiply(&self, dst: &mut MatrixMut<'_>, write: Write, lhs: Matrix<'_>) {
        let [n_rows, _] = self.dims;
        for (i, depth) in parts(n_rows, DEPTH).enumerate() {
            let write = if i == 0 { write } else { Write::Add };
            let lhs = lhs.cols(depth.clone());
            let panels = self.values.chunks_exact(n_rows * PANEL);
            for (columns, panel) in self.columns().zip(panels) {
                let panel = &panel[depth.start * PANEL..depth.end * PANEL];
                let panel = Matrix::new(panel, [depth.len(), PANEL]);
                gemm_of_panel(dst.reborrow().cols(columns), write, lhs, panel);
            }
        }
    }
}

/// Columns of a factor to a panel; what is beyond the last is not used.
fn copy(columns: Matrix<'_>, panel: &mut [f32]) {
    let ([n_rows, n_columns], [row_stride, column_stride]) = (columns.dims(), columns.strides());
    let values = columns.data();
    let rows = panel.as_chunks_mut::<PANEL>().0;
    if column_stride == 1 {
        for (i, row) in rows.iter_mut().enumerate() {
            let values = &values[i * row_stride..][..n_columns];
            match values.as_array::<PANEL>() {
                Some(values) => *row = *values,
                None => row[..n_columns].copy_from_slice(values),
            }
        }
        return;
    }
    let whole = match row_stride {
        1 => [n_rows / SIDE * SIDE, n_columns / SIDE * SIDE],
        _ => [0; 2],
    };
    let mut square: [Lanes; SIDE] = Default::default();
    for row in (0..whole[0]).step_by(SIDE) {
        for column in (0..whole[1]).step_by(SIDE) {
            let values = &values[column * column_stride + row..];
            turn(values, column_stride, 4 * SIDE, &mut square);
            for (row, turned) in rows[row..].iter_mut().zip(&square) {
                row[column..][..SIDE].copy_from_slice(turned);
            }
        }
    }
    for (i, row) in rows.iter_mut().enumerate() {
        let first = if i < whole[0] { whole[1] } else { 0 };
        for (column, place) in row.iter_mut().enumerate().take(n_columns).skip(first) {
            *place = values[i * row_stride + column * column_stride];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A factor whose numbers are small whole ones, lying by rows or by columns.
    fn factor(values: &[f32], [rows, columns]: [usize; 2], by_rows: bool) -> Matrix<'_> {
        let strides = if by_rows { [columns, 1] } else { [1, rows] };
        Matrix::strided(values, [rows, columns], strides)
    }

    fn value(matrix: Matrix<'_>, row: usize, column: usize) -> f32 {
        let [row_stride, column_stride] = matrix.strides();
        matrix.data()[row * row_stride + column * column_stride]
    }

    #[test]
    fn products_of_factors_that_lie_in_any_way() {
        let mut ways = Vec::new();
        for [m, k, n] in [
            [16, 128, 128],
            [77, 200, 90],
            [33, 1600, 129],
            [600, 45, 40],
            [1100, 16, 333],
        ] {
            let numbers = |len: usize, modulus: usize| -> Vec<f32> {
                (0..len).map(|i| (i % modulus) as f32 - 3.0).collect()
            };
            let (lhs, rhs) = (numbers(m * k, 13), numbers(k * n, 7));
            for lies in 0..4 {
                let lhs = factor(&lhs, [m, k], lies % 2 == 0);
                let rhs = factor(&rhs, [k, n], lies / 2 == 0);
                for (write, before) in [(Write::Replace, 0.0), (Write::Add, 1.0)] {
                    let mut dst = vec![1.0; m * n];
                    let view = MatrixMut::new(&mut dst, [m, n]);
                    ways.push(way(&view, write, lhs, rhs));
                    let add = |tile: &mut Tile<'_>| {
                        for row in 0..tile.rows.len() {
                            tile.values.row_mut(row)[0] += 0.5;
                        }
                    };
                    if multiply(view, write, lhs, rhs, &add).is_err() {
                        continue;
                    }
                    let finished = dst.iter().map(|found| found.fract().abs());
                    assert!(finished.sum::<f32>() >= 0.5 * m as f32);
                    for (i, found) in dst.iter().enumerate().step_by(11) {
                        let (row, column) = (i / n, i % n);
                        let products = (0..k).map(|k| value(lhs, row, k) * value(rhs, k, column));
                        let expected = before + products.sum::<f32>();
                        assert_eq!(found.floor(), expected, "{m} {k} {n}: {row} {column}");
                    }
                }
            }
        }
        if has_long_vectors() {
            assert!(ways.contains(&Some(Way::Straight)) && ways.contains(&Some(Way::Transposed)));
            assert!(ways.contains(&None));
        }
    }

    #[test]
    #[should_panic(expected = "product [64, 65] x [64, 64] into [64, 64]")]
    fn factors_that_do_not_fit_are_refused() {
        let (long, square) = (vec![0.0; 64 * 65], vec![0.0; 64 * 64]);
        let mut dst = vec![0.0; 64 * 64];
        let (lhs, rhs) = (Matrix::new(&long, [64, 65]), Matrix::new(&square, [64; 2]));
        let dst = MatrixMut::new(&mut dst, [64; 2]);
        let _ = multiply(dst, Write::Replace, lhs, rhs, &|_| {});
    }

    #[test]
    fn parts_cover_everything_once() {
        for (n, most) in [(1, 5), (5, 5), (6, 5), (1280, 192), (7, 1)] {
            let found: Vec<_> = parts(n, most).collect();
            assert!(found.iter().all(|part| (1..=most).contains(&part.len())));
            let covered: Vec<usize> = found.into_iter().flatten().collect();
            assert_eq!(covered, (0..n).collect::<Vec<_>>());
        }
        assert_eq!(parts(0, 3).count(), 0);
    }
}
