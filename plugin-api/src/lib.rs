//! The contract between graph nodes and the programs that run them.
//!
//! A plugin is a dynamic library that exports one root module ([`root`]) and one plain probe symbol ([`probe`]).
//! It and its host may be built by different compilers from different commits: everything that crosses is a type of
//! this crate, checked by `abi_stable` when the library is loaded.
//!
//! # The life of a node
//! 1. **Probe** (any thread): the host reads the probe symbol, which needs no `abi_stable`, and says in one sentence
//!    why a library cannot be loaded.
//! 2. **Load** (main thread): the layouts of all types are compared; the root module is read. A library is never
//!    unloaded.
//! 3. **Describe** (any thread, no node exists): [`NodeDescriptor`]s as JSON: sockets, widgets, docs.
//! 4. **Devices** (any thread, no node exists): the plugin opens the device that it will compute on and says which it is
//!    ([`DeviceDescriptor`]), or in one sentence why it cannot.
//! 5. **Create** (worker thread): one [`node::NodeObject`] per node of a graph; cheap, no device, no file.
//! 6. **Validate** (any thread): parameters against widgets, then the node's own check. Nothing is changed.
//! 7. **Run** (worker thread, one call at a time per node): values in, values out. The node polls
//!    [`Host::is_canceled`] at least at every optimizer step and reports progress, previews and metrics.
//! 8. **Drop** (worker thread). Values that the node returned live on: they are reference counted.
//!
//! Authors implement the safe trait [`Node`] and write [`export_plugin!`](crate::export_plugin) once; the foreign
//! function layer, the panic guard and the parameter parsing are made for them.
//!
//! # What must hold
//! * Values on wires are immutable; a writer asks for a unique copy.
//! * No panic crosses the boundary: [`guard`] turns it into a [`NodeError`].
//! * Plugin and host allocate and free through `abi_stable`'s types, never through each other's allocator.
//! * The contract knows nothing of candle, of diffusion, of files or of HTTP.

pub mod descriptor;
pub mod device;
pub mod error;
pub mod guard;
pub mod host;
pub mod node;
pub mod parameter;
pub mod port;
pub mod probe;
pub mod root;
pub mod tensor;

pub use descriptor::{InputSocket, NodeDescriptor, OutputSocket, PluginDescriptor};
pub use device::{DeviceDescriptor, DeviceKind, DeviceMemory};
pub use error::{ErrorCode, NodeError};
pub use host::{Host, HostContext, HostContext_TO, Preview, Progress, RunInfo};
pub use node::{Inputs, MemoryBlock, Node, NodeObject_TO, Outputs, SharedObject, Value};
pub use parameter::{ParameterProblem, Widget, WidgetKind};
pub use root::{PluginModule, PluginModule_Ref};
pub use tensor::{DataType, DeviceId, SharedTensor, TensorError};

#[doc(hidden)]
pub use abi_stable;

/// Version of this contract: `major.minor.patch` of the crate.
pub const CONTRACT_VERSION: &str = env!("CARGO_PKG_VERSION");
