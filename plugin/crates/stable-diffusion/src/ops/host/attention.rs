//! softmax(Q·Kᵀ/sqrt(d))·V per head, without ever holding a whole attention map.
//!
//! Queries are taken in tiles of [`TILE`]; a tile's scores are kept transposed, `[keys, queries]`, so that the
//! softmax runs across vector lanes and every matrix product reads its operands as they lie. The backward
//! computes the probabilities again. Heads are column ranges of `[B, N, heads·d]`: nothing is permuted.
//!
//! | here | symbol | shape |
//! |---|---|---|
//! | `scores` | exp(S - max S)ᵀ, S = Q·Kᵀ/sqrt(d) | `[M, tile]` |
//! | `d_scores` | dL/dP, then dL/dS, transposed | `[M, tile]` |
//! | `columns` | P restricted to the watched keys | `[B, heads, N, watched]` |

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{
    gemm::{Matrix, MatrixMut, Tile, Write, gemm},
    memory::{Values, output, slice_of, tracked, with_scratch, with_words},
    simd::{exp, items_per_thread, vectorize},
    tiles::{Factors, Means, Packed, Tiles, multiply_packed},
};
use crate::ops::Mask;

/// Queries per tile.
const TILE: usize = 64;

/// The sizes of one attention.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    n_samples: usize,
    n_queries: usize,
    n_keys: usize,
    n_heads: usize,
    head_width: usize,
    mask: Mask,
    watched: Vec<usize>,
    /// The processor's tiles, where it has them and there are enough keys for them.
    tiles: Option<(Tiles, Factors)>,
}

impl Attention {
    pub(crate) fn new(
        [q, k, _]: [&Tensor; 3],
        n_heads: usize,
        mask: Mask,
        watched: &[usize],
    ) -> Result<Self> {
        let (n_samples, n_queries, width) = q.dims3()?;
        let n_keys = k.dim(1)?;
        let (head_width, watched) = (width / n_heads, watched.to_vec());
        Ok(Self {
            n_samples,
            n_queries,
            n_keys,
            n_heads,
            head_width,
            mask,
            watched,
            tiles: Means::current().for_attention(n_keys, head_width),
        })
    }

    /// Elements of the output, and of the watched columns that follow it in the same buffer.
    pub(crate) fn lengths(&self) -> (usize, usize) {
        let n_rows = self.n_samples * self.n_queries * self.n_heads;
        (n_rows * self.head_width, n_rows * self.watched.len())
    }

    pub(crate) fn output_dims(&self) -> (usize, usize, usize) {
        (
            self.n_samples,
            self.n_queries,
            self.n_heads * self.head_width,
        )
    }

