//! What a later version must not do either, although plugins of it load in hosts of 1.0: one function more at the end of the
//! root module, and one at the end of a trait. Its hosts refuse every plugin of 1.0.

use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RBox, ROption, RResult, RStr, RString, RVec};
use abi_stable::{StableAbi, sabi_trait};

pub use crate::v1_0::{ExtensionBox, HostBox, NodeError, RunRequest, Value};

/// [`v1_0::PluginModule`](crate::v1_0::PluginModule) and one function.
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
    /// What 1.0 does not have.
    pub n_classes: extern "C" fn() -> u64,
}

impl RootModule for PluginModule_Ref {
    abi_stable::declare_root_module_statics! {PluginModule_Ref}
    const BASE_NAME: &'static str = "node_plugin";
    const NAME: &'static str = "node_plugin";
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("1.1.0");
}

/// [`v1_0::NodeObject`](crate::v1_0::NodeObject) and one function.
#[sabi_trait]
pub trait NodeObject: Send + 'static {
    /// As in 1.0.
    fn validate(&self, parameters: RStr<'_>) -> RResult<(), NodeError>;
    /// As in 1.0.
    fn fingerprint(&self, parameters: RStr<'_>) -> RResult<RString, NodeError>;
    /// As in 1.0.
    fn run(&mut self, request: RunRequest, host: HostBox) -> RResult<RVec<Value>, NodeError>;
    /// As in 1.0.
    #[sabi(last_prefix_field)]
    fn extension(&self, id: RStr<'_>) -> ROption<ExtensionBox>;
    /// What 1.0 does not have.
    fn n_runs(&self) -> u64;
}

/// An owned node.
pub type NodeBox = NodeObject_TO<RBox<()>>;
