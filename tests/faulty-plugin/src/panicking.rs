//! Panics wherever a test wants it to.
#![expect(unsafe_code, reason = "shares memory under an owner of its own")]

use std::sync::{Mutex, PoisonError};

use plugin_api::tensor::TensorDescription;
use plugin_api::{
    DataType, DeviceId, ErrorCode, Extension, Host, Inputs, MemoryBlock, Node, NodeDescriptor,
    NodeError, Opaque, Outputs, SharedObject, SharedTensor, TensorOwner, Value,
};

use crate::honest::NoParameters;

/// Where.
static PLACE: Mutex<String> = Mutex::new(String::new());

#[expect(clippy::panic, reason = "what all of this is for")]
fn pass(place: &str) {
    let wanted = PLACE.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if wanted == place {
        panic!("in {place}");
    }
}

/// Sets the place: a JSON text.
pub(crate) fn set_place() -> Box<dyn Extension> {
    Box::new(|request: Vec<Value>| {
        if let [Value::Json(text)] = request.as_slice() {
            let place = serde_json::from_str(text)
                .map_err(|error| NodeError::new(ErrorCode::InvalidInput, error.to_string()))?;
            *PLACE.lock().unwrap_or_else(PoisonError::into_inner) = place;
        }
        Ok(Vec::new())
    })
}

/// Gives back what it is given.
pub(crate) fn echo() -> Box<dyn Extension> {
    pass("extension");
    Box::new(|request| {
        pass("call");
        Ok(request)
    })
}

/// See the module.
#[derive(Debug)]
pub(crate) struct PanicAnywhere;

impl Default for PanicAnywhere {
    fn default() -> Self {
        pass("create");
        Self
    }
}

impl Drop for PanicAnywhere {
    fn drop(&mut self) {
        pass("drop of the node");
    }
}

impl Node for PanicAnywhere {
    type Parameters = NoParameters;

    fn descriptor() -> NodeDescriptor {
        pass("describe");
        NodeDescriptor::new::<NoParameters>(
            "PanicAnywhere",
            "Panic Anywhere",
            "faulty",
            "Panics wherever a test wants it to",
        )
        .output("object", "BOMB", "Panics too")
        .output("tensor", "BOMB_TENSOR", "Its owner panics too")
    }

    fn validate(&self, _: &NoParameters) -> Result<(), NodeError> {
        pass("validate");
        Ok(())
    }

    fn fingerprint(&self, _: &NoParameters) -> String {
        pass("fingerprint");
        "print".to_owned()
    }

    fn run(&mut self, _: &mut Inputs, _: NoParameters, _: &Host) -> Result<Outputs, NodeError> {
        pass("run");
        let values = Box::leak(Box::new([1f32; 4]));
        let description = TensorDescription {
            address: values.as_ptr() as u64,
            byte_offset: 0,
            allocation_bytes: 16,
            device: DeviceId::CPU,
            data_type: DataType::F32,
            shape: &[4],
            strides: &[1],
            is_read_only: true,
        };
        // SAFETY: leaked, so it stays as it is.
        let tensor = unsafe { SharedTensor::from_raw(&description, BombOwner) }?;
        let object = SharedObject::new("BOMB", Bomb);
        Ok(vec![Value::Object(object), Value::Tensor(tensor)])
    }

    fn extension(&self, id: &str) -> Option<Box<dyn Extension>> {
        pass("extension of the node");
        (id == "faulty-plugin.echo/1").then(echo)
    }
}

struct Bomb;

impl Opaque for Bomb {
    fn summary(&self) -> String {
        pass("summary");
        "a bomb".to_owned()
    }

    fn memory(&self) -> Vec<MemoryBlock> {
        pass("memory");
        vec![MemoryBlock { id: 7, bytes: 9 }]
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        pass("drop of the object");
    }
}

struct BombOwner;

impl TensorOwner for BombOwner {
    fn wait_on(&self, _: u64) -> Result<(), NodeError> {
        pass("wait_on");
        Ok(())
    }

    fn host_sync(&self) -> Result<(), NodeError> {
        pass("host_sync");
        Ok(())
    }

    fn release_after(&self, _: u64) -> Result<(), NodeError> {
        pass("release_after");
        Ok(())
    }

    fn copy_to(&self, _: DeviceId) -> Result<SharedTensor, NodeError> {
        pass("copy_to");
        Err(NodeError::new(ErrorCode::Internal, "there is nothing else"))
    }
}

impl Drop for BombOwner {
    fn drop(&mut self) {
        pass("drop of the owner");
    }
}
