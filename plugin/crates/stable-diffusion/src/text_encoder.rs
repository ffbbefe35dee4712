//! CLIP's text encoder (Radford et al. 2021): token ids to the context that the U-Net attends to.
//!
//! Differentiable in learned rows that stand for tokens beyond the vocabulary; causal over the whole padded
//! prompt, as Stable Diffusion uses it.

use candle_core::Tensor;

use crate::{
    Error, Result,
    config::{Activation, TextEncoderConfig},
    layers::{LayerNorm, Linear},
    ops::{self, Mask, on_workers},
    weights::Weights,
};

/// The network with its weights.
#[derive(Debug)]
pub struct TextEncoder {
    token_table: Tensor,
    position_table: Tensor,
    layers: Vec<EncoderLayer>,
    final_norm: LayerNorm,
    vocab_size: usize,
}

impl TextEncoder {
    /// Takes its parameters from `w` under transformers' names (`text_model.…`).
    ///
    /// # Errors
    /// [`Error::Tensor`] when the tensor library fails; missing tensors are reported by
    /// [`crate::weights::WeightMap::build`].
    pub fn new(config: &TextEncoderConfig, w: Weights) -> Result<Self> {
        let w = w.pp("text_model");
        let (width, embeddings) = (config.hidden_size, w.pp("embeddings"));
        let layers = w.pp("encoder.layers");
        Ok(Self {
            token_table: embeddings
                .pp("token_embedding")
                .get("weight", &[config.vocab_size, width])?,
            position_table: embeddings
                .pp("position_embedding")
                .get("weight", &[config.max_position_embeddings, width])?,
            layers: (0..config.num_hidden_layers)
                .map(|index| EncoderLayer::new(config, &layers.pp(index)))
                .collect::<Result<_>>()?,
            final_norm: LayerNorm::new(&w.pp("final_layer_norm"), width, config.layer_norm_eps)?,
            vocab_size: config.vocab_size,
        })
    }

    /// The vocabulary's embeddings, `[vocab, D]`.
    pub fn token_table(&self) -> &Tensor {
        &self.token_table
    }

    /// The last hidden state after the final norm, `[1, N, D]`.
    ///
    /// `ids` are N token ids, at most as many as there are positions. Ids from the vocabulary size on name rows
    /// of `learned_rows` `[K, D]`: id = vocabulary size + row. The result is differentiable in them.
    ///
    /// # Errors
    /// [`Error::Argument`] for too many ids or an id without a row.
    pub fn encode(&self, ids: &[u32], learned_rows: Option<&Tensor>) -> Result<Tensor> {
        let tokens = self.embed(ids, learned_rows)?;
        let positions = self.position_table.narrow(0, 0, ids.len())?;
        let x = (tokens + positions)?.unsqueeze(0)?;
        on_workers(x.device(), || {
            ops::as_one(&x, |x| {
                let through = |x: Tensor, layer: &EncoderLayer| layer.forward(&x);
                let x = self.layers.iter().try_fold(x.clone(), through)?;
                self.final_norm.forward(&x)
            })
        })
    }

    /// The embedding of every id, `[N, D]`.
    fn embed(&self, ids: &[u32], learned_rows: Option<&Tensor>) -> Result<Tensor> {
        let limit = self.position_table.dim(0)?;
        if ids.is_empty() || ids.len() > limit {
            return Err(Error::argument(
                "ids",
                format!("1 to {limit} tokens, not {}", ids.len()),
            ));
        }
        let n_learned = learned_rows.map_or(Ok(0), |rows| rows.dim(0))?;
        let is_learned = |id: u32| id as usize >= self.vocab_size;
        if let Some(id) = ids
            .iter()
            .find(|&&id| id as usize >= self.vocab_size + n_learned)
        {
            let reason = format!(
                "{id} of a vocabulary of {} and {n_learned} learned rows",
                self.vocab_size
            );
            return Err(Error::argument("ids", reason));
        }
        let device = self.token_table.device();
        let known: Vec<u32> = ids
            .iter()
            .map(|&id| if is_learned(id) { 0 } else { id })
            .collect();
        let known = self
            .token_table
            .index_select(&Tensor::new(known, device)?, 0)?;
        let Some(rows) = learned_rows.filter(|_| ids.iter().copied().any(is_learned)) else {
            return Ok(known);
        };
        // Every position picks its row from the known ones, which lie in order, followed by the learned ones.
        let picks = ids.iter().zip(0..).map(|(&id, position)| {
            if is_learned(id) {
                ids.len() as u32 + id - self.vocab_size as u32
            } else {
                position
            }
        });
        let picks = Tensor::new(picks.collect::<Vec<u32>>(), device)?;
        Ok(Tensor::cat(&[&known, rows], 0)?.index_select(&picks, 0)?)
    }
}

#[derive(Debug)]
struct EncoderLayer {
    norm_1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm_2: LayerNorm,
    widen: Linear,
    narrow: Linear,
    n_heads: usize,
    activation: Activation,
}

impl EncoderLayer {
    fn new(config: &TextEncoderConfig, w: &Weights) -> Result<Self> {
        let (width, epsilon) = (config.hidden_size, config.layer_norm_eps);
        let (attention, mlp) = (w.pp("self_attn"), w.pp("mlp"));
        let projection = |name: &str| Linear::new(&attention.pp(name), width, width);
        Ok(Self {
            norm_1: LayerNorm::new(&w.pp("layer_norm1"), width, epsilon)?,
            query: projection("q_proj")?,
            key: projection("k_proj")?,
            value: projection("v_proj")?,
            out: projection("out_proj")?,
            norm_2: LayerNorm::new(&w.pp("layer_norm2"), width, epsilon)?,
            widen: Linear::new(&mlp.pp("fc1"), width, config.intermediate_size)?,
            narrow: Linear::new(&mlp.pp("fc2"), config.intermediate_size, width)?,
            n_heads: config.num_attention_heads,
            activation: config.activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.norm_1.forward(x)?;
        let (q, k, v) = (
            self.query.forward(&h)?,
            self.key.forward(&h)?,
            self.value.forward(&h)?,
        );
        let attended = ops::attention(&q, &k, &v, self.n_heads, Mask::Causal)?;
        let x = ops::add(x, &self.out.forward(&attended)?)?;
        let h = self.widen.forward(&self.norm_2.forward(&x)?)?;
        let h = match self.activation {
            Activation::QuickGelu => ops::quick_gelu(&h)?,
            Activation::Gelu => ops::gelu_erf(&h)?,
        };
        ops::add(&x, &self.narrow.forward(&h)?)
    }
}
