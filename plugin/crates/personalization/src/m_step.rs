//! The M-step: optimizer steps on the tokens under fixed masks (stage 2), and textual inversion (stage 1a).
//!
//! One step samples a picture, a subset of its concepts in random order ("union sampling", BaS), a mirror image with
//! probability ½, a latent of the VAE's posterior, a timestep and noise; then
//!
//! ```text
//! L = L_mask + λ L_attn,   v ← AdamW(v, clip(∂L/∂v))
//! ```
//!
//! Only the rows are variables. The U-Net and the text encoder are differentiated through, never for their weights.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use stable_diffusion::ops::Precision;
use stable_diffusion::rng::Rng;
use stable_diffusion::tokenizer::Tokenizer;
use stable_diffusion::unet::{Backward, LayerAttention, Watch};
use stable_diffusion::{DiffusionModel, UNet};

use crate::checkpoint::Checkpoint;
use crate::config::MStepConfig;
use crate::error::{Error, Result};
use crate::learned::LearnedConcepts;
use crate::loss::cross_attention::concept_maps;
use crate::loss::{cross_attention_loss, masked_diffusion_loss};
use crate::mask::{ImageMasks, at_resolution, plane_tensor};
use crate::observer::{Event, Observer, offer, tell};
use crate::optimizer::{AdamWState, clipping};
use crate::prepared::PreparedScene;
use crate::scene::ScenePicture;
use crate::size::Size;

/// Name of stage 2 in events and errors.
pub const TOKENS: &str = "tokens";
/// Name of textual inversion in events and errors.
pub const INVERSION: &str = "inversion";

/// What one step is about; everything random of it.
#[derive(Debug)]
pub(crate) struct Draw {
    picture: usize,
    /// Indices into the picture's concepts, in the order of the prompt.
    subset: Vec<usize>,
    flipped: bool,
    /// z `[B, 4, h, w]`.
    latents: Tensor,
    /// ε `[B, 4, h, w]`.
    noise: Tensor,
    timesteps: Vec<usize>,
}

impl Draw {
    /// Draws from the stream (`seed`, `stream`, `step`), in the order: picture, subset, mirror, z, ε, t.
    pub(crate) fn new(
        model: &DiffusionModel,
        scene: &PreparedScene<'_>,
        config: &MStepConfig,
        (seed, stream, step): (u64, &str, usize),
    ) -> Result<Self> {
        let mut rng = Rng::new(seed, stream, step as u64);
        let picture = rng.below(scene.scene.pictures().len());
        let n_concepts = scene.scene.pictures()[picture].concepts.len();
        let n_sampled = 1 + rng.below(n_concepts);
        let subset = rng.sample_without_replacement(n_concepts, n_sampled);
        let flipped = rng.uniform() < config.flip_probability;
        let Size { width, height } = scene.latent_size(model, picture);
        let shape = [config.batch, model.config.unet.in_channels, height, width];
        let latents =
            scene.latents(model, picture, flipped, &rng.normal(&shape, &model.device)?)?;
        let noise = rng.normal(&shape, &model.device)?;
        let timesteps = (0..config.batch)
            .map(|_| rng.below(model.noise_schedule.n_timesteps()))
            .collect();
        Ok(Self {
            picture,
            subset,
            flipped,
            latents,
            noise,
            timesteps,
        })
    }
}

/// The losses of one step: numbers, so that nobody who is told of them holds its graph.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Losses {
    pub(crate) masked_diffusion: f32,
    pub(crate) cross_attention: f32,
}

/// L, and what it is made of.
#[derive(Debug)]
pub(crate) struct Objective<'a> {
    total: Tensor,
    masked_diffusion: Tensor,
    /// None where it does not count.
    cross_attention: Option<Tensor>,
    backward: Backward<'a>,
}

