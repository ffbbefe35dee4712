//! Attention by vectors of f32.

use super::super::{
    gemm::{Matrix, MatrixMut, Write, gemm},
    memory::with_scratch,
    simd::{exp, vectorize},
};
use super::{Attention, Gradients, Head, QUERIES, Softmax, Written};

/// Keys of a block.
const KEYS: usize = 256;

/// Queries `[n, d]`, the first of which is number `first`, over keys and values `[M, d]`.
pub(super) fn attend(
    op: &Attention,
    [q, k, v]: [Matrix<'_>; 3],
    first: usize,
    written: Written<'_>,
) {
    let ([n, d], most_keys) = (q.dims(), KEYS.min(op.n_keys));
    with_scratch((d + most_keys) * n, |scratch| {
        let (out, scores) = scratch.split_at_mut(d * n);
        let mut softmax = Softmax::new(op);
        out.fill(0.0);
        for start in (0..op.n_keys).step_by(KEYS) {
            let keys = start..op.n_keys.min(start + KEYS);
            let [k, v] = [k, v].map(|x| x.rows(keys.clone()));
            let scores = &mut scores[..keys.len() * n];
            let dst = MatrixMut::new(scores, [keys.len(), n]);
            gemm(dst, Write::Replace, k, q.t());
            op.hide(scores, n, [first, start]);
            op.watch(scores, n, &keys, written.columns);
            exponentials(&mut softmax, scores, out, n);
            let weights = Matrix::new(scores, [keys.len(), n]);
            gemm(MatrixMut::new(out, [d, n]), Write::Add, v.t(), weights);
        }
        softmax.finish(out, n, written);
    });
}

/// Turns products into exponentials of scores, and sums them up.
fn exponentials(softmax: &mut Softmax, scores: &mut [f32], out: &mut [f32], n: usize) {
    vectorize(
        #[inline(always)]
        || {
            softmax.see(scores, out, n);
            let (scale, largest) = (softmax.scale, softmax.largest);
            for row in scores.chunks_exact_mut(n) {
                let sums = softmax.sums.iter_mut();
                for ((score, largest), sum) in row.iter_mut().zip(&largest).zip(sums) {
                    *score = exp(scale * (*score - largest));
                    *sum += *score;
                }
            }
        },
    );
}

/// The gradients of a head.
pub(super) fn backward(op: &Attention, head: &Head<'_>, mut gradients: Gradients<'_>) {
    let most_keys = KEYS.min(op.n_keys);
    with_scratch(2 * most_keys * QUERIES, |scratch| {
        let (scores, d_scores) = scratch.split_at_mut(most_keys * QUERIES);
        for first_key in (0..op.n_keys).step_by(KEYS) {
            let keys = first_key..op.n_keys.min(first_key + KEYS);
            let [k, v] = [head.k, head.v].map(|x| x.rows(keys.clone()));
            for query in (0..op.n_queries).step_by(QUERIES) {
                let queries = query..op.n_queries.min(query + QUERIES);
                let n = queries.len();
                let [q, dy] = [head.q, head.dy].map(|x| x.rows(queries.clone()));
                let dims = [keys.len(), n];
                let [scores, d_scores] =
                    [&mut *scores, &mut *d_scores].map(|x| &mut x[..keys.len() * n]);
                gemm(MatrixMut::new(scores, dims), Write::Replace, k, q.t());
                op.hide(scores, n, [query, first_key]);
                gemm(MatrixMut::new(d_scores, dims), Write::Replace, v, dy.t());
                op.add_watched(head, query, d_scores, n, &keys);
                let (log_sums, means) = (
                    &head.log_sums[queries.clone()],
                    &head.means[queries.clone()],
                );
                score_gradient([scores, d_scores], op.scale(), log_sums, means);
                let [p, d_scores] = [&*scores, &*d_scores].map(|x| Matrix::new(x, dims));
                if let Some(dq) = &mut gradients.q {
                    gemm(dq.reborrow().rows(queries), Write::Add, d_scores.t(), k);
                }
                if let Some(dk) = &mut gradients.k {
                    gemm(dk.reborrow().rows(keys.clone()), Write::Add, d_scores, q);
                }
                if let Some(dv) = &mut gradients.v {
                    gemm(dv.reborrow().rows(keys.clone()), Write::Add, p, dy);
                }
            }
        }
    });
}

/// Turns products into P, and dP into dS over sqrt(d): rows of keys, columns of queries.
fn score_gradient(
    [scores, d_scores]: [&mut [f32]; 2],
    scale: f32,
    log_sums: &[f32],
    means: &[f32],
) {
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
