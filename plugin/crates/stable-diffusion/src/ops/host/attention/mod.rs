//! softmax(Q·Kᵀ/sqrt(d))·V per head, without ever holding a whole attention map.
//!
//! Queries are taken [`QUERIES`] at a time, keys some hundreds at a time: scores of so many never leave the cache. They are
//! kept transposed, `[keys, queries]`, so that the softmax runs across vector lanes. The forward pass keeps the largest
//! score and the sum of the exponentials of every query as it goes along (Milakov and Gimelshein 2018), and leaves their
//! logarithm to the backward pass, which computes the probabilities again (Dao et al. 2022):
//!
//! ```text
//! S = Q·Kᵀ/sqrt(d)      L = log Σ exp S        P = exp(S - L)         O = P·V
//! dP = dO·Vᵀ + dC       D = rowsum(dO∘O) + rowsum(dC∘C)               dS = P∘(dP - D)
//! dV = Pᵀ·dO            dQ = dS·K/sqrt(d)      dK = dSᵀ·Q/sqrt(d)
//! ```
//!
//! with C the columns of P that are watched; D is what rowsum(P∘dP) comes to. Heads are column ranges of `[B, N, heads·d]`:
//! nothing is permuted.
//!
//! | here | symbol | shape |
//! |---|---|---|
//! | `scores` | products of keys and queries, then Pᵀ | `[keys, queries]` |
//! | `d_scores` | dPᵀ, then dSᵀ | `[keys, queries]` |
//! | `log_sums`, `means` | L, D | `[B, heads, N]` |
//! | `columns` | C | `[B, heads, N, watched]` |
//!
//! | file | what |
//! |---|---|
//! | `vectors.rs` | a block of queries forward, a head backward, by vectors of f32 |
//! | `tiles.rs` | the same by the processor's matrix tiles |

mod tiles;
mod vectors;

use std::{ops::Range, sync::OnceLock};

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    gemm::{Matrix, MatrixMut, Tile},
    memory::{Values, tensor, unwritten},
    simd::{exp, items_per_thread, sum_zip_by, vectorize},
    tiles::{Factors, Means, Tiles},
};
use crate::ops::{
    Mask,
    function::{Function, Reads},
};

/// Queries of a block.
const QUERIES: usize = 128;

/// The sizes of one attention.
#[derive(Debug)]
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
    /// From the forward pass to the backward pass.
    log_sums: OnceLock<Vec<f32>>,
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
            log_sums: OnceLock::new(),
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

    fn rounds(&self) -> bool {
        matches!(self.tiles, Some((_, Factors::Rounded)))
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_width as f32).sqrt()
    }

    /// Head `index` of all samples' as `[n, head width]`; `x` is `[B, n, heads·d]`.
    fn head<'a>(&self, x: &'a [f32], n: usize, index: usize) -> Matrix<'a> {
        let (sample, head) = (index / self.n_heads, index % self.n_heads);
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

    /// Scores of keys that a query may not look at, those after it, become -∞. Queries begin with number `query`, keys with
    /// number `key`.
    fn hide(&self, scores: &mut [f32], n: usize, [query, key]: [usize; 2]) {
        if self.mask == Mask::Causal {
            for (key, row) in (key..).zip(scores.chunks_exact_mut(n)) {
                let n_before = key.saturating_sub(query).min(n);
                row[..n_before].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// What a block of queries writes.
struct Written<'a> {
    /// `[queries, d]`
    out: MatrixMut<'a>,
    /// `[queries, watched]`
    columns: &'a mut [f32],
    log_sums: &'a mut [f32],
}

/// What a backward pass reads of one head.
struct Head<'a> {
    /// `[N, d]`, and the gradient of the output.
    q: Matrix<'a>,
    dy: Matrix<'a>,
    /// `[M, d]`
    k: Matrix<'a>,
    v: Matrix<'a>,
    /// `[N, watched]`
    d_columns: &'a [f32],
    /// `[N]`
    log_sums: &'a [f32],
    means: Vec<f32>,
}

/// Where the gradients of one head go, as far as they are wanted.
struct Gradients<'a> {
    q: Option<MatrixMut<'a>>,
    k: Option<MatrixMut<'a>>,
    v: Option<MatrixMut<'a>>,
}

