//! A model of the layout of Stable Diffusion 1.x with few channels and random weights.

use candle_core::{Device, Tensor};
use stable_diffusion::{
    config::{DownBlock, ModelConfig, UpBlock},
    rng::Rng,
    unet::UNet,
    weights::WeightMap,
};

/// Three levels of two widths; different heads per level.
pub(crate) fn config() -> ModelConfig {
    let mut config = ModelConfig::sd_1_5();
    let (unet, text) = (&mut config.unet, &mut config.text_encoder);
    unet.sample_size = 16;
    unet.block_out_channels = vec![16, 32, 32];
    unet.layers_per_block = vec![1, 2, 1];
    unet.down_block_types = vec![
        DownBlock::CrossAttention,
        DownBlock::CrossAttention,
        DownBlock::Plain,
    ];
    unet.up_block_types = vec![
        UpBlock::Plain,
        UpBlock::CrossAttention,
        UpBlock::CrossAttention,
    ];
    unet.cross_attention_dim = 24;
    unet.heads = vec![2, 4, 2];
    unet.transformer_layers_per_block = vec![1, 2, 1];
    unet.norm_num_groups = 8;
    text.vocab_size = 20;
    text.hidden_size = 24;
    text.intermediate_size = 40;
    text.num_hidden_layers = 2;
    text.num_attention_heads = 3;
    text.max_position_embeddings = 10;
    config
}

pub(crate) fn unet() -> UNet {
    let config = config().unet;
    let weights = WeightMap::random(3, |w| UNet::build(&config, w)).unwrap();
    UNet::new(&config, &weights, None).unwrap()
}

pub(crate) fn random(shape: &[usize], index: u64) -> Tensor {
    Rng::new(11, "test", index)
        .normal(shape, &Device::Cpu)
        .unwrap()
}

/// The largest absolute difference.
pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    difference.max(0).unwrap().to_scalar().unwrap()
}
