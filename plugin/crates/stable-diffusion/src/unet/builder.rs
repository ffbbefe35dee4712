//! Building the network while its cross-attention layers are counted.

use super::observation::{CrossAttentionLayer, Stage, halved};
use crate::{config::UNetConfig, lora::LoraAdapter, weights::Weights};

/// What the levels are built from; collects the cross-attention layers in the order in which they run.
pub(super) struct Builder<'a> {
    pub(super) config: &'a UNetConfig,
    pub(super) lora: Option<&'a LoraAdapter>,
    pub(super) weights: Weights,
    layers: Vec<CrossAttentionLayer>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        config: &'a UNetConfig,
        weights: Weights,
        lora: Option<&'a LoraAdapter>,
    ) -> Self {
        Self {
            config,
            lora,
            weights,
            layers: Vec::new(),
        }
    }

    /// Registers a cross-attention layer and returns its index.
    pub(super) fn register(&mut self, name: &str, place: Place) -> usize {
        let padding = self.config.downsample_padding;
        let resolution =
            (0..place.level).fold(self.config.sample_size, |side, _| halved(side, padding));
        self.layers.push(CrossAttentionLayer {
            name: name.into(),
            stage: place.stage,
            resolution,
            halvings: (place.level, padding),
            heads: self.config.heads[place.level],
        });
        self.layers.len() - 1
    }

    pub(super) fn into_layers(self) -> Vec<CrossAttentionLayer> {
        self.layers
    }
}

/// Where in the network a transformer lies; levels count from the finest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) stage: Stage,
    pub(super) level: usize,
}
