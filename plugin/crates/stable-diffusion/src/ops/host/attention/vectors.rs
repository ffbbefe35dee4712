//! Attention by vectors of f32.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::{
    gemm::{Matrix, MatrixMut, Write},
    memory::with_scratch,
    simd::{exp, vectorize},
    turn::{SIDE, turn},
    unpacked::{VECTORS, gemm_unpacked},
};
use super::{Attention, Gradients, Head, QUERIES, Softmax, Written};

/// Keys of a block.
const KEYS: usize = 128;

/// Has `work` call what attends: a head's number, its queries `[n, d]`, the number of the first one, and where it writes.
///
/// Keys and values of a head lie together then: as they come the rows of one head are few numbers far apart, which neither the
/// cache nor what fetches ahead of it is made for.
pub(super) fn with_keys(
    op: &Attention,
    [k, v]: [&[f32]; 2],
    work: impl FnOnce(&(dyn Fn(usize, Matrix<'_>, usize, Written<'_>) + Sync)),
) {
    let dims = [op.n_keys, op.head_width];
    let len = op.n_keys * op.head_width;
    with_scratch(2 * op.n_samples * op.n_heads * len, |scratch| {
        let heads = scratch.par_chunks_exact_mut((2 * len).max(1)).enumerate();
        heads.for_each(|(index, place)| {
            let places = place.split_at_mut(len);
            padded(op.head(k, op.n_keys, index), op.head_width, places.0);
            padded(op.head(v, op.n_keys, index), op.head_width, places.1);
        });
        let scratch = &*scratch;
        work(&|index, q, first, written| {
            let (k, v) = scratch[2 * index * len..][..2 * len].split_at(len);
            attend(
                op,
                [q, Matrix::new(k, dims), Matrix::new(v, dims)],
                first,
                written,
            );
        });
    });
}

/// Queries `[n, d]`, the first of which is number `first`, over keys and values `[M, d]`.
fn attend(op: &Attention, [q, k, v]: [Matrix<'_>; 3], first: usize, written: Written<'_>) {
    let ([n, d], most_keys) = (q.dims(), KEYS.min(op.n_keys));
    let width = n.next_multiple_of(VECTORS);
    with_scratch((2 * d + most_keys) * width, |scratch| {
        let (turned, rest) = scratch.split_at_mut(d * width);
        let (out, scores) = rest.split_at_mut(d * width);
        let q = transposed(q, width, turned);
        let mut softmax = Softmax::new(op);
        out.fill(0.0);
        for start in (0..op.n_keys).step_by(KEYS) {
            let keys = start..op.n_keys.min(start + KEYS);
            let [k, v] = [k, v].map(|x| x.rows(keys.clone()));
            let dims = [keys.len(), width];
            let scores = &mut scores[..keys.len() * width];
            gemm_unpacked(MatrixMut::new(scores, dims), Write::Replace, k, q);
            op.hide(scores, width, [first, start]);
            op.watch(scores, width, &keys, written.columns);
            Arch::new().dispatch(Exponentials {
                softmax: &mut softmax,
                scores,
                out,
                width,
            });
            let weights = Matrix::new(scores, dims);
            gemm_unpacked(MatrixMut::new(out, [d, width]), Write::Add, v.t(), weights);
        }
        softmax.finish(out, width, written);
    });
}

/// The transposed matrix with rows as wide as `width`, zeros at their ends, in `place`.
fn transposed<'a>(matrix: Matrix<'_>, width: usize, place: &'a mut [f32]) -> Matrix<'a> {
    let ([n_rows, n_columns], [distance, _]) = (matrix.dims(), matrix.strides());
    let data = matrix.data();
    let whole = [n_rows, n_columns].map(|n| n / SIDE * SIDE);
    for row in (0..whole[0]).step_by(SIDE) {
        for column in (0..whole[1]).step_by(SIDE) {
            let mut columns = [[0.0; SIDE]; SIDE];
            turn(
                &data[row * distance + column..],
                distance,
                SIDE,
                &mut columns,
            );
            for (i, values) in columns.iter().enumerate() {
                place[(column + i) * width + row..][..SIDE].copy_from_slice(values);
            }
        }
    }
    for row in 0..n_rows {
        let done = if row < whole[0] { whole[1] } else { 0 };
        let values = &data[row * distance..][..n_columns];
        for (column, value) in values.iter().enumerate().skip(done) {
            place[column * width + row] = *value;
        }
    }
    for row in place.chunks_exact_mut(width) {
        row[n_rows..].fill(0.0);
    }
    Matrix::new(place, [n_columns, width])
}

/// The matrix with rows as wide as `width`, in `place`; zeros are at their ends.
fn padded<'a>(matrix: Matrix<'_>, width: usize, place: &'a mut [f32]) -> Matrix<'a> {
    let ([n_rows, n_columns], [distance, _]) = (matrix.dims(), matrix.strides());
    let rows = matrix.data().chunks(distance);
    for (to, from) in place.chunks_exact_mut(width).zip(rows).take(n_rows) {
        to[..n_columns].copy_from_slice(&from[..n_columns]);
        to[n_columns..].fill(0.0);
    }
    Matrix::new(place, [n_rows, width])
}

/// Turns products into exponentials of scores, and sums them up.
struct Exponentials<'a> {
    softmax: &'a mut Softmax,
    /// `[keys, width]`
    scores: &'a mut [f32],
    /// `[d, width]`, related to the largest of all scores so far.
    out: &'a mut [f32],
    width: usize,
}

