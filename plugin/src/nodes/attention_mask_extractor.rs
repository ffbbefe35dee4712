//! AttentionMaskExtractor: where the model looks for every concept, and the masks that follow.

use personalization::{ExtractionConfig, Scene, ScenePicture, binarize, extract_attention};
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, port};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::failure::from_method;
use crate::nodes::common::{masks_value, overlay_value, planes_value, show_masks};
use crate::nodes::parameters::{self, ExtractionParameters};
use crate::observer::HostObserver;
use crate::scene_input;
use crate::values::{ConceptsValue, ModelValue};

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
            "Averages the cross-attention of every concept over random timesteps and thresholds it: the E-step of the \
             method before the CRF",
        )
        .input("model", port::DIFFUSION_MODEL, "The model to look with")
        .input("images", port::IMAGE, "The pictures; every one shows all concepts")
        .input("concepts", port::CONCEPTS, "The tokens to look for")
        .output("masks", port::MASK, "Binary masks, picture after picture, concept after concept")
        .output("attention", port::ATTENTION_MAPS, "The maps before the threshold")
        .output("overlay", port::IMAGE, "The pictures with their masks in color")
        .aliases(&["daam", "cross attention", "segment"])
    }

    fn run(
        &mut self,
        inputs: &Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let base = ModelValue::of(inputs)?;
        let model = &*base.model;
        let learned = &inputs.object::<ConceptsValue>("concepts")?.0;
        let failed = |error: personalization::Error| from_method("images", &error);
        let pictures = scene_input::pictures(inputs.tensor("images")?, model.image_size())?;
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
        let maps = extract_attention(
            model,
            &prepared,
            learned,
            &config,
            parameters.timesteps,
            &mut observer,
        )
        .map_err(failed)?;
        let masks = maps
            .iter()
            .enumerate()
            .map(|(picture, maps)| binarize(maps, &scene.roles(picture), &config));
        let masks = masks.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        show_masks(host, &scene, &masks);
        let attention = maps.iter().flat_map(|maps| maps.maps.concat()).collect();
        Ok(vec![
            masks_value(&masks)?,
            planes_value(attention, model.image_size())?,
            overlay_value(&scene, &masks)?,
        ])
    }
}
