//! The operations in candle's own, for every device and type; see [`super`] for what each of them computes.
//!
//! candle's graph keeps every intermediate result, and computes and keeps the gradients of all operands. So each
//! operation here is one node ([`super::function`]): its inside is computed without a graph, its backward computes again what it
//! needs, and only operands that are tracked get gradients. Softmax, statistics and slopes are computed in f32 whatever the
//! operands are.
//!
//! On a CUDA device some of them are done by kernels of our own ([`kernels`] says which and when), each of which is tested
//! against the form in candle's operations.

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
    linear::{Arrangement, Linear},
    norm::Normalization,
};
use super::{Activation, After, Mask, Padding, function};

pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    arranged(Arrangement::Tokens, x, weight, bias)
}

fn arranged(
    arrangement: Arrangement,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    function::apply(Linear(arrangement), &operands)
}

pub(super) fn linear_from_channels(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    arranged(Arrangement::FromChannels, x, weight, bias)
}

pub(super) fn linear_to_channels(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    size: [usize; 2],
) -> Result<Tensor> {
    arranged(Arrangement::ToChannels(size), x, weight, bias)
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

/// Without a kernel, two operations, as the output has the operands' type and the probabilities are f32; those of the watched
/// keys cost little where there are as few keys as words.
pub(super) fn observed_attention(
    [q, k, v]: [&Tensor; 3],
    n_heads: usize,
    positions: &[usize],
) -> Result<Vec<Tensor>> {
    let mask = Mask::None;
    if !positions.is_empty()
        && let Some(fused) = Fused::of([q, k, v], n_heads, mask, positions)
    {
        let parts = |value: &Tensor| Fused::unpack(value, q, n_heads, positions.len());
        return function::apply_in_parts(fused, &[q, k, v], parts);
    }
    let output = attention([q, k, v], n_heads, mask)?;
    let watched = Watched {
        heads: Heads { n_heads, mask },
        positions: positions.to_vec(),
    };
    Ok(vec![output, function::apply(watched, &[q, k])?])
}
