//! Values between Rust and C.
#![expect(
    unsafe_code,
    reason = "structs of the C contract hold pointers that its rules vouch for"
)]

use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};

use abi_stable::std_types::RString;
use smallvec::SmallVec;

use super::abi::{
    NODE_PLUGIN_JSON, NODE_PLUGIN_NONE, NODE_PLUGIN_OBJECT, NODE_PLUGIN_TENSOR, NodePluginInput,
    NodePluginJson, NodePluginValue, NodePluginValueSink,
};
use super::objects::{exported_object, imported_object};
use crate::guard::guarded;
use crate::{ErrorCode, NodeError, SharedTensor, Value};

/// A value that is none.
pub(super) fn no_value() -> NodePluginValue {
    NodePluginValue {
        kind: NODE_PLUGIN_NONE,
        reserved: 0,
        tensor: null_mut(),
        object: null_mut(),
        json: null_mut(),
    }
}

/// Hands a value over to C.
///
/// # Errors
/// A tensor whose data could not be made.
#[inline]
pub(super) fn exported(value: Value) -> Result<NodePluginValue, NodeError> {
    let none = no_value();
    Ok(match value {
        Value::Tensor(tensor) => NodePluginValue {
            kind: NODE_PLUGIN_TENSOR,
            tensor: tensor.into_dlpack()?.as_ptr(),
            ..none
        },
        Value::Object(object) => NodePluginValue {
            kind: NODE_PLUGIN_OBJECT,
            object: exported_object(object),
            ..none
        },
        Value::Json(text) => NodePluginValue {
            kind: NODE_PLUGIN_JSON,
            json: exported_json(text),
            ..none
        },
    })
}

/// Takes a value over from C.
///
/// # Errors
/// A kind that is not known, a pointer that is NULL, or what [`SharedTensor::from_dlpack`] refuses.
///
/// # Safety
/// The value is as the contract has it, and handed over.
#[inline]
pub(super) unsafe fn imported(value: NodePluginValue) -> Result<Value, NodeError> {
    let missing = || {
        let text = "a value without its pointer was handed over";
        NodeError::new(ErrorCode::InvalidInput, text)
    };
    match value.kind {
        NODE_PLUGIN_TENSOR => {
            let tensor = NonNull::new(value.tensor).ok_or_else(missing)?;
            // SAFETY: the caller vouches for it.
            Ok(Value::Tensor(unsafe { SharedTensor::from_dlpack(tensor) }?))
        }
        NODE_PLUGIN_OBJECT => {
            let object = NonNull::new(value.object).ok_or_else(missing)?;
            // SAFETY: the caller vouches for it.
            Ok(Value::Object(unsafe { imported_object(object) }?))
        }
        NODE_PLUGIN_JSON => {
            let json = NonNull::new(value.json).ok_or_else(missing)?;
            // SAFETY: the caller vouches for it.
            Ok(Value::Json(unsafe { imported_json(json) }?))
        }
        kind => {
            let text = format!("a value of the kind {kind} was handed over, this reads 1 to 3");
            Err(NodeError::new(ErrorCode::InvalidInput, text))
        }
    }
}

/// Takes a value out of a place where the other side left it; nothing where it was taken before.
///
/// # Safety
/// As [`imported`].
#[inline]
pub(super) unsafe fn taken(place: &mut NodePluginValue) -> Option<Result<Value, NodeError>> {
    let value = std::mem::replace(place, no_value());
    // SAFETY: the caller vouches for it; it is no longer in its place.
    (value.kind != NODE_PLUGIN_NONE).then(|| unsafe { imported(value) })
}

/// Values, or inputs, that are lent to the other side; what it does not take is let go with this.
pub(super) struct LentValues<V: AsMut<NodePluginValue>>(SmallVec<[V; 4]>);

impl<V: AsMut<NodePluginValue>> LentValues<V> {
    pub(super) fn with_capacity(n: usize) -> Self {
        Self(SmallVec::with_capacity(n))
    }

