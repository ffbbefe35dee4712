//! Extensions between Rust and C.
#![expect(
    unsafe_code,
    reason = "structs of the C contract hold pointers that its rules vouch for"
)]

use std::ptr::NonNull;

use super::abi::{NodePluginError, NodePluginExtension, NodePluginValue, NodePluginValueSink};
use super::texts::{ended, no_error, returned};
use super::values::{LentValues, exported, push_all, pushed, taken};
use crate::extension::Extension;
use crate::guard::guarded;
use crate::{NodeError, Value};

/// An extension as C sees it. The head stands first: a pointer to it is one to all of it.
#[repr(C)]
pub(super) struct ExportedExtension {
    head: NodePluginExtension,
    extension: Box<dyn Extension>,
}

impl ExportedExtension {
    pub(super) fn new(extension: Box<dyn Extension>) -> Self {
        let head = NodePluginExtension {
            struct_size: size_of::<NodePluginExtension>() as u32,
            reserved: 0,
            call: call_exported,
        };
        Self { head, extension }
    }

    pub(super) fn as_ptr(&self) -> *const NodePluginExtension {
        std::ptr::from_ref(self).cast()
    }
}

unsafe extern "C" fn call_exported(
    extension: *const NodePluginExtension,
    request: *mut NodePluginValue,
    n_request: usize,
    answer: NodePluginValueSink,
    error: *mut NodePluginError,
) -> u32 {
    let result = guarded("an extension", || {
        let mut values = Vec::with_capacity(n_request);
        for i in 0..n_request {
            // SAFETY: the caller has as many values as it says; what is taken is no longer in its place.
            if let Some(value) = unsafe { taken(&mut *request.add(i)) } {
                values.push(value?);
            }
        }
        // SAFETY: the pointer is of `ExportedExtension::as_ptr`, and valid as long as the contract says.
        let extension = unsafe { &*extension.cast::<ExportedExtension>() };
        let answers = extension.extension.call(values)?;
        // SAFETY: the sink is valid during this call.
        unsafe { push_all(answers, answer) }
    });
    // SAFETY: NULL or valid.
    unsafe { ended(result, error) }
}

/// Asks an extension of the other side.
///
/// # Safety
/// It is valid.
pub(super) unsafe fn call(
    extension: NonNull<NodePluginExtension>,
    request: Vec<Value>,
) -> Result<Vec<Value>, NodeError> {
    let mut lent = LentValues::with_capacity(request.len());
    for value in request {
        lent.push(exported(value)?);
    }
    let mut error = no_error();
    let (code, answer) = pushed(|sink| {
        let values = lent.as_mut_slice();
        // SAFETY: the caller vouches for the extension; all else lives here.
        unsafe {
            (extension.as_ref().call)(
                extension.as_ptr(),
                values.as_mut_ptr(),
                values.len(),
                sink,
                &raw mut error,
            )
        }
    });
    drop(lent);
    returned(code, &error)?;
    answer
}