impl Objective<'_> {
    /// Gradients, zeros for variables that it does not depend on, and the losses. The graph ends here, and the device is
    /// waited for once.
    ///
    /// `at` is the stage and the step, from 1, that a loss which is not finite is reported for. The loss is `scale` times as
    /// large on its way back.
    fn gradients(
        self,
        variables: &[&Var],
        scale: f64,
        (stage, step): (&'static str, usize),
    ) -> Result<(Vec<Tensor>, Losses)> {
        let wanted: Vec<&Tensor> = variables.iter().map(|var| var.as_tensor()).collect();
        let found = match scale {
            1.0 => self.backward.gradients(&self.total, &wanted)?,
            scale => self.backward.gradients(&(&self.total * scale)?, &wanted)?,
        };
        let gradient = |(found, variable): (Option<Tensor>, &Tensor)| match found {
            Some(gradient) if scale == 1.0 => Ok(gradient),
            Some(gradient) => Ok((gradient * scale.recip())?.detach()),
            None => Ok(variable.zeros_like()?.detach()),
        };
        let gradients = found.into_iter().zip(wanted);
        let gradients = gradients.map(gradient).collect::<Result<_>>()?;
        let parts: Vec<&Tensor> = [&self.masked_diffusion]
            .into_iter()
            .chain(&self.cross_attention)
            .collect();
        let values = Tensor::stack(&parts, 0)?.to_vec1::<f32>()?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Error::NonFiniteLoss { stage, step });
        }
        let losses = Losses {
            masked_diffusion: values[0],
            cross_attention: values.get(1).copied().unwrap_or(0.0),
        };
        Ok((gradients, losses))
    }
}

/// By what the loss is multiplied on its way back before it is tried as it is: f16 loses gradients that are too small, and has
/// no room for large ones. A step that starts anew with each needs no state, so that a run is resumed exactly.
fn loss_scales(precision: Precision) -> &'static [f64] {
    match precision {
        Precision::F32 | Precision::Bf16 => &[],
        Precision::F16 => &[16384.0, 1024.0, 64.0],
    }
}

/// Whether all of the numbers are; the device is waited for once.
fn are_finite(tensors: &[Tensor]) -> Result<bool> {
    let sums = tensors.iter().map(|tensor| Ok(tensor.abs()?.sum_all()?));
    let sums = sums.collect::<Result<Vec<_>>>()?;
    Ok(Tensor::stack(&sums, 0)?
        .sum_all()?
        .to_scalar::<f32>()?
        .is_finite())
}

/// What the losses of a step are computed with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LossContext<'a> {
    pub(crate) model: &'a DiffusionModel,
    pub(crate) unet: &'a UNet,
    pub(crate) scene: &'a PreparedScene<'a>,
    /// `None`: textual inversion, everything counts and attention does not.
    pub(crate) masks: Option<&'a [ImageMasks]>,
    pub(crate) learned: &'a LearnedConcepts,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) config: &'a MStepConfig,
}

