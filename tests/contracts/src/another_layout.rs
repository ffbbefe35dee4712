//! What is forbidden: the fields of [`RunRequest`] have changed places. They are of one size, so that nothing but a comparison
//! of names and types can tell.

use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RBox, ROption, RResult, RStr, RString, RVec, Tuple2};
use abi_stable::{StableAbi, sabi_trait};

pub use crate::v1_0::{ExtensionBox, HostBox, NodeError, Value};

/// As in 1.0.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModule_Ref)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    /// As in 1.0.
    pub describe: extern "C" fn() -> RResult<RString, NodeError>,
    /// As in 1.0.
    pub create_node: extern "C" fn(class: RStr<'_>) -> RResult<NodeBox, NodeError>,
    /// As in 1.0.
    #[sabi(last_prefix_field)]
    pub extension: extern "C" fn(id: RStr<'_>) -> ROption<ExtensionBox>,
}

impl RootModule for PluginModule_Ref {
    abi_stable::declare_root_module_statics! {PluginModule_Ref}
    const BASE_NAME: &'static str = "node_plugin";
    const NAME: &'static str = "node_plugin";
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("1.0.0");
}

/// In 1.0 the inputs come first.
#[repr(C)]
#[derive(StableAbi)]
pub struct RunRequest {
    /// A JSON object.
    pub parameters: RString,
    /// By socket.
    pub inputs: RVec<Tuple2<RString, Value>>,
}

/// As in 1.0.
#[sabi_trait]
pub trait NodeObject: Send + 'static {
    /// As in 1.0.
    fn validate(&self, parameters: RStr<'_>) -> RResult<(), NodeError>;
    /// As in 1.0.
    fn fingerprint(&self, parameters: RStr<'_>) -> RResult<RString, NodeError>;
    /// As in 1.0, but for what is in the request.
    fn run(&mut self, request: RunRequest, host: HostBox) -> RResult<RVec<Value>, NodeError>;
    /// As in 1.0.
    #[sabi(last_prefix_field)]
    fn extension(&self, id: RStr<'_>) -> ROption<ExtensionBox>;
}

/// An owned node.
pub type NodeBox = NodeObject_TO<RBox<()>>;
