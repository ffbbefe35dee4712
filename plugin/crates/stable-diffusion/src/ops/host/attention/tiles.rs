//! Attention by the processor's matrix tiles.
//!
//! What is multiplied next is packed while it is computed: scores go from tiles of sums through the softmax into tiles of
//! factors. In f32, scores and output are exact; the backward pass multiplies probabilities and gradients of 16 bits.

use std::ops::Range;

use rayon::prelude::*;

use super::super::{
    gemm::{Matrix, MatrixMut, Write},
    memory::with_words,
    simd::vectorize,
    tiles::{BLOCK, Configured, Factors, Packed, Side, Strip, Tiles, block_product},
};
use super::{Attention, Gradients, Head, QUERIES, Softmax, Written};

/// Keys of a block in the forward pass, where every block of queries sees all of them.
const FORWARD_KEYS: usize = 256;
/// And in the backward pass, where all queries see a block of keys, the gradients of which stay in the cache.
const BACKWARD_KEYS: usize = 512;

/// Has `work` call what attends: a head's number, its queries `[n, d]`, the number of the first one, and where it writes.
pub(super) fn with_keys(
    op: &Attention,
    (tiles, factors): (Tiles, Factors),
    [k, v]: [&[f32]; 2],
    work: impl FnOnce(&(dyn Fn(usize, Matrix<'_>, usize, Written<'_>) + Sync)),
) {
    let [keys_len, values_len] = [[op.n_keys, op.head_width], [op.head_width, op.n_keys]]
        .map(|dims| Packed::len(factors, dims));
    let n_heads = op.n_samples * op.n_heads;
    with_words(n_heads * (keys_len + values_len), |words| {
        let heads = words.par_chunks_exact_mut(keys_len + values_len);
        let heads: Vec<[Packed<'_>; 2]> = heads
            .enumerate()
            .map(|(index, words)| {
                let (keys, values) = words.split_at_mut(keys_len);
                let [k, v] = [k, v].map(|x| op.head(x, op.n_keys, index));
                [
                    Packed::left(tiles, factors, k, keys),
                    Packed::left(tiles, factors, v.t(), values),
                ]
            })
            .collect();
        work(&|index, q, first, written| {
            let attend = match factors {
                Factors::Rounded => attend::<1>,
                Factors::Paired => attend::<2>,
                Factors::Exact => attend::<3>,
            };
            attend(op, (tiles, factors), heads[index], q, first, written);
        });
    });
}

/// Queries `q` over keys `[M, d]` and values `[d, M]`.
fn attend<const P: usize>(
    op: &Attention,
    (tiles, factors): (Tiles, Factors),
    [keys, values]: [Packed<'_>; 2],
    q: Matrix<'_>,
    first: usize,
    written: Written<'_>,
) {
    let [n, d] = q.dims();
    let [width, depth] = [n, d].map(|n| n.next_multiple_of(BLOCK));
    let most_keys = FORWARD_KEYS.min(op.n_keys.next_multiple_of(BLOCK));
    let lengths = [
        Packed::len(factors, [width, d]),
        Packed::len(factors, [width, most_keys]),
        depth * width,
        most_keys * width,
    ];
    with_words(lengths.iter().sum(), |mut words| {
        let [queries, weights, out, scores] = lengths.map(|len| cut(&mut words, len));
        let (out, scores) = (numbers(out), numbers(scores));
        let queries = Packed::right(tiles, factors, q.t(), queries);
        let mut softmax = Softmax::new(op);
        out.fill(0.0);
        tiles.configured(|configured| {
            for start in (0..op.n_keys).step_by(FORWARD_KEYS) {
                let range = start..op.n_keys.min(start + FORWARD_KEYS);
                let n_keys = range.len().next_multiple_of(BLOCK);
                let scores = &mut scores[..n_keys * width];
                let keys = keys.starting_at(start);
                products::<P>(
                    configured,
                    Write::Replace,
                    scores,
                    [n_keys, width],
                    keys,
                    queries,
                );
                hide(op, scores, width, [first, start], range.len());
                op.watch(scores, width, &range, written.columns);
                vectorize(
                    #[inline(always)]
                    || softmax.see(scores, out, width),
                );
                let weights = &mut weights[..Packed::len(factors, [width, n_keys])];
                let (scale, largest, sums) = (softmax.scale, &softmax.largest, &mut softmax.sums);
                tiles.exponentials::<P>(scores, width, scale, largest, sums, weights);
                let weights = Packed::of_words(factors, Side::Right, [width, n_keys], weights);
                let values = values.depth(start..start + n_keys);
                products::<P>(configured, Write::Add, out, [depth, width], values, weights);
            }
        });
        softmax.finish(out, width, written);
    });
}

/// dst (+)= lhs · rhs, in whole blocks.
fn products<const P: usize>(
    tiles: &Configured,
    write: Write,
    dst: &mut [f32],
    dims: [usize; 2],
    lhs: Packed<'_>,
    rhs: Packed<'_>,
) {
    let mut dst = MatrixMut::new(dst, dims);
    for row in (0..dims[0]).step_by(BLOCK) {
        let lhs = lhs.starting_at(row);
        for column in (0..dims[1]).step_by(BLOCK) {
            let rhs = rhs.starting_at(column);
            block_product::<P>(tiles, write, &mut dst, [row, column], lhs, rhs);
        }
    }
}

/// [`Attention::hide`], and the keys beyond the last one that fill a block.
fn hide(op: &Attention, scores: &mut [f32], width: usize, at: [usize; 2], n_keys: usize) {
    scores[n_keys * width..].fill(f32::NEG_INFINITY);
    op.hide(scores, width, at);
}

/// What is multiplied by what.
#[derive(Clone, Copy)]
struct Means {
    tiles: Tiles,
    /// Scores, which have to be those of the forward pass.
    scores: Factors,
    /// Everything else.
    rest: Factors,
}

/// The gradients of a head.
pub(super) fn backward(
    op: &Attention,
    (tiles, factors): (Tiles, Factors),
    head: &Head<'_>,
    gradients: Gradients<'_>,
) {
    let means = |rest| Means {
        tiles,
        scores: factors,
        rest,
    };
    match factors {
        Factors::Rounded => backward_head::<1, 1>(op, means(factors), head, gradients),
        Factors::Paired => backward_head::<2, 2>(op, means(factors), head, gradients),
        Factors::Exact => backward_head::<3, 2>(op, means(Factors::Paired), head, gradients),
    }
}

/// Queries and the gradients of their outputs, as right factors.
#[derive(Clone, Copy)]
struct Queries<'a> {
    /// Qᵀ and dOᵀ: queries are lines.
    q_lines: Packed<'a>,
    dy_lines: Packed<'a>,
    /// Q and dO: queries are k.
    q_depth: Packed<'a>,
    dy_depth: Packed<'a>,
    /// `[N]`, whole blocks.
    log_sums: &'a [f32],
    means: &'a [f32],
}

/// Scores of S parts, everything else of P.
fn backward_head<const S: usize, const P: usize>(
    op: &Attention,
    means: Means,
    head: &Head<'_>,
    gradients: Gradients<'_>,
) {
    let (n, d) = (op.n_queries, op.head_width);
    let [n_whole, depth] = [n, d].map(|n| n.next_multiple_of(BLOCK));
    let lengths = [
        Packed::len(means.scores, [n, d]),
        Packed::len(means.rest, [n, d]),
        Packed::len(means.rest, [d, n]),
        Packed::len(means.rest, [d, n]),
        n_whole,
        n_whole,
        depth * n_whole,
    ];
    with_words(lengths.iter().sum(), |mut words| {
        let [q_lines, dy_lines, q_depth, dy_depth, log_sums, d_means, dq] =
            lengths.map(|len| cut(&mut words, len));
        let [log_sums, d_means, dq] = [log_sums, d_means, dq].map(numbers);
        // Queries that fill the last block have no probabilities.
        log_sums.fill(f32::INFINITY);
        d_means.fill(0.0);
        log_sums[..n].copy_from_slice(head.log_sums);
        d_means[..n].copy_from_slice(&head.means);
        let right = |factors, x, words| Packed::right(means.tiles, factors, x, words);
        let queries = Queries {
            q_lines: right(means.scores, head.q.t(), q_lines),
            dy_lines: right(means.rest, head.dy.t(), dy_lines),
            q_depth: right(means.rest, head.q, q_depth),
            dy_depth: right(means.rest, head.dy, dy_depth),
            log_sums,
            means: d_means,
        };
        dq.fill(0.0);
        let Gradients { q, mut k, mut v } = gradients;
        for start in (0..op.n_keys).step_by(BACKWARD_KEYS) {
            let keys = start..op.n_keys.min(start + BACKWARD_KEYS);
            let gradients = KeyGradients {
                q: q.is_some().then_some(&mut *dq),
                k: k.as_mut().map(|k| k.reborrow().rows(keys.clone())),
                v: v.as_mut().map(|v| v.reborrow().rows(keys.clone())),
            };
            backward_keys::<S, P>(op, means, head, queries, keys, gradients);
        }
        if let Some(mut q) = q {
            for (block, dq) in dq.chunks(depth * QUERIES).enumerate() {
                let width = dq.len() / depth;
                for row in 0..width.min(n - block * QUERIES) {
                    let column = dq[row..].iter().step_by(width);
                    let dst = q.row_mut(block * QUERIES + row).iter_mut();
                    dst.zip(column).for_each(|(dst, value)| *dst = *value);
                }
            }
        }
    });
}

/// Where the gradients that some keys contribute go.
struct KeyGradients<'a> {
    /// Blocks of queries, each `[d, queries]`; added to.
    q: Option<&'a mut [f32]>,
    /// `[keys, d]`
    k: Option<MatrixMut<'a>>,
    v: Option<MatrixMut<'a>>,
}

