//! Values come in and go out as these structs, errors as a number and a sentence, everything that describes itself as JSON.
//! The rules that hold for all of it:
//!
//! - Text that is passed in is UTF-8 with a NUL at its end, valid during the call. Text that comes out is given piece by piece
//!   to a NodePluginSink, or filled into a NodePluginError.
//! - Structs whose first field is struct_size, and the table, only grow at their end: a field beyond the size that the other
//!   side says is not there.
//! - Nobody frees memory of the other side: everything that is handed over brings the function that lets it go, which may be
//!   called on any thread.
//! - No exception, panic or longjmp leaves a function.

use std::ffi::{c_char, c_void};

use super::dlpack::DLManagedTensorVersioned;

/// What stands first in every table.
pub const NODE_PLUGIN_MAGIC: &str = "NODEPLUGINTABLE";
/// Major version of the contract; different ones do not work together.
pub const NODE_PLUGIN_MAJOR: u32 = 1;
/// Minor version of the contract; a higher one has more at the end.
pub const NODE_PLUGIN_MINOR: u32 = 0;

/// Success; every other number is an error.
pub const NODE_PLUGIN_OK: u32 = 0;
/// A value on a socket or a parameter cannot be used.
pub const NODE_PLUGIN_INVALID_INPUT: u32 = 1;
/// A file or directory cannot be read, or is not what it should be.
pub const NODE_PLUGIN_INVALID_FILE: u32 = 2;
/// A file or directory cannot be written.
pub const NODE_PLUGIN_CANNOT_WRITE: u32 = 3;
/// The host asked the node to stop; nothing is wrong.
pub const NODE_PLUGIN_CANCELED: u32 = 4;
/// Memory of the host or of a device ran out.
pub const NODE_PLUGIN_OUT_OF_MEMORY: u32 = 5;
/// The node panicked: a fault of the plugin.
pub const NODE_PLUGIN_PANICKED: u32 = 6;
/// Anything else that is not the user's fault.
pub const NODE_PLUGIN_INTERNAL: u32 = 7;

/// No value.
pub const NODE_PLUGIN_NONE: u32 = 0;
/// `tensor` is set.
pub const NODE_PLUGIN_TENSOR: u32 = 1;
/// `object` is set.
pub const NODE_PLUGIN_OBJECT: u32 = 2;
/// `json` is set.
pub const NODE_PLUGIN_JSON: u32 = 3;

/// Severities of log lines.
pub const NODE_PLUGIN_LOG_DEBUG: u32 = 0;
/// Worth a line.
pub const NODE_PLUGIN_LOG_INFO: u32 = 1;
/// Something is not as asked, and the node goes on.
pub const NODE_PLUGIN_LOG_WARNING: u32 = 2;

/// Takes text, piece after piece, during the call that it is passed to.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginSink {
    /// Whoever made the sink knows.
    pub context: *mut c_void,
    /// `text` need not end with a NUL and is valid during this call.
    pub write: unsafe extern "C" fn(context: *mut c_void, text: *const c_char, length: usize),
}

/// What went wrong; filled in by a function that returns an error. Texts are UTF-8 with a NUL at their end; longer ones are
/// cut.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginError {
    /// The socket or parameter that it is about; empty if none.
    pub input: [c_char; 128],
    /// One sentence: what is wrong, with the name of the file, input or parameter, and what to do.
    pub message: [c_char; 1920],
}

/// Memory that an object keeps alive.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginMemory {
    /// The same for all objects that share the block, and for no other block that lives.
    pub id: u64,
    /// Its size.
    pub bytes: u64,
}

