//! Differentiable operations. [`Backend`] says who computes, and what all of them keep to.
//!
//! [`composed`] holds the same functions in candle's operations alone, with any gradient: what both backends are tested
//! against.

mod arrangement;
mod backend;
mod device;
mod function;
mod host;
mod pass;
mod precision;
mod tape;
mod workers;

pub mod composed;

use candle_core::{Result as TensorResult, Tensor, bail};

pub use backend::Backend;
pub use device::kernels;
pub(crate) use host::{dims_of, in_order_of_tiles, in_rows, is_ordered};
pub(crate) use pass::as_one;
pub use precision::Precision;
pub(crate) use tape::{Gradients, Tape};
pub(crate) use workers::on_workers;

use self::arrangement::{Joint, MeanOfHeads, Repeat, Shift, Sum};

use crate::Result;

/// Which keys a query may look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// All of them.
    None,
    /// Those at its own position and before.
    Causal,
}

/// Zero rows and columns around a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Padding {
    /// Above and to the left.
    pub before: usize,
    /// Below and to the right.
    pub after: usize,
}

impl Padding {
    /// No padding.
    pub const NONE: Self = Self::around(0);

    /// The same on all sides.
    pub const fn around(n: usize) -> Self {
        Self {
            before: n,
            after: n,
        }
    }
}

/// y = f(x), element by element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activation {
    /// x·sigmoid(x)
    Silu,
    /// x·sigmoid(1.702·x)
    QuickGelu,
    /// x·Φ(x), Φ the normal distribution function
    Gelu,
}

/// What follows a normalization in the same pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Nothing,
    Silu,
}

/// y = x·Wᵀ + b.
///
/// # Shapes
/// x `[.., in]`, weight `[out, in]` or `[out, in, 1, 1]`, bias `[out]`; y `[.., out]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (_, n_in) = weight_dims(weight)?;
    expect_width("linear", x.dims().last().copied().unwrap_or(0), n_in)?;
    Ok(match Backend::of_product(x, weight) {
        Backend::Host => host::linear(x, weight, bias),
        Backend::Device => device::linear(x, &in_rows(weight)?, bias),
    }?)
}

/// A linear layer of every pixel that leaves tokens: x `[B, in, h, w]` to `[B, h·w, out]`.
///
/// # Errors
/// As [`linear`].
pub fn linear_from_channels(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (_, n_in) = weight_dims(weight)?;
    expect_width("1x1 convolution", x.dims4()?.1, n_in)?;
    Ok(match Backend::of_product(x, weight) {
        Backend::Host => host::linear_from_channels(x, weight, bias),
        Backend::Device => device::linear_from_channels(x, &in_rows(weight)?, bias),
    }?)
}

/// A linear layer of every token that leaves a plane: x `[B, h·w, in]` to `[B, out, h, w]`.
///
/// # Errors
/// As [`linear`].
pub fn linear_to_channels(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    size: [usize; 2],
) -> Result<Tensor> {
    let (_, n_in) = weight_dims(weight)?;
    expect_width("linear", x.dims3()?.2, n_in)?;
    Ok(match Backend::of_product(x, weight) {
        Backend::Host => host::linear_to_channels(x, weight, bias, size),
        Backend::Device => device::linear_to_channels(x, &in_rows(weight)?, bias, size),
    }?)
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
    let dims = dims_of(weight);
    let (n_out, n_samples) = (dims.first().copied().unwrap_or(0), x.dim(0)?);
    if let Some(bias) = bias.filter(|b| ![&[n_out][..], &[n_samples, n_out]].contains(&b.dims())) {
        let reason = format!(
            "{:?} for {n_samples} samples and weight {dims:?}",
            bias.shape()
        );
        return Err(crate::Error::argument("bias", reason));
    }
    Ok(match Backend::of_product(x, weight) {
        Backend::Host => host::conv2d(x, weight, bias, stride, padding),
        Backend::Device => device::conv2d(x, &in_rows(weight)?, bias, stride, padding),
    }?)
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
    expect_groups(x, affine, n_groups)?;
    Ok(match Backend::of([x, affine[0], affine[1]]) {
        Backend::Host => host::group_norm(x, affine, n_groups, epsilon, after),
        Backend::Device => device::group_norm(x, affine, n_groups, epsilon, after),
    }?)
}

