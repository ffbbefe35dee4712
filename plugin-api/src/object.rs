//! Values of a plugin's own types on wires.

use abi_stable::StableAbi;
use abi_stable::std_types::RArc;
use abi_stable::type_level::downcasting::TD_CanDowncast;

use crate::abi::{ObjectAdapter, ObjectBox, OpaqueObject_TO};

/// Memory that a value keeps alive.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBlock {
    /// The same for all values that share the block, and for no other block that lives: an address, say.
    pub id: u64,
    /// Its size.
    pub bytes: u64,
}

/// A value of a plugin's own type, opaque to everybody else. Immutable and reference counted; it may be dropped on any
/// thread.
pub trait Opaque: Send + Sync + 'static {
    /// A line for a person, for example `2 concepts after 400 steps`. Any thread, several at once, at any time; at once.
    fn summary(&self) -> String;

    /// The memory that this value keeps alive, on whatever device, block by block: a host that keeps values within a
    /// budget counts a block once, however many of them share it. What is small beside the rest may be left out. Any
    /// thread, several at once, at any time; it does not touch the memory itself and takes less than a millisecond.
    fn memory(&self) -> Vec<MemoryBlock>;
}

/// An opaque value on a wire. Cloning counts a reference and allocates nothing.
#[repr(C)]
#[derive(StableAbi)]
pub struct SharedObject {
    object: ObjectBox,
}

impl Clone for SharedObject {
    fn clone(&self) -> Self {
        Self {
            object: OpaqueObject_TO::from_sabi(self.object.obj.shallow_clone()),
        }
    }
}

impl std::fmt::Debug for SharedObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedObject({}: {})", self.type_name(), self.summary())
    }
}

impl SharedObject {
    /// Shares `value` under the socket type `type_name`.
    pub fn new<T: Opaque>(type_name: &str, value: T) -> Self {
        let adapter = ObjectAdapter::new(type_name, value);
        Self {
            object: OpaqueObject_TO::from_ptr(RArc::new(adapter), TD_CanDowncast),
        }
    }

    /// The value, if this library made it and it is a `T`.
    #[must_use]
    pub fn get<T: Opaque>(&self) -> Option<&T> {
        // The id of a type holds that of the library: another build of it is another type.
        let adapter = self.object.obj.downcast_as::<ObjectAdapter<T>>().ok()?;
        adapter.value()
    }

    /// The socket type.
    #[must_use]
    pub fn type_name(&self) -> &str {
        self.object.type_name().as_str()
    }

    /// A line for a person; where the plugin panicked over it, that.
    #[must_use]
    pub fn summary(&self) -> String {
        self.object.summary().into_string()
    }

    /// The memory that it keeps alive; nothing where the plugin panicked over it.
    #[must_use]
    pub fn memory(&self) -> Vec<MemoryBlock> {
        self.object.memory().into_vec()
    }
}
