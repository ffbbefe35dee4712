//! The operations in candle's own, for every device and type; see [`super`] for what each of them computes.
//!
//! candle's graph keeps every intermediate result, and computes and keeps the gradients of all operands. So each
//! operation here is one node ([`function`]): its inside is computed without a graph, its backward computes again what it
//! needs, and only operands that are tracked get gradients. Softmax, statistics and slopes are computed in f32 whatever the
//! operands are.
//!
//! On a CUDA device some of them are done by kernels of our own ([`kernels`] says which and when), each of which is tested
//! against the form in candle's operations.

mod function;
pub mod kernels;

mod activation;
mod attention;
mod conv;
mod linear;
mod norm;

use candle_core::{Result, Tensor};

use self::{
    activation::{Elementwise, Geglu, Nearest},
    attention::{Attended, Heads, Watched},
    conv::Conv,
    kernels::{Fused, FusedGeglu, FusedGroups},
    linear::Linear,
    norm::Normalization,
};
use super::{Activation, After, Mask, Padding};

pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    function::apply(Linear, &operands)
}

pub(super) fn linear_from_channels(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    linear(&x.flatten_from(2)?.transpose(1, 2)?, weight, bias)
}

pub(super) fn linear_to_channels(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    [height, width]: [usize; 2],
) -> Result<Tensor> {
    let y = linear(x, weight, bias)?.transpose(1, 2)?;
    y.reshape((y.dim(0)?, y.dim(1)?, height, width))
}

pub(super) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    function::apply(Conv::new(x, weight, stride, padding)?, &operands)
}

pub(super) fn group_norm(
    x: &Tensor,
    [weight, bias]: [&Tensor; 2],
    n_groups: usize,
    epsilon: f64,
    after: After,
) -> Result<Tensor> {
    let operands = [x, weight, bias];
    match FusedGroups::of(x, [weight, bias], n_groups, epsilon, after) {
        Some(fused) => function::apply(fused, &operands),
        None => function::apply(
            Normalization::of_groups(n_groups, epsilon, after),
            &operands,
        ),
    }
}

pub(super) fn layer_norm(x: &Tensor, [weight, bias]: [&Tensor; 2], epsilon: f64) -> Result<Tensor> {
    function::apply(Normalization::of_last(epsilon), &[x, weight, bias])
}

pub(super) fn activation(x: &Tensor, which: Activation) -> Result<Tensor> {
    function::apply(Elementwise(which), &[x])
}

pub(super) fn geglu(x: &Tensor) -> Result<Tensor> {
    match FusedGeglu::of(x) {
        Some(fused) => function::apply(fused, &[x]),
        None => function::apply(Geglu, &[x]),
    }
}

pub(super) fn upsample_nearest(x: &Tensor, [height, width]: [usize; 2]) -> Result<Tensor> {
    function::apply(Nearest { height, width }, &[x])
}

pub(super) fn attention(operands: [&Tensor; 3], n_heads: usize, mask: Mask) -> Result<Tensor> {
    match Fused::of(operands, n_heads, mask, &[]) {
        Some(fused) => function::apply(fused, &operands),
        None => function::apply(Attended(Heads { n_heads, mask }), &operands),
    }
}

/// Without a kernel, two nodes, as the output has the operands' type and the probabilities are f32; those of the watched keys
/// cost little where there are as few keys as words.
pub(super) fn observed_attention(
    [q, k, v]: [&Tensor; 3],
    n_heads: usize,
    positions: &[usize],
) -> Result<(Tensor, Tensor)> {
    let mask = Mask::None;
    if !positions.is_empty()
        && let Some(fused) = Fused::of([q, k, v], n_heads, mask, positions)
    {
        let value = function::apply(fused, &[q, k, v])?;
        return Fused::unpack(&value, q, n_heads, positions.len());
    }
    let output = attention([q, k, v], n_heads, mask)?;
    let watched = Watched {
        heads: Heads { n_heads, mask },
        positions: positions.to_vec(),
    };
    Ok((output, function::apply(watched, &[q, k])?))
}
