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

pub(crate) use attention_mask_extractor::AttentionMaskExtractor;
pub(crate) use concept_token_learner::ConceptTokenLearner;
pub(crate) use dense_crf_refine::DenseCrfRefine;
pub(crate) use em_loop::EmLoop;
pub(crate) use load_concepts::LoadConcepts;
pub(crate) use load_diffusion_model::LoadDiffusionModel;
pub(crate) use load_tuned_model::LoadTunedModel;
pub(crate) use personalized_sampler::PersonalizedSampler;
pub(crate) use save_concepts::SaveConcepts;
