//! Small configurations, and the small checkpoint among the fixtures.

use std::path::{Path, PathBuf};

use stable_diffusion::config::{ModelConfig, UNetConfig, VaeConfig};
use stable_diffusion::single_file::Components;
use stable_diffusion::text_encoder::TextEncoder;
use stable_diffusion::tokenizer::Tokenizer;
use stable_diffusion::unet::UNet;
use stable_diffusion::vae::Vae;
use stable_diffusion::weights::WeightMap;

/// The small SD 2.x-like checkpoint.
pub(crate) fn sd2_small() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures/parity/sd2-small")
}

/// The tokenizer of [`sd2_small`].
pub(crate) fn tokenizer() -> Tokenizer {
    let folder = sd2_small().join("tokenizer");
    Tokenizer::from_files(
        "tokenizer",
        |file| Ok(std::fs::read(folder.join(file)).ok()),
        77,
    )
    .unwrap()
}

/// `config` with its structure kept and its sizes shrunk.
pub(crate) fn shrunk(config: ModelConfig) -> ModelConfig {
    let mut config = config;
    config.unet = UNetConfig {
        sample_size: 8,
        block_out_channels: vec![8, 16, 16, 24],
        heads: vec![2, 4, 2, 3],
        norm_num_groups: 4,
        cross_attention_dim: 12,
        ..config.unet
    };
    config.text_encoder.hidden_size = 12;
    config.text_encoder.intermediate_size = 20;
    config.text_encoder.num_attention_heads = 3;
    config.text_encoder.num_hidden_layers = 2;
    config.text_encoder.vocab_size = tokenizer().base_vocab_size();
    config.vae = VaeConfig {
        block_out_channels: vec![4, 8, 8, 12],
        norm_num_groups: 2,
        layers_per_block: 2,
        ..config.vae
    };
    config
}

/// Random weights for `config`.
pub(crate) fn random(config: &ModelConfig, seed: u64) -> Components {
    Components {
        unet: WeightMap::random(seed, |w| UNet::build(&config.unet, w)).unwrap(),
        vae: WeightMap::random(seed, |w| Vae::new(&config.vae, w).map(drop)).unwrap(),
        text_encoder: WeightMap::random(seed, |w| {
            TextEncoder::new(&config.text_encoder, w).map(drop)
        })
        .unwrap(),
    }
}
