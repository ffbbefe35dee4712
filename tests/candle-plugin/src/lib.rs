//! Tensors of candle, for tests of how they are shared: each copy of this library has a candle of its own, and counts its
//! own memory.
//!
//! | node | what it does |
//! | --- | --- |
//! | `CandleMake` | makes 0, 1, 2, … as a tensor of candle's |
//! | `CandlePass` | takes a tensor into candle and gives it back |
//! | `CandleSum` | adds a tensor's values up where they are |

use candle_core::{DType, Device, Tensor};
use peak_alloc::PeakAlloc;
use plugin_api::{
    ErrorCode, Extension, Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, Value,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Bytes that this library holds, and the most that it held since it was last asked.
fn memory() -> Box<dyn Extension> {
    Box::new(|_: Vec<Value>| {
        let (now, most) = (MEMORY.current_usage(), MEMORY.peak_usage());
        MEMORY.reset_peak_usage();
        Ok(vec![Value::Json(format!("[{now}, {most}]").into())])
    })
}

fn failed(error: candle_core::Error) -> NodeError {
    NodeError::new(ErrorCode::Internal, error.to_string())
}

#[derive(Debug, Default)]
struct CandleMake;

#[derive(Debug, Clone, Copy, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Elements {
    F32,
    F16,
    Bf16,
    U8,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct MakeParameters {
    /// How many rows of 1024
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1_000_000))]
    rows: usize,
    /// Of what
    #[serde(default = "f32")]
    elements: Elements,
    /// Whether it is the other way round: a view with strides
    #[serde(default)]
    transposed: bool,
}

fn one() -> usize {
    1
}

fn f32() -> Elements {
    Elements::F32
}

impl Node for CandleMake {
    type Parameters = MakeParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<MakeParameters>("CandleMake", "Make", "candle", "Counts").output(
            "tensor",
            "CANDLE",
            "0, 1, 2, …",
        )
    }

    fn run(
        &mut self,
        _: &mut Inputs,
        parameters: MakeParameters,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let dtype = match parameters.elements {
            Elements::F32 => DType::F32,
            Elements::F16 => DType::F16,
            Elements::Bf16 => DType::BF16,
            Elements::U8 => DType::U8,
        };
        let n = parameters.rows * 1024;
        let made = Tensor::arange(0u32, n as u32, &Device::Cpu)
            .and_then(|made| made.reshape((parameters.rows, 1024))?.to_dtype(dtype));
        let mut made = made.map_err(failed)?;
        if parameters.transposed {
            made = made.t().map_err(failed)?;
        }
        Ok(vec![Value::Tensor(tensor_bridge::share(&made)?)])
    }
}

#[derive(Debug, Deserialize, JsonSchema)]
struct NoParameters {}

#[derive(Debug, Default)]
struct CandlePass;

impl Node for CandlePass {
    type Parameters = NoParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<NoParameters>("CandlePass", "Pass", "candle", "Through candle")
            .input("tensor", "CANDLE", "What is taken in")
            .output("tensor", "CANDLE", "What came of it")
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        _: NoParameters,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let taken = tensor_bridge::tensor("tensor", inputs.tensor("tensor")?, &Device::Cpu)?;
        Ok(vec![Value::Tensor(tensor_bridge::share(&taken)?)])
    }
}

#[derive(Debug, Default)]
struct CandleSum;

impl Node for CandleSum {
    type Parameters = NoParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<NoParameters>("CandleSum", "Sum", "candle", "Adds up")
            .input("tensor", "CANDLE", "What is added up")
            .output("tensor", "CANDLE", "The very same")
            .output("sum", "FLOAT", "Of all values")
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        _: NoParameters,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let tensor = inputs.take_tensor("tensor")?;
        let sum: f64 = tensor.to_f32()?.iter().copied().map(f64::from).sum();
        Ok(vec![
            Value::Tensor(tensor),
            Value::Json(sum.to_string().into()),
        ])
    }
}

plugin_api::export_plugin! {
    name: "candle-plugin",
    nodes: [CandleMake, CandlePass, CandleSum],
    extensions: ["candle-plugin.memory/1" => memory],
}