impl<'a> LossContext<'a> {
    /// Gradients of this draw's L with respect to `rows` and whatever else is among `variables`, and the losses; see
    /// [`Objective::gradients`].
    pub(crate) fn gradients(
        &self,
        rows: &Tensor,
        draw: &Draw,
        variables: &[&Var],
        at: (&'static str, usize),
    ) -> Result<(Vec<Tensor>, Losses)> {
        for &scale in loss_scales(self.unet.precision()) {
            let (gradients, losses) = self
                .objective(rows, draw)?
                .gradients(variables, scale, at)?;
            if are_finite(&gradients)? {
                return Ok((gradients, losses));
            }
        }
        self.objective(rows, draw)?.gradients(variables, 1.0, at)
    }

    /// L of this draw, differentiable in `rows` `[C·V, D]` and in whatever of the U-Net is a variable.
    fn objective(&self, rows: &Tensor, draw: &Draw) -> Result<Objective<'a>> {
        let picture = &self.scene.scene.pictures()[draw.picture];
        let concepts: Vec<usize> = draw.subset.iter().map(|&i| picture.concepts[i]).collect();
        let prompt = self
            .tokenizer
            .encode(&self.learned.training_prompt(&concepts))?;
        let context = self.model.text_encoder.encode(&prompt.ids, Some(rows))?;
        let schedule = &self.model.noise_schedule;
        let noisy = schedule.add_noise(&draw.latents, &draw.noise, &draw.timesteps)?;
        let target = schedule.target(&draw.latents, &draw.noise, &draw.timesteps)?;
        let timesteps: Vec<f32> = draw.timesteps.iter().map(|&t| t as f32).collect();
        let Some(masks) = self.masks.map(|masks| &masks[draw.picture]) else {
            let watch = Watch::Layers(&[], &[]);
            let (observed, backward) = self
                .unet
                .forward_for_gradients(&noisy, &timesteps, &context, watch)?;
            let total = (observed.prediction - target)?.sqr()?.mean_all()?;
            return Ok(Objective {
                masked_diffusion: total.clone(),
                total,
                cross_attention: None,
                backward,
            });
        };
        let positions = self.learned.positions(self.tokenizer, &prompt, &concepts)?;
        let layers = if self.config.lambda_attention > 0.0 {
            self.config.layers.of(self.unet.cross_attention_layers())
        } else {
            Vec::new()
        };
        let watch = Watch::Layers(&layers, &positions);
        let (observed, backward) = self
            .unet
            .forward_for_gradients(&noisy, &timesteps, &context, watch)?;
        let latent = self.scene.latent_size(self.model, draw.picture);
        let union = masks.union(&draw.subset);
        let device = &self.model.device;
        let union = plane_tensor(&union, masks.size(), latent, draw.flipped, device)?;
        let masked_diffusion = masked_diffusion_loss(&observed.prediction, &target, &union)?;
        if layers.is_empty() {
            return Ok(Objective {
                total: masked_diffusion.clone(),
                masked_diffusion,
                cross_attention: None,
                backward,
            });
        }
        let cross_attention = self.cross_attention(observed.attention, masks, draw)?;
        Ok(Objective {
            total: (&masked_diffusion + (&cross_attention * self.config.lambda_attention)?)?,
            masked_diffusion,
            cross_attention: Some(cross_attention),
            backward,
        })
    }

    /// L_attn, the mean over layers; those of one size share their maps.
    fn cross_attention(
        &self,
        attention: Vec<LayerAttention>,
        masks: &ImageMasks,
        draw: &Draw,
    ) -> Result<Tensor> {
        let n_layers = attention.len() as f64;
        let mut by_size: BTreeMap<(usize, usize), Vec<LayerAttention>> = BTreeMap::new();
        for layer in attention {
            let size = (layer.width, layer.height);
            by_size.entry(size).or_default().push(layer);
        }
        let loss =
            |((width, height), layers): ((usize, usize), Vec<LayerAttention>)| -> Result<Tensor> {
                let size = Size::new(width, height);
                let maps = concept_maps(&layers, self.learned.vectors_per_concept()?)?;
                let loss = cross_attention_loss(&maps, &self.small_masks(masks, draw, size)?)?;
                Ok((loss * (layers.len() as f64 / n_layers))?)
            };
        let losses = by_size.into_iter().map(loss).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&losses, 0)?.sum_all()?)
    }

    /// G `[n, C]` of the sampled concepts.
    fn small_masks(&self, masks: &ImageMasks, draw: &Draw, size: Size) -> Result<Tensor> {
        let small =
            |&c: &usize| at_resolution(&masks.planes()[c], masks.size(), size, draw.flipped);
        let planes: Vec<f32> = draw.subset.iter().flat_map(small).collect();
        let shape = (draw.subset.len(), size.area());
        Ok(Tensor::from_vec(planes, shape, &self.model.device)?
            .t()?
            .contiguous()?)
    }
}

/// Stage 2: `n_steps` optimizer steps from where `learned` stands.
///
/// # Errors
/// Masks that do not fit the scene, a loss that is no longer finite, or a stop.
pub fn m_step(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    masks: &[ImageMasks],
    learned: &LearnedConcepts,
    config: &MStepConfig,
    n_steps: usize,
    observer: &mut dyn Observer,
) -> Result<LearnedConcepts> {
    check_masks(scene, masks)?;
    let mut learned = learned.clone();
    let tokenizer = learned.tokenizer(model)?;
    for done in 1..=n_steps {
        let draw = Draw::new(model, scene, config, (learned.seed, "m-step", learned.step))?;
        let losses;
        (learned, losses) = token_step(
            model,
            scene,
            Some(masks),
            &learned,
            &tokenizer,
            config,
            &draw,
        )
        .map_err(|error| error.during(|| step_name(TOKENS, done)))?;
        let event = Event::Learned {
            step: learned.step,
            learned: &learned,
            unet: &model.unet,
        };
        let told = tell(observer, &step_event(TOKENS, done, n_steps, losses))
            .and_then(|()| tell(observer, &event));
        offer(observer, Checkpoint::Tokens(&learned));
        told?;
    }
    Ok(learned)
}