    pub(crate) fn column_dims(&self) -> (usize, usize, usize, usize) {
        (
            self.n_samples,
            self.n_heads,
            self.n_queries,
            self.watched.len(),
        )
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_width as f32).sqrt()
    }

    /// Head `head` of sample `sample` as `[n, head width]`; `x` is `[B, n, heads·d]`.
    fn head<'a>(&self, x: &'a [f32], n: usize, [sample, head]: [usize; 2]) -> Matrix<'a> {
        let width = self.n_heads * self.head_width;
        Matrix::strided(
            &x[sample * n * width..][..n * width],
            [n, width],
            [width, 1],
        )
        .cols(head * self.head_width..(head + 1) * self.head_width)
    }

    /// The same as [`Self::head`] for writing, for all samples and heads in order.
    fn heads_mut<'a>(&self, x: &'a mut [f32], n: usize) -> Vec<Tile<'a>> {
        let width = self.n_heads * self.head_width;
        x.chunks_mut((n * width).max(1))
            .flat_map(|x| MatrixMut::new(x, [n, width]).tiles([n.max(1), self.head_width]))
            .collect()
    }

    /// [`Self::heads_mut`] of a buffer that nobody may have asked for.
    fn optional_heads_mut<'a>(
        &self,
        buffer: &'a mut Option<Vec<f32>>,
        n: usize,
    ) -> Vec<Option<MatrixMut<'a>>> {
        match buffer {
            Some(x) => self
                .heads_mut(x, n)
                .into_iter()
                .map(|tile| Some(tile.values))
                .collect(),
            None => (0..self.n_samples * self.n_heads).map(|_| None).collect(),
        }
    }

    /// Fills `scores` with exp(s - max s) of the queries `first..`, transposed, and returns each query's sum of
    /// them; `q` is `[tile, d]`.
    fn exp_scores(
        &self,
        q: Matrix<'_>,
        k: &Rows<'_>,
        first: usize,
        scores: &mut [f32],
    ) -> [f32; TILE] {
        let n = scores.len() / self.n_keys;
        let dst = MatrixMut::new(scores, [self.n_keys, n]);
        k.times(dst, self.scale(), q.t());
        if self.mask == Mask::Causal {
            for (key, row) in scores.chunks_exact_mut(n).enumerate() {
                let n_before = key.saturating_sub(first).min(n);
                row[..n_before].fill(f32::NEG_INFINITY);
            }
        }
        exp_columns(scores, n)
    }

    /// Words of both ways to pack keys or values of one head.
    fn packed_words(&self) -> [usize; 2] {
        let Some((_, factors)) = self.tiles else {
            return [0, 0];
        };
        let dims = [self.n_keys, self.head_width];
        [dims, [dims[1], dims[0]]].map(|dims| Packed::len(factors, dims))
    }

    /// Returns the output followed by the watched columns.
    fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let (n_output, n_columns) = self.lengths();
        let n_watched = self.watched.len();
        let mut packed = vec![0.0; n_output + n_columns];
        let (out, columns) = packed.split_at_mut(n_output);
        let heads = self.heads_mut(out, self.n_queries).into_iter().enumerate();
        let tiles: Vec<(usize, Tile<'_>)> = heads
            .flat_map(|(index, head)| {
                let tiles = head.values.tiles([TILE, self.head_width]);
                tiles.into_iter().map(move |tile| (index, tile))
            })
            .collect();
        let columns: Vec<&mut [f32]> = if n_watched == 0 {
            tiles.iter().map(|_| Default::default()).collect()
        } else {
            let heads = columns.chunks_mut(self.n_queries * n_watched);
            heads
                .flat_map(|head| head.chunks_mut(TILE * n_watched))
                .collect()
        };
        let n_heads = self.n_samples * self.n_heads;
        let [rows_words, columns_words] = self.packed_words();
        with_words(n_heads * (rows_words + columns_words), |words| {
            let (keys, values) = words.split_at_mut(n_heads * rows_words);
            let keys = Rows::of_heads(self, k, keys);
            let values = Columns::of_heads(self, v, values);
            tiles
                .into_par_iter()
                .zip(columns)
                .with_min_len(items_per_thread(self.n_keys * self.head_width))
                .for_each(|((index, mut tile), columns)| {
                    let at = [index / self.n_heads, index % self.n_heads];
                    let n = tile.rows.len();
                    let q = self.head(q, self.n_queries, at).rows(tile.rows.clone());
                    with_scratch(self.n_keys * n, |scores| {
                        let first = tile.rows.start;
                        let sums = self.exp_scores(q, &keys[index], first, scores);
                        let weights = Matrix::new(scores, [self.n_keys, n]);
                        values[index].times(tile.values.reborrow(), 1.0, weights);
                        for (row, &sum) in sums[..n].iter().enumerate() {
                            let scale = 1.0 / sum;
                            tile.values
                                .row_mut(row)
                                .iter_mut()
                                .for_each(|out| *out *= scale);
                            for (column, &key) in self.watched.iter().enumerate() {
                                columns[row * n_watched + column] = scores[key * n + row] * scale;
                            }
                        }
                    });
                });
        });
        packed
    }

    /// Gradients of q, k and v as far as `wanted`; `dy` is packed as the result of the forward is.
    fn backward(&self, [q, k, v, dy]: [&[f32]; 4], wanted: [bool; 3]) -> [Option<Vec<f32>>; 3] {
        let (n_output, _) = self.lengths();
        let (d_out, d_columns) = dy.split_at(n_output);
        let mut buffers = [
            wanted[0].then(|| vec![0.0; q.len()]),
            wanted[1].then(|| vec![0.0; k.len()]),
            wanted[2].then(|| vec![0.0; v.len()]),
        ];
        let [dq, dk, dv] = &mut buffers;
        let dq = self.optional_heads_mut(dq, self.n_queries);
        let dk = self.optional_heads_mut(dk, self.n_keys);
        let dv = self.optional_heads_mut(dv, self.n_keys);
        let columns_len = self.n_queries * self.watched.len();
        let [rows_words, columns_words] = self.packed_words();
        dq.into_par_iter()
            .zip(dk)
            .zip(dv)
            .enumerate()
            .for_each(|(index, ((dq, dk), dv))| {
                let at = [index / self.n_heads, index % self.n_heads];
                let (k, v) = (self.head(k, self.n_keys, at), self.head(v, self.n_keys, at));
                with_words(2 * rows_words + columns_words, |words| {
                    let (key_rows, words) = words.split_at_mut(rows_words);
                    let (value_rows, key_columns) = words.split_at_mut(rows_words);
                    let head = Head {
                        q: self.head(q, self.n_queries, at),
                        k: Rows::new(self.tiles, k, key_rows),
                        v: Rows::new(self.tiles, v, value_rows),
                        k_columns: Columns::new(self.tiles, k, key_columns),
                        d_out: self.head(d_out, self.n_queries, at),
                        d_columns: &d_columns[index * columns_len..][..columns_len],
                    };
                    self.backward_head(&head, [dq, dk, dv]);
                });
            });
        buffers
    }

    // With dP = dO·Vᵀ (+ the columns' own gradient): dS = P∘(dP - rowsum(P∘dP)), dQ = dS·K/sqrt(d),
    // dK = dSᵀ·Q/sqrt(d), dV = Pᵀ·dO.
    fn backward_head(&self, head: &Head<'_>, [dq, mut dk, mut dv]: [Option<MatrixMut<'_>>; 3]) {
        let n_tiles = self.n_queries.div_ceil(TILE);
        let mut dq_tiles: Vec<Option<MatrixMut<'_>>> = match dq {
            Some(dq) => dq
                .tiles([TILE, self.head_width])
                .into_iter()
                .map(|tile| Some(tile.values))
                .collect(),
            None => (0..n_tiles).map(|_| None).collect(),
        };
        for (tile, dq) in dq_tiles.iter_mut().enumerate() {
            let rows = tile * TILE..self.n_queries.min((tile + 1) * TILE);
            let n = rows.len();
            let (q, d_out) = (head.q.rows(rows.clone()), head.d_out.rows(rows.clone()));
            with_scratch(2 * self.n_keys * n, |scratch| {
                let (p, d_scores) = scratch.split_at_mut(self.n_keys * n);
                let sums = self.exp_scores(q, &head.k, rows.start, p);
                let dst = MatrixMut::new(d_scores, [self.n_keys, n]);
                head.v.times(dst, 1.0, d_out.t());
                let n_watched = self.watched.len();
                for (column, &key) in self.watched.iter().enumerate() {
                    let d_columns = &head.d_columns[rows.start * n_watched + column..];
                    let d_columns = d_columns.iter().step_by(n_watched);
                    for (d, &d_column) in d_scores[key * n..][..n].iter_mut().zip(d_columns) {
                        *d += d_column;
                    }
                }
                score_gradient(p, d_scores, &sums[..n]);
                let (p, d_scores) = (
                    Matrix::new(p, [self.n_keys, n]),
                    Matrix::new(d_scores, [self.n_keys, n]),
                );
                if let Some(dq) = dq {
                    head.k_columns.times(dq.reborrow(), self.scale(), d_scores);
                }
                if let Some(dk) = &mut dk {
                    add_product(self.tiles, dk.reborrow(), self.scale(), d_scores, q);
                }
                if let Some(dv) = &mut dv {
                    add_product(self.tiles, dv.reborrow(), 1.0, p, d_out);
                }
            });
        }
    }
}

