//! Low-rank adapters: trainable changes to a frozen U-Net (Hu et al. 2021).
//!
//! An adapted projection computes y = x·Wᵀ + b + (alpha / rank)·x·downᵀ·upᵀ. Adapted are the query, key, value
//! and output projections of every attention, as in diffusers' training scripts.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use candle_core::{DType, Tensor, Var};

use crate::{
    Error, Result,
    lora_file::CONFIGURATION,
    ops::{dims_of, in_rows},
    rng::Rng,
    weights::{WeightMap, write_tensors},
};

/// Paths of the adapted projections end in one of these.
const ADAPTED: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];
/// Ends of the factors' names (PEFT's).
const DOWN: &str = ".lora_A.weight";
const UP: &str = ".lora_B.weight";

/// What the tensors of a file are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraNames {
    /// `lora_unet_down_blocks_0_….lora_down.weight`: loads in ComfyUI, A1111, InvokeAI and diffusers.
    Kohya,
    /// `unet.down_blocks.0.….lora_A.weight`: loads in diffusers.
    Peft,
}

/// The two factors of one change of weight, up·down.
#[derive(Debug, Clone)]
pub struct LoraFactors {
    /// `[rank, in]`
    pub down: Tensor,
    /// `[out, rank]`
    pub up: Tensor,
}

/// A low-rank adapter of the U-Net's attention.
#[derive(Debug, Clone)]
pub struct LoraAdapter {
    /// Rank of every change.
    pub rank: usize,
    /// Changes are scaled by alpha / rank.
    pub alpha: f64,
    /// Factors by module path, for example `mid_block.attentions.0.transformer_blocks.0.attn2.to_k`.
    pub factors: BTreeMap<String, LoraFactors>,
}

impl LoraAdapter {
    /// A trainable adapter of a U-Net's weights that changes nothing yet: down from N(0, 1/rank), up zero.
    ///
    /// # Errors
    /// [`Error::Argument`] for rank 0.
    pub fn new(weights: &WeightMap, rank: usize, alpha: f64, seed: u64) -> Result<Self> {
        if rank == 0 {
            return Err(Error::argument("rank", "at least 1"));
        }
        let mut factors = BTreeMap::new();
        for (name, weight) in &weights.0 {
            let Some(path) = name.strip_suffix(".weight").filter(|path| is_adapted(path)) else {
                continue;
            };
            let [n_out, n_in] = dims_of(weight)[..] else {
                let reason = format!("{name} is {:?}, no matrix", weight.shape());
                return Err(Error::argument("weights", reason));
            };
            let device = weight.device();
            // The stream is named by the path, so an adapter's start does not depend on the other layers.
            let noise = Rng::new(seed, &format!("lora {path}"), 0).normal(&[rank, n_in], device)?;
            let down = Var::from_tensor(&(noise / rank as f64)?)?.into_inner();
            let up = Var::zeros((n_out, rank), DType::F32, device)?.into_inner();
            factors.insert(path.to_owned(), LoraFactors { down, up });
        }
        Ok(Self {
            rank,
            alpha,
            factors,
        })
    }

    /// What the product of the factors is multiplied by.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// The trainable tensors by name, in a fixed order; empty for a loaded or detached adapter.
    pub fn variables(&self) -> Vec<(String, Var)> {
        let named = self.factors.iter().flat_map(|(path, factors)| {
            [
                (format!("{path}{DOWN}"), &factors.down),
                (format!("{path}{UP}"), &factors.up),
            ]
        });
        let variables = named.filter(|(_, tensor)| tensor.is_variable());
        variables
            .filter_map(|(name, tensor)| Some((name, Var::from_tensor(tensor).ok()?)))
            .collect()
    }

    /// A frozen copy of the present values.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the tensor library fails.
    pub fn detach(&self) -> Result<Self> {
        let copy = |factors: &LoraFactors| -> Result<LoraFactors> {
            Ok(LoraFactors {
                down: factors.down.copy()?.detach(),
                up: factors.up.copy()?.detach(),
            })
        };
        let factors = self
            .factors
            .iter()
            .map(|(path, factors)| Ok((path.clone(), copy(factors)?)));
        Ok(Self {
            factors: factors.collect::<Result<_>>()?,
            ..*self
        })
    }

