//! Stage 1a: how tokens start.

use candle_core::{DType, Device, Tensor};
use stable_diffusion::DiffusionModel;
use stable_diffusion::rng::Rng;

use crate::config::{TokenConfig, TokenInit};
use crate::error::Result;
use crate::learned::LearnedConcepts;
use crate::optimizer::AdamWState;
use crate::prepared::PreparedScene;

/// Stage 1a: rows for all concepts of the scene, before textual inversion.
///
/// # Errors
/// A class word that the tokenizer does not know.
pub fn first_rows(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    config: &TokenConfig,
    seed: u64,
) -> Result<LearnedConcepts> {
    let concepts = scene.scene.concepts().to_vec();
    let mut rng = Rng::new(seed, "token init", 0);
    let table = TokenTable::of(model)?;
    let (mut rows, mut from_words) = (Vec::new(), true);
    for concept in &concepts {
        let has_word = !concept.class_word.is_empty() && config.init != TokenInit::Random;
        from_words &= has_word;
        if has_word {
            let ids = model.tokenizer.word_ids(&concept.class_word)?;
            let vectors = config.vectors_per_concept;
            rows.extend((0..vectors).map(|vector| table.word_row(&ids, vector, vectors)));
        } else {
            rows.extend((0..config.vectors_per_concept).map(|_| table.random_row(&mut rng)));
        }
    }
    let (n, width) = (rows.len(), table.width);
    let rows = Tensor::from_vec(rows.concat(), (n, width), &model.device)?;
    let learned = LearnedConcepts {
        vectors: vec![config.vectors_per_concept; concepts.len()],
        concepts,
        initial_rows: rows.clone(),
        from_words,
        optimizer: AdamWState::zeros(std::slice::from_ref(&rows))?,
        rows,
        step: 0,
        seed,
        base_fingerprint: model.fingerprint.clone(),
    };
    learned.tokenizer(model)?;
    Ok(learned)
}

/// The frozen token table on the CPU.
struct TokenTable {
    values: Vec<f32>,
    width: usize,
}

impl TokenTable {
    fn of(model: &DiffusionModel) -> Result<Self> {
        let table = model.text_encoder.token_table();
        let width = table.dim(1)?;
        let values = table
            .to_device(&Device::Cpu)?
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1()?;
        Ok(Self { values, width })
    }

    fn row(&self, id: u32) -> &[f32] {
        &self.values[id as usize * self.width..][..self.width]
    }

    /// The word's row; of several pieces their mean, or piece k for vector k.
    fn word_row(&self, ids: &[u32], vector: usize, vectors: usize) -> Vec<f32> {
        if vectors > 1 || ids.len() == 1 {
            return self.row(ids[vector.min(ids.len() - 1)]).to_vec();
        }
        let mean = |d: usize| ids.iter().map(|&id| self.row(id)[d]).sum::<f32>() / ids.len() as f32;
        (0..self.width).map(mean).collect()
    }

    fn random_row(&self, rng: &mut Rng) -> Vec<f32> {
        let noise = rng.normals(self.width);
        (0..self.width)
            .zip(noise)
            .map(|(d, noise)| self.mean(d) + self.deviation(d) * noise)
            .collect()
    }

    fn n_rows(&self) -> usize {
        self.values.len() / self.width
    }

    fn column(&self, d: usize) -> impl Iterator<Item = f64> {
        self.values
            .iter()
            .skip(d)
            .step_by(self.width)
            .map(|&v| f64::from(v))
    }

    fn mean(&self, d: usize) -> f32 {
        (self.column(d).sum::<f64>() / self.n_rows() as f64) as f32
    }

    fn deviation(&self, d: usize) -> f32 {
        let mean = f64::from(self.mean(d));
        let square = self.column(d).map(|v| (v - mean).powi(2)).sum::<f64>();
        (square / (self.n_rows() - 1).max(1) as f64).sqrt() as f32
    }
}
