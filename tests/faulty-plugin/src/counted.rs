//! Objects that are counted while they live.
#![expect(
    clippy::mem_forget,
    reason = "losing an object is what one of them is for"
)]

use std::sync::atomic::{AtomicUsize, Ordering};

use abi_stable::std_types::RString;
use plugin_api::node::Opaque;
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, SharedObject, Value};
use schemars::JsonSchema;
use serde::Deserialize;

const PORT: &str = "COUNTED";
static ALIVE: AtomicUsize = AtomicUsize::new(0);

struct Object;

impl Object {
    fn new() -> Self {
        ALIVE.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        ALIVE.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Opaque for Object {
    fn summary(&self) -> RString {
        format!("one of {} objects", ALIVE.load(Ordering::SeqCst)).into()
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
        inputs: &Inputs,
        parameters: Parameters,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let _: Option<&Object> = inputs.optional_object("other")?;
        let alive = ALIVE.load(Ordering::SeqCst);
        if parameters.leak {
            std::mem::forget(Object::new());
        }
        let object = Value::Object(SharedObject::new(PORT, Object::new()));
        Ok(vec![object, Value::Json(alive.to_string().into())])
    }
}
