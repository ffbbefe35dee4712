//! Objects that are counted while they live.
#![expect(
    clippy::mem_forget,
    reason = "losing an object is what one of them is for"
)]

use std::sync::atomic::{AtomicUsize, Ordering};

use plugin_api::{
    ErrorCode, Host, Inputs, MemoryBlock, Node, NodeDescriptor, NodeError, Opaque, Outputs,
    SharedObject, Value,
};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::honest::NoParameters;

const PORT: &str = "COUNTED";
static ALIVE: AtomicUsize = AtomicUsize::new(0);

struct Object {
    /// What it says that it holds.
    bytes: u64,
}

impl Object {
    fn new(bytes: u64) -> Self {
        ALIVE.fetch_add(1, Ordering::SeqCst);
        Self { bytes }
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        ALIVE.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Opaque for Object {
    fn summary(&self) -> String {
        format!("one of {} objects", ALIVE.load(Ordering::SeqCst))
    }

    fn memory(&self) -> Vec<MemoryBlock> {
        let id = std::ptr::from_ref(self).addr() as u64;
        let bytes = self.bytes;
        vec![MemoryBlock { id, bytes }]
    }
}

/// Gives an object, and says how many are alive.
#[derive(Debug, Default)]
pub(crate) struct Counted;

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// Loses one object, which then lives for ever
    #[serde(default)]
    leak: bool,
    /// MiB that the object says it holds
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    megabytes: u64,
    /// Tells objects apart
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    number: u64,
}

impl Node for Counted {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "Counted",
            "Counted",
            "faulty",
            "Gives an object that is counted",
        )
        .optional_input("other", PORT, "Another one, which stays alive")
        .output("object", PORT, "The object")
        .output("alive", "INT", "How many were alive before")
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: Parameters,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let _: Option<&Object> = inputs.optional_object("other")?;
        let alive = ALIVE.load(Ordering::SeqCst);
        if parameters.leak {
            std::mem::forget(Object::new(0));
        }
        // The number is there for the host, to which other parameters are another result.
        let _ = parameters.number;
        let object = Object::new(parameters.megabytes << 20);
        let object = Value::Object(SharedObject::new(PORT, object));
        Ok(vec![object, Value::Json(alive.to_string().into())])
    }
}

/// Has memory for its own work only where no object is alive.
#[derive(Debug, Default)]
pub(crate) struct Hungry;

impl Node for Hungry {
    type Parameters = NoParameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<NoParameters>(
            "Hungry",
            "Hungry",
            "faulty",
            "Memory runs out while other objects live",
        )
        .optional_input("images", picture_ports::IMAGE, "Is waited for only")
        .output("alive", "INT", "How many were alive before")
    }

    fn run(&mut self, _: &mut Inputs, _: NoParameters, _: &Host) -> Result<Outputs, NodeError> {
        match ALIVE.load(Ordering::SeqCst) {
            0 => Ok(vec![Value::Json("0".into())]),
            alive => {
                let text = format!("memory ran out beside {alive} objects");
                Err(NodeError::new(ErrorCode::OutOfMemory, text))
            }
        }
    }
}
