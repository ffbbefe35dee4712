//! Low-rank adapters: trainable changes to a frozen U-Net (Hu et al. 2021).
//!
//! An adapted projection computes y = x·Wᵀ + b + (alpha / rank)·x·downᵀ·upᵀ. Adapted are the query, key, value
//! and output projections of every attention, as in diffusers' training scripts.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor, Var};

use crate::{
    Error, Result,
    rng::Rng,
    weights::{TensorFile, WeightMap, save_tensors},
};

/// Paths of the adapted projections end in one of these.
const ADAPTED: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];
/// Names in a file: `unet.<path>.lora_A.weight` and so on (PEFT's, as diffusers writes them).
const PREFIX: &str = "unet.";
const DOWN: &str = ".lora_A.weight";
const UP: &str = ".lora_B.weight";
/// Key of a file's metadata under which diffusers keeps PEFT's configuration, as JSON.
const CONFIGURATION: &str = "lora_adapter_metadata";

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
            let (n_out, n_in) = weight.dims2()?;
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

    /// Writes a file that diffusers' `load_lora_weights` reads. A file of this name is replaced only once the
    /// new one is complete.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = BTreeMap::new();
        for (module, factors) in &self.factors {
            tensors.insert(format!("{PREFIX}{module}{DOWN}"), factors.down.clone());
            tensors.insert(format!("{PREFIX}{module}{UP}"), factors.up.clone());
        }
        let configuration = serde_json::json!({
            "unet.r": self.rank,
            "unet.lora_alpha": self.alpha,
            "unet.target_modules": ADAPTED,
        });
        let metadata = BTreeMap::from([
            ("format".to_owned(), "pt".to_owned()),
            (CONFIGURATION.to_owned(), configuration.to_string()),
        ]);
        save_tensors(path, &tensors, DType::F32, &metadata)
    }

    /// Reads what [`Self::save`] or diffusers wrote; the factors are frozen.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when the file is not such an adapter.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let unreadable =
            |reason: &dyn std::fmt::Display| Error::unreadable(path.display().to_string(), reason);
        let file = TensorFile::open(path)?;
        let mut factors = BTreeMap::new();
        for name in file.names() {
            let Some(parameter) = name.strip_prefix(PREFIX) else {
                return Err(unreadable(&format!("{name} does not belong to the U-Net")));
            };
            if let Some(module) = parameter.strip_suffix(DOWN) {
                let up = format!("{PREFIX}{module}{UP}");
                if file.shape(&up).is_none() {
                    return Err(unreadable(&format!("{module} has no {}", &UP[1..])));
                }
                let (down, up) = (file.read(name, device)?, file.read(&up, device)?);
                factors.insert(module.to_owned(), LoraFactors { down, up });
            } else if !parameter.ends_with(UP) {
                return Err(unreadable(&format!("{name} is not part of an adapter")));
            }
        }
        let Some(first) = factors.values().next() else {
            return Err(unreadable(&"it holds no adapter"));
        };
        let rank = first.down.dims().first().copied().unwrap_or(0);
        if rank == 0
            || factors
                .values()
                .any(|factors| factors.down.dims().first() != Some(&rank))
        {
            return Err(unreadable(&"its layers have different ranks"));
        }
        // Without a configuration the changes are not scaled.
        let configuration = file.metadata().get(CONFIGURATION);
        let configuration: serde_json::Value = configuration
            .map_or(Ok(serde_json::Value::Null), |json| {
                serde_json::from_str(json)
            })
            .map_err(|error| unreadable(&error))?;
        let alpha = configuration["unet.lora_alpha"]
            .as_f64()
            .unwrap_or(rank as f64);
        Ok(Self {
            rank,
            alpha,
            factors,
        })
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
            if [up, down]
                != [
                    &[weight.dims()[0], self.rank][..],
                    &[self.rank, weight.dims()[1]],
                ]
            {
                let reason = format!(
                    "{path}: {up:?} x {down:?} for a weight {:?}",
                    weight.shape()
                );
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
