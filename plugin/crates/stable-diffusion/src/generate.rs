//! Pictures from text embeddings: noise, guided denoising, decoding.
//!
//! ```text
//! eps = eps_unconditional + guidance (eps_conditional - eps_unconditional)     (Ho and Salimans 2021)
//! ```

use std::ops::ControlFlow;

use candle_core::{DType, Tensor};

use crate::config::Prediction;
use crate::error::{Error, Result};
use crate::model::DiffusionModel;
use crate::rng::Rng;
use crate::sampling::{NoiseLevels, Problem, Sampler, Schedule};

/// Cells a side of the largest latent that [`preview`] decodes as it is.
const PREVIEW_WHOLE: usize = 32;
/// Cells a side to which it averages a larger one on a CPU: decoding 32 with Stable Diffusion's widths takes as
/// long there as a step of the U-Net on 64, decoding 16 a fourth of that.
const PREVIEW_ON_CPU: usize = 16;

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateConfig {
    /// Steps per picture, in 1..=T.
    pub steps: usize,
    /// Weight of the prompt against the unconditional prompt; 1 leaves the latter out.
    pub guidance: f64,
    /// How steps are made.
    pub sampler: Sampler,
    /// Which noise levels they visit.
    pub schedule: Schedule,
    /// Seed of all noise; picture i has its own streams under it.
    pub seed: u64,
    /// Pictures to make, of each picture to start from.
    pub n_pictures: usize,
    /// What to start from.
    pub start: Start,
}

/// What a picture starts from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// Pure noise, of this width and height in pixels.
    Noise([usize; 2]),
    /// The latents given to [`generate`], with as much noise as the last part of the steps takes away; in (0, 1], 1 leaves
    /// next to nothing of them.
    Latents {
        /// Which part.
        denoise: f64,
    },
}

/// Bytes of answers of the model that are kept of one picture: those of a thousand steps at 512 pixels.
const KEPT: usize = 64 << 20;
/// Answers that are kept of any picture: those of a hundred steps with two each. A step takes far more memory than they do.
const ALWAYS_KEPT: usize = 200;

/// How far [`generate_from`] has come. Going on from it gives the same bits: a sampler is a function of what the model answers,
/// so it is run again with the answers that are known.
#[derive(Debug, Clone, Default)]
pub struct GenerateProgress {
    /// Decoded pictures [1, 3, H, W], as the decoder leaves them.
    pub pictures: Vec<Tensor>,
    /// D(x, σ) [1, 4, h, w] of the picture after them, in the order in which they were asked for.
    pub answers: Vec<Tensor>,
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
    /// From where the call can go on.
    pub progress: &'a GenerateProgress,
}

/// Generates pictures, [n, 3, H, W] in [0, 1]. Picture i is the same whatever `n_pictures` is.
///
/// * `latents`: [B, 4, h, w], scaled, for [`Start::Latents`]: all pictures of the first come first
/// * `on_step`: called after each step; `Break` stops
///
/// # Errors
/// [`Error::Canceled`] if `on_step` broke off, [`Error::Argument`] if the configuration is out of range.
pub fn generate(
    model: &DiffusionModel,
    contexts: Contexts<'_>,
    latents: Option<&Tensor>,
    config: &GenerateConfig,
    on_step: &mut dyn FnMut(GenerateStep<'_>) -> ControlFlow<()>,
) -> Result<Tensor> {
    let progress = GenerateProgress::default();
    generate_from(model, contexts, latents, config, progress, on_step)
}

/// [`generate`] from where an earlier call with the same arguments was stopped. `on_step` hears of the steps that were not done.
///
/// # Errors
/// As [`generate`].
pub fn generate_from(
    model: &DiffusionModel,
    contexts: Contexts<'_>,
    latents: Option<&Tensor>,
    config: &GenerateConfig,
    mut progress: GenerateProgress,
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
    let starts = starts(model, latents, config)?;
    // Known at the end of all steps otherwise.
    for start in &starts {
        let (_, _, height, width) = start.dims4()?;
        let size = [width, height].map(|side| side * model.config.vae.downsampling());
        model.vae.foresee(&model.device, 1, size)?;
    }
    let guided = GuidedModel::new(model, contexts, config.guidance);
    let denoise = match config.start {
        Start::Noise(_) => 1.0,
        Start::Latents { denoise } => denoise,
    };
    let sigmas =
        config
            .sampler
            .noise_levels(&guided.levels, config.schedule, config.steps, denoise)?;
    let n_pictures = starts.len() * config.n_pictures;
    for picture in progress.pictures.len()..n_pictures {
        let mut denoising = Denoising {
            guided: &guided,
            noise: Rng::new(config.seed, "sampler noise", picture as u64),
            picture,
            steps: (picture * config.steps, n_pictures * config.steps),
            n_known: progress.answers.len(),
            n_asked: 0,
            progress: &mut progress,
            on_step,
        };
        let x = denoising.noisy(&starts[picture / config.n_pictures], &sigmas, config.seed)?;
        let latents = config.sampler.sample(&mut denoising, &x, &sigmas)?;
        progress.pictures.push(model.vae.decode(&latents)?);
        progress.answers.clear();
    }
    in_unit_range(&Tensor::cat(&progress.pictures, 0)?)
}

/// What [`generate`] is told in words, see [`crate::prompt`].
#[derive(Debug, Clone, Copy)]
pub struct Contexts<'a> {
    /// [1, 77·n, D]
    pub conditional: &'a Tensor,
    /// [1, 77·m, D]
    pub unconditional: &'a Tensor,
}