/// Normalization of x `[.., C]` over its last dimension with scale and shift `[C]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    expect_affine("layer_norm", [weight, bias], width)?;
    Ok(match Backend::of([x, weight, bias]) {
        Backend::Host => host::layer_norm(x, [weight, bias], epsilon),
        Backend::Device => device::layer_norm(x, [weight, bias], epsilon),
    }?)
}

/// x·sigmoid(x), element by element.
///
/// # Errors
/// [`crate::Error::Tensor`] when the tensor library fails.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    activation(x, Activation::Silu)
}

/// x·sigmoid(1.702·x), element by element: OpenAI's approximation of GELU.
///
/// # Errors
/// As [`silu`].
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    activation(x, Activation::QuickGelu)
}

/// x·Φ(x), element by element: GELU with the exact normal distribution function.
///
/// # Errors
/// As [`silu`].
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    activation(x, Activation::Gelu)
}

fn activation(x: &Tensor, which: Activation) -> Result<Tensor> {
    Ok(match Backend::of([x]) {
        Backend::Host => host::activation(x, which),
        Backend::Device => device::activation(x, which),
    }?)
}

/// value·gelu(gate) of x `[.., 2·width]` = (value, gate): `[.., width]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the last dimension is odd.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    expect_even(x)?;
    Ok(match Backend::of([x]) {
        Backend::Host => host::geglu(x),
        Backend::Device => device::geglu(x),
    }?)
}

/// value·gelu(gate) of (value, gate) = x·Wᵀ + b: x `[.., in]`, weight `[2·out, in]`, bias `[2·out]`; y `[.., out]`.
///
/// # Errors
/// As [`linear`] and [`geglu`].
pub fn gated_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (n_out, n_in) = weight_dims(weight)?;
    match Backend::of_product(x, weight) {
        Backend::Host if n_out.is_multiple_of(2) && n_out > 0 => {
            expect_width("gated linear", x.dims().last().copied().unwrap_or(0), n_in)?;
            Ok(host::gated_linear(x, weight, bias)?)
        }
        _ => geglu(&linear(x, weight, bias)?),
    }
}

/// Nearest-neighbor enlargement of x `[B, C, h, w]` to `[B, C, height, width]`; output pixel i shows input
/// pixel floor(i·h / height), as in PyTorch.
///
/// # Errors
/// [`crate::Error::Tensor`] when x is not four-dimensional.
pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    Ok(match Backend::of([x]) {
        Backend::Host => host::upsample_nearest(x, [height, width]),
        Backend::Device => device::upsample_nearest(x, [height, width]),
    }?)
}

/// softmax(Q·Kᵀ/sqrt(d))·V in every head.
///
/// # Shapes
/// q `[B, N, heads·d]`, k and v `[B, M, heads·d]`; the result is `[B, N, heads·d]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit, or for [`Mask::Causal`] unless N = M.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, n_heads: usize, mask: Mask) -> Result<Tensor> {
    expect_heads([q, k, v], n_heads, mask, &[])?;
    Ok(match Backend::of([q, k, v]) {
        Backend::Host => host::attention([q, k, v], n_heads, mask),
        Backend::Device => device::attention([q, k, v], n_heads, mask),
    }?)
}

/// [`attention`] without a mask, and the probabilities that every query gives to the keys at `positions`:
/// f32 `[B, heads, N, positions]`, in [0, 1], differentiable in q and k.
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
    expect_heads([q, k, v], n_heads, Mask::None, positions)?;
    let both = match Backend::of([q, k, v]) {
        Backend::Host => host::observed_attention([q, k, v], n_heads, positions),
        Backend::Device => device::observed_attention([q, k, v], n_heads, positions),
    }?;
    let Ok([attended, probabilities]) = <[Tensor; 2]>::try_from(both) else {
        return Err(candle_core::Error::Msg("attention gave something else".into()).into());
    };
    Ok((attended, probabilities))
}

/// x + y, of one shape.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes differ.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    add_scaled(x, y, 1.0)
}

