//! Nodes that do what they say.

use std::path::Path;
use std::time::Duration;

use plugin_api::{
    ErrorCode, Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, SharedTensor, Value,
    host::LogLevel,
};
use schemars::JsonSchema;
use serde::Deserialize;

const SIDE: usize = 16;

/// Counts slowly.
#[derive(Debug, Default)]
pub(crate) struct Slow;

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct SlowParameters {
    /// How far it counts
    #[serde(default = "twenty")]
    #[schemars(range(min = 1, max = 10_000))]
    steps: u32,
    /// Milliseconds per step
    #[serde(default)]
    #[schemars(range(min = 0, max = 10_000))]
    wait: u64,
    /// What its pictures are called, one per line
    #[serde(default)]
    #[schemars(extend("x-multiline" = true))]
    prompts: String,
    /// Same seed, same picture
    #[serde(default)]
    #[schemars(extend("x-seed" = true))]
    seed: u64,
}

fn twenty() -> u32 {
    20
}

impl Node for Slow {
    type Parameters = SlowParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<SlowParameters>("Slow", "Slow", "faulty", "Counts slowly")
            .optional_input("images", picture_ports::IMAGE, "Is looked at only")
            .output("images", picture_ports::IMAGE, "One picture per prompt")
            .output("masks", picture_ports::MASK, "One mask per prompt")
    }

    fn run(
        &mut self,
        _inputs: &mut Inputs,
        parameters: SlowParameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let info = host.run_info();
        let work_dir = Some(Path::new(info.work_dir.as_str()));
        let work_dir = work_dir.filter(|folder| !folder.as_os_str().is_empty());
        let state = work_dir.map(|folder| folder.join("step"));
        let resumed = state
            .as_ref()
            .and_then(|state| std::fs::read_to_string(state).ok())
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        if resumed > 0 {
            host.log(LogLevel::Info, &format!("goes on at step {resumed}"));
        }
        let total = parameters.steps;
        for step in resumed..total {
            if host.is_canceled() {
                return Err(NodeError::canceled());
            }
            std::thread::sleep(Duration::from_millis(parameters.wait));
            let (x, part) = (f64::from(step), f64::from(step + 1) / f64::from(total));
            host.metric("loss", x, 1.0 / (1.0 + x));
            host.metric("IoU of <a>", x, part);
            host.metric("IoU of <b>", x, part * part);
            let text = format!("step {}/{total}  IoU {part:.2}", step + 1);
            host.progress("counting", step as usize + 1, total as usize, &text);
            if step % 5 == 0 {
                host.preview(picture(part as f32)?, "counted", &format!("step {step}"));
            }
            if let Some(state) = &state {
                write(state, &(step + 1).to_string())?;
            }
        }
        let n = parameters
            .prompts
            .lines()
            .filter(|line| !line.trim().is_empty())
            .count()
            .max(1);
        let value = (parameters.seed % 256) as f32 / 255.0;
        let masks = shared(vec![1.0; n * SIDE * SIDE], &[n, SIDE, SIDE])?;
        Ok(vec![
            Value::Tensor(shared(
                vec![value; n * SIDE * SIDE * 3],
                &[n, SIDE, SIDE, 3],
            )?),
            Value::Tensor(masks),
        ])
    }
}

fn picture(value: f32) -> Result<SharedTensor, NodeError> {
    shared(vec![value; SIDE * SIDE * 3], &[SIDE, SIDE, 3])
}

pub(crate) fn shared(values: Vec<f32>, shape: &[usize]) -> Result<SharedTensor, NodeError> {
    SharedTensor::from_vec(values, shape)
        .map_err(|error| NodeError::new(ErrorCode::Internal, error.to_string()))
}

/// Whole or not at all: a process that is killed on the way leaves what was there.
fn write(path: &Path, text: &str) -> Result<(), NodeError> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text)
        .and_then(|()| std::fs::rename(&beside, path))
        .map_err(|error| NodeError::new(ErrorCode::CannotWrite, error.to_string()))
}

/// Hands on.
#[derive(Debug, Default)]
pub(crate) struct Passthrough;

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct NoParameters {}

impl Node for Passthrough {
    type Parameters = NoParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<NoParameters>(
            "Passthrough",
            "Passthrough",
            "faulty",
            "Hands its input on",
        )
        .input("images", picture_ports::IMAGE, "What is handed on")
        .output("images", picture_ports::IMAGE, "The very same")
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        _: NoParameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let images = inputs.tensor("images")?;
        // Addresses of user space have 47 bits: a double holds them.
        host.metric("address", 0.0, images.data_address() as f64);
        host.metric("address", 1.0, images.data_address() as f64);
        Ok(vec![Value::Tensor(images.clone())])
    }
}

/// Hands on and says nothing: what it takes is what a hop takes.
#[derive(Debug, Default)]
pub(crate) struct Relay;

impl Node for Relay {
    type Parameters = NoParameters;

    fn descriptor() -> NodeDescriptor {
        let about = "Hands its input on and says nothing";
        NodeDescriptor::new::<NoParameters>("Relay", "Relay", "faulty", about)
            .input("images", picture_ports::IMAGE, "What is handed on")
            .output("images", picture_ports::IMAGE, "The very same")
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        _: NoParameters,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        Ok(vec![Value::Tensor(inputs.take_tensor("images")?)])
    }
}

/// Gives a number.
#[derive(Debug, Default)]
pub(crate) struct Number;

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct NumberParameters {
    /// The number
    #[serde(default)]
    #[schemars(range(min = 0, max = 100_000))]
    value: i64,
}

impl Node for Number {
    type Parameters = NumberParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<NumberParameters>(
            "Number",
            "Number",
            "faulty",
            "Gives a number to a widget",
        )
        .output("number", "INT", "The number")
    }

    fn run(
        &mut self,
        _: &mut Inputs,
        parameters: NumberParameters,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        Ok(vec![Value::Json(parameters.value.to_string().into())])
    }
}