/// Latents [1, 4, h, w] to start from, each once.
fn starts(
    model: &DiffusionModel,
    latents: Option<&Tensor>,
    config: &GenerateConfig,
) -> Result<Vec<Tensor>> {
    let channels = model.config.unet.in_channels;
    match (config.start, latents) {
        (Start::Noise(size), _) => {
            let factor = model.config.vae.downsampling();
            let [width, height] = size.map(|side| side / factor);
            if size
                .iter()
                .any(|&side| side == 0 || !side.is_multiple_of(factor))
            {
                let reason = format!(
                    "{} x {} is not a size in multiples of {factor} pixels",
                    size[0], size[1]
                );
                return Err(Error::argument("size", reason));
            }
            let shape = (1, channels, height, width);
            Ok(vec![Tensor::zeros(shape, DType::F32, &model.device)?])
        }
        (Start::Latents { .. }, Some(latents)) => {
            let n = latents.dim(0)?;
            let one = |i| Ok(latents.narrow(0, i, 1)?.detach());
            (0..n).map(one).collect()
        }
        (Start::Latents { .. }, None) => Err(Error::argument("latents", "there are none")),
    }
}

/// One picture in the making.
struct Denoising<'a> {
    guided: &'a GuidedModel<'a>,
    noise: Rng,
    picture: usize,
    /// Done and to do over all pictures.
    steps: (usize, usize),
    /// Answers that were there at the beginning.
    n_known: usize,
    n_asked: usize,
    progress: &'a mut GenerateProgress,
    on_step: &'a mut dyn FnMut(GenerateStep<'_>) -> ControlFlow<()>,
}

impl Denoising<'_> {
    /// z with the first level's noise. At the largest one the whole has the variance that the model was trained with.
    fn noisy(&self, z: &Tensor, sigmas: &[f64], seed: u64) -> Result<Tensor> {
        let noise = Rng::new(seed, "generate", self.picture as u64).normal(z.dims(), z.device())?;
        let sigma = sigmas[0];
        let is_all = sigma >= self.guided.levels.largest() * (1.0 - 1e-5);
        let scale = if is_all {
            (1.0 + sigma * sigma).sqrt()
        } else {
            sigma
        };
        Ok((z + (noise * scale)?)?)
    }
}

impl Problem for Denoising<'_> {
    fn clean(&mut self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        let answers = &mut self.progress.answers;
        self.n_asked += 1;
        if self.n_asked <= self.n_known {
            return Ok(answers[self.n_asked - 1].clone());
        }
        let answer = self.guided.clean(x, sigma)?;
        // The first ones are of use without the later ones.
        let is_next = answers.len() + 1 == self.n_asked;
        let is_little = self.n_asked * answer.elem_count() * size_of::<f32>() <= KEPT;
        if is_next && (is_little || self.n_asked <= ALWAYS_KEPT) {
            answers.push(answer.clone());
        }
        Ok(answer)
    }

    fn noise(&mut self, x: &Tensor) -> Result<Tensor> {
        self.noise.normal(x.dims(), x.device())
    }

    fn on_step(&mut self, clean: &Tensor) -> Result<()> {
        self.steps.0 += 1;
        if self.n_asked <= self.n_known {
            return Ok(());
        }
        let (step, total) = self.steps;
        let picture = self.picture;
        let step = GenerateStep {
            picture,
            step,
            total,
            clean,
            progress: self.progress,
        };
        if (self.on_step)(step).is_break() {
            return Err(Error::Canceled);
        }
        Ok(())
    }
}

