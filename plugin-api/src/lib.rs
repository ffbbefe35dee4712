//! The contract between graph nodes and the programs that run them.
//!
//! A plugin is a dynamic library of nodes. It and its host may be built by different compilers from different commits, and
//! either may be written in another language than Rust. Authors of nodes implement the safe trait [`Node`] and write
//! [`export_plugin!`] once; everything that crosses the boundary, the guards against panics and the reading of parameters are
//! made for them.
//!
//! # A plugin, whole
//! A library of one node, with `crate-type = ["cdylib"]` and the dependencies `plugin-api`, `schemars` and `serde` in its
//! `Cargo.toml`. This is the file `examples/invert.rs`, which the tests build and run in the host:
//!
//! ```rust,ignore
#![doc = include_str!("../examples/invert.rs")]
//! ```
//!
//! * **What it is**: [`NodeDescriptor`] names the sockets. Sockets of one name link; which names there are and what their
//!   tensors look like is agreed among plugins, not here.
//! * **Parameters** are a struct. Its doc comments, defaults and bounds become widgets, and values that do not fit are refused
//!   before the node sees them.
//! * **Values on wires do not change.** [`Inputs::take_tensor`] and [`SharedTensor::make_unique`] give memory that may be
//!   written: the input's own if nobody else holds it, else a copy.
//! * **Errors** have a code and one sentence for a person, and name the input that they are about.
//! * **The host** is asked whether to stop, and shown how far the node is ([`Host`]).
//!
//! # The life of a node
//!
//! | step | thread | what happens |
//! | --- | --- | --- |
//! | look | any | the host reads the table that [`c_door::ENTRY`] gives: name, versions, and in one sentence why it cannot be used |
//! | load | any | a host in Rust compares the layouts of all types ([`root`]); one in another language goes on with the table. A library is never unloaded |
//! | describe | any, several at once | descriptors as JSON; no node exists, no device is opened |
//! | extensions | any, several at once | what else the plugin can do ([`extension`]), for example tell its devices |
//! | create | any, several at once | one object per node of a graph: at once, no device, no file |
//! | validate, fingerprint | any, one call of a node at a time | parameters against what the node knows; nothing is changed; less than a second |
//! | run | a worker, one call of a node at a time | values in, values out; for as long as it takes. The node asks [`Host::is_canceled`] at least at every step and returns [`NodeError::canceled`] within one |
//! | drop | any | of the node, and later of its values: they are reference counted and live on |
//!
//! The documentation of every method says the same in detail. Plugin and host allocate and free through `abi_stable`'s types
//! or through functions that come with a value, never through each other's allocator.
//!
//! # Panics
//! No panic crosses the boundary, in either direction: see [`guard`]. From a node it is an error with
//! [`ErrorCode::Panicked`], from a summary its text, from a destructor a message on standard error, and from a host's service
//! the end of the run with the host's own error.
//!
//! # What may change after 1.0
//! `layout-1.0.txt` records every type that crosses, with the tables of functions, and `include/node_plugin.h` the same in C; a
//! test compares both, and others load plugins and hosts that are built against what was recorded. A plugin of 1.x works in any
//! host of 1.y:
//!
//! * Types of Rust never change: those that are passed by value ([`NodeError`], [`SharedTensor`], [`Value`], [`Progress`],
//!   [`RunInfo`] and all that they hold), and the tables of functions ([`PluginModule`], the traits of [`abi`]). A host that
//!   knew a function more would refuse every plugin that does not have it.
//! * Structs of C that start with their size, and the table, grow at the end only; whoever reads what 1.0 does not have asks
//!   first whether it is there.
//! * JSON (descriptors, devices) may get keys; readers pass over those that they do not know, and new ones have a default.
//! * [`ErrorCode`]s and ids of extensions keep their meaning for ever; new ones are appended.
//! * Whatever else is new is an [`extension`].

pub mod abi;
pub mod c_door;
pub mod descriptor;
pub mod device;
pub mod error;
pub mod extension;
pub mod guard;
pub mod host;
pub mod loaded;
pub mod node;
pub mod object;
pub mod parameter;
pub mod root;
pub mod tensor;

pub use descriptor::{InputSocket, NodeDescriptor, OutputSocket, PluginDescriptor};
pub use device::{DeviceDescriptor, DeviceKind, DeviceMemory};
pub use error::{ErrorCode, NodeError};
pub use extension::{Extension, LoadedExtension};
pub use host::{Host, HostContext, HostFault, LogLevel, Preview, Progress, RunInfo};
pub use loaded::{LoadedNode, LoadedPlugin};
pub use node::{Inputs, Node, Outputs, Value};
pub use object::{MemoryBlock, Opaque, SharedObject};
pub use parameter::{ParameterProblem, ProblemKind, Widget, WidgetKind};
pub use root::{PluginModule, PluginModule_Ref};
pub use tensor::{DataType, DeviceId, Element, SharedTensor, TensorError, TensorOwner};

#[doc(hidden)]
pub use abi_stable;

/// Version of this contract: `major.minor.patch` of the crate.
pub const CONTRACT_VERSION: &str = env!("CARGO_PKG_VERSION");