impl Attention {
    /// The output followed by the watched columns, and the logarithms of the sums.
    fn attend(&self, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (n_output, n_columns) = self.lengths();
        let mut packed = unwritten(n_output + n_columns);
        let mut log_sums = vec![0.0; self.n_samples * self.n_heads * self.n_queries];
        let (out, columns) = packed.split_at_mut(n_output);
        let heads = self.heads_mut(out, self.n_queries).into_iter().enumerate();
        let tiles: Vec<(usize, Tile<'_>)> = heads
            .flat_map(|(index, head)| {
                let tiles = head.values.tiles([QUERIES, self.head_width]);
                tiles.into_iter().map(move |tile| (index, tile))
            })
            .collect();
        let columns = pieces(columns, self.n_queries, self.watched.len(), tiles.len());
        let sums = pieces(&mut log_sums, self.n_queries, 1, tiles.len());
        let blocks = tiles
            .into_par_iter()
            .zip(columns)
            .zip(sums)
            .with_min_len(items_per_thread(self.n_keys * self.head_width))
            .map(|(((index, tile), columns), log_sums)| {
                let written = Written {
                    out: tile.values,
                    columns,
                    log_sums,
                };
                (index, tile.rows, written)
            });
        let work = |attend: &(dyn Fn(usize, Matrix<'_>, usize, Written<'_>) + Sync)| {
            blocks.for_each(|(index, rows, written)| {
                let q = self.head(q, self.n_queries, index).rows(rows.clone());
                attend(index, q, rows.start, written);
            });
        };
        match self.tiles {
            Some(means) => tiles::with_keys(self, means, [k, v], work),
            None => vectors::with_keys(self, [k, v], work),
        }
        (packed, log_sums)
    }

    /// Gradients of q, k and v as far as `wanted`. `y` and `dy` are packed as the result of the forward pass is.
    fn gradients(
        &self,
        [q, k, v, y, dy]: [&[f32]; 5],
        log_sums: &[f32],
        wanted: [bool; 3],
    ) -> [Option<Vec<f32>>; 3] {
        let (n_output, _) = self.lengths();
        let [(y, columns), (dy, d_columns)] = [y, dy].map(|packed| packed.split_at(n_output));
        let mut buffers = [
            wanted[0].then(|| unwritten(q.len())),
            wanted[1].then(|| unwritten(k.len())),
            wanted[2].then(|| unwritten(v.len())),
        ];
        let [dq, dk, dv] = &mut buffers;
        let dq = self.optional_heads_mut(dq, self.n_queries);
        let dk = self.optional_heads_mut(dk, self.n_keys);
        let dv = self.optional_heads_mut(dv, self.n_keys);
        let columns_len = self.n_queries * self.watched.len();
        dq.into_par_iter()
            .zip(dk)
            .zip(dv)
            .enumerate()
            .for_each(|(index, ((dq, dk), dv))| {
                let [q, y, dy] = [q, y, dy].map(|x| self.head(x, self.n_queries, index));
                let [k, v] = [k, v].map(|x| self.head(x, self.n_keys, index));
                let [columns, d_columns] =
                    [columns, d_columns].map(|c| &c[index * columns_len..][..columns_len]);
                let head = Head {
                    q,
                    dy,
                    k,
                    v,
                    d_columns,
                    log_sums: &log_sums[index * self.n_queries..][..self.n_queries],
                    means: self.means([y, dy], [columns, d_columns]),
                };
                let gradients = Gradients {
                    q: dq,
                    k: dk,
                    v: dv,
                };
                match self.tiles {
                    Some(means) => tiles::backward(self, means, &head, gradients),
                    None => vectors::backward(self, &head, gradients),
                }
            });
        buffers
    }

    /// D of one head.
    fn means(&self, [y, dy]: [Matrix<'_>; 2], [columns, d_columns]: [&[f32]; 2]) -> Vec<f32> {
        let n_watched = self.watched.len();
        let mean = |query: usize| {
            let [y, dy] = [y, dy].map(|x| &x.rows(query..query + 1).data()[..self.head_width]);
            let [c, dc] = [columns, d_columns].map(|c| &c[query * n_watched..][..n_watched]);
            (sum_zip_by(y, dy, |y, dy| y * dy) + sum_zip_by(c, dc, |c, dc| c * dc)) as f32
        };
        (0..self.n_queries).map(mean).collect()
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

    /// The watched among these keys, by their place in `watched`.
    fn watched_of(&self, keys: &Range<usize>) -> impl Iterator<Item = (usize, usize)> {
        let watched = self.watched.iter().copied().enumerate();
        watched.filter(|(_, key)| keys.contains(key))
    }

    /// Lets `columns` `[n, watched]` have the rows of the watched keys.
    fn watch(&self, scores: &[f32], width: usize, keys: &Range<usize>, columns: &mut [f32]) {
        for (column, key) in self.watched_of(keys) {
            let seen = &scores[(key - keys.start) * width..][..width];
            let columns = columns[column..].iter_mut().step_by(self.watched.len());
            columns.zip(seen).for_each(|(column, seen)| *column = *seen);
        }
    }

    /// Adds the gradient of the watched columns, of queries from number `query` on, to `d_scores`.
    fn add_watched(
        &self,
        head: &Head<'_>,
        query: usize,
        d_scores: &mut [f32],
        width: usize,
        keys: &Range<usize>,
    ) {
        for (column, key) in self.watched_of(keys) {
            let rows = head.d_columns[query * self.watched.len() + column..].iter();
            let d_scores = &mut d_scores[(key - keys.start) * width..][..width];
            let rows = rows.step_by(self.watched.len());
            d_scores.iter_mut().zip(rows).for_each(|(d, row)| *d += row);
        }
    }
}

/// The softmax of a block of queries, as far as keys were seen.
struct Softmax {
    /// Of scores, which come as products.
    scale: f32,
    largest: [f32; QUERIES],
    sums: [f32; QUERIES],
}

impl Softmax {
    fn new(op: &Attention) -> Self {
        Self {
            scale: op.scale(),
            largest: [f32::NEG_INFINITY; QUERIES],
            sums: [0.0; QUERIES],
        }
    }

    /// Looks for the largest of more products `[keys, width]`, and relates what was summed up to it; `out` is `[d, width]`.
    #[inline(always)]
    fn see(&mut self, scores: &[f32], out: &mut [f32], width: usize) {
        let mut largest = self.largest;
        for row in scores.chunks_exact(width) {
            for (largest, &score) in largest.iter_mut().zip(row) {
                *largest = if score > *largest { score } else { *largest };
            }
        }
        let mut shrink = [0.0; QUERIES];
        for (i, shrink) in shrink.iter_mut().enumerate() {
            *shrink = exp(self.scale * (self.largest[i] - largest[i]));
            self.sums[i] *= *shrink;
        }
        for row in out.chunks_exact_mut(width) {
            for (out, shrink) in row.iter_mut().zip(&shrink) {
                *out *= shrink;
            }
        }
        self.largest = largest;
    }

    /// Puts what was summed up in its place, normalized.
    fn finish(&self, out: &[f32], width: usize, mut written: Written<'_>) {
        let n_watched = written.columns.len() / written.log_sums.len();
        for (row, log_sum) in written.log_sums.iter_mut().enumerate() {
            *log_sum = self.scale * self.largest[row] + self.sums[row].ln();
            let weight = 1.0 / self.sums[row];
            let column = out[row..].iter().step_by(width);
            for (dst, value) in written.out.row_mut(row).iter_mut().zip(column) {
                *dst = weight * value;
            }
            let scores = &mut written.columns[row * n_watched..][..n_watched];
            let (scale, log_sum) = (self.scale, *log_sum);
            vectorize(
                #[inline(always)]
                || {
                    for score in scores {
                        *score = exp(scale * *score - log_sum);
                    }
                },
            );
        }
    }
}

/// The part of every block of queries, of rows `[heads · queries, width]`; empty ones if there is no width.
fn pieces(rows: &mut [f32], n_queries: usize, width: usize, n_blocks: usize) -> Vec<&mut [f32]> {
    if width == 0 {
        return (0..n_blocks).map(|_| Default::default()).collect();
    }
    let heads = rows.chunks_mut(n_queries * width);
    heads
        .flat_map(|head| head.chunks_mut(QUERIES * width))
        .collect()
}

/// Operands q, k and v; the value is output and columns in one buffer, see [`Attention::lengths`], or the output as it stands
/// where there are no columns.
impl Function for Attention {
    const NAME: &'static str = "attention";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let device = operands[0].device();
        let contiguous = operands.iter().map(Tensor::contiguous);
        let operands = contiguous.collect::<Result<Vec<_>>>()?;
        let values = operands.iter().map(Values::of);
        let values = values.collect::<Result<Vec<_>>>()?;
        let [q, k, v] = &values[..] else {
            bail!("attention takes three operands")
        };
        let (packed, log_sums) = self.attend(q.as_slice()?, k.as_slice()?, v.as_slice()?);
        // A second pass of one operation finds the same.
        self.log_sums.get_or_init(|| log_sums);
        if self.watched.is_empty() {
            return tensor(packed, self.output_dims(), device);
        }
        let len = packed.len();
        tensor(packed, len, device)
    }

    fn backward(
        &self,
        operands: &[Tensor],
        y: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let Some(log_sums) = self.log_sums.get() else {
            bail!("attention goes back before it went forward")
        };
        let seen = operands.iter().chain([y, dy]).map(Tensor::contiguous);
        let seen = seen.collect::<Result<Vec<_>>>()?;
        let values = seen.iter().map(Values::of).collect::<Result<Vec<_>>>()?;
        let slices = values.iter().map(Values::as_slice);
        let slices = slices.collect::<Result<Vec<_>>>()?;
        let (Ok(slices), &[q, k, v]) = (slices.try_into(), wanted) else {
            bail!("attention takes three operands")
        };
        let gradients = self.gradients(slices, log_sums, [q, k, v]);
        let tensor = |(values, like): (Option<Vec<f32>>, &Tensor)| {
            values
                .map(|values| tensor(values, like.shape(), like.device()))
                .transpose()
        };
        gradients.into_iter().zip(operands).map(tensor).collect()
    }

    // Where products round their factors, what is rounded before is the same, but for the means of the output.
    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::rounded_if(self.rounds())
    }

    fn reads_value(&self) -> Reads {
        Reads::rounded_if(self.rounds())
    }
}