/// The decoder's pictures, about [-1, 1], as pictures in [0, 1].
fn in_unit_range(decoded: &Tensor) -> Result<Tensor> {
    Ok(((decoded + 1.0)? * 0.5)?.clamp(0.0, 1.0)?)
}

/// A quick look at a clean latent [1, 4, h, w], scaled: a picture [1, 3, H', W'] in [0, 1].
///
/// A latent of more cells than 32 a side has is first averaged to about as many, on a CPU to those of 16 a side; the picture
/// is that much smaller. Up to there it is the picture that [`generate`] would give.
///
/// # Errors
/// Those of the decoder.
pub fn preview(model: &DiffusionModel, clean: &Tensor) -> Result<Tensor> {
    let (_, _, height, width) = clean.dims4()?;
    // Of a square of the same area.
    let side = (height * width).isqrt();
    let wanted = if side <= PREVIEW_WHOLE || !model.device.is_cpu() {
        PREVIEW_WHOLE
    } else {
        PREVIEW_ON_CPU
    };
    let cell = side.div_ceil(wanted).min(height).min(width);
    let small = if cell > 1 {
        &clean.avg_pool2d(cell)?
    } else {
        clean
    };
    in_unit_range(&model.vae.decode(small)?)
}

/// A U-Net that denoises towards a prompt and away from another.
#[derive(Debug)]
pub struct GuidedModel<'a> {
    model: &'a DiffusionModel,
    levels: NoiseLevels,
    /// Unconditional, conditional.
    contexts: [Tensor; 2],
    guidance: f64,
}

impl<'a> GuidedModel<'a> {
    /// `guidance` 1 leaves the unconditional prompt out.
    #[must_use]
    pub fn new(model: &'a DiffusionModel, contexts: Contexts<'_>, guidance: f64) -> Self {
        Self {
            model,
            levels: NoiseLevels::new(&model.noise_schedule),
            contexts: [
                contexts.unconditional.detach(),
                contexts.conditional.detach(),
            ],
            guidance,
        }
    }

    /// The model's noise levels.
    #[must_use]
    pub fn levels(&self) -> &NoiseLevels {
        &self.levels
    }

    /// D(x, σ) of [`crate::sampling`], [1, 4, h, w] as `x`.
    ///
    /// # Errors
    /// Those of the U-Net.
    pub fn clean(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        // x in the variance-preserving form that the U-Net knows.
        let alpha = 1.0 / (1.0 + sigma * sigma).sqrt();
        let latents = (x * alpha)?;
        let output = self.prediction(&latents, self.levels.timestep(sigma) as f32)?;
        let clean = match self.model.noise_schedule.prediction() {
            Prediction::Epsilon => (x - (output * sigma)?)?,
            Prediction::Velocity => ((latents - (output * sigma)?)? * alpha)?,
        };
        Ok(clean.detach())
    }

    /// With classifier-free guidance. Contexts of one length are asked about together.
    fn prediction(&self, latents: &Tensor, t: f32) -> Result<Tensor> {
        let (unet, contexts) = (&self.model.unet, &self.contexts);
        if self.guidance == 1.0 {
            return unet.forward(latents, &[t], &contexts[1]);
        }
        let both = if contexts[0].dims() == contexts[1].dims() {
            unet.forward(latents, &[t], &Tensor::cat(contexts, 0)?)?
        } else {
            Tensor::cat(&unet.forward_each(latents, &[t], contexts)?, 0)?
        };
        let (unconditional, conditional) = (both.narrow(0, 0, 1)?, both.narrow(0, 1, 1)?);
        Ok((&unconditional + ((conditional - &unconditional)? * self.guidance)?)?)
    }
}
