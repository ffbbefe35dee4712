//! Names of the original layout, translated to diffusers'. No tensor is touched here.
//!
//! The original U-Net numbers its blocks in the order in which they run, whatever they are; the
//! translation therefore walks the configuration in that order.

use crate::config::{DownBlock, UNetConfig, UpBlock, VaeConfig};

/// Placeholder in a translated name of OpenCLIP's packed query, key and value projection.
pub(super) const PACKED: &str = "in_proj";

/// diffusers' name of a tensor of the original U-Net, without the prefix `model.diffusion_model.`.
/// `None` if this U-Net has no such tensor.
pub fn unet_name(config: &UNetConfig, name: &str) -> Option<String> {
    let whole = [
        ("time_embed.0.", "time_embedding.linear_1."),
        ("time_embed.2.", "time_embedding.linear_2."),
        ("input_blocks.0.0.", "conv_in."),
        ("out.0.", "conv_norm_out."),
        ("out.2.", "conv_out."),
        ("middle_block.1.", "mid_block.attentions.0."),
    ];
    if let Some((from, to)) = whole.iter().find(|(from, _)| name.starts_with(from)) {
        return Some(format!("{to}{}", &name[from.len()..]));
    }
    for (from, to) in [
        ("middle_block.0.", "mid_block.resnets.0."),
        ("middle_block.2.", "mid_block.resnets.1."),
    ] {
        if let Some(rest) = name.strip_prefix(from) {
            return Some(format!("{to}{}", unet_resnet(rest)?));
        }
    }
    let (side, rest) = name.split_once('.')?;
    let (block, rest) = rest.split_once('.')?;
    let (part, rest) = rest.split_once('.')?;
    let (block, part): (usize, usize) = (block.parse().ok()?, part.parse().ok()?);
    match side {
        "input_blocks" => input_block(config, block, part, rest),
        "output_blocks" => output_block(config, block, part, rest),
        _ => None,
    }
}

/// `input_blocks.{block}.{part}.{rest}`, block 0 being `conv_in`.
fn input_block(config: &UNetConfig, block: usize, part: usize, rest: &str) -> Option<String> {
    let mut next = 1;
    for (level, kind) in config.down_block_types.iter().enumerate() {
        let layers = config.layers_per_block[level];
        if block < next + layers {
            let layer = block.checked_sub(next)?;
            return match (part, kind) {
                (0, _) => Some(format!(
                    "down_blocks.{level}.resnets.{layer}.{}",
                    unet_resnet(rest)?
                )),
                (1, DownBlock::CrossAttention) => {
                    Some(format!("down_blocks.{level}.attentions.{layer}.{rest}"))
                }
                _ => None,
            };
        }
        next += layers;
        let last = level + 1 == config.down_block_types.len();
        if !last && block == next {
            let rest = rest.strip_prefix("op.").filter(|_| part == 0)?;
            return Some(format!("down_blocks.{level}.downsamplers.0.conv.{rest}"));
        }
        next += usize::from(!last);
    }
    None
}

/// `output_blocks.{block}.{part}.{rest}`; levels are counted from the coarsest.
fn output_block(config: &UNetConfig, block: usize, part: usize, rest: &str) -> Option<String> {
    let n = config.up_block_types.len();
    let mut next = 0;
    for (level, kind) in config.up_block_types.iter().enumerate() {
        let layers = config.layers_per_block[n - 1 - level] + 1;
        if block < next + layers {
            let layer = block - next;
            let upsampler = usize::from(*kind == UpBlock::CrossAttention) + 1;
            let upsamples = layer + 1 == layers && level + 1 < n;
            return match (part, kind) {
                (0, _) => Some(format!(
                    "up_blocks.{level}.resnets.{layer}.{}",
                    unet_resnet(rest)?
                )),
                (1, UpBlock::CrossAttention) => {
                    Some(format!("up_blocks.{level}.attentions.{layer}.{rest}"))
                }
                (part, _) if upsamples && part == upsampler => Some(format!(
                    "up_blocks.{level}.upsamplers.0.conv.{}",
                    rest.strip_prefix("conv.")?
                )),
                _ => None,
            };
        }
        next += layers;
    }
    None
}

