//! softmax(Q·Kᵀ/sqrt(d))·V per head, some queries at a time: a map is never built whole. The backward computes the
//! probabilities again.
//!
//! ```text
//! P = softmax(S),   S = Q·Kᵀ/sqrt(d),   O = P·V
//! dV = Pᵀ·dO,   dP = dO·Vᵀ,   dS = P∘(dP - rowsum(P∘dP)),   dQ = dS·K/sqrt(d),   dK = dSᵀ·Q/sqrt(d)
//! ```

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};

use crate::ops::{Mask, function::Function};

/// Scores that are held at a time, in elements.
const MOST_SCORES: usize = 1 << 23;

/// How operands are cut into heads.
pub(super) struct Heads {
    pub(super) n_heads: usize,
    pub(super) mask: Mask,
}

impl Heads {
    /// x `[B, n, heads·d]` as `[B, heads, n, d]`.
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (n_samples, n, width) = x.dims3()?;
        x.contiguous()?
            .reshape((n_samples, n, self.n_heads, width / self.n_heads))?
            .transpose(1, 2)?
            .contiguous()
    }

    /// The inverse of [`Self::split`].
    fn join(x: &Tensor) -> Result<Tensor> {
        x.transpose(1, 2)?.contiguous()?.flatten_from(2)
    }

    /// Which queries are taken at a time, of `q` and `k` that are split.
    fn blocks(q: &Tensor, k: &Tensor) -> Result<Vec<Range<usize>>> {
        let (n_samples, n_heads, n_queries, _) = q.dims4()?;
        let n = (MOST_SCORES / (n_samples * n_heads * k.dim(2)?).max(1)).max(1);
        let starts = (0..n_queries).step_by(n);
        Ok(starts
            .map(|start| start..n_queries.min(start + n))
            .collect())
    }

    /// P of some queries `[B, heads, n, d]`, the first of which is number `first`; f32.
    fn probabilities(&self, q: &Tensor, k: &Tensor, first: usize) -> Result<Tensor> {
        let scale = (q.dim(D::Minus1)? as f64).powf(-0.5);
        // Scaled before the product: half precision has room for little more.
        let scores = (q * scale)?.matmul(&k.t()?)?.to_dtype(DType::F32)?;
        let scores = match self.mask {
            Mask::None => scores,
            Mask::Causal => {
                let numbers = |n: usize| Tensor::arange(0u32, n as u32, q.device());
                let own = (numbers(q.dim(2)?)?.to_dtype(DType::F32)? + first as f64)?;
                let keys = numbers(k.dim(2)?)?.to_dtype(DType::F32)?;
                let later = keys.unsqueeze(0)?.broadcast_gt(&own.unsqueeze(1)?)?;
                scores.broadcast_add(&(later.to_dtype(DType::F32)? * -1e30)?)?
            }
        };
        let largest = scores.max_keepdim(D::Minus1)?;
        let weights = scores.broadcast_sub(&largest)?.exp()?;
        weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)
    }
}

/// dS·sqrt(d) from P and dP, of the type of the operands.
fn score_gradient(p: &Tensor, dp: &Tensor, like: &Tensor) -> Result<Tensor> {
    let weighted = (p * dp)?;
    let mean = weighted.sum_keepdim(D::Minus1)?;
    (weighted - p.broadcast_mul(&mean)?)?.to_dtype(like.dtype())
}

/// Sums of gradients, block by block.
#[derive(Default)]
struct Gradients {
    q: Vec<Tensor>,
    k: Option<Tensor>,
    v: Option<Tensor>,
}

impl Gradients {
    /// Adds what the gradient of some queries' scores does to queries and keys.
    fn add_scores(&mut self, ds: &Tensor, q: &Tensor, k: &Tensor, wanted: &[bool]) -> Result<()> {
        let scale = (q.dim(D::Minus1)? as f64).powf(-0.5);
        if wanted[0] {
            self.q.push((ds.matmul(k)? * scale)?);
        }
        if wanted[1] {
            add(&mut self.k, (ds.t()?.contiguous()?.matmul(q)? * scale)?)?;
        }
        Ok(())
    }

