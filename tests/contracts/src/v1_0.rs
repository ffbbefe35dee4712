//! Version 1.0, as `layout-1.0.txt` has it. What types and functions mean is said in `plugin-api`.

use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RArc, RBox, ROption, RResult, RStr, RString, RVec, Tuple2};
use abi_stable::{StableAbi, sabi_trait};

/// Fields in the order of `plugin-api`, as everywhere here.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModule_Ref)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    /// The description of plugin and nodes, JSON.
    pub describe: extern "C" fn() -> RResult<RString, NodeError>,
    /// A node of a class.
    pub create_node: extern "C" fn(class: RStr<'_>) -> RResult<NodeBox, NodeError>,
    /// An extension of the plugin.
    #[sabi(last_prefix_field)]
    pub extension: extern "C" fn(id: RStr<'_>) -> ROption<ExtensionBox>,
}

impl RootModule for PluginModule_Ref {
    abi_stable::declare_root_module_statics! {PluginModule_Ref}
    const BASE_NAME: &'static str = "node_plugin";
    const NAME: &'static str = "node_plugin";
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("1.0.0");
}

/// An error.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct NodeError {
    /// A number.
    pub code: u32,
    /// One sentence.
    pub message: RString,
    /// A socket or parameter.
    pub input: RString,
}

/// What a wire carries.
#[repr(u8)]
#[derive(StableAbi)]
pub enum Value {
    /// A tensor.
    Tensor(SharedTensor),
    /// A plugin's own.
    Object(SharedObject),
    /// JSON.
    Json(RString),
}

/// A tensor.
#[repr(C)]
#[derive(StableAbi)]
pub struct SharedTensor {
    /// Of the allocation.
    pub address: u64,
    /// Of the first element.
    pub byte_offset: u64,
    /// Size of the allocation.
    pub allocation_bytes: u64,
    /// DLPack's.
    pub device: DeviceId,
    /// DLPack's.
    pub data_type: DataType,
    /// At most 8.
    pub n_dims: u32,
    /// DLPack's.
    pub flags: u32,
    /// Elements.
    pub shape: [usize; 8],
    /// In elements.
    pub strides: [isize; 8],
    /// Keeps the memory.
    pub owner: TensorOwnerBox,
}

/// Where memory is.
#[repr(C)]
#[derive(StableAbi)]
pub struct DeviceId {
    /// DLPack's number.
    pub kind: i32,
    /// Which one.
    pub index: i32,
}

/// What memory holds.
#[repr(C)]
#[derive(StableAbi)]
pub struct DataType {
    /// DLPack's number.
    pub code: u8,
    /// Per element.
    pub bits: u8,
    /// 1.
    pub lanes: u16,
}

/// A value of a plugin's own type.
#[repr(C)]
#[derive(StableAbi)]
pub struct SharedObject {
    object: ObjectBox,
}

/// Memory that a value keeps alive.
#[repr(C)]
#[derive(StableAbi)]
pub struct MemoryBlock {
    /// Of the block.
    pub id: u64,
    /// Its size.
    pub bytes: u64,
}

/// How far a node is.
#[repr(C)]
#[derive(StableAbi)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// Units in all.
    pub total: u64,
    /// The stage.
    pub stage: RString,
    /// A line.
    pub text: RString,
}

/// A picture of what a node does.
#[repr(C)]
#[derive(StableAbi)]
pub struct Preview {
    /// `[H, W, 3]`.
    pub picture: SharedTensor,
    /// Which row it belongs in.
    pub series: RString,
    /// What it shows.
    pub label: RString,
}

/// Facts about a run.
#[repr(C)]
#[derive(StableAbi)]
pub struct RunInfo {
    /// The node's id.
    pub node_id: RString,
    /// Where results go.
    pub output_dir: RString,
    /// Of the node's own.
    pub work_dir: RString,
}

/// One call of a node.
#[repr(C)]
#[derive(StableAbi)]
pub struct RunRequest {
    /// By socket.
    pub inputs: RVec<Tuple2<RString, Value>>,
    /// A JSON object.
    pub parameters: RString,
}

/// A node.
#[sabi_trait]
pub trait NodeObject: Send + 'static {
    /// Checks parameters.
    fn validate(&self, parameters: RStr<'_>) -> RResult<(), NodeError>;
    /// Text that changes with the result.
    fn fingerprint(&self, parameters: RStr<'_>) -> RResult<RString, NodeError>;
    /// Runs.
    fn run(&mut self, request: RunRequest, host: HostBox) -> RResult<RVec<Value>, NodeError>;
    /// An extension of the node.
    #[sabi(last_prefix_field)]
    fn extension(&self, id: RStr<'_>) -> ROption<ExtensionBox>;
}

/// An owned node.
pub type NodeBox = NodeObject_TO<RBox<()>>;

/// A value of a plugin's own type.
#[sabi_trait]
pub trait OpaqueObject: Send + Sync + 'static {
    /// The socket type.
    fn type_name(&self) -> RStr<'_>;
    /// A line.
    fn summary(&self) -> RString;
    /// What it keeps alive.
    #[sabi(last_prefix_field)]
    fn memory(&self) -> RVec<MemoryBlock>;
}

/// A counted value.
pub type ObjectBox = OpaqueObject_TO<RArc<()>>;

/// What keeps a tensor's memory.
#[sabi_trait]
pub trait TensorOwnerObject: Send + Sync + 'static {
    /// Lets a stream wait for the values.
    fn wait_on(&self, stream: u64) -> RResult<(), NodeError>;
    /// Waits for the values.
    fn host_sync(&self) -> RResult<(), NodeError>;
    /// Lets the memory's end wait for a stream.
    fn release_after(&self, stream: u64) -> RResult<(), NodeError>;
    /// A copy.
    #[sabi(last_prefix_field)]
    fn copy_to(&self, device: DeviceId) -> RResult<SharedTensor, NodeError>;
}

/// A counted owner.
pub type TensorOwnerBox = RArc<TensorOwnerObject_TO<RBox<()>>>;

/// An extension.
#[sabi_trait]
pub trait ExtensionObject: Send + Sync + 'static {
    /// Answers.
    #[sabi(last_prefix_field)]
    fn call(&self, request: RVec<Value>) -> RResult<RVec<Value>, NodeError>;
}

/// An owned extension.
pub type ExtensionBox = ExtensionObject_TO<RBox<()>>;

/// A host's services.
#[sabi_trait]
pub trait HostObject: Send + Sync + 'static {
    /// Whether to stop.
    fn is_canceled(&self) -> bool;
    /// How far the node is.
    fn progress(&self, progress: Progress);
    /// A picture.
    fn preview(&self, preview: Preview);
    /// A point of a curve.
    fn metric(&self, series: RString, x: f64, y: f64);
    /// A line.
    fn log(&self, level: u32, text: RString);
    /// A file.
    fn saved(&self, path: RString);
    /// Facts.
    fn run_info(&self) -> RunInfo;
    /// An extension of the host.
    #[sabi(last_prefix_field)]
    fn extension(&self, id: RStr<'_>) -> ROption<ExtensionBox>;
}

/// A counted host.
pub type HostBox = HostObject_TO<RArc<()>>;
