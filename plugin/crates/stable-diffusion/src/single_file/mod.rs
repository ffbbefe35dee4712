//! Single-file checkpoints in CompVis' and Stability's original layout, SD 1.x and 2.x.
//!
//! | prefix in the file | component |
//! |---|---|
//! | `model.diffusion_model.` | U-Net |
//! | `first_stage_model.` | VAE |
//! | `cond_stage_model.transformer.` | text encoder of SD 1.x (OpenAI's CLIP, transformers' names) |
//! | `cond_stage_model.model.` | text encoder of SD 2.x (OpenCLIP's names) |
//!
//! Everything else in such a file (EMA copies, the noise schedule, the training state) is ignored. A file may lack its VAE,
//! and a VAE may come as a file of its own, with the names above or without their prefix, or in diffusers' names.

mod names;

use candle_core::Device;

use crate::config::{Activation, ModelConfig, VaeConfig};
use crate::error::{Error, Result};
use crate::ops::Precision;
use crate::weights::{TensorFile, WeightMap, in_precision};

pub use names::{text_encoder_name, unet_name, vae_name};

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const CLIP: &str = "cond_stage_model.transformer.";
const OPEN_CLIP: &str = "cond_stage_model.model.";

/// Above this standard deviation of one bias an SD 2.x U-Net predicts velocity.
/// Source: ComfyUI, `comfy/supported_models.py`, `SD20.model_type`.
const VELOCITY_BIAS_STD: f32 = 0.09;

/// The bias that the rule above looks at.
const VELOCITY_BIAS: &str =
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias";

/// The three components in diffusers' names.
#[derive(Debug, Clone)]
pub struct Components {
    /// U-Net.
    pub unet: WeightMap,
    /// VAE.
    pub vae: WeightMap,
    /// Text encoder.
    pub text_encoder: WeightMap,
}

/// Which published model a file holds, told by the width of its cross-attention's keys.
///
/// Whether an SD 2.x model predicts noise or velocity is written nowhere in such a file. It is
/// guessed from one bias, which is wider in velocity models; a `scheduler_config.json` beside the
/// file overrides the guess.
///
/// # Errors
/// [`Error::Config`] if the file is SDXL, an inpainting model, or no Stable Diffusion at all.
pub fn detect(file: &TensorFile) -> Result<ModelConfig> {
    let refuse = |reason: &str| Err(Error::config(file.name(), reason));
    if file
        .names()
        .any(|name| name.starts_with("conditioner.embedders."))
    {
        return refuse("this is SDXL; supported are Stable Diffusion 1.x and 2.x");
    }
    let keys = format!("{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight");
    let config = match file.shape(&keys) {
        Some([_, 768]) => ModelConfig::sd_1_5(),
        Some([_, 1024]) if predicts_velocity(file)? => ModelConfig::sd_2_1(),
        Some([_, 1024]) => ModelConfig::sd_2_1_base(),
        Some(shape) => {
            let reason =
                format!("cross-attention keys of shape {shape:?} belong to neither SD 1.x nor 2.x");
            return refuse(&reason);
        }
        None => {
            return refuse(
                "this is no Stable Diffusion 1.x or 2.x checkpoint: it has no attn2.to_k in its U-Net",
            );
        }
    };
    match file.shape(&format!("{UNET}input_blocks.0.0.weight")) {
        Some([_, 9, ..]) => refuse(
            "this is an inpainting model (9 input channels); a text-to-image model is needed",
        ),
        Some([_, 5, ..]) => {
            refuse("this is a depth model (5 input channels); a text-to-image model is needed")
        }
        _ => Ok(config),
    }
}

/// The padding token that a version was trained with, where CLIP's own tokenizer files say another.
pub(crate) fn padding(config: &ModelConfig) -> Option<&'static str> {
    // OpenCLIP pads with 0, which is "!".
    (config.text_encoder.activation == Activation::Gelu).then_some("!")
}

fn predicts_velocity(file: &TensorFile) -> Result<bool> {
    if file.shape(VELOCITY_BIAS).is_none() {
        return Ok(false);
    }
    let bias = file.read(VELOCITY_BIAS, &Device::Cpu)?;
    let variance = bias
        .broadcast_sub(&bias.mean_all()?)?
        .sqr()?
        .mean_all()?
        .to_scalar::<f32>()?;
    Ok(variance.sqrt() > VELOCITY_BIAS_STD)
}

