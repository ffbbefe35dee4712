//! Shared objects between Rust and C: handles that either side counts.
#![expect(
    unsafe_code,
    reason = "structs of the C contract hold pointers that its rules vouch for"
)]

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use super::abi::{NodePluginMemory, NodePluginObject, NodePluginSink};
use super::texts::{CText, c_text, collected, text, write};
use crate::guard::guarded;
use crate::object::Opaque;
use crate::{MemoryBlock, NodeError, SharedObject};

/// Told apart by its address: which library made an object. Two libraries, or two copies of one, never have the same.
static MAKER: u8 = 0;

fn maker() -> *const c_void {
    (&raw const MAKER).cast()
}

/// A shared object as C sees it; counted by the `Arc` that it is in.
#[repr(C)]
struct ExportedObject {
    head: NodePluginObject,
    shared: SharedObject,
    /// Its own memory, which stays where it is.
    type_name: CText,
}

// SAFETY: its pointers go to a static and into its own text, and are only read.
unsafe impl Send for ExportedObject {}
// SAFETY: as above.
unsafe impl Sync for ExportedObject {}

pub(super) fn exported_object(shared: SharedObject) -> *mut NodePluginObject {
    if let Some(foreign) = shared.get::<ForeignObject>() {
        return foreign.retained();
    }
    let type_name = c_text(shared.type_name());
    let object = ExportedObject {
        head: NodePluginObject {
            struct_size: size_of::<NodePluginObject>() as u32,
            reserved: 0,
            maker: maker(),
            type_name: type_name.as_ptr(),
            retain: retain_exported,
            release: release_exported,
            summary: summary_of_exported,
            memory: memory_of_exported,
        },
        shared,
        type_name,
    };
    Arc::into_raw(Arc::new(object)).cast_mut().cast()
}

unsafe extern "C" fn retain_exported(object: *mut NodePluginObject) {
    // SAFETY: the pointer is of `exported_object`, and its caller holds a reference.
    unsafe { Arc::increment_strong_count(object.cast_const().cast::<ExportedObject>()) };
}

unsafe extern "C" fn release_exported(object: *mut NodePluginObject) {
    let _ = guarded("an object that is freed", || {
        if !object.is_null() {
            // SAFETY: as above; this reference is given up.
            unsafe { Arc::decrement_strong_count(object.cast_const().cast::<ExportedObject>()) };
        }
        Ok(())
    });
}

unsafe extern "C" fn summary_of_exported(object: *const NodePluginObject, text: NodePluginSink) {
    let _ = guarded("the summary of an object", || {
        // SAFETY: as above; the sink is valid during this call.
        unsafe { write(text, &(*object.cast::<ExportedObject>()).shared.summary()) };
        Ok(())
    });
}

unsafe extern "C" fn memory_of_exported(
    object: *const NodePluginObject,
    blocks: *mut NodePluginMemory,
    capacity: usize,
) -> usize {
    guarded("the memory of an object", || {
        // SAFETY: as above.
        let found = unsafe { &(*object.cast::<ExportedObject>()).shared }.memory();
        for (i, &MemoryBlock { id, bytes }) in found.iter().take(capacity).enumerate() {
            // SAFETY: the caller has room for as many as it says.
            unsafe { blocks.add(i).write(NodePluginMemory { id, bytes }) };
        }
        Ok(found.len())
    })
    .unwrap_or(0)
}

/// # Safety
/// A valid object, of which one reference is handed over.
pub(super) unsafe fn imported_object(
    object: NonNull<NodePluginObject>,
) -> Result<SharedObject, NodeError> {
    // SAFETY: the caller vouches for it.
    let head = unsafe { object.as_ref() };
    if head.maker == maker() {
        let exported = object.as_ptr().cast_const().cast::<ExportedObject>();
        // SAFETY: this library's mark says that it is of `exported_object`.
        let exported = unsafe { Arc::from_raw(exported) };
        return Ok(exported.shared.clone());
    }
    let foreign = ForeignObject(object);
    // SAFETY: valid for as long as the object is.
    let type_name = unsafe { text(head.type_name) }?.to_owned();
    Ok(SharedObject::new(&type_name, foreign))
}

/// One reference to an object of a plugin in C.
struct ForeignObject(NonNull<NodePluginObject>);

// SAFETY: the contract lets its functions be called on any thread, several at once.
unsafe impl Send for ForeignObject {}
// SAFETY: as above.
unsafe impl Sync for ForeignObject {}

impl ForeignObject {
    fn head(&self) -> &NodePluginObject {
        // SAFETY: valid while a reference is held, which this is.
        unsafe { self.0.as_ref() }
    }

    fn retained(&self) -> *mut NodePluginObject {
        // SAFETY: as above.
        unsafe { (self.head().retain)(self.0.as_ptr()) };
        self.0.as_ptr()
    }
}

impl Drop for ForeignObject {
    fn drop(&mut self) {
        // SAFETY: the one reference is given up.
        unsafe { (self.head().release)(self.0.as_ptr()) };
    }
}

impl Opaque for ForeignObject {
    fn summary(&self) -> String {
        // SAFETY: valid, see above; the sink is valid during the call.
        let ((), text) = collected(|sink| unsafe { (self.head().summary)(self.0.as_ptr(), sink) });
        text.unwrap_or_else(|error| error.message.into_string())
    }

    fn memory(&self) -> Vec<MemoryBlock> {
        let memory = |blocks: &mut [NodePluginMemory]| {
            // SAFETY: valid, see above; there is room for as many blocks as it is told.
            unsafe { (self.head().memory)(self.0.as_ptr(), blocks.as_mut_ptr(), blocks.len()) }
        };
        let n = memory(&mut []);
        let mut blocks = vec![NodePluginMemory { id: 0, bytes: 0 }; n];
        let n = memory(&mut blocks);
        blocks.truncate(n);
        let block = |NodePluginMemory { id, bytes }| MemoryBlock { id, bytes };
        blocks.into_iter().map(block).collect()
    }
}
