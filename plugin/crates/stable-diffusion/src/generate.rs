//! Pictures from text embeddings: noise, guided denoising, decoding.
//!
//! ```text
//! eps = eps_unconditional + guidance (eps_conditional - eps_unconditional)     (Ho and Salimans 2021)
//! ```

use std::ops::ControlFlow;

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::model::DiffusionModel;
use crate::rng::Rng;
use crate::scheduler::{SchedulerKind, SchedulerStep};
use crate::unet::UNet;

/// Cells a side of the largest latent that [`preview`] decodes as it is.
const PREVIEW_WHOLE: usize = 32;
/// Cells a side to which it averages a larger one on a CPU: decoding 32 with Stable Diffusion's widths takes as
/// long there as a step of the U-Net on 64, decoding 16 a fourth of that.
const PREVIEW_ON_CPU: usize = 16;

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateConfig {
    /// Evaluations of the U-Net per picture.
    pub steps: usize,
    /// Weight of the prompt against the unconditional prompt; 1 leaves the latter out.
    pub guidance: f64,
    /// The sampler.
    pub scheduler: SchedulerKind,
    /// Seed of the initial noise; picture i has its own stream under it.
    pub seed: u64,
    /// Pictures to make.
    pub n_pictures: usize,
}

/// Where a call of [`generate`] stands.
#[derive(Debug)]
pub struct GenerateStep<'a> {
    /// Which picture, from 0.
    pub picture: usize,
    /// Steps done over all pictures, from 1.
    pub step: usize,
    /// Steps to do over all pictures.
    pub total: usize,
    /// This picture's clean latent as it is predicted now, [1, 4, h, w], scaled; see [`preview`].
    pub clean: &'a Tensor,
}

/// Generates pictures, [n, 3, H, W] in [0, 1]. Picture i is the same whatever `n_pictures` is.
///
/// * `conditional`, `unconditional`: contexts, [1, 77·n, D] and [1, 77·m, D], see [`crate::prompt`]
/// * `on_step`: called after each step; `Break` stops
///
/// # Errors
/// [`Error::Canceled`] if `on_step` broke off, [`Error::Argument`] if the configuration is out of range.
pub fn generate(
    model: &DiffusionModel,
    conditional: &Tensor,
    unconditional: &Tensor,
    config: &GenerateConfig,
    on_step: &mut dyn FnMut(GenerateStep<'_>) -> ControlFlow<()>,
) -> Result<Tensor> {
    if config.n_pictures == 0 {
        return Err(Error::argument("n_pictures", "0 is not in 1.."));
    }
    if !config.guidance.is_finite() {
        return Err(Error::argument(
            "guidance",
            format!("{} is not a number", config.guidance),
        ));
    }
    let contexts = [unconditional.detach(), conditional.detach()];
    let mut pictures = Vec::with_capacity(config.n_pictures);
    for picture in 0..config.n_pictures {
        let latents = denoise(model, &contexts, config, picture, on_step)?;
        pictures.push(model.vae.decode(&latents)?);
    }
    in_unit_range(&Tensor::cat(&pictures, 0)?)
}

/// The decoder's pictures, about [-1, 1], as pictures in [0, 1].
fn in_unit_range(decoded: &Tensor) -> Result<Tensor> {
    Ok(((decoded + 1.0)? * 0.5)?.clamp(0.0, 1.0)?)
}

/// A quick look at a clean latent [1, 4, h, w], scaled: a picture [1, 3, H', W'] in [0, 1].
///
/// A latent of more than 32 cells a side is first averaged to at most 32, on a CPU to at most 16; the picture is that
/// much smaller. Up to there it is the picture that [`generate`] would give.
///
/// # Errors
/// Those of the decoder.
pub fn preview(model: &DiffusionModel, clean: &Tensor) -> Result<Tensor> {
    let (_, _, height, width) = clean.dims4()?;
    let side = height.min(width);
    let wanted = if side <= PREVIEW_WHOLE || !model.device.is_cpu() {
        PREVIEW_WHOLE
    } else {
        PREVIEW_ON_CPU
    };
    let cell = side.div_ceil(wanted);
    let small = if cell > 1 {
        &clean.avg_pool2d(cell)?
    } else {
        clean
    };
    in_unit_range(&model.vae.decode(small)?)
}

/// One picture's latent, [1, 4, h, w], scaled. `contexts` are those of [`guided_prediction`].
fn denoise(
    model: &DiffusionModel,
    contexts: &[Tensor; 2],
    config: &GenerateConfig,
    picture: usize,
    on_step: &mut dyn FnMut(GenerateStep<'_>) -> ControlFlow<()>,
) -> Result<Tensor> {
    let mut scheduler = config
        .scheduler
        .build(&model.config.scheduler, config.steps)?;
    let size = model.latent_size();
    let shape = [1, model.config.unet.in_channels, size, size];
    let mut latents =
        Rng::new(config.seed, "generate", picture as u64).normal(&shape, &model.device)?;
    for (i, t) in scheduler.timesteps().to_vec().into_iter().enumerate() {
        let prediction = guided_prediction(&model.unet, &latents, t, contexts, config.guidance)?;
        let SchedulerStep { sample, clean } = scheduler.step(&prediction, i, &latents)?;
        latents = sample.detach();
        let step = picture * config.steps + i + 1;
        let total = config.n_pictures * config.steps;
        if on_step(GenerateStep {
            picture,
            step,
            total,
            clean: &clean.detach(),
        })
        .is_break()
        {
            return Err(Error::Canceled);
        }
    }
    Ok(latents)
}

/// The U-Net's prediction with classifier-free guidance, [1, 4, h, w].
///
/// * `latents`: [1, 4, h, w]
/// * `contexts`: unconditional [1, 77·m, D] and conditional [1, 77·n, D]; those of one length are asked about together
///
/// # Errors
/// Those of the U-Net.
pub fn guided_prediction(
    unet: &UNet,
    latents: &Tensor,
    timestep: usize,
    contexts: &[Tensor; 2],
    guidance: f64,
) -> Result<Tensor> {
    let t = timestep as f32;
    if guidance == 1.0 {
        return unet.forward(latents, &[t], &contexts[1]);
    }
    let (unconditional, conditional) = if contexts[0].dims() == contexts[1].dims() {
        let latents = Tensor::cat(&[latents, latents], 0)?;
        let both = unet.forward(&latents, &[t, t], &Tensor::cat(contexts, 0)?)?;
        (both.narrow(0, 0, 1)?, both.narrow(0, 1, 1)?)
    } else {
        let one = |context| unet.forward(latents, &[t], context);
        (one(&contexts[0])?, one(&contexts[1])?)
    };
    Ok((&unconditional + ((conditional - &unconditional)? * guidance)?)?)
}
