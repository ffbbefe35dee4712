//! ConceptTokenLearner: tokens, from their start or from where they stand, under masks if there are any.

use personalization::{EmConfig, TokenPlan, first_rows, learn_tokens};
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::failure::from_method;
use crate::nodes::common::{optional_masks, seed_schema};
use crate::nodes::parameters::{self, TokenParameters};
use crate::observer::HostObserver;
use crate::ports;
use crate::scene_input;
use crate::values::{ConceptsValue, ModelValue, concepts_value};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct ConceptTokenLearner;

/// Parameters of the node.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// One concept per line: an optional `<token>`, then its class word, or a token alone, whose thing is then found
    /// without words. Add `(background)` for what lies behind everything else, and `@1,3` for a concept that is only
    /// in pictures 1 and 3.
    #[serde(default = "parameters::concepts")]
    #[schemars(extend("x-multiline" = true))]
    concept_list: String,
    /// Optimizer steps under the masks; without masks the tokens are only started.
    #[serde(default = "parameters::steps_per_round")]
    #[schemars(range(min = EmConfig::STEPS.least, max = EmConfig::STEPS.most))]
    steps: usize,
    #[serde(flatten)]
    tokens: TokenParameters,
    /// Steps between two sample pictures of every object concept; 0 paints none. On a CPU only small models paint any.
    #[serde(default = "parameters::sample_every")]
    #[schemars(range(min = 0, max = 100_000))]
    sample_every: usize,
    /// Same seed, same bits on a CPU. Concepts that are linked keep the seed they started with.
    #[serde(default)]
    #[schemars(transform = seed_schema)]
    seed: u64,
}

impl Node for ConceptTokenLearner {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "ConceptTokenLearner",
            "Concept Token Learner",
            "Conceptloom/learn",
            "Starts a token for every concept and, given masks, learns it: the M-step of the method",
        )
        .input("model", ports::DIFFUSION_MODEL, "The model to learn on; it is not changed")
        .input("images", ports::IMAGE, "One or several pictures of the concepts")
        .optional_input("masks", ports::MASK, "One mask per concept, in the order of the list, picture after picture")
        .optional_input("concepts", ports::CONCEPTS, "Tokens to go on with, optimizer included")
        .output("concepts", ports::CONCEPTS, "The tokens")
        .aliases(&["textual inversion", "embedding"])
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let base = ModelValue::of(inputs)?;
        let model = &*base.model;
        let scene = scene_input::scene(inputs, &parameters.concept_list, model, host)?;
        let masks = optional_masks(inputs, "masks", &scene)?;
        let prepared = base.prepare(&scene)?;
        let failed = |error: personalization::Error| from_method("concept_list", &error);
        let mut observer = HostObserver::new(host, model)
            .with_scene(&scene, None)
            .with_samples(parameters.sample_every)
            .with_stages(parameters.tokens.stages(parameters.steps, 0));
        let config = parameters.tokens.m_step();
        let start = parameters.tokens.start();
        let (first, inversion_steps) = match inputs.optional_object::<ConceptsValue>("concepts")? {
            Some(ConceptsValue(learned)) if learned.concepts == scene.concepts() => {
                (learned.clone(), 0)
            }
            Some(_) => {
                return Err(NodeError::invalid_input(
                    "concepts",
                    "the linked concepts are not those of the list; use the same tokens and words in the same order",
                ));
            }
            None => {
                let first =
                    first_rows(model, &prepared, &start, parameters.seed).map_err(failed)?;
                (first, start.inversion_steps())
            }
        };
        let plan = TokenPlan {
            first: &first,
            inversion_steps,
            masks: masks.as_deref(),
            steps: parameters.steps,
        };
        let resumed = observer.keep_learning(|state| plan.check(state, model, &prepared));
        let learned = learn_tokens(model, &prepared, &plan, &config, resumed, &mut observer);
        let learned = learned.map_err(failed)?;
        Ok(vec![concepts_value(learned)])
    }
}
