//! PersonalizedSampler: prompts with learned tokens become pictures.

use candle_core::Tensor;
use personalization::{SamplePrompts, Sampled, checkpoint, sample_from};
use plugin_api::host::LogLevel;
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, SharedTensor, Value};
use schemars::JsonSchema;
use serde::Deserialize;
use stable_diffusion::prompt;
use stable_diffusion::{DiffusionModel, GenerateConfig, Sampler, Schedule, Start};

use crate::failure::{from_method, from_model};
use crate::nodes::common::{internal, seed_schema};
use crate::observer::HostObserver;
use crate::ports;
use crate::values::{ConceptsValue, ModelValue};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct PersonalizedSampler;

/// Parameters of the node. What came later stands last: saved workflows that count their values keep them.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// One prompt per line. Concepts go by their tokens: "a photo of <rex> on a beach"; `embedding:rex` works too.
    #[serde(default = "prompts")]
    #[schemars(extend("x-multiline" = true))]
    prompts: String,
    /// What the pictures are steered away from; empty in the method's own figures.
    #[serde(default)]
    negative_prompt: String,
    /// Steps per picture.
    #[serde(default = "steps")]
    #[schemars(range(min = 1, max = 1000))]
    steps: usize,
    /// Classifier-free guidance: 1 ignores the negative prompt; Break-A-Scene samples with 7.5.
    #[serde(default = "guidance")]
    #[schemars(range(min = 1.0, max = 30.0), extend("x-step" = 0.5))]
    guidance: f64,
    /// How steps are made, under ComfyUI's names: dpmpp_2m gives good pictures from 20 steps, Break-A-Scene samples with
    /// ddim; heun asks the model twice a step.
    #[serde(default = "sampler_name")]
    #[schemars(extend("enum" = Sampler::ALL.map(Sampler::name), "x-former" = {"dpm_solver": "dpmpp_2m"}))]
    sampler_name: String,
    /// Pictures per prompt, and of each picture to start from.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pictures_per_prompt: usize,
    /// Same seed, same pictures.
    #[serde(default)]
    #[schemars(transform = seed_schema)]
    seed: u64,
    /// Which noise levels the steps visit: normal is even in the training's timesteps, karras visits more of the low ones.
    #[serde(default = "scheduler")]
    #[schemars(extend(
        "enum" = Schedule::ALL.map(Schedule::name),
        "x-former" = {"ddim": "normal", "dpm_solver": "normal"}
    ))]
    scheduler: String,
    /// Width in pixels, a multiple of 8; 0 is the model's own. A picture to start from has its own.
    #[serde(default)]
    #[schemars(range(min = 0, max = 4096))]
    width: usize,
    /// Height in pixels, a multiple of 8; 0 is the model's own. A picture to start from has its own.
    #[serde(default)]
    #[schemars(range(min = 0, max = 4096))]
    height: usize,
    /// How much of a picture to start from is painted anew: 1 keeps next to nothing of it. Without such a picture it is 1.
    #[serde(default = "denoise")]
    #[schemars(range(min = 0.01, max = 1.0), extend("x-step" = 0.01))]
    denoise: f64,
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
fn sampler_name() -> String {
    Sampler::DpmPp2m.name().to_owned()
}
fn scheduler() -> String {
    Schedule::Normal.name().to_owned()
}
fn denoise() -> f64 {
    1.0
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
            ports::DIFFUSION_MODEL,
            "The base model, or the tuned one of EmLoop",
        )
        .optional_input(
            "concepts",
            ports::CONCEPTS,
            "Learned tokens; without them prompts are plain text",
        )
        .optional_input(
            "image",
            ports::IMAGE,
            "Pictures to start from: every prompt repaints each of them as far as denoise says",
        )
        .output(
            "images",
            ports::IMAGE,
            "All pictures of the first prompt, then of the second, …",
        )
        .aliases(&["ksampler", "generate", "text to image"])
    }

    fn validate(&self, parameters: &Parameters) -> Result<(), NodeError> {
        let prompts = parameters.prompts.lines().map(|line| ("prompts", line));
        let negative = ("negative_prompt", parameters.negative_prompt.as_str());
        prompts
            .chain([negative])
            .try_for_each(|(name, prompt)| prompt::check(prompt).map_err(|e| from_model(name, &e)))
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let model = &*ModelValue::of(inputs)?.model;
        let learned = inputs
            .optional_object::<ConceptsValue>("concepts")?
            .map(|value| &value.0);
        let latents = inputs
            .optional_tensor("image")?
            .map(|image| latents(model, image, host))
            .transpose()?;
        let config = GenerateConfig {
            steps: parameters.steps,
            guidance: parameters.guidance,
            sampler: named(
                "sampler_name",
                &parameters.sampler_name,
                &Sampler::ALL,
                Sampler::name,
            )?,
            schedule: named(
                "scheduler",
                &parameters.scheduler,
                &Schedule::ALL,
                Schedule::name,
            )?,
            seed: parameters.seed,
            n_pictures: parameters.pictures_per_prompt,
            start: start(model, latents.is_some(), &parameters, host)?,
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
            latents: latents.as_ref(),
        };
        let mut observer = HostObserver::new(host, model);
        let resumed = observer.keep(checkpoint::SAMPLING, |path| {
            let sampled = Sampled::load(path, &model.device)?;
            sampled.check(model, &prompts, &config)?;
            Ok(sampled)
        });
        let sampled = resumed.unwrap_or_default();
        let pictures = sample_from(model, learned, &prompts, &config, sampled, &mut observer)
            .map_err(|error| from_method("prompts", &error))?;
        shared(&pictures)
    }
}