/// Stage 1a, `inversion`: plain textual inversion, without masks and without the attention loss. Goes on after the steps that
/// were done.
pub(crate) fn inversion(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    config: &MStepConfig,
    n_steps: usize,
    observer: &mut dyn Observer,
) -> Result<LearnedConcepts> {
    let mut inverted = learned.clone();
    let tokenizer = learned.tokenizer(model)?;
    for done in learned.step + 1..=n_steps {
        let draw = Draw::new(model, scene, config, (learned.seed, "inversion", done))?;
        let losses;
        (inverted, losses) = token_step(model, scene, None, &inverted, &tokenizer, config, &draw)
            .map_err(|error| error.during(|| step_name(INVERSION, done)))?;
        let told = tell(observer, &step_event(INVERSION, done, n_steps, losses));
        offer(observer, Checkpoint::Tokens(&inverted));
        told?;
    }
    // Stage 2 counts its own steps and starts with fresh moments, as a new optimizer does.
    let optimizer = AdamWState::zeros(std::slice::from_ref(&inverted.rows))?;
    Ok(LearnedConcepts {
        step: 0,
        optimizer,
        ..inverted
    })
}

/// One optimizer step on the rows; without masks it is one of textual inversion.
fn token_step(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    masks: Option<&[ImageMasks]>,
    learned: &LearnedConcepts,
    tokenizer: &Tokenizer,
    config: &MStepConfig,
    draw: &Draw,
) -> Result<(LearnedConcepts, Losses)> {
    let stage = if masks.is_some() { TOKENS } else { INVERSION };
    let rows = Var::from_tensor(&learned.rows)?;
    let context = LossContext {
        model,
        unet: &model.unet,
        scene,
        masks,
        learned,
        tokenizer,
        config,
    };
    let at = (stage, learned.step + 1);
    let (gradients, losses) = context.gradients(rows.as_tensor(), draw, &[&rows], at)?;
    let scale = clipping(&gradients, config.max_gradient_norm)?;
    let rates = [config.learning_rate];
    let mut optimizer = learned.optimizer.clone();
    optimizer.step(&[&rows], gradients, &scale, &rates, config)?;
    let next = LearnedConcepts {
        rows: rows.as_detached_tensor(),
        optimizer,
        step: learned.step + 1,
        ..learned.clone()
    };
    Ok((next, losses))
}

/// What errors call a step.
pub(crate) fn step_name(stage: &str, step: usize) -> String {
    format!("step {step} of the stage {stage}")
}

pub(crate) fn step_event(
    stage: &'static str,
    step: usize,
    total: usize,
    Losses {
        masked_diffusion,
        cross_attention,
    }: Losses,
) -> Event<'static> {
    Event::Step {
        stage,
        step,
        total,
        masked_diffusion,
        cross_attention,
    }
}

pub(crate) fn check_masks(scene: &PreparedScene<'_>, masks: &[ImageMasks]) -> Result<()> {
    let pictures = scene.scene.pictures();
    let fits = |(masks, picture): (&ImageMasks, &ScenePicture)| {
        masks.planes().len() == picture.concepts.len() && masks.size() == picture.picture.size()
    };
    if masks.len() != pictures.len() || !masks.iter().zip(pictures).all(fits) {
        return Err(Error::MasksDoNotFit {
            pictures: pictures.len(),
        });
    }
    for (i, (masks, picture)) in masks.iter().zip(pictures).enumerate() {
        let mut planes = masks.planes().iter().zip(&picture.concepts);
        if let Some((_, &concept)) = planes.find(|(plane, _)| plane.iter().all(|&v| v == 0)) {
            return Err(Error::EmptyMask {
                token: scene.scene.concepts()[concept].token.clone(),
                picture: i + 1,
            });
        }
    }
    Ok(())
}