/// Reads a file's three components, whose sizes are those of `config`, the U-Net in this precision.
///
/// # Errors
/// [`Error::Unreadable`], [`Error::Argument`] for f16 on a CPU, or [`Error::Config`] listing tensors of a component that have no place.
pub fn read(
    file: &TensorFile,
    config: &ModelConfig,
    precision: Precision,
    device: &Device,
) -> Result<Components> {
    file.foresee(precision, device)?;
    let mut unet = WeightMap::default();
    let mut vae = WeightMap::default();
    let mut text_encoder = WeightMap::default();
    let mut unknown = Vec::new();
    let mut place = |map: &mut WeightMap, from: &str, to: Option<String>| -> Result<()> {
        match to {
            Some(to) => {
                map.0.insert(to, file.read(from, device)?);
            }
            None => unknown.push(from.to_owned()),
        }
        Ok(())
    };
    for name in file.names() {
        if let Some(rest) = name.strip_prefix(UNET) {
            let to = unet_name(&config.unet, rest);
            place(&mut unet, name, to.clone())?;
            if let Some(weight) = to.and_then(|to| unet.0.get_mut(&to)) {
                *weight = in_precision(precision, weight.clone())?;
            }
        } else if let Some(rest) = name.strip_prefix(VAE) {
            if !is_training_only(rest) {
                place(&mut vae, name, vae_name(&config.vae, rest))?;
            }
        } else if let Some(rest) = name.strip_prefix(CLIP) {
            if !crate::weights::is_unused(rest) {
                place(&mut text_encoder, name, Some(rest.to_owned()))?;
            }
        } else if let Some(rest) = name.strip_prefix(OPEN_CLIP) {
            open_clip(rest, config, &mut text_encoder, |place_as, map| {
                place(map, name, place_as)
            })?;
        }
    }
    if !unknown.is_empty() {
        let n = unknown.len();
        unknown.truncate(12);
        return Err(Error::config(
            file.name(),
            format!("{n} tensors have no place: {}", unknown.join(", ")),
        ));
    }
    split_in_projections(&mut text_encoder)?;
    Ok(Components {
        unet,
        vae: crate::vae::canonical_names(vae)?,
        text_encoder,
    })
}

/// The VAE of a file: of a whole checkpoint, or alone, in the original names or in diffusers'.
///
/// # Errors
/// [`Error::Unreadable`]; [`Error::Config`] if the file holds none.
pub fn read_vae(file: &TensorFile, config: &VaeConfig, device: &Device) -> Result<WeightMap> {
    let mut vae = WeightMap::default();
    let is_whole = file.names().any(|name| name.starts_with(VAE));
    for name in file.names() {
        let rest = match name.strip_prefix(VAE) {
            Some(rest) => rest,
            None if is_whole => continue,
            None => name,
        };
        if is_training_only(rest) {
            continue;
        }
        let is_diffusers = rest.contains("_blocks.")
            || rest.contains("mid_block.")
            || rest.contains("conv_norm_out.");
        let to = if is_diffusers {
            Some(rest.to_owned())
        } else {
            vae_name(config, rest)
        };
        if let Some(to) = to {
            vae.0.insert(to, file.read(name, device)?);
        }
    }
    if vae.0.is_empty() {
        return Err(Error::config(
            file.name(),
            "this holds no VAE of Stable Diffusion 1.x or 2.x",
        ));
    }
    crate::vae::canonical_names(vae)
}

/// Of the VAE's training: the discriminator and the perceptual loss.
fn is_training_only(name: &str) -> bool {
    name.starts_with("loss.") || name.starts_with("model_ema.")
}

/// Places one of OpenCLIP's tensors, or leaves out those that are not used: its projection, its
/// temperature, its mask, and the layers after the one whose output is taken.
fn open_clip(
    name: &str,
    config: &ModelConfig,
    map: &mut WeightMap,
    mut place: impl FnMut(Option<String>, &mut WeightMap) -> Result<()>,
) -> Result<()> {
    let unused = ["text_projection", "logit_scale", "attn_mask"].contains(&name);
    let layer = name
        .strip_prefix("transformer.resblocks.")
        .and_then(|rest| rest.split('.').next()?.parse().ok());
    if unused || layer.is_some_and(|layer: usize| layer >= config.text_encoder.num_hidden_layers) {
        return Ok(());
    }
    place(text_encoder_name(name), map)
}

/// OpenCLIP keeps the weights of queries, keys and values in one tensor.
fn split_in_projections(map: &mut WeightMap) -> Result<()> {
    let packed: Vec<String> = map
        .0
        .keys()
        .filter(|name| name.contains(names::PACKED))
        .cloned()
        .collect();
    for name in packed {
        let Some(tensor) = map.0.remove(&name) else {
            continue;
        };
        let width = tensor.dim(0)? / 3;
        for (i, part) in ["q_proj", "k_proj", "v_proj"].iter().enumerate() {
            let part_name = name.replace(names::PACKED, part);
            // Its own copy: a view would keep the whole tensor in memory and strided.
            map.0.insert(
                part_name,
                tensor.narrow(0, i * width, width)?.force_contiguous()?,
            );
        }
    }
    Ok(())
}
