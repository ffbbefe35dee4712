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
    let wanted = unet.config().sample_size as f64 / 4.0;
    let distance = |resolution: usize| (resolution as f64 / wanted).log2().abs();
    let outer = unet
        .cross_attention_layers()
        .iter()
        .filter(|layer| layer.stage != Stage::Mid);
    let better = |best: usize, resolution: usize| {
        let (d, e) = (distance(resolution), distance(best));
        if best == 0 || d < e || (d == e && resolution > best) {
            resolution
        } else {
            best
        }
    };
    outer.map(|layer| layer.resolution).fold(0, better)
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
