//! Attention maps of the concepts: the E-step up to its soft maps (P Eq. 2 and §3.2; METHOD of DAAM and DiffuMask).
//!
//! ```text
//! A_c = mean over layers of bicubic( mean over timesteps, heads and positions of softmax(Q Kᵀ / √d) )
//! ```
//!
//! The prompt names all concepts of the picture. Every timestep gets its own latent of the posterior and its own
//! noise; one conditional pass through the U-Net, no guidance, no gradient.

use std::collections::BTreeMap;

use candle_core::Tensor;
use stable_diffusion::DiffusionModel;
use stable_diffusion::rng::Rng;
use stable_diffusion::unet::{LayerAttention, Watch};

use crate::config::{Combination, ExtractionConfig};
use crate::error::Result;
use crate::learned::LearnedConcepts;
use crate::loss::cross_attention::concept_map;
use crate::maps::AttentionMaps;
use crate::observer::{Event, Observer, tell};
use crate::prepared::PreparedScene;

/// Noisy latents in one pass, at a latent size of 32; fewer at larger ones, so that memory stays about the same.
const BATCH_AT_32: usize = 10;

/// Maps of every picture of the scene, from `n_timesteps` random timesteps each.
///
/// The stream is named by the seed and the learned step, apart from the training stream: runs with and without
/// E-steps see the same training noise.
///
/// # Errors
/// Those of the model, or a stop.
pub fn extract_attention(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    config: &ExtractionConfig,
    n_timesteps: usize,
    observer: &mut dyn Observer,
) -> Result<Vec<AttentionMaps>> {
    let n_pictures = scene.scene.pictures().len();
    let mut all = Vec::with_capacity(n_pictures);
    for picture in 0..n_pictures {
        let mut rng = Rng::new(
            learned.seed,
            &format!("e-step, picture {picture}"),
            learned.step as u64,
        );
        let mut on_pass = |done: usize| {
            let (done, total) = (picture * n_timesteps + done, n_pictures * n_timesteps);
            tell(
                observer,
                &Event::Progress {
                    stage: "attention",
                    done,
                    total,
                },
            )
        };
        let timesteps = draw_timesteps(model, config, n_timesteps, &mut rng);
        all.push(extract_one(
            model,
            scene,
            learned,
            config,
            picture,
            &timesteps,
            &mut rng,
            &mut on_pass,
        )?);
    }
    Ok(all)
}

