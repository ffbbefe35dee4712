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
    /// How often the planes before it are halved, by convolutions with this padding.
    pub(super) halvings: (usize, usize),
    /// Attention heads.
    pub heads: usize,
}

impl CrossAttentionLayer {
    /// Height and width of its plane for latents of these.
    #[must_use]
    pub fn size_of(&self, latent: [usize; 2]) -> [usize; 2] {
        let (n, padding) = self.halvings;
        latent.map(|side| (0..n).fold(side, |side, _| halved(side, padding)))
    }
}

/// Side of a plane after the stride 2 convolution with a 3x3 kernel.
pub(super) fn halved(size: usize, padding: usize) -> usize {
    (size + 2 * padding).saturating_sub(3) / 2 + 1
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
    /// softmax(Q·Kᵀ/sqrt(d)) of the self-attention in front of this layer, the mean over heads, `[B, h·w, h·w]`: how
    /// much each pixel of the plane looks at each other one. Only of [`Watch::WithSelfAttention`].
    pub self_attention: Option<Tensor>,
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
    /// The same, and the self-attention in front of these layers.
    WithSelfAttention(&'a [usize], &'a [usize]),
}

impl<'a> Watch<'a> {
    /// Nothing is watched.
    pub const NOTHING: Self = Self::Layers(&[], &[]);

    /// The watched positions of the prompt.
    pub(super) fn all_positions(self) -> &'a [usize] {
        let (Self::All(positions)
        | Self::Layers(_, positions)
        | Self::WithSelfAttention(_, positions)) = self;
        positions
    }

    /// The watched layers, if they are named one by one.
    pub(super) fn layers(self) -> Option<&'a [usize]> {
        match self {
            Self::All(_) => None,
            Self::Layers(layers, _) | Self::WithSelfAttention(layers, _) => Some(layers),
        }
    }

    /// Positions to watch in this layer.
    pub(super) fn positions(self, layer: usize) -> Option<&'a [usize]> {
        let is_watched = self.layers().is_none_or(|layers| layers.contains(&layer));
        is_watched.then(|| self.all_positions())
    }

    /// Whether to watch the self-attention in front of this layer.
    pub(super) fn sees_self_attention(self, layer: usize) -> bool {
        matches!(self, Self::WithSelfAttention(layers, _) if layers.contains(&layer))
    }
}

/// A [`Watch`] that outlives its lists.
#[derive(Debug)]
pub(super) struct OwnedWatch {
    layers: Option<Vec<usize>>,
    positions: Vec<usize>,
    with_self_attention: bool,
}

impl OwnedWatch {
    pub(super) fn of(watch: Watch<'_>) -> Self {
        Self {
            layers: watch.layers().map(<[usize]>::to_vec),
            positions: watch.all_positions().to_vec(),
            with_self_attention: matches!(watch, Watch::WithSelfAttention(..)),
        }
    }

    pub(super) fn get(&self) -> Watch<'_> {
        match &self.layers {
            None => Watch::All(&self.positions),
            Some(layers) if self.with_self_attention => {
                Watch::WithSelfAttention(layers, &self.positions)
            }
            Some(layers) => Watch::Layers(layers, &self.positions),
        }
    }
}

/// What accompanies the latents through one pass.
pub(super) struct Pass<'a> {
    pub(super) context: &'a Tensor,
    pub(super) watch: Watch<'a>,
    pub(super) attention: Vec<LayerAttention>,
}