    pub(super) fn push(&mut self, value: V) {
        self.0.push(value);
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [V] {
        &mut self.0
    }
}

impl<V: AsMut<NodePluginValue>> Drop for LentValues<V> {
    fn drop(&mut self) {
        for value in &mut self.0 {
            // SAFETY: exported by this library, and not taken by the other side.
            drop(unsafe { taken(value.as_mut()) });
        }
    }
}

impl AsMut<Self> for NodePluginValue {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}

impl AsMut<NodePluginValue> for NodePluginInput {
    fn as_mut(&mut self) -> &mut NodePluginValue {
        &mut self.value
    }
}

/// Collects the values that `fill` pushes.
pub(super) fn pushed<R>(
    fill: impl FnOnce(NodePluginValueSink) -> R,
) -> (R, Result<Vec<Value>, NodeError>) {
    /// Values, and the first that could not be read.
    type Found = (Vec<Value>, Option<NodeError>);
    unsafe extern "C" fn push(context: *mut c_void, value: NodePluginValue) {
        // SAFETY: the context is the pair below, which lives while the sink is used, by one thread.
        let (values, error) = unsafe { &mut *context.cast::<Found>() };
        let pushed = guarded("a value from C", || {
            // SAFETY: handed over.
            values.push(unsafe { imported(value) }?);
            Ok(())
        });
        if let Err(found) = pushed {
            error.get_or_insert(found);
        }
    }
    // Most nodes have one output.
    let mut found: Found = (Vec::with_capacity(1), None);
    let result = fill(NodePluginValueSink {
        context: (&raw mut found).cast(),
        push,
    });
    let (values, error) = found;
    (result, error.map_or(Ok(values), Err))
}

/// Pushes values into a sink of the other side.
///
/// # Errors
/// As [`exported`].
///
/// # Safety
/// The sink is valid during this call.
pub(super) unsafe fn push_all(
    values: Vec<Value>,
    sink: NodePluginValueSink,
) -> Result<(), NodeError> {
    for value in values {
        let value = exported(value)?;
        // SAFETY: the caller vouches for it.
        unsafe { (sink.push)(sink.context, value) };
    }
    Ok(())
}

/// The head stands first: a pointer to it is one to all of it.
#[repr(C)]
struct ExportedJson {
    head: NodePluginJson,
    text: RString,
}

fn exported_json(text: RString) -> *mut NodePluginJson {
    unsafe extern "C" fn delete(json: *mut NodePluginJson) {
        let _ = guarded("a text that is freed", || {
            if !json.is_null() {
                // SAFETY: the box below; the contract lets it be freed once.
                drop(unsafe { Box::from_raw(json.cast::<ExportedJson>()) });
            }
            Ok(())
        });
    }
    let head = NodePluginJson {
        text: text.as_ptr().cast(),
        length: text.len(),
        manager: null_mut(),
        deleter: Some(delete),
    };
    Box::into_raw(Box::new(ExportedJson { head, text })).cast()
}

/// # Safety
/// Valid, and handed over.
unsafe fn imported_json(json: NonNull<NodePluginJson>) -> Result<RString, NodeError> {
    // SAFETY: the caller vouches for it.
    let held = unsafe { *json.as_ref() };
    let NodePluginJson {
        text,
        length,
        deleter,
        ..
    } = held;
    let bytes = if text.is_null() || length == 0 {
        Vec::new()
    } else {
        // SAFETY: valid until it is let go.
        unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) }.to_vec()
    };
    if let Some(deleter) = deleter {
        // SAFETY: handed over, so it is let go here.
        unsafe { deleter(json.as_ptr()) };
    }
    String::from_utf8(bytes)
        .map(RString::from)
        .map_err(|_| NodeError::new(ErrorCode::InvalidInput, "a JSON value is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::extensions::{ExportedExtension, call};
    use super::*;
    use crate::tensor::{TensorDescription, TensorOwner};
    use crate::{DataType, DeviceId};

    /// Counted while it lives; its data come, or never do.
    struct Owner(Arc<AtomicUsize>, bool);

    impl TensorOwner for Owner {
        fn host_sync(&self) -> Result<(), NodeError> {
            let failed = || NodeError::new(ErrorCode::Internal, "the data never came");
            self.1.then_some(()).ok_or_else(failed)
        }
    }

    impl Drop for Owner {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn tensor(alive: &Arc<AtomicUsize>, comes: bool) -> Value {
        alive.fetch_add(1, Ordering::SeqCst);
        let values: &'static [f32] = &[1.0];
        let description = TensorDescription {
            address: values.as_ptr() as u64,
            byte_offset: 0,
            allocation_bytes: 4,
            device: DeviceId::CPU,
            data_type: DataType::F32,
            shape: &[1],
            strides: &[1],
            is_read_only: true,
        };
        // SAFETY: a constant.
        let made = unsafe { SharedTensor::from_raw(&description, Owner(alive.clone(), comes)) };
        Value::Tensor(made.unwrap())
    }

    #[test]
    fn what_the_other_side_does_not_take_is_let_go() {
        let alive = Arc::new(AtomicUsize::new(0));
        let mut lent = LentValues::with_capacity(2);
        for _ in 0..2 {
            lent.push(exported(tensor(&alive, true)).unwrap());
        }
        // SAFETY: exported above.
        let first = unsafe { taken(&mut lent.as_mut_slice()[0]) }.unwrap();
        drop(lent);
        assert_eq!(alive.load(Ordering::SeqCst), 1);
        drop(first);
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_request_of_which_one_value_cannot_be_made_loses_none() {
        let answers = |_: Vec<Value>| Ok(Vec::new());
        let extension = ExportedExtension::new(Box::new(answers));
        let alive = Arc::new(AtomicUsize::new(0));
        let request = vec![tensor(&alive, true), tensor(&alive, false)];
        let pointer = NonNull::new(extension.as_ptr().cast_mut()).unwrap();
        // SAFETY: the extension lives.
        let answer = unsafe { call(pointer, request) };
        assert_eq!(&*answer.unwrap_err().message, "the data never came");
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }
}
