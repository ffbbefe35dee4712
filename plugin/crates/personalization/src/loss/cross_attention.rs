//! The cross-attention loss (P Eq. 4; BaS `train.py`).
//!
//! ```text
//! A_c   = mean over layers and heads of softmax(Q Kᵀ / √d) at the positions of c
//! Â_c   = A_c / max_pixels A_c                       the gradient flows through the maximum, as in BaS
//! L_attn = mean over samples of Σ_c mean_pixels (Â_c - G_c)²,   G_c = M_c at the layers' size, nearest
//! ```
//! | symbol | shape | meaning |
//! | --- | --- | --- |
//! | A_c | `[n]` in [0, 1] | attention map of a concept; the layers of one size, of n cells |
//! | G_c | `[n]` in {0, 1} | its mask |

use candle_core::Tensor;
use stable_diffusion::unet::LayerAttention;

use crate::error::Result;

/// Maxima below this one count as this one: a map of zeros has no direction.
const SMALLEST_MAXIMUM: f64 = 1e-12;

/// A `[B, n, C]`: the mean over layers, heads and the V positions of each concept; differentiable.
///
/// # Shapes
/// Every layer's probabilities are `[B, heads, n, C·V]`.
///
/// # Errors
/// Layers of different sizes, or none.
pub fn concept_maps(layers: &[LayerAttention], vectors_per_concept: usize) -> Result<Tensor> {
    let maps = layers
        .iter()
        .map(|layer| concept_map(layer, vectors_per_concept))
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::stack(&maps, 0)?.mean(0)?)
}

/// One layer's share of [`concept_maps`].
///
/// # Errors
/// A number of positions that is no multiple of `vectors_per_concept`.
pub fn concept_map(layer: &LayerAttention, vectors_per_concept: usize) -> Result<Tensor> {
    let (batch, heads, pixels, positions) = layer.probabilities.dims4()?;
    let shape = (
        batch,
        heads,
        pixels,
        positions / vectors_per_concept,
        vectors_per_concept,
    );
    Ok(layer.probabilities.reshape(shape)?.mean(4)?.mean(1)?)
}

/// L_attn, a scalar; differentiable in `maps`.
///
/// # Shapes
/// `maps` `[B, n, C]`; `masks` `[n, C]` in {0, 1}.
///
/// # Errors
/// Shapes that do not fit.
pub fn cross_attention_loss(maps: &Tensor, masks: &Tensor) -> Result<Tensor> {
    let largest = maps.max_keepdim(1)?.maximum(SMALLEST_MAXIMUM)?;
    let difference = maps.broadcast_div(&largest)?.broadcast_sub(masks)?;
    Ok(difference.sqr()?.mean(1)?.sum(1)?.mean(0)?)
}
