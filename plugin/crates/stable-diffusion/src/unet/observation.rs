//! What can be seen of a pass: which cross-attention layers there are, and what they looked at.

use candle_core::Tensor;

/// The part of the network that a layer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Ever smaller planes.
    Down,
    /// The smallest plane.
    Mid,
    /// Ever larger planes.
    Up,
}

/// A cross-attention layer, in the order in which they run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrossAttentionLayer {
    /// diffusers' path, for example `down_blocks.1.attentions.0.transformer_blocks.0.attn2`.
    pub name: String,
    /// Where it lies.
    pub stage: Stage,
    /// Width of its plane for latents of the configured sample size, in pixels.
    pub resolution: usize,
    /// Attention heads.
    pub heads: usize,
}

/// What one cross-attention layer gave to the watched positions.
#[derive(Debug, Clone)]
pub struct LayerAttention {
    /// Index into [`crate::UNet::cross_attention_layers`].
    pub layer: usize,
    /// Height of the layer's plane for these latents.
    pub height: usize,
    /// Width of the layer's plane for these latents.
    pub width: usize,
    /// softmax(Q·Kᵀ/sqrt(d)) at the watched positions, `[B, heads, h·w, P]`, in [0, 1], differentiable.
    pub probabilities: Tensor,
}

/// A prediction and the attention that led to it.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The prediction `[B, 4, h, w]`.
    pub prediction: Tensor,
    /// One entry per watched layer, in order.
    pub attention: Vec<LayerAttention>,
}

/// Which cross-attention probabilities to return.
#[derive(Debug, Clone, Copy)]
pub enum Watch<'a> {
    /// These positions of the prompt in all layers.
    All(&'a [usize]),
    /// In the layers of these indices, these positions of the prompt.
    Layers(&'a [usize], &'a [usize]),
}

impl<'a> Watch<'a> {
    pub(super) const NOTHING: Self = Self::Layers(&[], &[]);

    pub(super) fn positions(self, layer: usize) -> Option<&'a [usize]> {
        match self {
            Self::All(positions) => Some(positions),
            Self::Layers(layers, positions) => layers.contains(&layer).then_some(positions),
        }
    }
}

/// What accompanies the latents through one pass.
pub(super) struct Pass<'a> {
    pub(super) context: &'a Tensor,
    pub(super) watch: Watch<'a>,
    pub(super) attention: Vec<LayerAttention>,
}
