//! How tensors are shared between libraries: nothing is copied, nothing is lost, nobody writes what others hold, and work on a
//! device keeps its order.
//!
//! | module | what |
//! | --- | --- |
//! | `two_candles` | two libraries that each have a candle of their own, and a counting allocator in each |
//! | `write_protected` | inputs in memory that cannot be written, in a process that dies of trying |
//! | `device`, `mock_device` | a device whose memory the CPU cannot read, and whose streams have vector clocks |
#![expect(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test"
)]

#[path = "../it/doors.rs"]
mod doors;
#[path = "../it/support.rs"]
#[expect(dead_code, reason = "the other tests use all of it")]
mod support;

#[cfg(unix)]
mod device;
#[cfg(unix)]
mod mock_device;
#[cfg(unix)]
mod protected;
mod two_candles;
#[cfg(unix)]
mod write_protected;

use std::collections::BTreeMap;

use peak_alloc::PeakAlloc;
use plugin_api::{
    HostContext, LoadedPlugin, NodeError, Preview, Progress, RunInfo, SharedTensor, Value,
};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Hears nothing.
struct Quiet;

impl HostContext for Quiet {
    fn is_canceled(&self) -> bool {
        false
    }
    fn progress(&self, _: Progress) {}
    fn preview(&self, _: Preview) {}
    fn metric(&self, _: &str, _: f64, _: f64) {}
    fn log(&self, _: u32, _: &str) {}
    fn saved(&self, _: &str) {}
    fn run_info(&self) -> RunInfo {
        RunInfo::default()
    }
}

/// One call of a new node with tensors as inputs.
fn call(
    plugin: LoadedPlugin,
    class: &str,
    inputs: &[(&str, &SharedTensor)],
    parameters: &str,
) -> Result<Vec<Value>, NodeError> {
    let inputs = inputs.iter();
    let inputs: BTreeMap<_, _> = inputs
        .map(|(name, tensor)| ((*name).to_owned(), Value::Tensor((*tensor).clone())))
        .collect();
    plugin.create(class)?.run(inputs, parameters, Quiet)
}

/// The first output, a tensor.
fn tensor(outputs: Vec<Value>) -> SharedTensor {
    match outputs.into_iter().next() {
        Some(Value::Tensor(tensor)) => tensor,
        other => panic!("{other:?} is no tensor"),
    }
}

/// The second output, a number.
fn number(outputs: &[Value]) -> f64 {
    match &outputs[1] {
        Value::Json(text) => text.parse().unwrap(),
        other => panic!("{other:?} is no number"),
    }
}
