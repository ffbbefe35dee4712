//! The two losses, one per file, and the layers that the second one reads.

pub mod cross_attention;
pub mod masked_diffusion;

use stable_diffusion::unet::{Stage, UNet};

pub use cross_attention::cross_attention_loss;
pub use masked_diffusion::masked_diffusion_loss;

/// R: the width of the attention layers in the loss. BaS uses 16 for latents of 64, that is h / 4; the nearest one
/// that the down and up blocks have, the finer of two equally near.
#[must_use]
pub fn loss_resolution(unet: &UNet) -> usize {
    let outer = unet
        .cross_attention_layers()
        .iter()
        .filter(|layer| layer.stage != Stage::Mid);
    nearest_width(
        outer.map(|layer| layer.resolution),
        unet.config().sample_size as f64 / 4.0,
    )
}

/// The width nearest to `wanted` by ratio, the larger of two equally near; 0 if there is none.
pub(crate) fn nearest_width(widths: impl Iterator<Item = usize>, wanted: f64) -> usize {
    let distance = |width: usize| (width as f64 / wanted).log2().abs();
    let better = |best: usize, width: usize| {
        let (d, e) = (distance(width), distance(best));
        if best == 0 || d < e || (d == e && width > best) {
            width
        } else {
            best
        }
    };
    widths.fold(0, better)
}

/// Indices of the cross-attention layers of the down and up blocks with width R (BaS).
#[must_use]
pub fn loss_layers(unet: &UNet) -> Vec<usize> {
    let resolution = loss_resolution(unet);
    let layers = unet.cross_attention_layers().iter().enumerate();
    layers
        .filter(|(_, l)| l.stage != Stage::Mid && l.resolution == resolution)
        .map(|(i, _)| i)
        .collect()
}
