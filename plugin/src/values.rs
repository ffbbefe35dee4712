//! The plugin's own values on wires.

use std::sync::Arc;

use abi_stable::std_types::RString;
use personalization::LearnedConcepts;
use plugin_api::node::Opaque;
use plugin_api::{SharedObject, Value, port};
use stable_diffusion::DiffusionModel;

/// A model on a wire.
pub(crate) struct ModelValue(pub(crate) Arc<DiffusionModel>);

impl Opaque for ModelValue {
    fn summary(&self) -> RString {
        let fingerprint = &self.0.fingerprint;
        format!(
            "diffusion model {}",
            &fingerprint[..fingerprint.len().min(12)]
        )
        .into()
    }
}

/// Learned concepts on a wire.
pub(crate) struct ConceptsValue(pub(crate) LearnedConcepts);

impl Opaque for ConceptsValue {
    fn summary(&self) -> RString {
        let tokens: Vec<&str> = self
            .0
            .concepts
            .iter()
            .map(|concept| concept.token.as_str())
            .collect();
        format!("{} after {} steps", tokens.join(", "), self.0.step).into()
    }
}

/// Puts a model on a wire.
pub(crate) fn model_value(model: Arc<DiffusionModel>) -> Value {
    Value::Object(SharedObject::new(port::DIFFUSION_MODEL, ModelValue(model)))
}

/// Puts concepts on a wire.
pub(crate) fn concepts_value(learned: LearnedConcepts) -> Value {
    Value::Object(SharedObject::new(port::CONCEPTS, ConceptsValue(learned)))
}
