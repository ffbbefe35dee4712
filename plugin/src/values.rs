//! The plugin's own values on wires.

use std::sync::{Arc, Weak};

use abi_stable::std_types::RString;
use personalization::{Encodings, Evidence, LearnedConcepts, Posterior, PreparedScene, Scene};
use plugin_api::node::Opaque;
use plugin_api::{Inputs, NodeError, SharedObject, Value, port};
use stable_diffusion::DiffusionModel;

use crate::failure::from_method;

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
    fn summary(&self) -> RString {
        let fingerprint = &self.model.fingerprint;
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

/// What extractions found out on a wire, picture by picture.
#[derive(Default)]
pub(crate) struct EvidenceValue {
    /// Sums so far; empty where the labeling asks for none.
    pub(crate) evidence: Vec<Evidence>,
    /// The unary energy of the CRF; empty where masks say it.
    pub(crate) posteriors: Vec<Posterior>,
}

impl Opaque for EvidenceValue {
    fn summary(&self) -> RString {
        let draws = self
            .evidence
            .first()
            .map_or(0.0, |evidence| evidence.n_draws);
        format!(
            "evidence of {} pictures, {draws} draws each",
            self.evidence.len()
        )
        .into()
    }
}

/// Puts evidence on a wire.
pub(crate) fn evidence_value(value: EvidenceValue) -> Value {
    Value::Object(SharedObject::new(port::EVIDENCE, value))
}

/// Puts a model on a wire.
pub(crate) fn model_value(model: ModelValue) -> Value {
    Value::Object(SharedObject::new(port::DIFFUSION_MODEL, model))
}

/// Puts concepts on a wire.
pub(crate) fn concepts_value(learned: LearnedConcepts) -> Value {
    Value::Object(SharedObject::new(port::CONCEPTS, ConceptsValue(learned)))
}