    fn joined(self) -> Result<[Option<Tensor>; 3]> {
        let q = if self.q.is_empty() {
            None
        } else {
            Some(Heads::join(&Tensor::cat(&self.q, 2)?)?)
        };
        let join = |x: Option<Tensor>| x.map(|x| Heads::join(&x)).transpose();
        Ok([q, join(self.k)?, join(self.v)?])
    }
}

fn add(sum: &mut Option<Tensor>, more: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + more)?,
        None => more,
    });
    Ok(())
}

/// O of the operands q, k and v.
pub(super) struct Attended(pub(super) Heads);

impl Function for Attended {
    const NAME: &'static str = "attention";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let heads = &self.0;
        let [q, k, v] = [0, 1, 2].map(|i| heads.split(&operands[i]));
        let (q, k, v) = (q?, k?, v?);
        let mut parts = Vec::new();
        for block in Heads::blocks(&q, &k)? {
            let own = q.narrow(2, block.start, block.len())?.contiguous()?;
            let p = heads.probabilities(&own, &k, block.start)?;
            parts.push(p.to_dtype(v.dtype())?.matmul(&v)?);
        }
        Heads::join(&Tensor::cat(&parts, 2)?)
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let heads = &self.0;
        let [q, k, v] = [0, 1, 2].map(|i| heads.split(&operands[i]));
        let (q, k, v, dy) = (q?, k?, v?, heads.split(dy)?);
        let mut gradients = Gradients::default();
        for block in Heads::blocks(&q, &k)? {
            let rows = |x: &Tensor| x.narrow(2, block.start, block.len())?.contiguous();
            let (own, dy) = (rows(&q)?, rows(&dy)?);
            let p = heads.probabilities(&own, &k, block.start)?;
            if wanted[2] {
                let p = p.to_dtype(v.dtype())?.t()?.contiguous()?;
                add(&mut gradients.v, p.matmul(&dy)?)?;
            }
            if wanted[0] || wanted[1] {
                let dp = dy.matmul(&v.t()?)?.to_dtype(DType::F32)?;
                gradients.add_scores(&score_gradient(&p, &dp, &q)?, &own, &k, wanted)?;
            }
        }
        Ok(gradients.joined()?.into())
    }
}

/// f32 P of some keys `[B, heads, N, positions]`, of the operands q and k.
pub(super) struct Watched {
    pub(super) heads: Heads,
    pub(super) positions: Vec<usize>,
}

impl Watched {
    fn positions(&self, like: &Tensor) -> Result<Tensor> {
        let positions: Vec<u32> = self.positions.iter().map(|&i| i as u32).collect();
        Tensor::new(positions, like.device())
    }
}

impl Function for Watched {
    const NAME: &'static str = "watched attention";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let (q, k) = (
            self.heads.split(&operands[0])?,
            self.heads.split(&operands[1])?,
        );
        let (n_samples, n_heads, n_queries, _) = q.dims4()?;
        if self.positions.is_empty() {
            let shape = (n_samples, n_heads, n_queries, 0);
            return Tensor::zeros(shape, DType::F32, q.device());
        }
        let positions = self.positions(&q)?;
        let mut parts = Vec::new();
        for block in Heads::blocks(&q, &k)? {
            let own = q.narrow(2, block.start, block.len())?.contiguous()?;
            let p = self.heads.probabilities(&own, &k, block.start)?;
            parts.push(p.index_select(&positions, 3)?);
        }
        Tensor::cat(&parts, 2)
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (q, k) = (
            self.heads.split(&operands[0])?,
            self.heads.split(&operands[1])?,
        );
        let positions = self.positions(&q)?;
        let mut gradients = Gradients::default();
        for block in Heads::blocks(&q, &k)? {
            let rows = |x: &Tensor| x.narrow(2, block.start, block.len())?.contiguous();
            let own = rows(&q)?;
            let p = self.heads.probabilities(&own, &k, block.start)?;
            let dp = p.zeros_like()?.index_add(&positions, &rows(dy)?, 3)?;
            gradients.add_scores(&score_gradient(&p, &dp, &q)?, &own, &k, wanted)?;
        }
        let [q, k, _] = gradients.joined()?;
        Ok(vec![q, k])
    }
}
