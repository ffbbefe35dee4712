//! Figures that say whether masks and tokens got better, against true masks. All are deterministic: streams of their
//! own, the same for every run on the same picture.

use candle_core::Tensor;
use stable_diffusion::DiffusionModel;
use stable_diffusion::rng::Rng;

use crate::assignment::best_assignment;
use crate::config::{CrfStage, ExtractionConfig, TokenInit};
use crate::error::Result;
use crate::labels::label;
use crate::learned::LearnedConcepts;
use crate::maps::AttentionMaps;
use crate::mask::{ImageMasks, SceneMasks, at_resolution, iou};
use crate::observation::Eye;
use crate::prepared::PreparedScene;
use crate::refine::refine;
use crate::scene::{Role, Scene, ScenePicture};

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

/// Which concept's true masks every concept is compared with: itself, unless there is nothing that tells it from others
/// before it is learned. Objects are alike if they start alike (from one class word, or at random, where no word is
/// used) and the same pictures show them. Among those the names are arbitrary, and the assignment with the largest
/// mean IoU of `masks` counts, as in the papers that discover concepts; it is exact. Concepts in the order of the scene.
///
/// Use one matching, that of the last masks, for all figures of a run.
#[must_use]
pub fn match_concepts(
    scene: &Scene,
    init: TokenInit,
    masks: &[ImageMasks],
    truth: &[ImageMasks],
) -> Vec<usize> {
    let n_concepts = scene.concepts().len();
    let place = |picture: usize, concept: usize| {
        let shown = &scene.pictures()[picture].concepts;
        shown.iter().position(|&c| c == concept)
    };
    let places = |concept: usize| -> Vec<(usize, usize)> {
        (0..scene.pictures().len())
            .filter_map(|picture| Some((picture, place(picture, concept)?)))
            .collect()
    };
    let start = |concept: usize| {
        let concept = &scene.concepts()[concept];
        let word = (init != TokenInit::Random).then_some(&concept.class_word);
        (concept.role == Role::Object).then_some(word)
    };
    let are_alike = |a: usize, b: usize| {
        let pictures = |concept| places(concept).into_iter().map(|(picture, _)| picture);
        a == b || (start(a).is_some() && start(a) == start(b) && pictures(a).eq(pictures(b)))
    };
    let mean_iou = |concept: usize, other: usize| {
        let (found, wanted) = (places(concept), places(other));
        let ious = found.iter().zip(&wanted).map(|(&(picture, i), &(_, j))| {
            f64::from(iou(
                &masks[picture].planes()[i],
                &truth[picture].planes()[j],
            ))
        });
        ious.sum::<f64>() / found.len().max(1) as f64
    };
    let mut matching: Vec<usize> = (0..n_concepts).collect();
    for first in 0..n_concepts {
        let group: Vec<usize> = (0..n_concepts).filter(|&c| are_alike(first, c)).collect();
        if group[0] < first {
            continue;
        }
        let row = |&c: &usize| group.iter().map(|&other| mean_iou(c, other)).collect();
        let score: Vec<Vec<f64>> = group.iter().map(row).collect();
        for (&concept, column) in group.iter().zip(best_assignment(&score)) {
            matching[concept] = group[column];
        }
    }
    matching
}

