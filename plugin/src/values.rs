//! The plugin's own values on wires.

use std::sync::{Arc, Weak};

use personalization::{Encodings, Evidence, LearnedConcepts, Posterior, PreparedScene, Scene};
use plugin_api::{Inputs, MemoryBlock, NodeError, Opaque, SharedObject, Value};
use stable_diffusion::DiffusionModel;

use crate::failure::from_method;
use crate::ports;

/// A model on a wire, with the pictures that were encoded with it: all nodes of a graph share them.
#[derive(Clone)]
pub(crate) struct ModelValue {
    pub(crate) model: Arc<DiffusionModel>,
    encodings: Arc<Encodings>,
}

impl ModelValue {
    /// A checkpoint with which nothing is encoded yet.
    pub(crate) fn new(model: DiffusionModel) -> Self {
        Self {
            model: Arc::new(model),
            encodings: Arc::default(),
        }
    }

    /// The model of a node's input `model`.
    ///
    /// # Errors
    /// An input that is no model.
    pub(crate) fn of(inputs: &Inputs) -> Result<&Self, NodeError> {
        inputs.object::<Self>("model")
    }

    /// A model that was tuned from this one. It encodes pictures as this one does.
    pub(crate) fn tuned(&self, model: DiffusionModel) -> Self {
        Self {
            model: Arc::new(model),
            encodings: self.encodings.clone(),
        }
    }

    /// The scene with what its pictures cost once.
    ///
    /// # Errors
    /// Pictures of another size than the model's.
    pub(crate) fn prepare<'a>(&self, scene: &'a Scene) -> Result<PreparedScene<'a>, NodeError> {
        PreparedScene::sharing(&self.model, scene, &self.encodings)
            .map_err(|error| from_method("images", &error))
    }

    /// Who refers to this model's memory without keeping it.
    pub(crate) fn downgrade(&self) -> WeakModel {
        WeakModel {
            model: Arc::downgrade(&self.model),
            encodings: Arc::downgrade(&self.encodings),
        }
    }
}

/// A model for as long as a wire holds it.
pub(crate) struct WeakModel {
    model: Weak<DiffusionModel>,
    encodings: Weak<Encodings>,
}

impl WeakModel {
    /// The model, if anybody still holds it.
    pub(crate) fn upgrade(&self) -> Option<ModelValue> {
        Some(ModelValue {
            model: self.model.upgrade()?,
            encodings: self.encodings.upgrade()?,
        })
    }
}

impl Opaque for ModelValue {
    fn summary(&self) -> String {
        let fingerprint = &self.model.fingerprint;
        format!(
            "diffusion model {}",
            &fingerprint[..fingerprint.len().min(12)]
        )
    }

    fn memory(&self) -> Vec<MemoryBlock> {
        // Encodings of pictures come later, and are small beside the weights.
        self.model.tensors().map(tensor_bridge::block).collect()
    }
}

/// Learned concepts on a wire.
pub(crate) struct ConceptsValue(pub(crate) LearnedConcepts);

impl Opaque for ConceptsValue {
    fn summary(&self) -> String {
        let tokens: Vec<&str> = self
            .0
            .concepts
            .iter()
            .map(|concept| concept.token.as_str())
            .collect();
        format!("{} after {} steps", tokens.join(", "), self.0.step)
    }

    fn memory(&self) -> Vec<MemoryBlock> {
        let LearnedConcepts {
            rows,
            initial_rows,
            optimizer,
            ..
        } = &self.0;
        let moments = optimizer.m.iter().chain(&optimizer.v);
        let tensors = [rows, initial_rows].into_iter().chain(moments);
        tensors.map(tensor_bridge::block).collect()
    }
}

/// What extractions found out on a wire, picture by picture.
#[derive(Default)]
pub(crate) struct EvidenceValue {
    /// Sums so far; empty where the labeling asks for none.
    pub(crate) evidence: Vec<Evidence>,
    /// The unary energy of the CRF; empty where masks say it.
    pub(crate) posteriors: Vec<Posterior>,
}

impl Opaque for EvidenceValue {
    fn summary(&self) -> String {
        let draws = self
            .evidence
            .first()
            .map_or(0.0, |evidence| evidence.n_draws);
        format!(
            "evidence of {} pictures, {draws} draws each",
            self.evidence.len()
        )
    }

    fn memory(&self) -> Vec<MemoryBlock> {
        let seen = self.evidence.iter().flat_map(|seen| {
            let planes = seen.log_likelihoods.iter().chain(&seen.attention.maps);
            planes.map(Vec::as_slice).chain([seen.affinity.parts().0])
        });
        let concluded = self.posteriors.iter().flat_map(|q| &q.planes);
        seen.chain(concluded.map(Vec::as_slice))
            .map(|plane| MemoryBlock {
                id: plane.as_ptr().addr() as u64,
                bytes: size_of_val(plane) as u64,
            })
            .collect()
    }
}

/// Puts evidence on a wire.
pub(crate) fn evidence_value(value: EvidenceValue) -> Value {
    Value::Object(SharedObject::new(ports::EVIDENCE, value))
}

/// Puts a model on a wire.
pub(crate) fn model_value(model: ModelValue) -> Value {
    Value::Object(SharedObject::new(ports::DIFFUSION_MODEL, model))
}

/// Puts concepts on a wire.
pub(crate) fn concepts_value(learned: LearnedConcepts) -> Value {
    Value::Object(SharedObject::new(ports::CONCEPTS, ConceptsValue(learned)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use stable_diffusion::lora::LoraAdapter;
    use stable_diffusion::{CheckpointSource, UNet};

    use super::*;

    fn bytes<'a>(objects: impl IntoIterator<Item = &'a SharedObject>) -> u64 {
        let blocks = objects.into_iter().flat_map(SharedObject::memory);
        let distinct: BTreeMap<u64, u64> = blocks.map(|block| (block.id, block.bytes)).collect();
        distinct.into_values().sum()
    }

    #[test]
    fn weights_that_models_share_count_once() {
        let source = CheckpointSource::Embedded {
            name: sprites::NAME,
            files: sprites::FILES,
        };
        let model = DiffusionModel::load(&source, &candle_core::Device::Cpu).unwrap();
        // Its files hold f16, and names.
        let files = sprites::FILES
            .iter()
            .filter(|(name, _)| name.ends_with(".safetensors"));
        let n_file_bytes = files.map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        let lora = LoraAdapter::new(model.unet.weights(), 4, 4.0, 0).unwrap();
        let n_lora_bytes: u64 = lora
            .factors
            .values()
            .map(|factors| 4 * (factors.down.elem_count() + factors.up.elem_count()) as u64)
            .sum();
        let unet = UNet::new(&model.config.unet, model.unet.weights(), Some(&lora)).unwrap();
        let adapted = DiffusionModel {
            unet: Arc::new(unet),
            lora: Some(lora),
            ..model.clone()
        };
        let base = ModelValue::new(model);
        let tuned = base.tuned(adapted);
        let shared = |model| SharedObject::new(ports::DIFFUSION_MODEL, model);
        let (base, tuned) = (shared(base), shared(tuned));
        let n_base_bytes = bytes([&base]);
        assert!(
            n_base_bytes > n_file_bytes * 19 / 10 && n_base_bytes < 2 * n_file_bytes,
            "{n_base_bytes} bytes of files of {n_file_bytes}"
        );
        assert_eq!(bytes([&base, &tuned]), n_base_bytes + n_lora_bytes);
        assert_eq!(bytes([&tuned]), n_base_bytes + n_lora_bytes);
    }
}
