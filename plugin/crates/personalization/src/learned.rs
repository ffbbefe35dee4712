//! Learned tokens, and how prompts name them.

use std::ops::Range;

use candle_core::Tensor;
use stable_diffusion::DiffusionModel;
use stable_diffusion::tokenizer::{TokenizedPrompt, Tokenizer};

use crate::error::{Error, Result};
use crate::optimizer::AdamWState;
use crate::scene::Concept;

/// Learned rows with everything that is needed to learn on. A value: every stage returns a new one.
#[derive(Debug, Clone)]
pub struct LearnedConcepts {
    /// The concepts, in the order of their rows.
    pub concepts: Vec<Concept>,
    /// V of every concept. Learning takes one V for all; what is loaded may have several.
    pub vectors: Vec<usize>,
    /// v `[Σ V, D]`, f32, not tracked.
    pub rows: Tensor,
    /// Where the rows started, `[Σ V, D]`.
    pub initial_rows: Tensor,
    /// Whether every row started from a word; a random row says nothing before it has learned.
    pub from_words: bool,
    /// Optimizer steps so far; names the random streams of the next one.
    pub step: usize,
    /// Moments of the rows.
    pub optimizer: AdamWState,
    /// Seed of all streams.
    pub seed: u64,
    /// Fingerprint of the model that they were learned on.
    pub base_fingerprint: String,
}

impl LearnedConcepts {
    /// Whether the tokens say nothing yet: attention and noise would be those of chance.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        !self.from_words && self.step == 0
    }

    /// Whether a model's prompts can name them.
    ///
    /// # Errors
    /// [`Error::ConceptWidth`].
    pub fn check_width(&self, model: &DiffusionModel) -> Result<()> {
        let (found, wanted) = (self.rows.dim(1)?, model.text_encoder.token_table().dim(1)?);
        if found == wanted {
            Ok(())
        } else {
            Err(Error::ConceptWidth { found, wanted })
        }
    }

    /// Placeholder strings of all rows: `<rex>`, then `<rex>_1`, … if there are several vectors per concept.
    #[must_use]
    pub fn placeholders(&self) -> Vec<String> {
        let names = |(concept, &vectors): (&Concept, &usize)| {
            let token = concept.token.clone();
            (0..vectors).map(move |k| {
                if k == 0 {
                    token.clone()
                } else {
                    format!("{token}_{k}")
                }
            })
        };
        let concepts = self.concepts.iter().zip(&self.vectors);
        concepts.flat_map(names).collect()
    }

    /// The rows of a concept.
    #[must_use]
    pub fn rows_of(&self, concept: usize) -> Range<usize> {
        let first = self.vectors[..concept].iter().sum();
        first..first + self.vectors[concept]
    }

    /// V, if it is the same for all concepts.
    ///
    /// # Errors
    /// [`Error::UnevenVectors`].
    pub fn vectors_per_concept(&self) -> Result<usize> {
        let first = self.vectors.first().copied().unwrap_or(1);
        match self.vectors.iter().position(|&vectors| vectors != first) {
            None => Ok(first),
            Some(other) => Err(Error::UnevenVectors {
                first: self.concepts[0].token.clone(),
                other: self.concepts[other].token.clone(),
            }),
        }
    }

    /// How a concept stands in a prompt: all of its placeholders.
    #[must_use]
    pub fn text_of(&self, concept: usize) -> String {
        self.placeholders()[self.rows_of(concept)].join(" ")
    }

    /// The model's tokenizer with the placeholders.
    ///
    /// # Errors
    /// A placeholder that the vocabulary has already.
    pub fn tokenizer(&self, model: &DiffusionModel) -> Result<Tokenizer> {
        Ok(model.tokenizer.with_placeholders(&self.placeholders())?)
    }

    /// `a photo of <a> and <b>` (BaS) for these concepts in this order.
    #[must_use]
    pub fn training_prompt(&self, concepts: &[usize]) -> String {
        let texts: Vec<String> = concepts.iter().map(|&c| self.text_of(c)).collect();
        format!("a photo of {}", texts.join(" and "))
    }

    /// `a photo of a <a>`: the prompt under which the noise is asked about one concept. With the article, as captions
    /// have it: a bare word says less about the noise (measured).
    #[must_use]
    pub fn own_prompt(&self, concept: usize) -> String {
        format!("a photo of a {}", self.text_of(concept))
    }

    /// Positions of these concepts' placeholders in a prompt, V per concept.
    ///
    /// # Errors
    /// A concept that the prompt does not name.
    pub fn positions(
        &self,
        tokenizer: &Tokenizer,
        prompt: &TokenizedPrompt,
        concepts: &[usize],
    ) -> Result<Vec<usize>> {
        let rows = concepts.iter().flat_map(|&c| self.rows_of(c));
        let position = |row: usize| {
            let id = (tokenizer.base_vocab_size() + row) as u32;
            let found = prompt.positions_of(id).first().copied();
            found.ok_or_else(|| Error::NotInPrompt {
                token: self.placeholders()[row].clone(),
            })
        };
        rows.map(position).collect()
    }
}