    /// Writes a safetensors file whose tensors have these names.
    ///
    /// # Errors
    /// Those of the writer, and of the tensor library.
    pub fn write(&self, file: &mut dyn Write, names: LoraNames) -> io::Result<()> {
        let mut tensors = BTreeMap::new();
        let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        for (module, factors) in &self.factors {
            let (down, up) = match names {
                LoraNames::Kohya => {
                    let module = format!("lora_unet_{}", module.replace('.', "_"));
                    let alpha = Tensor::new(self.alpha as f32, factors.down.device())
                        .map_err(io::Error::other)?;
                    tensors.insert(format!("{module}.alpha"), alpha);
                    (
                        format!("{module}.lora_down.weight"),
                        format!("{module}.lora_up.weight"),
                    )
                }
                LoraNames::Peft => (format!("unet.{module}{DOWN}"), format!("unet.{module}{UP}")),
            };
            tensors.insert(down, factors.down.clone());
            tensors.insert(up, factors.up.clone());
        }
        match names {
            LoraNames::Kohya => metadata.extend([
                ("ss_network_module".to_owned(), "networks.lora".to_owned()),
                ("ss_network_dim".to_owned(), self.rank.to_string()),
                ("ss_network_alpha".to_owned(), self.alpha.to_string()),
            ]),
            LoraNames::Peft => {
                let configuration = serde_json::json!({
                    "unet.r": self.rank,
                    "unet.lora_alpha": self.alpha,
                    "unet.target_modules": ADAPTED,
                });
                metadata.insert(CONFIGURATION.to_owned(), configuration.to_string());
            }
        }
        write_tensors(file, &tensors, DType::F32, &metadata)
    }

    /// These weights with the change in them.
    ///
    /// # Errors
    /// [`Error::Argument`] when the adapter is of other weights.
    pub fn merged(&self, weights: &WeightMap) -> Result<WeightMap> {
        self.check(weights)?;
        let mut merged = weights.clone();
        for (path, factors) in &self.factors {
            if let Some(weight) = merged.0.get_mut(&format!("{path}.weight")) {
                let change = (factors.up.detach().matmul(&factors.down.detach())? * self.scale())?;
                *weight = added(weight, &change)?;
            }
        }
        Ok(merged)
    }

    /// Whether every factor fits a weight of this U-Net.
    pub(crate) fn check(&self, weights: &WeightMap) -> Result<()> {
        for (path, factors) in &self.factors {
            let weight = weights
                .0
                .get(&format!("{path}.weight"))
                .filter(|_| is_adapted(path));
            let Some(weight) = weight else {
                return Err(Error::argument(
                    "adapter",
                    format!("the U-Net has no attention projection {path}"),
                ));
            };
            let (down, up) = (factors.down.dims(), factors.up.dims());
            let dims = dims_of(weight);
            if [up, down] != [&[dims[0], self.rank][..], &[self.rank, dims[1]]] {
                let reason = format!("{path}: {up:?} x {down:?} for a weight {dims:?}");
                return Err(Error::argument("adapter", reason));
            }
        }
        Ok(())
    }
}

fn is_adapted(path: &str) -> bool {
    let in_attention = path.contains(".attn1.") || path.contains(".attn2.");
    in_attention
        && ADAPTED
            .iter()
            .any(|name| path.strip_suffix(name).is_some_and(|p| p.ends_with('.')))
}

/// A weight and a change of it, in f32, as the weight's type.
pub(crate) fn added(weight: &Tensor, change: &Tensor) -> Result<Tensor> {
    let weight = in_rows(weight)?;
    let sum = (weight.detach().to_dtype(DType::F32)? + change.to_dtype(DType::F32)?)?;
    Ok(sum.to_dtype(weight.dtype())?)
}
