//! Nodes that do not do what they say.

use plugin_api::{
    ErrorCode, Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, SharedTensor, Value,
};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::honest::{NoParameters, shared};

/// Fails with a code.
#[derive(Debug, Default)]
pub(crate) struct Fail;

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum Code {
    InvalidInput,
    InvalidFile,
    CannotWrite,
    Canceled,
    OutOfMemory,
    Internal,
}

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct FailParameters {
    /// With which code
    #[serde(default = "invalid_input")]
    code: Code,
    /// Already when it is checked
    #[serde(default)]
    early: bool,
}

fn invalid_input() -> Code {
    Code::InvalidInput
}

fn failure(code: Code) -> NodeError {
    let code = match code {
        Code::InvalidInput => {
            return NodeError::invalid_input("code", "the code is one that fails");
        }
        Code::InvalidFile => ErrorCode::InvalidFile,
        Code::CannotWrite => ErrorCode::CannotWrite,
        Code::Canceled => return NodeError::canceled(),
        Code::OutOfMemory => ErrorCode::OutOfMemory,
        Code::Internal => ErrorCode::Internal,
    };
    NodeError::new(code, format!("it fails with {}", code.name()))
}

impl Node for Fail {
    type Parameters = FailParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<FailParameters>("Fail", "Fail", "faulty", "Fails with a code")
            .optional_input("images", picture_ports::IMAGE, "Is not looked at")
            .output_node()
    }

    fn validate(&self, parameters: &FailParameters) -> Result<(), NodeError> {
        if parameters.early {
            Err(failure(parameters.code))
        } else {
            Ok(())
        }
    }

    fn run(
        &mut self,
        _: &mut Inputs,
        parameters: FailParameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let folder = host.run_info().output_dir.into_string();
        // A file that must not survive the failure.
        let _ = std::fs::write(std::path::Path::new(&folder).join("half.txt"), "half");
        Err(failure(parameters.code))
    }
}

/// Returns what it did not promise.
#[derive(Debug, Default)]
pub(crate) struct Lie;

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    TooFew,
    TooMany,
    WrongType,
    WrongShape,
    NotFinite,
    BadPreview,
}

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct LieParameters {
    /// About what
    #[serde(default = "too_few")]
    about: Kind,
}

fn too_few() -> Kind {
    Kind::TooFew
}

impl Node for Lie {
    type Parameters = LieParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<LieParameters>(
            "Lie",
            "Lie",
            "faulty",
            "Returns what it did not promise",
        )
        .output("images", picture_ports::IMAGE, "Not what it says")
    }

    fn run(
        &mut self,
        _: &mut Inputs,
        parameters: LieParameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let picture = |values: Vec<f32>, shape: &[usize]| -> Result<Value, NodeError> {
            Ok(Value::Tensor(shared(values, shape)?))
        };
        let honest = || picture(vec![0.5; 48], &[1, 4, 4, 3]);
        match parameters.about {
            Kind::TooFew => Ok(Vec::new()),
            Kind::TooMany => Ok(vec![honest()?, honest()?]),
            Kind::WrongType => Ok(vec![Value::Json("7".into())]),
            Kind::WrongShape => Ok(vec![picture(vec![0.5; 16], &[4, 4])?]),
            Kind::NotFinite => Ok(vec![picture(vec![f32::NAN; 48], &[1, 4, 4, 3])?]),
            Kind::BadPreview => {
                let flat: SharedTensor = shared(vec![0.5; 16], &[16])?;
                host.preview(flat, "flat", "no picture");
                host.metric("loss", 0.0, f64::NAN);
                host.progress("backward", 7, 3, "further than the end");
                Ok(vec![honest()?])
            }
        }
    }
}

/// Writes to its input.
#[derive(Debug, Default)]
pub(crate) struct Scribble;

impl Node for Scribble {
    type Parameters = NoParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<NoParameters>("Scribble", "Scribble", "faulty", "Writes to its input")
            .input("images", picture_ports::IMAGE, "Is written to")
            .output("images", picture_ports::IMAGE, "What came of it")
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        _: NoParameters,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let images = inputs.take_tensor("images")?;
        // SAFETY: none; it is what the contract forbids. Tests run it where the memory cannot be written.
        #[expect(unsafe_code, reason = "what this node is for")]
        unsafe {
            (images.data_address() as *mut f32).write_volatile(0.0);
        }
        Ok(vec![Value::Tensor(images)])
    }
}

/// Panics.
#[derive(Debug, Default)]
pub(crate) struct Panic;

impl Node for Panic {
    type Parameters = NoParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<NoParameters>("Panic", "Panic", "faulty", "Panics").output_node()
    }

    fn run(&mut self, _: &mut Inputs, _: NoParameters, _: &Host) -> Result<Outputs, NodeError> {
        let nothing: [u8; 0] = [];
        let index = nothing.len() + 3;
        #[expect(clippy::panic, reason = "what this node is for")]
        {
            panic!("index {index} out of nothing");
        }
    }
}