/// A tensor within a residual block of the U-Net.
fn unet_resnet(rest: &str) -> Option<String> {
    replace_prefix(
        rest,
        &[
            ("in_layers.0.", "norm1."),
            ("in_layers.2.", "conv1."),
            ("emb_layers.1.", "time_emb_proj."),
            ("out_layers.0.", "norm2."),
            ("out_layers.3.", "conv2."),
            ("skip_connection.", "conv_shortcut."),
        ],
    )
}

/// diffusers' name of a tensor of the original VAE, without the prefix `first_stage_model.`.
/// `None` if this VAE has no such tensor.
pub fn vae_name(config: &VaeConfig, name: &str) -> Option<String> {
    let (side, rest) = name.split_once('.')?;
    match side {
        "quant_conv" | "post_quant_conv" => return Some(name.to_owned()),
        "encoder" | "decoder" => {}
        _ => return None,
    }
    let whole = [
        ("conv_in.", "conv_in."),
        ("conv_out.", "conv_out."),
        ("norm_out.", "conv_norm_out."),
        ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
        ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
        ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
        ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
        ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ];
    if let Some(translated) = replace_prefix(rest, &whole) {
        return Some(format!("{side}.{translated}"));
    }
    for (from, to) in [
        ("mid.block_1.", "mid_block.resnets.0."),
        ("mid.block_2.", "mid_block.resnets.1."),
    ] {
        if let Some(rest) = rest.strip_prefix(from) {
            return Some(format!("{side}.{to}{}", vae_resnet(rest)?));
        }
    }
    let (direction, rest) = rest.split_once('.')?;
    let (level, rest) = rest.split_once('.')?;
    let level: usize = level.parse().ok()?;
    let n = config.block_out_channels.len();
    let (path, sampler) = match (side, direction) {
        ("encoder", "down") => (
            format!("encoder.down_blocks.{level}"),
            ("downsample.", "downsamplers.0."),
        ),
        // The decoder's levels are numbered like the encoder's, diffusers' in the order they run.
        ("decoder", "up") => (
            format!("decoder.up_blocks.{}", (n - 1).checked_sub(level)?),
            ("upsample.", "upsamplers.0."),
        ),
        _ => return None,
    };
    if let Some(rest) = rest.strip_prefix(sampler.0) {
        return Some(format!("{path}.{}{rest}", sampler.1));
    }
    let (layer, rest) = rest.strip_prefix("block.")?.split_once('.')?;
    Some(format!("{path}.resnets.{layer}.{}", vae_resnet(rest)?))
}

/// A tensor within a residual block of the VAE.
fn vae_resnet(rest: &str) -> Option<String> {
    replace_prefix(
        rest,
        &[
            ("norm1.", "norm1."),
            ("conv1.", "conv1."),
            ("norm2.", "norm2."),
            ("conv2.", "conv2."),
            ("nin_shortcut.", "conv_shortcut."),
        ],
    )
}

/// transformers' name of a tensor of OpenCLIP's text encoder, without the prefix
/// `cond_stage_model.model.`. The packed projection keeps `PACKED` in its name.
pub fn text_encoder_name(name: &str) -> Option<String> {
    let whole = [
        (
            "positional_embedding",
            "embeddings.position_embedding.weight",
        ),
        (
            "token_embedding.weight",
            "embeddings.token_embedding.weight",
        ),
        ("ln_final.weight", "final_layer_norm.weight"),
        ("ln_final.bias", "final_layer_norm.bias"),
    ];
    if let Some((_, to)) = whole.iter().find(|(from, _)| *from == name) {
        return Some(format!("text_model.{to}"));
    }
    let (layer, rest) = name
        .strip_prefix("transformer.resblocks.")?
        .split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let rest = replace_prefix(
        rest,
        &[
            ("ln_1.", "layer_norm1."),
            ("ln_2.", "layer_norm2."),
            ("attn.in_proj_", "self_attn.in_proj."),
            ("attn.out_proj.", "self_attn.out_proj."),
            ("mlp.c_fc.", "mlp.fc1."),
            ("mlp.c_proj.", "mlp.fc2."),
        ],
    )?;
    Some(format!("text_model.encoder.layers.{layer}.{rest}"))
}

fn replace_prefix(name: &str, table: &[(&str, &str)]) -> Option<String> {
    table
        .iter()
        .find_map(|(from, to)| name.strip_prefix(from).map(|rest| format!("{to}{rest}")))
}