impl WithSimd for Exponentials<'_> {
    type Output = ();

    /// A vector of queries after the other, so that its largest score and its sum stay in registers.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let scale = self.softmax.scale;
        let queries = self.softmax.largest.as_chunks_mut::<VECTORS>().0.iter_mut();
        let queries = queries.zip(self.softmax.sums.as_chunks_mut::<VECTORS>().0);
        for (start, (largest, sums)) in (0..self.width).step_by(VECTORS).zip(queries) {
            let mut found = *largest;
            for row in self.scores.chunks_exact(self.width) {
                for (found, &score) in found.iter_mut().zip(&row[start..][..VECTORS]) {
                    *found = if score > *found { score } else { *found };
                }
            }
            let mut shrink = [0.0; VECTORS];
            for ((shrink, largest), found) in shrink.iter_mut().zip(&*largest).zip(&found) {
                *shrink = exp(scale * (largest - found));
            }
            for row in self.out.chunks_exact_mut(self.width) {
                for (out, shrink) in row[start..][..VECTORS].iter_mut().zip(&shrink) {
                    *out *= shrink;
                }
            }
            let mut sum = [0.0; VECTORS];
            for row in self.scores.chunks_exact_mut(self.width) {
                let scores = row[start..][..VECTORS].iter_mut().zip(&found);
                for ((score, found), sum) in scores.zip(&mut sum) {
                    *score = exp(scale * (*score - found));
                    *sum += *score;
                }
            }
            for ((sums, shrink), sum) in sums.iter_mut().zip(&shrink).zip(&sum) {
                *sums = *sums * shrink + sum;
            }
            *largest = found;
        }
    }
}

