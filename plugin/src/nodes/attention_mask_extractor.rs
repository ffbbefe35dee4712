//! AttentionMaskExtractor: where the model looks for every concept, what explains the noise, and the masks that follow.

use personalization::{ExtractionConfig, ImageMasks, Labels, Scene, ScenePicture, label, observe};
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::failure::from_method;
use crate::nodes::common::{masks_value, overlay_value, planes_value, show_masks, size_of};
use crate::nodes::parameters::{self, ExtractionParameters};
use crate::observer::HostObserver;
use crate::ports;
use crate::scene_input;
use crate::values::{ConceptsValue, EvidenceValue, ModelValue, evidence_value};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct AttentionMaskExtractor;

/// Parameters of the node.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// Random timesteps that are averaged: 50 in the paper, 20 are enough between rounds.
    #[serde(default = "parameters::first_timesteps")]
    #[schemars(range(
        min = ExtractionConfig::TIMESTEPS.least,
        max = ExtractionConfig::TIMESTEPS.most
    ))]
    timesteps: usize,
    #[serde(flatten)]
    extraction: ExtractionParameters,
}

impl Node for AttentionMaskExtractor {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "AttentionMaskExtractor",
            "Attention Mask Extractor",
            "Conceptloom/masks",
            "Where the model looks for every concept and under which of them it predicts the noise best, over random \
             timesteps, and the masks that follow: the E-step of the method before the CRF",
        )
        .input("model", ports::DIFFUSION_MODEL, "The model to look with")
        .input("images", ports::IMAGE, "The pictures; every one shows all concepts")
        .input("concepts", ports::CONCEPTS, "The tokens to look for")
        .optional_input("evidence", ports::EVIDENCE, "Of the round before, to which this one's is added")
        .output("masks", ports::MASK, "Binary masks, picture after picture, concept after concept")
        .output("attention", ports::ATTENTION_MAPS, "The maps before the threshold")
        .output("overlay", ports::IMAGE, "The pictures with their masks in color")
        .output("evidence", ports::EVIDENCE, "For DenseCrfRefine, and for the extraction of the next round")
        .aliases(&["daam", "cross attention", "segment"])
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let base = ModelValue::of(inputs)?;
        let model = &*base.model;
        let learned = &inputs.object::<ConceptsValue>("concepts")?.0;
        let failed = |error: personalization::Error| from_method("images", &error);
        let pictures = scene_input::pictures_to_learn(inputs, model, host)?;
        let all: Vec<usize> = (0..learned.concepts.len()).collect();
        let shown = pictures
            .into_iter()
            .map(|picture| ScenePicture {
                picture,
                concepts: all.clone(),
            })
            .collect();
        let scene = Scene::new(learned.concepts.clone(), shown).map_err(failed)?;
        let prepared = base.prepare(&scene)?;
        let config = parameters.extraction.config(parameters.timesteps);
        let mut observer = HostObserver::new(host, model).with_scene(&scene, None);
        let earlier = inputs.optional_object::<EvidenceValue>("evidence")?;
        let earlier = earlier.map_or(&[][..], |value| &value.evidence);
        let resumed = observer.keep_learning(|state| {
            state.check_looking(model, &prepared, learned, &config, parameters.timesteps)
        });
        let observations = observe(
            model,
            &prepared,
            learned,
            &config,
            parameters.timesteps,
            earlier,
            resumed,
            &mut observer,
        )
        .map_err(failed)?;
        let labels = observations.iter().enumerate().map(|(picture, seen)| {
            let roles = scene.roles(picture);
            label(&seen.maps, seen.evidence.as_ref(), &roles, learned, &config)
        });
        let labels = labels.collect::<Result<Vec<Labels>, _>>().map_err(failed)?;
        for (picture, seen) in observations.iter().enumerate() {
            observer.show_observation(picture, seen, &format!("picture {}", picture + 1));
        }
        let masks: Vec<ImageMasks> = labels.iter().map(|labels| labels.masks.clone()).collect();
        show_masks(host, &scene, &masks);
        let maps = observations.iter().map(|seen| &seen.maps);
        let attention = maps.flat_map(|maps| maps.maps.concat()).collect();
        let found = EvidenceValue {
            evidence: observations
                .into_iter()
                .filter_map(|seen| seen.evidence)
                .collect(),
            posteriors: labels
                .into_iter()
                .filter_map(|labels| labels.posterior)
                .collect(),
        };
        Ok(vec![
            masks_value(&masks)?,
            planes_value(attention, size_of(&masks))?,
            overlay_value(&scene, &masks)?,
            evidence_value(found),
        ])
    }
}