/// A value of a plugin's own type: immutable and reference counted. A plugin that makes some puts its own fields behind.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginObject {
    /// Size of this struct as its maker knows it.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// An address inside the library that made it, by which that library knows its own; others only compare.
    pub maker: *const c_void,
    /// The socket type.
    pub type_name: *const c_char,
    /// Counts a reference. Any thread, several at once.
    pub retain: unsafe extern "C" fn(object: *mut NodePluginObject),
    /// Lets a reference go; the last one frees it. Any thread.
    pub release: unsafe extern "C" fn(object: *mut NodePluginObject),
    /// A line for a person. Any thread, several at once.
    pub summary: unsafe extern "C" fn(object: *const NodePluginObject, text: NodePluginSink),
    /// Fills in the memory that it keeps alive, at most `capacity` blocks; returns how many there are. Any thread.
    pub memory: unsafe extern "C" fn(
        object: *const NodePluginObject,
        blocks: *mut NodePluginMemory,
        capacity: usize,
    ) -> usize,
}

/// JSON text that whoever holds it lets go by its deleter.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginJson {
    /// UTF-8; need not end with a NUL.
    pub text: *const c_char,
    /// In bytes.
    pub length: usize,
    /// The maker's.
    pub manager: *mut c_void,
    /// Called once, with this struct, on any thread; may be NULL.
    pub deleter: Option<unsafe extern "C" fn(json: *mut NodePluginJson)>,
}

/// What a wire carries: of the three pointers the one that `kind` names, the others are NULL.
///
/// A tensor is let go by its deleter, an object by release, JSON by its deleter. Tensors on devices are ready: whoever hands
/// one over has waited for it, and whoever lets it go has waited for its own work.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginValue {
    /// NODE_PLUGIN_TENSOR, NODE_PLUGIN_OBJECT, NODE_PLUGIN_JSON or NODE_PLUGIN_NONE.
    pub kind: u32,
    /// 0.
    pub reserved: u32,
    /// A tensor. Without the flag READ_ONLY its holder may write it.
    pub tensor: *mut DLManagedTensorVersioned,
    /// One reference to an object.
    pub object: *mut NodePluginObject,
    /// A number, text or switch.
    pub json: *mut NodePluginJson,
}

/// A value on a socket.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginInput {
    /// The socket.
    pub name: *const c_char,
    /// Its value.
    pub value: NodePluginValue,
}

/// Takes values during the call that it is passed to: each call hands one over.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginValueSink {
    /// Whoever made the sink knows.
    pub context: *mut c_void,
    /// Takes the value, which then is the sink's.
    pub push: unsafe extern "C" fn(context: *mut c_void, value: NodePluginValue),
}

/// What a plugin, a node or a host can do beyond the fixed part, by a versioned id such as "devices/1".
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginExtension {
    /// Size of this struct as its maker knows it.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Asks. Values of the request are the caller's, but what is taken from them by setting their kind to NODE_PLUGIN_NONE.
    /// Any thread, several at once.
    pub call: unsafe extern "C" fn(
        extension: *const NodePluginExtension,
        request: *mut NodePluginValue,
        n_request: usize,
        answer: NodePluginValueSink,
        error: *mut NodePluginError,
    ) -> u32,
}

/// The host's services for one run of one node, valid until it returns. All functions: the thread that runs the node and
/// threads that it started and joins before it returns, several at once. They return at once.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginHost {
    /// Size of this struct as the host knows it.
    pub struct_size: u32,
    /// The host's minor version of the contract.
    pub minor: u32,
    /// The host's.
    pub context: *mut c_void,
    /// The node's id in the graph.
    pub node_id: *const c_char,
    /// Where results go; exists.
    pub output_dir: *const c_char,
    /// A directory of this node's own that survives a cancellation and is empty for other inputs and parameters; empty text if
    /// the host keeps none. A node stores there what it needs to resume.
    pub work_dir: *const c_char,
    /// Not 0 once the user asked to stop. A node asks at least once per step or every quarter of a second, and then returns
    /// NODE_PLUGIN_CANCELED within one step.
    pub is_canceled: unsafe extern "C" fn(context: *mut c_void) -> i32,
    /// Shows how far a stage is and a line for a person.
    pub progress: unsafe extern "C" fn(
        context: *mut c_void,
        stage: *const c_char,
        done: u64,
        total: u64,
        text: *const c_char,
    ),
    /// Shows a picture [H, W, 3] of 32-bit floats in [0, 1], which is then the host's.
    pub preview: unsafe extern "C" fn(
        context: *mut c_void,
        picture: *mut DLManagedTensorVersioned,
        series: *const c_char,
        label: *const c_char,
    ),
    /// Adds a point to a curve.
    pub metric: unsafe extern "C" fn(context: *mut c_void, series: *const c_char, x: f64, y: f64),
    /// Writes a log line of a severity NODE_PLUGIN_LOG_….
    pub log: unsafe extern "C" fn(context: *mut c_void, level: u32, text: *const c_char),
    /// Tells about a file that the node wrote into the output directory.
    pub saved: unsafe extern "C" fn(context: *mut c_void, path: *const c_char),
    /// The host's extension of this id, valid until the node returns; NULL for one that it does not have.
    pub extension:
        unsafe extern "C" fn(context: *mut c_void, id: *const c_char) -> *const NodePluginExtension,
}

