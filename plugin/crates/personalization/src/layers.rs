//! Which cross-attention layers are read: one choice for the maps of the E-step and for the loss of the M-step, named
//! relative to the network, so that it means the same at any size of latents.

use serde::Serialize;
use stable_diffusion::unet::CrossAttentionLayer;

/// Layers whose attention is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerChoice {
    /// All cross-attention layers (P).
    All,
    /// Those of the down and up blocks one level above the bottleneck. In Stable Diffusion that is h / 4: 16 for
    /// pictures of 512 (BaS), 24 for 768; in the bundled model, whose U-Net has a level less, h / 2 = 16. Finer layers
    /// attend to texture; the bottleneck has a single layer, too coarse for small things.
    AboveBottleneck,
}

impl LayerChoice {
    /// Indices of the chosen layers among all of a U-Net. Every U-Net attends in its bottleneck; one that attends
    /// nowhere else is read there.
    #[must_use]
    pub fn of(self, layers: &[CrossAttentionLayer]) -> Vec<usize> {
        let widths = || layers.iter().map(|layer| layer.resolution);
        let bottleneck = widths().min().unwrap_or(0);
        let above = widths().filter(|&width| width > bottleneck).min();
        let width = above.unwrap_or(bottleneck);
        let is_chosen = |layer: &CrossAttentionLayer| match self {
            Self::All => true,
            Self::AboveBottleneck => layer.resolution == width,
        };
        (0..layers.len())
            .filter(|&i| is_chosen(&layers[i]))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use stable_diffusion::config::{DownBlock, ModelConfig, UNetConfig, UpBlock};
    use stable_diffusion::unet::Stage::{Down, Up};
    use stable_diffusion::unet::{Stage, UNet};

    use super::*;

    /// The U-Net of the bundled model.
    fn sprites() -> UNetConfig {
        UNetConfig {
            sample_size: 32,
            block_out_channels: vec![64, 128, 192],
            layers_per_block: vec![1; 3],
            down_block_types: vec![
                DownBlock::Plain,
                DownBlock::CrossAttention,
                DownBlock::CrossAttention,
            ],
            up_block_types: vec![
                UpBlock::CrossAttention,
                UpBlock::CrossAttention,
                UpBlock::Plain,
            ],
            cross_attention_dim: 128,
            heads: vec![4; 3],
            transformer_layers_per_block: vec![1; 3],
            ..ModelConfig::sd_1_5().unet
        }
    }

    fn chosen(config: &UNetConfig, choice: LayerChoice) -> Vec<(Stage, usize)> {
        let layers = UNet::layers_of(config).unwrap();
        let chosen = choice.of(&layers);
        let place = |i: usize| (layers[i].stage, layers[i].resolution);
        chosen.into_iter().map(place).collect()
    }

    #[test]
    fn one_level_above_the_bottleneck_is_the_same_part_of_the_latent_at_any_size() {
        let stable_diffusion =
            |width| [[(Down, width); 2].as_slice(), [(Up, width); 3].as_slice()].concat();
        for (config, expected) in [
            (ModelConfig::sd_1_5().unet, stable_diffusion(16)),
            (ModelConfig::sd_2_1_base().unet, stable_diffusion(16)),
            (ModelConfig::sd_2_1().unet, stable_diffusion(24)),
            (sprites(), vec![(Down, 16), (Up, 16), (Up, 16)]),
        ] {
            let found = chosen(&config, LayerChoice::AboveBottleneck);
            assert_eq!(found, expected, "latents of {}", config.sample_size);
        }
    }

    #[test]
    fn all_layers_are_those_of_every_width() {
        let widths = |config| -> Vec<usize> {
            let layers = chosen(&config, LayerChoice::All);
            layers.into_iter().map(|(_, width)| width).collect()
        };
        assert_eq!(
            widths(ModelConfig::sd_2_1().unet),
            [
                96, 96, 48, 48, 24, 24, 12, 24, 24, 24, 48, 48, 48, 96, 96, 96
            ]
        );
        assert_eq!(widths(sprites()), [16, 8, 8, 8, 8, 16, 16]);
    }
}
