//! Figures that say whether masks and tokens got better, against true masks. All are deterministic: streams of their
//! own, the same for every run on the same picture.

use candle_core::Tensor;
use stable_diffusion::DiffusionModel;
use stable_diffusion::rng::Rng;

use crate::attention::extract_one;
use crate::binarize::binarize;
use crate::config::{CrfStage, ExtractionConfig};
use crate::error::Result;
use crate::learned::LearnedConcepts;
use crate::maps::AttentionMaps;
use crate::mask::{ImageMasks, at_resolution, iou};
use crate::prepared::PreparedScene;
use crate::refine::refine;

/// Seed of the evaluation streams.
const EVALUATION_SEED: u64 = 12_345;

/// Stratified timesteps of the masked error.
const N_TIMESTEPS: usize = 16;

/// IoU of every concept's mask with its true one, in [0, 1].
#[must_use]
pub fn mask_ious(masks: &ImageMasks, truth: &ImageMasks) -> Vec<f32> {
    masks
        .planes()
        .iter()
        .zip(truth.planes())
        .map(|(mask, truth)| iou(mask, truth))
        .collect()
}

/// What the current tokens find on a picture, whatever masks they were trained on.
#[derive(Debug, Clone)]
pub struct Extraction {
    /// The masks.
    pub masks: ImageMasks,
    /// The maps that they came from.
    pub maps: AttentionMaps,
}

/// Extraction with the current tokens and fixed noise: whether the *token* got better.
///
/// # Errors
/// Those of the model and of the CRF.
pub fn extraction(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    config: &ExtractionConfig,
    crf: &CrfStage,
    picture: usize,
) -> Result<Extraction> {
    let mut rng = Rng::new(EVALUATION_SEED, "extraction", picture as u64);
    // Stratified, because maps get more diffuse with more noise: figures must not hang on a lucky draw.
    let (n, total) = (
        config.n_timesteps_initial,
        model.noise_schedule.n_timesteps(),
    );
    let timesteps: Vec<usize> = (0..n).map(|i| (2 * i + 1) * total / (2 * n)).collect();
    let maps = extract_one(
        model,
        scene,
        learned,
        config,
        picture,
        &timesteps,
        &mut rng,
        &mut |_| Ok(()),
    )?;
    let roles = scene.scene.roles(picture);
    let masks = refine(
        &*scene.crf(picture, &crf.crf)?,
        &binarize(&maps, &roles, config)?,
        &roles,
        Some(&maps),
        None,
        crf,
    )?;
    Ok(Extraction { masks, maps })
}

/// Share of each map's mass outside of the true mask, in [0, 1].
#[must_use]
pub fn leaks(maps: &AttentionMaps, truth: &ImageMasks) -> Vec<f32> {
    let leak = |(map, truth): (&Vec<f32>, &Vec<u8>)| {
        let outside: f32 = map
            .iter()
            .zip(truth)
            .filter(|(_, t)| **t == 0)
            .map(|(v, _)| v)
            .sum();
        outside / map.iter().sum::<f32>().max(1e-12)
    };
    maps.maps.iter().zip(truth.planes()).map(leak).collect()
}

/// Masked reconstruction error of every concept of a picture:
///
/// ```text
/// mean over t of Σ G_c (ε_θ(z_t, t, "a photo of v_c") - target)² / (4 Σ G_c)
/// ```
///
/// at 16 stratified timesteps with fixed noise and the posterior's mean as latent.
///
/// # Errors
/// Those of the model.
pub fn masked_errors(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    truth: &ImageMasks,
    picture: usize,
) -> Result<Vec<f64>> {
    let tokenizer = learned.tokenizer(model)?;
    let (h, total) = (model.latent_size(), model.noise_schedule.n_timesteps());
    let timesteps: Vec<usize> = (1..=N_TIMESTEPS)
        .map(|k| k * (total - 1) / (N_TIMESTEPS + 1))
        .collect();
    let z = scene.mean_latents(model, picture)?;
    let mut rng = Rng::new(EVALUATION_SEED, "masked error", picture as u64);
    let noises = timesteps
        .iter()
        .map(|_| Ok(rng.normal(z.dims(), &model.device)?))
        .collect::<Result<Vec<Tensor>>>()?;
    let concepts = &scene.scene.pictures()[picture].concepts;
    let mut errors = Vec::with_capacity(concepts.len());
    for (index, &concept) in concepts.iter().enumerate() {
        let prompt = tokenizer.encode(&learned.training_prompt(&[concept]))?;
        let context = model
            .text_encoder
            .encode(&prompt.ids, Some(&learned.rows))?
            .detach();
        let inside = at_resolution(&truth.planes()[index], truth.size(), h, false);
        let n_inside: f32 = inside.iter().sum();
        let inside = Tensor::from_vec(inside, (1, 1, h, h), &model.device)?;
        let mut sum = 0.0;
        for (&t, noise) in timesteps.iter().zip(&noises) {
            let noisy = model.noise_schedule.add_noise(&z, noise, &[t])?;
            let target = model.noise_schedule.target(&z, noise, &[t])?;
            let square = (model.unet.forward(&noisy, &[t as f32], &context)? - target)?.sqr()?;
            sum += f64::from(
                square
                    .broadcast_mul(&inside)?
                    .sum_all()?
                    .to_scalar::<f32>()?,
            );
        }
        let channels = z.dim(1)? as f64;
        errors.push(sum / (N_TIMESTEPS as f64 * channels * f64::from(n_inside.max(1.0))));
    }
    Ok(errors)
}
