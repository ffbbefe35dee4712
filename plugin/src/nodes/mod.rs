//! One file per node. Each maps ports and parameters to one call of the method.

mod attention_mask_extractor;
mod common;
mod concept_token_learner;
mod dense_crf_refine;
mod em_loop;
mod load_concepts;
mod load_diffusion_model;
mod load_tuned_model;
mod parameters;
mod personalized_sampler;
mod save_concepts;

pub(crate) use common::internal;

pub(crate) use attention_mask_extractor::AttentionMaskExtractor;
pub(crate) use concept_token_learner::ConceptTokenLearner;
pub(crate) use dense_crf_refine::DenseCrfRefine;
pub(crate) use em_loop::EmLoop;
pub(crate) use load_concepts::LoadConcepts;
pub(crate) use load_diffusion_model::LoadDiffusionModel;
pub(crate) use load_tuned_model::LoadTunedModel;
pub(crate) use personalized_sampler::PersonalizedSampler;
pub(crate) use save_concepts::SaveConcepts;

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use plugin_api::Node;
    use serde_json::{Map, Value};

    /// Hosts send what the widgets show; what a struct has without it must be the same.
    #[track_caller]
    fn widgets_show_the_defaults_of<N: Node<Parameters: Debug>>() {
        let descriptor = N::descriptor();
        let read = |parameters: Map<String, Value>| -> N::Parameters {
            serde_json::from_value(Value::Object(parameters)).unwrap()
        };
        let shown = read(descriptor.completed_parameters(&Map::new()));
        assert_eq!(format!("{shown:?}"), format!("{:?}", read(Map::new())));
    }

    #[test]
    fn widgets_show_the_defaults_of_every_node() {
        widgets_show_the_defaults_of::<super::LoadDiffusionModel>();
        widgets_show_the_defaults_of::<super::ConceptTokenLearner>();
        widgets_show_the_defaults_of::<super::AttentionMaskExtractor>();
        widgets_show_the_defaults_of::<super::DenseCrfRefine>();
        widgets_show_the_defaults_of::<super::EmLoop>();
        widgets_show_the_defaults_of::<super::PersonalizedSampler>();
        widgets_show_the_defaults_of::<super::SaveConcepts>();
        widgets_show_the_defaults_of::<super::LoadConcepts>();
        widgets_show_the_defaults_of::<super::LoadTunedModel>();
    }
}
