//! EmLoop: the whole method in one node.

use personalization::{
    CrfStage, EmConfig, EmOutcome, EmStart, ExtractionConfig, JointConfig, JointScope, JointState,
    MaskMode, checkpoint, em, joint_stage,
};
use plugin_api::host::LogLevel;
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::failure::from_method;
use crate::nodes::common::{
    masks_value, optional_masks, overlay_value, planes_value, seed_schema, size_of,
};
use crate::nodes::parameters::{self, ExtractionParameters, Scope, TokenParameters};
use crate::observer::HostObserver;
use crate::ports;
use crate::scene_input;
use crate::values::{ModelValue, concepts_value, model_value};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct EmLoop;

/// Where masks come from.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Masks {
    /// From attention, and re-estimated in every round.
    Em,
    /// From the attention of the class words, then fixed.
    Baseline,
    /// From the input masks, fixed (Break-A-Scene).
    Given,
}

/// Parameters of the node.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// One concept per line: an optional `<token>`, then its class word, or a token alone, whose thing is then found
    /// without words. Add `(background)` for what lies behind everything else, and `@1,3` for a concept that is only
    /// in pictures 1 and 3.
    #[serde(default = "parameters::concepts")]
    #[schemars(extend("x-multiline" = true))]
    concept_list: String,
    /// Where masks come from.
    #[serde(default = "em_masks")]
    mode: Masks,
    /// Optimizer steps on the tokens; the paper says usually 400.
    #[serde(default = "parameters::steps")]
    #[schemars(range(min = EmConfig::STEPS.least, max = EmConfig::STEPS.most))]
    steps: usize,
    /// Optimizer steps between two estimates of the masks.
    #[serde(default = "parameters::steps_per_round")]
    #[schemars(range(
        min = EmConfig::STEPS_PER_ROUND.least,
        max = EmConfig::STEPS_PER_ROUND.most
    ))]
    steps_per_round: usize,
    #[serde(flatten)]
    tokens: TokenParameters,
    #[serde(flatten)]
    extraction: ExtractionParameters,
    /// Random timesteps of the first estimate.
    #[serde(default = "parameters::first_timesteps")]
    #[schemars(range(
        min = ExtractionConfig::TIMESTEPS.least,
        max = ExtractionConfig::TIMESTEPS.most
    ))]
    first_timesteps: usize,
    /// Random timesteps of every later estimate.
    #[serde(default = "parameters::timesteps")]
    #[schemars(range(
        min = ExtractionConfig::TIMESTEPS.least,
        max = ExtractionConfig::TIMESTEPS.most
    ))]
    timesteps: usize,
    /// A refined mask whose IoU with the unrefined one is smaller is refused; 0 refuses none.
    #[serde(default)]
    #[schemars(
        range(min = CrfStage::GUARD_IOU.least, max = CrfStage::GUARD_IOU.most),
        extend("x-step" = 0.05)
    )]
    crf_guard: f64,
    /// Steps of the joint stage, which trains weights and tokens under the last masks; 0 leaves it out.
    #[serde(default = "joint_steps")]
    #[schemars(range(min = JointConfig::STEPS.least, max = JointConfig::STEPS.most))]
    joint_steps: usize,
    /// Learning rate of the joint stage: 2e-6 for a whole Stable Diffusion U-Net (Break-A-Scene), about 1e-4 for LoRA.
    #[serde(default = "joint_rate")]
    #[schemars(
        range(min = JointConfig::LEARNING_RATE.least, max = JointConfig::LEARNING_RATE.most),
        extend("x-step" = 0.00001)
    )]
    joint_learning_rate: f64,
    /// What the joint stage trains.
    #[serde(default = "lora")]
    joint_scope: Scope,
    /// Rank of the LoRA factors.
    #[serde(default = "rank")]
    #[schemars(range(min = JointConfig::RANK.least, max = JointConfig::RANK.most))]
    lora_rank: usize,
    /// Steps between two sample pictures of every object concept; 0 paints none. On a CPU only small models paint any.
    #[serde(default = "parameters::sample_every")]
    #[schemars(range(min = 0, max = 100_000))]
    sample_every: usize,
    /// Same seed, same bits on a CPU.
    #[serde(default)]
    #[schemars(transform = seed_schema)]
    seed: u64,
}

fn em_masks() -> Masks {
    Masks::Em
}
fn joint_steps() -> usize {
    JointConfig::lora().steps
}
fn joint_rate() -> f64 {
    JointConfig::lora().learning_rate
}
fn lora() -> Scope {
    Scope::Lora
}
fn rank() -> usize {
    match JointConfig::lora().scope {
        JointScope::Lora { rank } => rank,
        JointScope::Full | JointScope::KeyValue => JointConfig::RANK.least,
    }
}