/// A node; what it is only its plugin knows.
#[derive(Debug)]
pub struct NodePluginNode {
    _opaque: (),
}

/// Everything that a plugin offers. Static: it stays where it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NodePluginTable {
    /// NODE_PLUGIN_MAGIC.
    pub magic: [c_char; 16],
    /// Size of this struct in the library.
    pub struct_size: u32,
    /// NODE_PLUGIN_MAJOR of the library.
    pub major: u32,
    /// NODE_PLUGIN_MINOR of the library.
    pub minor: u32,
    /// 0.
    pub reserved: u32,
    /// Stable name of the plugin, UTF-8, filled up with NULs.
    pub name: [c_char; 64],
    /// Version of the plugin, UTF-8, filled up with NULs.
    pub version: [c_char; 32],
    /// The description of plugin and nodes as JSON (description.schema.json), the same at every call. Any thread, several at once; in milliseconds.
    pub describe: unsafe extern "C" fn(json: NodePluginSink, error: *mut NodePluginError) -> u32,
    /// The plugin's extension of this id, valid for ever; NULL for one that it does not have. Any thread, several at once.
    pub extension: unsafe extern "C" fn(id: *const c_char) -> *const NodePluginExtension,
    /// Makes a node of this class; NULL and an error for one that is not known. Any thread, several at once; at once.
    pub node_new: unsafe extern "C" fn(
        class_name: *const c_char,
        error: *mut NodePluginError,
    ) -> *mut NodePluginNode,
    /// Frees a node; NULL is allowed. Any thread.
    pub node_free: unsafe extern "C" fn(node: *mut NodePluginNode),
    /// Checks parameters, a JSON object, beyond what the description says. Any thread, one function of a node at a time.
    pub node_validate: unsafe extern "C" fn(
        node: *mut NodePluginNode,
        parameters: *const c_char,
        error: *mut NodePluginError,
    ) -> u32,
    /// Text that changes when the result would change although inputs and parameters are the same. Any thread, one function
    /// of a node at a time.
    pub node_fingerprint: unsafe extern "C" fn(
        node: *mut NodePluginNode,
        parameters: *const c_char,
        text: NodePluginSink,
        error: *mut NodePluginError,
    ) -> u32,
    /// Runs the node on a worker thread, one function of a node at a time. Parameters that are left out have their default.
    /// Inputs are the caller's, who lets them go after the run, but what the node takes from them by setting their kind to
    /// NODE_PLUGIN_NONE. Outputs are pushed in the order of the description; after an error the caller lets them go too.
    pub node_run: unsafe extern "C" fn(
        node: *mut NodePluginNode,
        inputs: *mut NodePluginInput,
        n_inputs: usize,
        parameters: *const c_char,
        host: *const NodePluginHost,
        outputs: NodePluginValueSink,
        error: *mut NodePluginError,
    ) -> u32,
    /// The node's extension of this id, valid until the node is freed; NULL for one that it does not have. Any thread, one
    /// function of a node at a time.
    pub node_extension: unsafe extern "C" fn(
        node: *mut NodePluginNode,
        id: *const c_char,
    ) -> *const NodePluginExtension,
}