/// What the backward of one head reads.
struct Head<'a> {
    q: Matrix<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    k_columns: Columns<'a>,
    d_out: Matrix<'a>,
    d_columns: &'a [f32],
}

/// Keys or values of one head, as the left factor x `[keys, d]`.
#[derive(Clone, Copy)]
enum Rows<'a> {
    Plain(Matrix<'a>),
    Packed(Tiles, Factors, Packed<'a>),
}

/// Keys or values of one head, as the left factor xᵀ `[d, keys]`.
#[derive(Clone, Copy)]
enum Columns<'a> {
    Plain(Matrix<'a>),
    Packed(Tiles, Factors, Packed<'a>),
}

impl<'a> Rows<'a> {
    fn new(tiles: Option<(Tiles, Factors)>, x: Matrix<'a>, words: &'a mut [u32]) -> Self {
        match tiles {
            None => Self::Plain(x),
            Some((tiles, factors)) => {
                Self::Packed(tiles, factors, Packed::left(tiles, factors, x, words))
            }
        }
    }

    /// Of all heads of all samples.
    fn of_heads(op: &Attention, x: &'a [f32], words: &'a mut [u32]) -> Vec<Self> {
        let head = |index: usize| op.head(x, op.n_keys, [index / op.n_heads, index % op.n_heads]);
        per_head(op, words, |index, words| {
            Self::new(op.tiles, head(index), words)
        })
    }

    /// dst = scale·x·rhs, rhs `[d, n]`
    fn times(&self, dst: MatrixMut<'_>, scale: f32, rhs: Matrix<'_>) {
        match *self {
            Self::Plain(x) => gemm(dst, Write::Replace, scale, x, rhs),
            Self::Packed(tiles, factors, x) => {
                let [k, n] = rhs.dims();
                with_words(Packed::len(factors, [n, k]), |words| {
                    let rhs = Packed::right(tiles, factors, rhs, words);
                    multiply_packed(tiles, dst, Write::Replace, scale, x, rhs);
                });
            }
        }
    }
}

impl<'a> Columns<'a> {
    fn new(tiles: Option<(Tiles, Factors)>, x: Matrix<'a>, words: &'a mut [u32]) -> Self {
        match tiles {
            None => Self::Plain(x),
            Some((tiles, factors)) => {
                Self::Packed(tiles, factors, Packed::left(tiles, factors, x.t(), words))
            }
        }
    }

    /// As [`Rows::of_heads`].
    fn of_heads(op: &Attention, x: &'a [f32], words: &'a mut [u32]) -> Vec<Self> {
        let head = |index: usize| op.head(x, op.n_keys, [index / op.n_heads, index % op.n_heads]);
        per_head(op, words, |index, words| {
            Self::new(op.tiles, head(index), words)
        })
    }

    /// dst = scale·(xᵀ·rhs)ᵀ, rhs `[keys, n]`: `[n, d]`
    fn times(&self, mut dst: MatrixMut<'_>, scale: f32, rhs: Matrix<'_>) {
        match *self {
            Self::Plain(x) => gemm(dst, Write::Replace, scale, rhs.t(), x),
            Self::Packed(tiles, factors, x) => {
                let [k, n] = rhs.dims();
                let [_, d] = dst.dims();
                with_words(Packed::len(factors, [n, k]), |words| {
                    let rhs = Packed::right(tiles, factors, rhs, words);
                    with_scratch(d * n, |transposed| {
                        let view = MatrixMut::new(transposed, [d, n]);
                        multiply_packed(tiles, view, Write::Replace, scale, x, rhs);
                        for row in 0..n {
                            let column = transposed[row..].iter().step_by(n);
                            for (dst, value) in dst.row_mut(row).iter_mut().zip(column) {
                                *dst = *value;
                            }
                        }
                    });
                });
            }
        }
    }
}

/// One of every head, each with its part of `words`.
fn per_head<'a, T: Send>(
    op: &Attention,
    words: &'a mut [u32],
    of: impl Fn(usize, &'a mut [u32]) -> T + Sync,
) -> Vec<T> {
    let n_heads = op.n_samples * op.n_heads;
    let len = words.len() / n_heads.max(1);
    if len == 0 {
        return (0..n_heads).map(|index| of(index, &mut [])).collect();
    }
    let parts = words.par_chunks_exact_mut(len).enumerate();
    parts.map(|(index, words)| of(index, words)).collect()
}

/// dst += scale·lhs·rhs
fn add_product(
    tiles: Option<(Tiles, Factors)>,
    dst: MatrixMut<'_>,
    scale: f32,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) {
    let Some((tiles, factors)) = tiles else {
        return gemm(dst, Write::Add, scale, lhs, rhs);
    };
    let ([m, k], [_, n]) = (lhs.dims(), rhs.dims());
    with_words(Packed::len(factors, [m, k]), |left| {
        with_words(Packed::len(factors, [n, k]), |right| {
            let lhs = Packed::left(tiles, factors, lhs, left);
            let rhs = Packed::right(tiles, factors, rhs, right);
            multiply_packed(tiles, dst, Write::Add, scale, lhs, rhs);
        });
    });
}

/// x <- exp(x - max) down each of `n` columns; returns the sums of the columns.
fn exp_columns(x: &mut [f32], n: usize) -> [f32; TILE] {
    let (mut largest, mut sums) = ([f32::NEG_INFINITY; TILE], [0.0f32; TILE]);
    vectorize(
        #[inline(always)]
        || {
            for row in x.chunks_exact(n) {
                for (largest, &x) in largest.iter_mut().zip(row) {
                    *largest = if x > *largest { x } else { *largest };
                }
            }
            for row in x.chunks_exact_mut(n) {
                for ((x, &largest), sum) in row.iter_mut().zip(&largest).zip(&mut sums) {
                    *x = exp(*x - largest);
                    *sum += *x;
                }
            }
        },
    );
    sums
}

/// Turns `p` from exponentials into probabilities and `d` from dP into dS, column by column.
fn score_gradient(p: &mut [f32], d: &mut [f32], sums: &[f32]) {
    let n = sums.len();
    let (mut scale, mut mean) = ([0.0f32; TILE], [0.0f32; TILE]);
    for (scale, sum) in scale.iter_mut().zip(sums) {
        *scale = 1.0 / sum;
    }
    vectorize(
        #[inline(always)]
        || {
            for (p, d) in p.chunks_exact_mut(n).zip(d.chunks_exact(n)) {
                for (((p, &d), &scale), mean) in p.iter_mut().zip(d).zip(&scale).zip(&mut mean) {
                    *p *= scale;
                    *mean += *p * d;
                }
            }
            for (p, d) in p.chunks_exact(n).zip(d.chunks_exact_mut(n)) {
                for ((&p, d), &mean) in p.iter().zip(d).zip(&mean) {
                    *d = p * (*d - mean);
                }
            }
        },
    );
}

/// Applies the attention; returns output and columns in one buffer, see [`Attention::lengths`].
pub(crate) fn apply(op: Attention, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    if [&q, &k, &v].into_iter().any(|tensor| tracked(Some(tensor))) {
        q.apply_op3(&k, &v, op)
    } else {
        q.apply_op3_no_bwd(&k, &v, &op)
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let packed = self.forward(
            slice_of(q, q_layout)?,
            slice_of(k, k_layout)?,
            slice_of(v, v_layout)?,
        );
        let len = packed.len();
        // Without columns the buffer is the output as it stands.
        if self.watched.is_empty() {
            return Ok(output(packed, self.output_dims()));
        }
        Ok(output(packed, len))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let [q_values, k_values, v_values, dy_values] = [
            Values::of(q)?,
            Values::of(k)?,
            Values::of(v)?,
            Values::of(&dy)?,
        ];
        let operands = [
            q_values.as_slice()?,
            k_values.as_slice()?,
            v_values.as_slice()?,
            dy_values.as_slice()?,
        ];
        let wanted = [tracked(Some(q)), tracked(Some(k)), tracked(Some(v))];
        let [dq, dk, dv] = self.backward(operands, wanted);
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values
                .map(|values| Tensor::from_vec(values, like.shape(), like.device()))
                .transpose()
        };
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}
