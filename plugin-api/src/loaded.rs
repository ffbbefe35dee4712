//! A plugin as its host holds it, whichever door of the library it came through.

use std::fmt;

use abi_stable::std_types::{RString, RVec};

use crate::abi::{HostAdapter, NodeBox, RunRequest};
use crate::c_door::ForeignPlugin;
use crate::c_door::abi::NodePluginTable;
use crate::extension::{DEVICES, LoadedExtension};
use crate::node::Inputs;
use crate::{
    DeviceDescriptor, ErrorCode, HostContext, NodeError, Outputs, PluginDescriptor,
    PluginModule_Ref, Value,
};

#[derive(Clone, Copy)]
enum Door {
    Rust(PluginModule_Ref),
    C(ForeignPlugin),
}

/// A loaded plugin. Its library stays loaded for ever.
#[derive(Clone, Copy)]
pub struct LoadedPlugin(Door);

impl fmt::Debug for LoadedPlugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Door::Rust(_) => f.write_str("LoadedPlugin(Rust)"),
            Door::C(_) => f.write_str("LoadedPlugin(C)"),
        }
    }
}

impl From<PluginModule_Ref> for LoadedPlugin {
    /// Through the root module, whose layout was compared when it was read.
    fn from(module: PluginModule_Ref) -> Self {
        Self(Door::Rust(module))
    }
}

impl LoadedPlugin {
    /// Through the table for all languages, as [`checked`](crate::c_door::checked) gives it.
    ///
    /// # Safety
    /// The table's functions do what `node_plugin.h` says, and its library stays loaded.
    #[expect(unsafe_code, reason = "functions of C are what their header says")]
    #[must_use]
    pub unsafe fn from_table(table: &'static NodePluginTable) -> Self {
        // SAFETY: the caller vouches for it.
        Self(Door::C(unsafe { ForeignPlugin::new(table) }))
    }

    /// What the plugin says about itself and its nodes.
    ///
    /// # Errors
    /// It panicked over it, or it cannot be read.
    pub fn describe(&self) -> Result<PluginDescriptor, NodeError> {
        let json = match self.0 {
            Door::Rust(module) => module.describe()().into_result()?.into_string(),
            Door::C(plugin) => plugin.describe()?,
        };
        read("its description of its nodes", &json)
    }

    /// A node of this class.
    ///
    /// # Errors
    /// The class is not known, or the plugin panicked.
    pub fn create(&self, class: &str) -> Result<LoadedNode, NodeError> {
        let node = match self.0 {
            Door::Rust(module) => module.create_node()(class.into()).into_result()?,
            Door::C(plugin) => plugin.create(class)?,
        };
        Ok(LoadedNode(node))
    }

    /// What the plugin can do beyond this, by the id of the extension.
    #[must_use]
    pub fn extension(&self, id: &str) -> Option<LoadedExtension> {
        LoadedExtension::new(match self.0 {
            Door::Rust(module) => module.extension()(id.into()),
            Door::C(plugin) => plugin.extension(id),
        })
    }

    /// The devices that its nodes compute on ([`DEVICES`]); none where it leaves that open.
    ///
    /// # Errors
    /// The plugin's own sentence, or an answer that cannot be read.
    pub fn devices(&self) -> Result<Vec<DeviceDescriptor>, NodeError> {
        match self.extension(DEVICES) {
            None => Ok(Vec::new()),
            Some(extension) => read("its description of its devices", &extension.text()?),
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(what: &str, json: &str) -> Result<T, NodeError> {
    serde_json::from_str(json).map_err(|error| {
        let text = format!("{what} cannot be read ({error}); this is a fault of the plugin");
        NodeError::new(ErrorCode::Internal, text)
    })
}

/// A node as its host holds it: what [`Node`](crate::Node) says of threads and times holds for these methods.
pub struct LoadedNode(NodeBox);

impl fmt::Debug for LoadedNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LoadedNode")
    }
}

impl LoadedNode {
    /// Checks parameters, a JSON object.
    ///
    /// # Errors
    /// The first problem, or a panic of the node.
    pub fn validate(&self, parameters: &str) -> Result<(), NodeError> {
        self.0.validate(parameters.into()).into_result()
    }

    /// Text that changes when the result would change although inputs and parameters are the same.
    ///
    /// # Errors
    /// Parameters that cannot be read, or a panic of the node.
    pub fn fingerprint(&self, parameters: &str) -> Result<String, NodeError> {
        let print = self.0.fingerprint(parameters.into()).into_result();
        print.map(RString::into_string)
    }

    /// Runs the node on values by socket name; outputs in the order of its descriptor.
    ///
    /// # Errors
    /// The node's, a panic of the node, or one of `context`.
    pub fn run(
        &mut self,
        inputs: impl IntoIterator<Item = (String, Value)>,
        parameters: &str,
        context: impl HostContext,
    ) -> Result<Outputs, NodeError> {
        let request = RunRequest {
            inputs: Inputs::new(inputs).into_request(),
            parameters: parameters.into(),
        };
        let (host, fault) = HostAdapter::boxed(context);
        let outputs = self.0.run(request, host).into_result();
        fault.or(outputs.map(RVec::into_vec))
    }

    /// What the node can do beyond this, by the id of the extension.
    #[must_use]
    pub fn extension(&self, id: &str) -> Option<LoadedExtension> {
        LoadedExtension::new(self.0.extension(id.into()))
    }
}
