//! Differentiable operations: kernels of this crate for f32 in memory, candle's own elsewhere.
//!
//! Two rules that candle's operations do not keep:
//! - A frozen parameter (one that is not tracked) gets no gradient: none is computed, none is kept.
//! - Without a tracked operand nothing is kept for a backward pass.
//!
//! The kernels have the same bits for any number of threads. [`composed`] holds the same functions in candle's
//! operations: they run on other devices and types, and the kernels are tested against them.

mod gemm;
mod host;
mod simd;

mod activation;
mod attention;
mod conv;
mod layer;
mod norm;
mod projection;

pub mod composed;

use candle_core::Tensor;

pub use attention::Mask;
pub use conv::Padding;

use self::{
    activation::{Activation, Geglu, Nearest},
    attention::Attention,
    conv::Conv,
    host::on_host,
    norm::{After, GroupNorm, LayerNorm},
    projection::{Arrangement, Projection},
};
use crate::Result;

/// y = x·Wᵀ + b.
///
/// # Shapes
/// x `[.., in]`, weight `[out, in]` or `[out, in, 1, 1]`, bias `[out]`; y `[.., out]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !on_host([x, weight]) {
        return Ok(composed::linear(x, weight, bias)?);
    }
    Ok(layer::apply(
        Projection::tokens(x, weight)?,
        x,
        weight,
        bias,
    )?)
}

/// A linear layer of every pixel that leaves tokens: x `[B, in, h, w]` to `[B, h·w, out]`.
///
/// # Errors
/// As [`linear`].
pub fn linear_from_channels(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !on_host([x, weight]) {
        let tokens = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        return Ok(composed::linear(&tokens, weight, bias)?);
    }
    let op = Projection::from_channels(x, weight, Arrangement::Tokens)?;
    Ok(layer::apply(op, x, weight, bias)?)
}

/// A linear layer of every token that leaves a plane: x `[B, h·w, in]` to `[B, out, h, w]`.
///
/// # Errors
/// As [`linear`].
pub fn linear_to_channels(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    [height, width]: [usize; 2],
) -> Result<Tensor> {
    if !on_host([x, weight]) {
        let y = composed::linear(x, weight, bias)?
            .transpose(1, 2)?
            .contiguous()?;
        return Ok(y.reshape((y.dim(0)?, y.dim(1)?, height, width))?);
    }
    let op = Projection::to_channels(x, weight, [height, width])?;
    Ok(layer::apply(op, x, weight, bias)?)
}

/// 2-D convolution.
///
/// # Shapes
/// x `[B, in, H, W]`, weight `[out, in, kh, kw]`, bias `[out]`, or `[B, out]` for one per sample;
/// y `[B, out, (H + before + after - kh) / stride + 1, ..]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit or the kernel is larger than the padded picture.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    if !on_host([x, weight]) {
        return Ok(composed::conv2d(x, weight, bias, stride, padding)?);
    }
    let (n_out, n_samples) = (weight.dim(0)?, x.dim(0)?);
    if let Some(bias) = bias.filter(|b| ![&[n_out][..], &[n_samples, n_out]].contains(&b.dims())) {
        let reason = format!(
            "{:?} for {n_samples} samples and weight {:?}",
            bias.shape(),
            weight.shape()
        );
        return Err(crate::Error::argument("bias", reason));
    }
    let is_pointwise =
        matches!(weight.dims(), [_, _, 1, 1]) && stride == 1 && padding == Padding::NONE;
    if is_pointwise && bias.is_none_or(|bias| bias.rank() == 1) {
        let op = Projection::from_channels(x, weight, Arrangement::Channels)?;
        return Ok(layer::apply(op, x, weight, bias)?);
    }
    Ok(layer::apply(
        Conv::new(x, weight, stride, padding)?,
        x,
        weight,
        bias,
    )?)
}

/// Group normalization of x `[B, C, ..]` with scale and shift `[C]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when C is not a multiple of `n_groups` or the shapes do not fit.
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    n_groups: usize,
    epsilon: f64,
) -> Result<Tensor> {
    normalize_groups(x, [weight, bias], n_groups, epsilon, After::Nothing)
}

/// silu(group_norm(x)) in one pass; see [`group_norm`].
///
/// # Errors
/// As [`group_norm`].
pub fn group_norm_silu(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    n_groups: usize,
    epsilon: f64,
) -> Result<Tensor> {
    normalize_groups(x, [weight, bias], n_groups, epsilon, After::Silu)
}