impl Parameters {
    fn config(&self) -> EmConfig {
        let mut extraction = self.extraction.config(self.timesteps);
        extraction.n_timesteps_initial = self.first_timesteps;
        EmConfig {
            tokens: self.tokens.start(),
            extraction,
            crf: parameters::crf(self.crf_guard, parameters::crf_iterations()),
            m_step: self.tokens.m_step(),
            steps: self.steps,
            e_step_every: self.steps_per_round,
            masks: match self.mode {
                Masks::Em => MaskMode::Em,
                Masks::Baseline => MaskMode::Baseline,
                Masks::Given => MaskMode::Given,
            },
        }
    }

    /// The joint stage, if it is not left out.
    fn joint(&self) -> Option<JointConfig> {
        self.joint_scope
            .config(self.joint_steps, self.joint_learning_rate, self.lora_rank)
    }
}

impl Node for EmLoop {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "EmLoop",
            "EM Loop",
            "Conceptloom/learn",
            "Learns a token and a mask for every concept of the pictures: tokens under masks, masks from attention and \
             noise, in turns; then tokens and weights together",
        )
        .input("model", ports::DIFFUSION_MODEL, "The model to learn on; it is not changed")
        .input(
            "images",
            ports::IMAGE,
            "One or several pictures of the concepts; learned whole, at their own proportions and about the area of the \
             model's own pictures",
        )
        .optional_input(
            "masks",
            ports::MASK,
            "For mode `given`: one mask per concept, in the order of the list, of the shape of the pictures",
        )
        .optional_input("true_masks", ports::MASK, "Only to show the IoU: one true mask per concept")
        .output("concepts", ports::CONCEPTS, "The learned tokens")
        .output("model", ports::DIFFUSION_MODEL, "The model with the tuned weights")
        .output("masks", ports::MASK, "The last masks, picture after picture, concept after concept")
        .output("attention", ports::ATTENTION_MAPS, "The maps that the last masks came from")
        .output("overlay", ports::IMAGE, "The pictures with their masks in color")
        .aliases(&["textual inversion", "break-a-scene", "personalization", "train"])
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
        let given = optional_masks(inputs, "masks", &scene)?;
        let truth = optional_masks(inputs, "true_masks", &scene)?;
        let prepared = base.prepare(&scene)?;
        let config = parameters.config();
        if config.masks == MaskMode::Given && given.is_none() {
            return Err(NodeError::invalid_input(
                "masks",
                "mode `given` needs masks; link them, or choose `em`",
            ));
        }
        let failed = |error: personalization::Error| from_method("concept_list", &error);
        let mut observer = HostObserver::new(host, model)
            .with_scene(&scene, truth.as_deref())
            .with_samples(parameters.sample_every)
            .with_stages(
                parameters
                    .tokens
                    .stages(parameters.steps, parameters.joint_steps),
            );
        let resumed = observer.keep_learning(|state| state.check(model, &prepared, &config));
        let start = match resumed {
            Some(state) => EmStart::Resume(Box::new(state)),
            None => given
                .filter(|_| config.masks == MaskMode::Given)
                .map_or(EmStart::Fresh, EmStart::Masks),
        };
        let outcome = em(
            model,
            &prepared,
            start,
            &config,
            parameters.seed,
            &mut observer,
        )
        .map_err(failed)?;
        let EmOutcome {
            learned,
            masks,
            observations,
            ..
        } = outcome;
        if !learned.from_words {
            observer.show_found(&masks);
        }
        let (tuned, learned) = match &parameters.joint() {
            None => (base.clone(), learned),
            Some(joint) => {
                let resumed = observer.keep(checkpoint::JOINT, |path| {
                    JointState::load(path, &model.device)
                });
                if let Some(state) = &resumed {
                    let text = format!("going on after step {} of the joint stage", state.step);
                    host.log(LogLevel::Info, &text);
                }
                let mut tune = |resume| {
                    let m_step = &config.m_step;
                    let observer = &mut observer;
                    joint_stage(
                        model, &prepared, &masks, &learned, joint, m_step, resume, observer,
                    )
                };
                let tuned = match tune(resumed) {
                    Err(error @ personalization::Error::StateOfOtherWork { .. }) => {
                        let text = format!("a saved state cannot be used: {error}; starting anew");
                        host.log(LogLevel::Warning, &text);
                        tune(None)
                    }
                    tuned => tuned,
                };
                let (tuned, learned) = tuned.map_err(failed)?;
                (base.tuned(tuned), learned)
            }
        };
        let maps = observations.iter().map(|seen| &seen.maps);
        let attention = maps.flat_map(|maps| maps.maps.concat()).collect();
        Ok(vec![
            concepts_value(learned),
            model_value(tuned),
            masks_value(&masks)?,
            planes_value(attention, size_of(&masks))?,
            overlay_value(&scene, &masks)?,
        ])
    }
}