/// What some keys contribute.
fn backward_keys<const S: usize, const P: usize>(
    op: &Attention,
    means: Means,
    head: &Head<'_>,
    queries: Queries<'_>,
    keys: Range<usize>,
    mut gradients: KeyGradients<'_>,
) {
    let Means {
        tiles,
        scores: exact,
        rest,
    } = means;
    let d = op.head_width;
    let [n_keys, depth] = [keys.len(), d].map(|n| n.next_multiple_of(BLOCK));
    let lengths = [
        Packed::len(exact, [n_keys, d]),
        Packed::len(rest, [n_keys, d]),
        Packed::len(rest, [d, n_keys]),
        Packed::len(rest, [n_keys, QUERIES]),
        Packed::len(rest, [n_keys, QUERIES]),
        Packed::len(rest, [QUERIES, n_keys]),
        BLOCK * QUERIES,
        BLOCK * QUERIES,
        n_keys * depth,
        n_keys * depth,
    ];
    with_words(lengths.iter().sum(), |mut words| {
        let [
            key_lines,
            value_lines,
            key_depth,
            p_left,
            d_left,
            d_right,
            scores,
            d_scores,
            dk,
            dv,
        ] = lengths.map(|len| cut(&mut words, len));
        let [scores, d_scores, dk, dv] = [scores, d_scores, dk, dv].map(numbers);
        dk.fill(0.0);
        dv.fill(0.0);
        let [k, v] = [head.k, head.v].map(|x| x.rows(keys.clone()));
        let key_lines = Packed::left(tiles, exact, k, key_lines);
        let value_lines = Packed::left(tiles, rest, v, value_lines);
        let key_depth = Packed::left(tiles, rest, k.t(), key_depth);
        let n_queries = queries.log_sums.len();
        tiles.configured(|configured| {
            for query in (0..n_queries).step_by(QUERIES) {
                let width = QUERIES.min(n_queries - query);
                let q_lines = queries.q_lines.starting_at(query);
                let dy_lines = queries.dy_lines.starting_at(query);
                let (scores, d_scores) =
                    (&mut scores[..BLOCK * width], &mut d_scores[..BLOCK * width]);
                let strip_len = Packed::len(rest, [BLOCK, width]);
                for key in (0..n_keys).step_by(BLOCK) {
                    let dims = [BLOCK, width];
                    let key_lines = key_lines.starting_at(key);
                    products::<S>(configured, Write::Replace, scores, dims, key_lines, q_lines);
                    let value_lines = value_lines.starting_at(key);
                    products::<P>(
                        configured,
                        Write::Replace,
                        d_scores,
                        dims,
                        value_lines,
                        dy_lines,
                    );
                    let first = keys.start + key;
                    let last = keys.end.min(first + BLOCK);
                    hide(op, scores, width, [query, first], last - first);
                    op.add_watched(head, query, d_scores, width, &(first..last));
                    let strip = Strip {
                        scores,
                        d_scores,
                        log_sums: &queries.log_sums[query..],
                        means: &queries.means[query..],
                        p_left: &mut p_left[key / BLOCK * strip_len..],
                        d_left: &mut d_left[key / BLOCK * strip_len..],
                    };
                    let step = [key / BLOCK, n_keys / BLOCK];
                    tiles.score_gradients::<P>(strip, op.scale(), d_right, step);
                }
                let packed = |side, dims, words| Packed::of_words(rest, side, dims, words);
                if let Some(dq) = &mut gradients.q {
                    let dq = &mut dq[depth * query..][..depth * width];
                    let d_right = packed(Side::Right, [width, n_keys], d_right);
                    products::<P>(
                        configured,
                        Write::Add,
                        dq,
                        [depth, width],
                        key_depth,
                        d_right,
                    );
                }
                let range = query..query + width;
                if gradients.k.is_some() {
                    let d_left = packed(Side::Left, [n_keys, width], d_left);
                    let q_depth = queries.q_depth.depth(range.clone());
                    products::<P>(configured, Write::Add, dk, [n_keys, depth], d_left, q_depth);
                }
                if gradients.v.is_some() {
                    let p_left = packed(Side::Left, [n_keys, width], p_left);
                    let dy_depth = queries.dy_depth.depth(range);
                    products::<P>(
                        configured,
                        Write::Add,
                        dv,
                        [n_keys, depth],
                        p_left,
                        dy_depth,
                    );
                }
            }
        });
        for (gradient, values) in [(&mut gradients.k, dk), (&mut gradients.v, dv)] {
            if let Some(gradient) = gradient {
                for (key, values) in values.chunks_exact(depth).take(keys.len()).enumerate() {
                    gradient.row_mut(key).copy_from_slice(&values[..d]);
                }
            }
        }
    });
}

/// Cuts `len` words off the front.
fn cut<'a>(words: &mut &'a mut [u32], len: usize) -> &'a mut [u32] {
    let (front, rest) = std::mem::take(words).split_at_mut(len);
    *words = rest;
    front
}

fn numbers(words: &mut [u32]) -> &mut [f32] {
    bytemuck::cast_slice_mut(words)
}
