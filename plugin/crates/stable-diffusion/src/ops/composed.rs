//! The operations of [`super`] written in candle's own: any device and type, any gradient.
//!
//! What both backends are tested against, and what the form for devices computes where nothing has to be spared. Only
//! operations with a backward are used; candle computes the gradients of frozen parameters too, and keeps everything.

use candle_core::{D, DType, Result, Tensor, bail};

use super::{Mask, Padding};

/// y = x·Wᵀ + b; x `[.., in]`, W `[out, in]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (n_out, n_in) = (weight.dim(0)?, weight.elem_count() / weight.dim(0)?.max(1));
    let mut dims = x.dims().to_vec();
    let Some(last) = dims.last_mut() else {
        bail!("linear of a scalar")
    };
    *last = n_out;
    let y = x
        .reshape(((), n_in))?
        .matmul(&weight.reshape((n_out, n_in))?.t()?)?
        .reshape(dims)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// x `[B, C, H, W]`, W `[out, C, kh, kw]`, b `[out]` or `[B, out]`.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    let Padding { before, after } = padding;
    let mut padded = x
        .pad_with_zeros(2, before, after)?
        .pad_with_zeros(3, before, after)?;
    // candle takes the part of the last rows and columns that no window reads to be equally large, or its
    // backward fails: without such a part there is nothing to get wrong.
    for axis in [2, 3] {
        let n_windows = (padded.dim(axis)?.saturating_sub(weight.dim(axis)?)) / stride.max(1);
        padded = padded.narrow(axis, 0, n_windows * stride + weight.dim(axis)?)?;
    }
    let y = padded.contiguous()?.conv2d(weight, 0, stride, 1, 1)?;
    match bias {
        Some(bias) if bias.rank() == 2 => y.broadcast_add(&bias.unsqueeze(2)?.unsqueeze(3)?),
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

/// x `[B, C, ..]`, scale and shift `[C]`.
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    n_groups: usize,
    epsilon: f64,
) -> Result<Tensor> {
    let (n_samples, n_channels) = (x.dim(0)?, x.dim(1)?);
    let grouped = x.reshape((n_samples, n_groups, ()))?;
    let normalized = normalize(&grouped, epsilon)?.reshape((n_samples, n_channels, ()))?;
    let scale = weight.reshape((1, n_channels, 1))?;
    let shift = bias.reshape((1, n_channels, 1))?;
    normalized
        .broadcast_mul(&scale)?
        .broadcast_add(&shift)?
        .reshape(x.shape())
}

/// x `[.., C]`, scale and shift `[C]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    normalize(x, epsilon)?
        .broadcast_mul(weight)?
        .broadcast_add(bias)
}

/// (x - mean) / sqrt(var + ε) over the last dimension.
fn normalize(x: &Tensor, epsilon: f64) -> Result<Tensor> {
    let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    centered.broadcast_div(&(variance + epsilon)?.sqrt()?)
}

/// x·sigmoid(x)
pub fn silu(x: &Tensor) -> Result<Tensor> {
    x.silu()
}

/// x·sigmoid(1.702·x)
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    x * ((x * -1.702)?.exp()? + 1.0)?.recip()?
}

/// x·Φ(x)
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    x * ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? * 0.5)?.affine(1.0, 0.5)?
}

/// x `[.., 2·width]` = (value, gate): value·gelu(gate).
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? / 2;
    let value = x.narrow(D::Minus1, 0, width)?;
    value * gelu_erf(&x.narrow(D::Minus1, width, width)?.contiguous()?)?
}

/// x `[B, C, h, w]` to `[B, C, height, width]`.
pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let sources = |n_outputs: usize, n_inputs: usize| {
        let sources: Vec<u32> = (0..n_outputs)
            .map(|i| (i * n_inputs / n_outputs) as u32)
            .collect();
        Tensor::new(sources, x.device())
    };
    x.contiguous()?
        .index_select(&sources(height, h)?, 2)?
        .index_select(&sources(width, w)?, 3)
}

/// q `[B, N, heads·d]`, k and v `[B, M, heads·d]`: output `[B, N, heads·d]`, probabilities `[B, heads, N, M]`.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    n_heads: usize,
    mask: Mask,
) -> Result<(Tensor, Tensor)> {
    let (n_samples, n_queries, width) = q.dims3()?;
    let heads = |x: &Tensor| {
        let n = x.dim(1)?;
        x.reshape((n_samples, n, n_heads, width / n_heads))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?);
    let scale = ((width / n_heads) as f64).powf(-0.5);
    let mut scores = (q.matmul(&k.t()?)? * scale)?;
    if mask == Mask::Causal {
        let rows = Tensor::arange(0u32, n_queries as u32, q.device())?;
        let later = rows.unsqueeze(0)?.broadcast_gt(&rows.unsqueeze(1)?)?;
        let barrier = (later.to_dtype(DType::F32)? * -1e9)?.to_dtype(scores.dtype())?;
        scores = scores.broadcast_add(&barrier)?;
    }
    let probabilities = candle_nn::ops::softmax(&scores, D::Minus1)?;
    let out = probabilities
        .matmul(&v)?
        .transpose(1, 2)?
        .reshape((n_samples, n_queries, width))?;
    Ok((out, probabilities))
}