/// The gradients of a head.
pub(super) fn backward(op: &Attention, head: &Head<'_>, gradients: Gradients<'_>) {
    let ([_, d], n_keys) = (head.q.dims(), op.n_keys);
    let padded_d = d.next_multiple_of(VECTORS);
    let lens = [
        // Of the head: keys and values, and their gradients.
        d * n_keys,
        d * n_keys,
        padded_d * n_keys,
        padded_d * n_keys,
        // Of a block of queries.
        KEYS.min(n_keys) * QUERIES,
        KEYS.min(n_keys) * QUERIES,
        d * QUERIES,
        d * QUERIES,
        d * QUERIES,
        padded_d * QUERIES,
        padded_d * QUERIES,
    ];
    with_scratch(lens.iter().sum(), |mut rest| {
        let [
            k,
            v,
            dk,
            dv,
            scores,
            d_scores,
            turned_q,
            turned_dy,
            dq,
            rows_q,
            rows_dy,
        ] = lens.map(|len| {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(len);
            rest = others;
            part
        });
        let [k, v] = [(head.k, k), (head.v, v)].map(|(x, place)| padded(x, d, place));
        dk.fill(0.0);
        dv.fill(0.0);
        let mut gradient_of_q = gradients.q;
        for query in (0..op.n_queries).step_by(QUERIES) {
            let queries = query..op.n_queries.min(query + QUERIES);
            let n = queries.len();
            let width = n.next_multiple_of(VECTORS);
            let [q, dy] = [head.q, head.dy].map(|x| x.rows(queries.clone()));
            let turned_q = transposed(q, width, &mut turned_q[..d * width]);
            let turned_dy = transposed(dy, width, &mut turned_dy[..d * width]);
            let q = padded(q, padded_d, &mut rows_q[..padded_d * n]);
            let dy = padded(dy, padded_d, &mut rows_dy[..padded_d * n]);
            let [mut log_sums, mut means] = [[0.0; QUERIES]; 2];
            log_sums[..n].copy_from_slice(&head.log_sums[queries.clone()]);
            means[..n].copy_from_slice(&head.means[queries.clone()]);
            let lines = [&log_sums[..width], &means[..width]];
            let dq = &mut dq[..d * width];
            dq.fill(0.0);
            for first_key in (0..n_keys).step_by(KEYS) {
                let keys = first_key..n_keys.min(first_key + KEYS);
                let [k, v] = [k, v].map(|x| x.rows(keys.clone()));
                let dims = [keys.len(), width];
                let [scores, d_scores] =
                    [&mut *scores, &mut *d_scores].map(|x| &mut x[..keys.len() * width]);
                gemm_unpacked(MatrixMut::new(scores, dims), Write::Replace, k, turned_q);
                op.hide(scores, width, [query, first_key]);
                gemm_unpacked(MatrixMut::new(d_scores, dims), Write::Replace, v, turned_dy);
                op.add_watched(head, query, d_scores, width, &keys);
                score_gradient([scores, d_scores], op.scale(), lines);
                let [p, d_scores] = [&*scores, &*d_scores].map(|x| Matrix::new(x, dims));
                if gradient_of_q.is_some() {
                    gemm_unpacked(MatrixMut::new(dq, [d, width]), Write::Add, k.t(), d_scores);
                }
                for (place, is_wanted, lhs, rhs) in [
                    (&mut *dk, gradients.k.is_some(), d_scores, q),
                    (&mut *dv, gradients.v.is_some(), p, dy),
                ] {
                    if is_wanted {
                        let place = &mut place[padded_d * first_key..][..padded_d * keys.len()];
                        let dst = MatrixMut::new(place, [keys.len(), padded_d]);
                        gemm_unpacked(dst, Write::Add, lhs.cols(0..n), rhs);
                    }
                }
            }
            if let Some(gradient) = &mut gradient_of_q {
                let mut rows = gradient.reborrow().rows(queries);
                for row in 0..n {
                    let column = dq[row..].iter().step_by(width);
                    let row = rows.row_mut(row).iter_mut();
                    row.zip(column).for_each(|(to, from)| *to = *from);
                }
            }
        }
        for (gradient, rows) in [(gradients.k, dk), (gradients.v, dv)] {
            let rows = rows.chunks_exact(padded_d).enumerate();
            if let Some(mut gradient) = gradient {
                rows.for_each(|(i, row)| gradient.row_mut(i).copy_from_slice(&row[..d]));
            }
        }
    });
}

/// Turns products into P, and dP into dS over sqrt(d): rows of keys, columns of queries with L and D.
fn score_gradient([scores, d_scores]: [&mut [f32]; 2], scale: f32, [log_sums, means]: [&[f32]; 2]) {
    let n = log_sums.len();
    vectorize(
        #[inline(always)]
        || {
            let rows = scores.chunks_exact_mut(n).zip(d_scores.chunks_exact_mut(n));
            for (p, d) in rows {
                for (((p, d), &log_sum), &mean) in p.iter_mut().zip(d).zip(log_sums).zip(means) {
                    *p = exp(scale * *p - log_sum);
                    *d = scale * *p * (*d - mean);
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_are_transposed_and_padded() {
        for [n_rows, n_columns, distance] in [[1, 3, 3], [16, 16, 20], [37, 40, 41], [33, 7, 9]] {
            let values: Vec<f32> = (0..n_rows * distance).map(|i| i as f32).collect();
            let matrix = Matrix::strided(&values, [n_rows, n_columns], [distance, 1]);
            let [width, padded_width] = [n_rows, n_columns].map(|n| n.next_multiple_of(VECTORS));
            let mut columns = vec![1.0; n_columns * width];
            transposed(matrix, width, &mut columns);
            let mut rows = vec![1.0; n_rows * padded_width];
            padded(matrix, padded_width, &mut rows);
            for row in 0..width {
                for column in 0..padded_width {
                    let is_inside = row < n_rows && column < n_columns;
                    let expected = if is_inside {
                        values[row * distance + column]
                    } else {
                        0.0
                    };
                    if column < n_columns {
                        assert_eq!(columns[column * width + row], expected, "{row} {column}");
                    }
                    if row < n_rows {
                        assert_eq!(
                            rows[row * padded_width + column],
                            expected,
                            "{row} {column}"
                        );
                    }
                }
            }
        }
    }
}