/// The one of this name.
fn named<T: Copy>(
    parameter: &str,
    name: &str,
    all: &[T],
    name_of: fn(T) -> &'static str,
) -> Result<T, NodeError> {
    let found = all.iter().copied().find(|one| name_of(*one) == name);
    found.ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|one| name_of(*one)).collect();
        let names = names.join(", ");
        let text = format!("{parameter} is \"{name}\", it can be one of: {names}");
        NodeError::invalid_input(parameter, text)
    })
}

/// What the parameters say of where pictures start; what they say in vain is told.
fn start(
    model: &DiffusionModel,
    has_picture: bool,
    parameters: &Parameters,
    host: &Host,
) -> Result<Start, NodeError> {
    let Parameters {
        width,
        height,
        denoise,
        ..
    } = *parameters;
    if has_picture {
        if [width, height] != [0, 0] {
            let text =
                "width and height are not used: pictures have the size of the ones to start from";
            host.log(LogLevel::Warning, text);
        }
        return Ok(Start::Latents { denoise });
    }
    if denoise < 1.0 {
        let text = format!("denoise {denoise} is not used: there is no picture to start from");
        host.log(LogLevel::Warning, &text);
    }
    let factor = model.config.vae.downsampling();
    let side = |name: &str, wanted: usize| match wanted {
        0 => Ok(model.image_size()),
        _ if wanted.is_multiple_of(factor) => Ok(wanted),
        _ => {
            let nearest = (wanted / factor).max(1) * factor;
            let text = format!("{name} is {wanted}, it takes multiples of {factor}: try {nearest}");
            Err(NodeError::invalid_input(name, text))
        }
    };
    Ok(Start::Noise([
        side("width", width)?,
        side("height", height)?,
    ]))
}

/// The latents `[B, 4, h, w]` of pictures; what their middle has beyond multiples of the VAE's cells is cut off.
fn latents(model: &DiffusionModel, image: &SharedTensor, host: &Host) -> Result<Tensor, NodeError> {
    let [_, height, width] = ports::image_size("image", image)?;
    // Values that are no numbers are refused there.
    ports::values("image", image)?;
    let pixels = ports::tensor("image", image, &model.device)?;
    let factor = model.config.vae.downsampling();
    let whole = [height, width].map(|side| side / factor * factor);
    if whole.contains(&0) {
        let text =
            format!("the input image is {width} x {height} pixels; it needs {factor} a side");
        return Err(NodeError::invalid_input("image", text));
    }
    if whole != [height, width] {
        let text = format!(
            "the picture to start from is cut from {width} x {height} to {} x {}, multiples of {factor}",
            whole[1], whole[0]
        );
        host.log(LogLevel::Warning, &text);
    }
    let cut = |pixels: &Tensor, dim: usize, side: usize, whole: usize| {
        pixels.narrow(dim, (side - whole) / 2, whole)
    };
    let pixels = cut(&pixels, 1, height, whole[0])
        .and_then(|pixels| cut(&pixels, 2, width, whole[1]))
        .and_then(|pixels| pixels.permute((0, 3, 1, 2))?.contiguous())
        .and_then(|pixels| pixels.affine(2.0, -1.0))
        .map_err(internal)?;
    let moments = model.vae.moments(&pixels);
    let moments = moments.map_err(|error| from_model("image", &error))?;
    model.vae.scaled(&moments.mean).map_err(internal)
}

/// `[n, 3, H, W]` as an `IMAGE`.
fn shared(pictures: &Tensor) -> Result<Outputs, NodeError> {
    let images = pictures
        .permute((0, 2, 3, 1))
        .and_then(|images| images.contiguous())
        .map_err(internal)?;
    Ok(vec![Value::Tensor(tensor_bridge::share(&images)?)])
}