/// The true masks with those of concept `matching[c]` where concept c stands.
///
/// # Errors
/// Masks of another size than their own say.
pub fn matched_truth(
    scene: &Scene,
    truth: &[ImageMasks],
    matching: &[usize],
) -> Result<SceneMasks> {
    let matched = |(picture, truth): (&ScenePicture, &ImageMasks)| {
        let plane = |&concept: &usize| {
            let of = |&other: &usize| other == matching[concept];
            let place = picture.concepts.iter().position(of);
            place.map(|place| truth.planes()[place].clone())
        };
        let planes = picture.concepts.iter().filter_map(plane).collect();
        ImageMasks::new(truth.size(), planes)
    };
    scene.pictures().iter().zip(truth).map(matched).collect()
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
    let eye = Eye {
        model,
        scene,
        learned,
        config,
        picture,
    };
    let seen = eye.observe(&timesteps, None, None, &mut rng, &mut |_| Ok(()))?;
    let roles = scene.scene.roles(picture);
    let labels = label(&seen.maps, seen.evidence.as_ref(), &roles, learned, config)?;
    let lattice = scene.crf(picture, &crf.crf)?;
    let refined = refine(&lattice, &labels, &roles, Some(&seen.maps), None, crf)?;
    let (masks, maps) = (refined.masks, seen.maps);
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
    let latent = scene.latent_size(model, picture);
    let total = model.noise_schedule.n_timesteps();
    let z = scene.mean_latents(model, picture)?;
    let mut rng = Rng::new(EVALUATION_SEED, "masked error", picture as u64);
    let concepts = &scene.scene.pictures()[picture].concepts;
    let context = |&concept: &usize| {
        let prompt = tokenizer.encode(&learned.training_prompt(&[concept]))?;
        let context = model
            .text_encoder
            .encode(&prompt.ids, Some(&learned.rows))?;
        Ok(context.detach())
    };
    let contexts = concepts.iter().map(context).collect::<Result<Vec<_>>>()?;
    let inside = |(_, plane): (&usize, &Vec<u8>)| {
        let inside = at_resolution(plane, truth.size(), latent, false);
        let n_inside: f32 = inside.iter().sum();
        let shape = (1, 1, latent.height, latent.width);
        let inside = Tensor::from_vec(inside, shape, &model.device)?;
        Ok((inside, f64::from(n_inside.max(1.0))))
    };
    let insides = concepts.iter().zip(truth.planes()).map(inside);
    let insides = insides.collect::<Result<Vec<_>>>()?;
    let mut sums = vec![0.0; insides.len()];
    for t in (1..=N_TIMESTEPS).map(|k| k * (total - 1) / (N_TIMESTEPS + 1)) {
        let noise = rng.normal(z.dims(), &model.device)?;
        let noisy = model.noise_schedule.add_noise(&z, &noise, &[t])?;
        let target = model.noise_schedule.target(&z, &noise, &[t])?;
        let predictions = model.unet.forward_each(&noisy, &[t as f32], &contexts)?;
        for ((prediction, (inside, _)), sum) in predictions.iter().zip(&insides).zip(&mut sums) {
            let square = (prediction - &target)?.sqr()?.broadcast_mul(inside)?;
            *sum += f64::from(square.sum_all()?.to_scalar::<f32>()?);
        }
    }
    let n_values = (N_TIMESTEPS * z.dim(1)?) as f64;
    let mean = |(sum, (_, n_inside)): (&f64, &(Tensor, f64))| sum / (n_values * n_inside);
    Ok(sums.iter().zip(&insides).map(mean).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::{Concept, Picture};
    use crate::size::Size;

    /// Objects with these words, a background, and pictures that show these concepts.
    fn scene(words: &[&str], pictures: &[&[usize]]) -> Scene {
        let concept = |(i, word): (usize, &&str)| Concept {
            token: format!("<{i}>"),
            class_word: (*word).to_owned(),
            role: if *word == "sea" {
                Role::Background
            } else {
                Role::Object
            },
        };
        let picture = |concepts: &&[usize]| ScenePicture {
            picture: Picture::from_rgb8(Size::square(2), &[7; 12], Size::square(2)).unwrap(),
            concepts: concepts.to_vec(),
        };
        let concepts = words.iter().enumerate().map(concept).collect();
        Scene::new(concepts, pictures.iter().map(picture).collect()).unwrap()
    }

    /// One plane per entry, with that pixel inside.
    fn masks(pixels: &[usize]) -> ImageMasks {
        let plane = |&pixel: &usize| (0..4).map(|i| u8::from(i == pixel)).collect();
        ImageMasks::new(Size::square(2), pixels.iter().map(plane).collect()).unwrap()
    }

    #[test]
    fn only_concepts_that_nothing_tells_apart_change_places() {
        let all: &[usize] = &[0, 1, 2, 3];
        let (found, truth) = (masks(&[2, 0, 1, 3]), masks(&[0, 1, 2, 3]));
        for (words, init, expected) in [
            (["dog", "dog", "dog", "sea"], TokenInit::Class, [2, 0, 1, 3]),
            (["dog", "car", "dog", "sea"], TokenInit::Class, [2, 1, 0, 3]),
            (["dog", "car", "cat", "sea"], TokenInit::Class, [0, 1, 2, 3]),
            (
                ["dog", "car", "cat", "sea"],
                TokenInit::Random,
                [2, 0, 1, 3],
            ),
        ] {
            let scene = scene(&words, &[all]);
            let (found, truth) = ([found.clone()], [truth.clone()]);
            let matching = match_concepts(&scene, init, &found, &truth);
            assert_eq!(matching, expected, "{words:?}");
            let matched = matched_truth(&scene, &truth, &matching).unwrap();
            assert_eq!(matched[0], masks(&expected));
        }
    }

    #[test]
    fn pictures_tell_concepts_apart() {
        let scene = scene(&["dog", "dog", "dog", "sea"], &[&[0, 1, 3], &[1, 2, 3]]);
        let found = [masks(&[1, 0, 3]), masks(&[0, 1, 3])];
        let truth = [masks(&[0, 1, 3]), masks(&[1, 0, 3])];
        let matching = match_concepts(&scene, TokenInit::Random, &found, &truth);
        assert_eq!(matching, [0, 1, 2, 3]);
    }
}
