//! PersonalizedSampler: prompts with learned tokens become pictures.

use candle_core::Tensor;
use personalization::{SamplePrompts, sample};
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, Value, port};
use schemars::JsonSchema;
use serde::Deserialize;
use stable_diffusion::{GenerateConfig, SchedulerKind};

use crate::failure::from_method;
use crate::nodes::common::seed_schema;
use crate::observer::HostObserver;
use crate::tensor_bridge;
use crate::values::{ConceptsValue, ModelValue};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct PersonalizedSampler;

/// The sampler.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Scheduler {
    /// DPM-Solver++ (2M): good pictures from 20 steps.
    DpmSolver,
    /// DDIM, as Break-A-Scene samples.
    Ddim,
}

/// Parameters of the node.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// One prompt per line. Concepts go by their tokens: "a photo of <rex> on a beach"; `embedding:rex` works too.
    #[serde(default = "prompts")]
    #[schemars(extend("x-multiline" = true))]
    prompts: String,
    /// What the pictures are steered away from; empty in the method's own figures.
    #[serde(default)]
    negative_prompt: String,
    /// Evaluations of the U-Net per picture.
    #[serde(default = "steps")]
    #[schemars(range(min = 1, max = 1000))]
    steps: usize,
    /// Classifier-free guidance: 1 ignores the negative prompt; Break-A-Scene samples with 7.5.
    #[serde(default = "guidance")]
    #[schemars(range(min = 1.0, max = 30.0), extend("x-step" = 0.5))]
    guidance: f64,
    /// The sampler.
    #[serde(default = "scheduler")]
    scheduler: Scheduler,
    /// Pictures per prompt.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pictures_per_prompt: usize,
    /// Same seed, same pictures.
    #[serde(default)]
    #[schemars(transform = seed_schema)]
    seed: u64,
}

fn prompts() -> String {
    "a photo of <rex>".to_owned()
}
fn steps() -> usize {
    30
}
fn guidance() -> f64 {
    5.0
}
fn scheduler() -> Scheduler {
    Scheduler::DpmSolver
}
fn one() -> usize {
    1
}

impl Node for PersonalizedSampler {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "PersonalizedSampler",
            "Personalized Sampler",
            "Conceptloom/sample",
            "Paints prompts in which <token> is a learned concept",
        )
        .input(
            "model",
            port::DIFFUSION_MODEL,
            "The base model, or the tuned one of EmLoop",
        )
        .optional_input(
            "concepts",
            port::CONCEPTS,
            "Learned tokens; without them prompts are plain text",
        )
        .output(
            "images",
            port::IMAGE,
            "All pictures of the first prompt, then of the second, …",
        )
        .aliases(&["ksampler", "generate", "text to image"])
    }

    fn run(
        &mut self,
        inputs: &Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let model = &*ModelValue::of(inputs)?.model;
        let learned = inputs
            .optional_object::<ConceptsValue>("concepts")?
            .map(|value| &value.0);
        let scheduler = match parameters.scheduler {
            Scheduler::DpmSolver => SchedulerKind::DpmSolverPlusPlus2M,
            Scheduler::Ddim => SchedulerKind::Ddim,
        };
        let config = GenerateConfig {
            steps: parameters.steps,
            guidance: parameters.guidance,
            scheduler,
            seed: parameters.seed,
            n_pictures: parameters.pictures_per_prompt,
        };
        let prompts: Vec<&str> = parameters
            .prompts
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        if prompts.is_empty() {
            return Err(NodeError::invalid_input(
                "prompts",
                "there is no prompt; write one per line",
            ));
        }
        let prompts = SamplePrompts {
            prompts: &prompts,
            negative: &parameters.negative_prompt,
        };
        let pictures = sample(
            model,
            learned,
            &prompts,
            &config,
            &mut HostObserver::new(host, model),
        )
        .map_err(|error| from_method("prompts", &error))?;
        shared(&pictures)
    }
}

/// `[n, 3, H, W]` as an `IMAGE`.
fn shared(pictures: &Tensor) -> Result<Outputs, NodeError> {
    let internal = |error: candle_core::Error| {
        NodeError::new(plugin_api::ErrorCode::Internal, error.to_string())
    };
    let images = pictures
        .permute((0, 2, 3, 1))
        .and_then(|images| images.contiguous())
        .map_err(internal)?;
    Ok(vec![Value::Tensor(tensor_bridge::share(&images)?)])
}