fn normalize_groups(
    x: &Tensor,
    affine: [&Tensor; 2],
    n_groups: usize,
    epsilon: f64,
    after: After,
) -> Result<Tensor> {
    if on_host([x, affine[0], affine[1]]) {
        let op = GroupNorm::new(x, affine, n_groups, epsilon, after)?;
        return Ok(layer::apply(op, x, affine[0], Some(affine[1]))?);
    }
    let y = composed::group_norm(x, affine[0], affine[1], n_groups, epsilon)?;
    match after {
        After::Nothing => Ok(y),
        After::Silu => Ok(composed::silu(&y)?),
    }
}

/// Normalization of x `[.., C]` over its last dimension with scale and shift `[C]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    if !on_host([x, weight, bias]) {
        return Ok(composed::layer_norm(x, weight, bias, epsilon)?);
    }
    Ok(layer::apply(
        LayerNorm::new(x, [weight, bias], epsilon)?,
        x,
        weight,
        Some(bias),
    )?)
}

/// x·sigmoid(x), element by element.
///
/// # Errors
/// [`crate::Error::Tensor`] when the tensor library fails.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if !on_host([x]) {
        return Ok(composed::silu(x)?);
    }
    Ok(activation::apply(x, Activation::Silu)?)
}

/// x·sigmoid(1.702·x), element by element: OpenAI's approximation of GELU.
///
/// # Errors
/// As [`silu`].
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    if !on_host([x]) {
        return Ok(composed::quick_gelu(x)?);
    }
    Ok(activation::apply(x, Activation::QuickGelu)?)
}

/// x·Φ(x), element by element: GELU with the exact normal distribution function.
///
/// # Errors
/// As [`silu`].
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    if !on_host([x]) {
        return Ok(composed::gelu_erf(x)?);
    }
    Ok(activation::apply(x, Activation::Gelu)?)
}

/// value·gelu(gate) of x `[.., 2·width]` = (value, gate): `[.., width]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the last dimension is odd.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    if !on_host([x]) {
        return Ok(composed::geglu(x)?);
    }
    Ok(activation::apply(x, Geglu::new(x)?)?)
}

/// Nearest-neighbor enlargement of x `[B, C, h, w]` to `[B, C, height, width]`; output pixel i shows input
/// pixel floor(i·h / height), as in PyTorch.
///
/// # Errors
/// [`crate::Error::Tensor`] when x is not four-dimensional.
pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    if !on_host([x]) {
        return Ok(composed::upsample_nearest(x, height, width)?);
    }
    Ok(activation::apply(x, Nearest { height, width })?)
}

/// softmax(Q·Kᵀ/sqrt(d))·V in every head.
///
/// # Shapes
/// q `[B, N, heads·d]`, k and v `[B, M, heads·d]`; the result is `[B, N, heads·d]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit, or for [`Mask::Causal`] unless N = M.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, n_heads: usize, mask: Mask) -> Result<Tensor> {
    if !on_host([q, k, v]) {
        return Ok(composed::attention(q, k, v, n_heads, mask)?.0);
    }
    Ok(attention::apply(
        Attention::new([q, k, v], n_heads, mask, &[])?,
        [q, k, v],
    )?)
}

/// [`attention`] without a mask, and the probabilities that every query gives to the keys at `positions`:
/// `[B, heads, N, positions]`, in [0, 1], differentiable in q and k.
///
/// # Errors
/// As [`attention`], and when a position is not below M.
pub fn observed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    n_heads: usize,
    positions: &[usize],
) -> Result<(Tensor, Tensor)> {
    if !on_host([q, k, v]) {
        let (out, probabilities) = composed::attention(q, k, v, n_heads, Mask::None)?;
        let positions: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        let positions = Tensor::new(positions, q.device())?;
        return Ok((out, probabilities.index_select(&positions, 3)?));
    }
    let op = Attention::new([q, k, v], n_heads, Mask::None, positions)?;
    let ((n_output, n_columns), output, columns) =
        (op.lengths(), op.output_dims(), op.column_dims());
    let packed = attention::apply(op, [q, k, v])?;
    if positions.is_empty() {
        return Ok((packed, Tensor::zeros(columns, q.dtype(), q.device())?));
    }
    Ok((
        packed.narrow(0, 0, n_output)?.reshape(output)?,
        packed.narrow(0, n_output, n_columns)?.reshape(columns)?,
    ))
}
