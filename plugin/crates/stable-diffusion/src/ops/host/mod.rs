//! The operations as kernels for f32 in memory; see [`super`] for what each of them computes.

mod gemm;
mod memory;
mod numbers;
mod ordered;
mod packed;
mod simd;
mod tiles;
mod turn;
mod unpacked;

mod activation;
mod attention;
mod conv;
mod gated;
mod layer;
mod norm;
mod projection;
mod sum;
mod winograd;

use candle_core::{D, Result, Tensor};

use self::{
    activation::{Elementwise, Geglu, Nearest},
    attention::Attention,
    conv::Conv,
    gated::Gated,
    norm::{GroupNorm, LayerNorm},
    projection::{Arrangement, Projection},
};
use super::{Activation, After, Mask, Padding, function};

pub(crate) use ordered::{dims_of, in_order_of_tiles, in_rows, is_ordered};
pub(super) use sum::{add_to, mean_of_heads, rounded, sum, widened};

pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    layer::apply(Projection::tokens(x, weight)?, x, weight, bias)
}

pub(super) fn linear_from_channels(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let op = Projection::from_channels(x, weight, Arrangement::Tokens)?;
    layer::apply(op, x, weight, bias)
}

pub(super) fn linear_to_channels(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    size: [usize; 2],
) -> Result<Tensor> {
    layer::apply(Projection::to_channels(x, weight, size)?, x, weight, bias)
}

pub(super) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    let is_pointwise =
        matches!(dims_of(weight)[..], [_, _, 1, 1]) && stride == 1 && padding == Padding::NONE;
    if is_pointwise && bias.is_none_or(|bias| bias.rank() == 1) {
        let op = Projection::from_channels(x, weight, Arrangement::Channels)?;
        return layer::apply(op, x, weight, bias);
    }
    layer::apply(Conv::new(x, weight, stride, padding)?, x, weight, bias)
}

pub(super) fn group_norm(
    x: &Tensor,
    [weight, bias]: [&Tensor; 2],
    n_groups: usize,
    epsilon: f64,
    after: After,
) -> Result<Tensor> {
    let op = GroupNorm::new(x, n_groups, epsilon, after)?;
    layer::apply(op, x, weight, Some(bias))
}

pub(super) fn layer_norm(x: &Tensor, [weight, bias]: [&Tensor; 2], epsilon: f64) -> Result<Tensor> {
    layer::apply(LayerNorm::new(x, epsilon), x, weight, Some(bias))
}

pub(super) fn activation(x: &Tensor, which: Activation) -> Result<Tensor> {
    function::apply(Elementwise(which), &[x])
}

pub(super) fn geglu(x: &Tensor) -> Result<Tensor> {
    function::apply(Geglu::new(x.dim(D::Minus1)? / 2), &[x])
}

pub(super) fn gated_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    function::apply(Gated::new(x, weight)?, &operands)
}

pub(super) fn upsample_nearest(x: &Tensor, [height, width]: [usize; 2]) -> Result<Tensor> {
    function::apply(Nearest { height, width }, &[x])
}

pub(super) fn attention(operands: [&Tensor; 3], n_heads: usize, mask: Mask) -> Result<Tensor> {
    function::apply(Attention::new(operands, n_heads, mask, &[])?, &operands)
}

pub(super) fn observed_attention(
    operands: [&Tensor; 3],
    n_heads: usize,
    positions: &[usize],
) -> Result<Vec<Tensor>> {
    let op = Attention::new(operands, n_heads, Mask::None, positions)?;
    let ((n_output, n_columns), output, columns) =
        (op.lengths(), op.output_dims(), op.column_dims());
    let parts = |packed: &Tensor| {
        Ok(vec![
            packed.narrow(0, 0, n_output)?.reshape(output)?,
            packed.narrow(0, n_output, n_columns)?.reshape(columns)?,
        ])
    };
    if positions.is_empty() {
        let attended = function::apply(op, &operands)?;
        let nothing = Tensor::zeros(columns, attended.dtype(), attended.device())?;
        return Ok(vec![attended, nothing]);
    }
    function::apply_in_parts(op, &operands, parts)
}