/// Maps of one picture at given timesteps; latents and noise come from `rng`.
#[expect(
    clippy::too_many_arguments,
    reason = "one value per noun of the definition; a struct would name them again"
)]
pub(crate) fn extract_one(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    config: &ExtractionConfig,
    picture: usize,
    timesteps: &[usize],
    rng: &mut Rng,
    on_pass: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<AttentionMaps> {
    let concepts = &scene.scene.pictures()[picture].concepts;
    let tokenizer = learned.tokenizer(model)?;
    let prompt = tokenizer.encode(&learned.training_prompt(concepts))?;
    let positions = learned.positions(&tokenizer, &prompt, concepts)?;
    let context = model
        .text_encoder
        .encode(&prompt.ids, Some(&learned.rows))?
        .detach();
    let layers = config.layers.of(model.unet.cross_attention_layers());
    let n_timesteps = timesteps.len();
    let h = model.latent_size();
    let batch = (BATCH_AT_32 * 32 * 32 / (h * h)).clamp(1, BATCH_AT_32);
    let mut sums: BTreeMap<usize, LayerSum> = BTreeMap::new();
    let mut done = 0;
    for timesteps in timesteps.chunks(batch) {
        let shape = [timesteps.len(), model.config.unet.in_channels, h, h];
        let latents = scene.latents(model, picture, false, &rng.normal(&shape, &model.device)?)?;
        let noise = rng.normal(&shape, &model.device)?;
        let noisy = model
            .noise_schedule
            .add_noise(&latents, &noise, timesteps)?;
        let t: Vec<f32> = timesteps.iter().map(|&t| t as f32).collect();
        let observed = model.unet.forward_observed(
            &noisy,
            &t,
            &context,
            Watch::Layers(&layers, &positions),
        )?;
        for layer in &observed.attention {
            let sum = sums
                .entry(layer.layer)
                .or_insert_with(|| LayerSum::empty(layer, concepts.len()));
            sum.add(layer, learned.vectors_per_concept)?;
        }
        done += timesteps.len();
        on_pass(done)?;
    }
    let size = model.image_size();
    let layers: Vec<LayerSum> = sums
        .into_values()
        .map(|sum| sum.divided_by(n_timesteps))
        .collect();
    Ok(AttentionMaps {
        size,
        maps: (0..concepts.len())
            .map(|c| combine(&layers, c, size, config.combination))
            .collect(),
    })
}

fn draw_timesteps(
    model: &DiffusionModel,
    config: &ExtractionConfig,
    n: usize,
    rng: &mut Rng,
) -> Vec<usize> {
    let total = model.noise_schedule.n_timesteps();
    let [lo, hi] = config
        .timestep_range
        .map(|part| (part * total as f64).round() as usize);
    let hi = hi.clamp(lo + 1, total);
    (0..n).map(|_| lo + rng.below(hi - lo)).collect()
}

/// Sum over timesteps of one layer's maps.
struct LayerSum {
    width: usize,
    height: usize,
    /// `[C][height · width]`.
    maps: Vec<Vec<f32>>,
}

impl LayerSum {
    fn empty(layer: &LayerAttention, n_concepts: usize) -> Self {
        let maps = vec![vec![0.0; layer.width * layer.height]; n_concepts];
        Self {
            width: layer.width,
            height: layer.height,
            maps,
        }
    }

    fn add(&mut self, layer: &LayerAttention, vectors_per_concept: usize) -> Result<()> {
        let sums: Tensor = concept_map(layer, vectors_per_concept)?.sum(0)?;
        for (pixel, values) in sums.to_vec2::<f32>()?.iter().enumerate() {
            for (map, value) in self.maps.iter_mut().zip(values) {
                map[pixel] += value;
            }
        }
        Ok(())
    }

    fn divided_by(mut self, n: usize) -> Self {
        self.maps.iter_mut().flatten().for_each(|v| *v /= n as f32);
        self
    }
}

/// One concept's map at picture size from all layers.
fn combine(layers: &[LayerSum], concept: usize, size: usize, how: Combination) -> Vec<f32> {
    // Resolution by resolution; for the flat mean each layer counts the same.
    let mut groups: BTreeMap<usize, Vec<&LayerSum>> = BTreeMap::new();
    for layer in layers {
        groups.entry(layer.width).or_default().push(layer);
    }
    let mut total = vec![0.0f32; size * size];
    for group in groups.values() {
        let n_pixels = group[0].maps[concept].len();
        let mean = |i: usize| {
            group
                .iter()
                .map(|layer| layer.maps[concept][i])
                .sum::<f32>()
                / group.len() as f32
        };
        match how {
            Combination::Flat => {
                for layer in group {
                    let up =
                        upsample_bicubic(&layer.maps[concept], layer.width, layer.height, size);
                    total
                        .iter_mut()
                        .zip(up)
                        .for_each(|(sum, v)| *sum += v / layers.len() as f32);
                }
            }
            Combination::PerResolution => {
                let mean: Vec<f32> = (0..n_pixels).map(mean).collect();
                let up = upsample_bicubic(&mean, group[0].width, group[0].height, size);
                let largest = up.iter().copied().fold(1e-12, f32::max);
                total
                    .iter_mut()
                    .zip(up)
                    .for_each(|(sum, v)| *sum += v / largest / groups.len() as f32);
            }
        }
    }
    total
}

/// Bicubic interpolation as PyTorch does it (a = -0.75, pixel centers, edges repeated), clamped to at least 0.
#[must_use]
pub fn upsample_bicubic(map: &[f32], width: usize, height: usize, size: usize) -> Vec<f32> {
    let columns = taps(width, size);
    let rows = taps(height, size);
    let narrow: Vec<f32> = (0..height)
        .flat_map(|y| {
            let row = &map[y * width..(y + 1) * width];
            columns
                .iter()
                .map(move |taps| taps.iter().map(|&(x, weight)| row[x] * weight).sum())
        })
        .collect();
    (0..size * size)
        .map(|i| {
            let (y, x) = (i / size, i % size);
            rows[y]
                .iter()
                .map(|&(row, weight)| narrow[row * size + x] * weight)
                .sum::<f32>()
                .max(0.0)
        })
        .collect()
}

/// The four source pixels of every target pixel and their weights.
fn taps(from: usize, to: usize) -> Vec<[(usize, f32); 4]> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|i| {
            let center = scale * (i as f32 + 0.5) - 0.5;
            let first = center.floor();
            let t = center - first;
            let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
            std::array::from_fn(|k| {
                let source = (first as isize + k as isize - 1).clamp(0, from as isize - 1);
                (source as usize, weights[k])
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bicubic_is_pytorchs() {
        // torch.nn.functional.interpolate(x, size=(4, 4), mode="bicubic") of [[0, 1], [2, 4]], clamped.
        let ours = upsample_bicubic(&[0.0, 1.0, 2.0, 4.0], 2, 2, 4);
        assert!((ours[0] - 0.0).abs() < 1e-6 && ours[15] > 4.0, "{ours:?}");
        let flat = upsample_bicubic(&[3.0; 4], 2, 2, 7);
        assert!(flat.iter().all(|v| (v - 3.0).abs() < 1e-5));
    }
}