/// x + scale·y, of one shape.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes differ.
pub fn add_scaled(x: &Tensor, y: &Tensor, scale: f64) -> Result<Tensor> {
    if x.shape() != y.shape() {
        let [x, y] = [x, y].map(Tensor::shape);
        return Err(candle_core::Error::Msg(format!("the sum of {x:?} and {y:?}")).into());
    }
    Ok(function::apply(Sum { scale }, &[x, y])?)
}

/// The channels of x `[B, C, ..]` and behind them those of y `[B, D, ..]`: `[B, C + D, ..]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit.
pub fn join_channels(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok(function::apply(Joint, &[x, y])?)
}

/// x `[B, C]` + shift `[C]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the shapes do not fit.
pub fn shift(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    expect_affine("shift", [shift; 2], x.dims2()?.1)?;
    Ok(function::apply(Shift, &[x, shift])?)
}

/// x `[1 or n_samples, ..]` for every sample, `[n_samples, ..]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when x has another number of samples.
pub fn for_samples(x: &Tensor, n_samples: usize) -> Result<Tensor> {
    if x.dim(0)? == n_samples {
        return Ok(x.clone());
    }
    Ok(function::apply(Repeat { n_samples }, &[x])?)
}

/// The mean of x `[B, heads, ..]` over its heads, `[B, ..]`.
///
/// # Errors
/// [`crate::Error::Tensor`] when the tensor library fails.
pub fn mean_of_heads(x: &Tensor) -> Result<Tensor> {
    Ok(function::apply(MeanOfHeads, &[x])?)
}

// ---------------------------------------------------------------- shapes that every backend relies on

/// `[out, in]` of a linear or 1x1 convolution weight.
fn weight_dims(weight: &Tensor) -> TensorResult<(usize, usize)> {
    match dims_of(weight)[..] {
        [out, n_in] | [out, n_in, 1, 1] => Ok((out, n_in)),
        ref dims => bail!("a projection weight is [out, in] or [out, in, 1, 1], not {dims:?}"),
    }
}

fn expect_width(what: &str, found: usize, expected: usize) -> TensorResult<()> {
    if found != expected {
        bail!("{what}: the weight takes {expected} channels, the input has {found}");
    }
    Ok(())
}

fn expect_groups(x: &Tensor, affine: [&Tensor; 2], n_groups: usize) -> TensorResult<()> {
    let [_, n_channels, ..] = x.dims() else {
        bail!("group_norm takes [B, C, ..], not {:?}", x.shape())
    };
    expect_affine("group_norm", affine, *n_channels)?;
    if n_groups == 0 || n_channels % n_groups != 0 {
        bail!("group_norm: {n_channels} channels in {n_groups} groups");
    }
    Ok(())
}

fn expect_even(x: &Tensor) -> TensorResult<()> {
    match x.dims().last() {
        Some(&last) if last % 2 == 0 && last > 0 => Ok(()),
        _ => bail!(
            "geglu takes an even number of channels, not {:?}",
            x.shape()
        ),
    }
}

fn expect_affine(what: &str, affine: [&Tensor; 2], n_channels: usize) -> TensorResult<()> {
    for tensor in affine {
        if tensor.dims() != [n_channels] {
            bail!(
                "{what}: scale and shift {:?} for {n_channels} channels",
                tensor.shape()
            );
        }
    }
    Ok(())
}

fn expect_heads(
    [q, k, v]: [&Tensor; 3],
    n_heads: usize,
    mask: Mask,
    positions: &[usize],
) -> TensorResult<()> {
    let (n_samples, n_queries, width) = q.dims3()?;
    let (key_samples, n_keys, key_width) = k.dims3()?;
    if k.dims() != v.dims() || key_width != width || key_samples != n_samples {
        let [q, k, v] = [q, k, v].map(Tensor::shape);
        bail!("attention of {q:?}, {k:?} and {v:?}");
    }
    if n_heads == 0 || width % n_heads != 0 || n_keys == 0 {
        bail!("attention: {n_heads} heads of {width} channels over {n_keys} keys");
    }
    if mask == Mask::Causal && n_queries != n_keys {
        bail!("causal attention of {n_queries} queries over {n_keys} keys");
    }
    if let Some(position) = positions.iter().find(|&&position| position >= n_keys) {
        bail!("attention: position {position} of {n_keys} keys");
    }
    Ok(())
}
