//! All node classes that there are: the host's own and those of loaded plugins.

use std::collections::BTreeMap;
use std::sync::Arc;

use plugin_api::guard::guarded_host;
use plugin_api::{
    DeviceDescriptor, ErrorCode, Host, HostContext, Inputs, LoadedNode, NodeDescriptor, NodeError,
    Outputs, Value as WireValue,
};
use serde_json::{Map, Value};

use crate::builtin_nodes::{self, BuiltinClass, BuiltinNode, Places};
use crate::graph::{Graph, Input};
use crate::loader::{DeviceError, Plugin};
use crate::object_info;

/// The pack that the editor shows for the host's own nodes.
const OWN_PACK: &str = "nodes";

/// Two classes of one name.
#[derive(Debug, thiserror::Error)]
#[error("the node class {class} is in {first} and in {second}; load only one of them")]
pub(crate) struct DuplicateClass {
    class: String,
    first: String,
    second: String,
}

enum Origin {
    Builtin(&'static BuiltinClass),
    Plugin(usize),
}

struct Class {
    descriptor: NodeDescriptor,
    origin: Origin,
}

/// See the module.
pub(crate) struct Catalog {
    classes: BTreeMap<String, Class>,
    plugins: Vec<Plugin>,
    places: Arc<Places>,
}

impl Catalog {
    /// The host's nodes and the plugins'; `places` is where the host's nodes look for files.
    ///
    /// # Errors
    /// Two classes of one name.
    pub(crate) fn new(plugins: Vec<Plugin>, places: Places) -> Result<Self, DuplicateClass> {
        let builtin = builtin_nodes::CLASSES.iter().map(|class| Class {
            descriptor: (class.descriptor)(),
            origin: Origin::Builtin(class),
        });
        let foreign = plugins.iter().enumerate().flat_map(|(i, plugin)| {
            plugin.nodes.iter().map(move |node| Class {
                descriptor: node.clone(),
                origin: Origin::Plugin(i),
            })
        });
        let pack = |origin: &Origin| match origin {
            Origin::Builtin(_) => "the host".to_owned(),
            Origin::Plugin(i) => format!("the plugin {}", plugins[*i].path.display()),
        };
        let mut classes: BTreeMap<String, Class> = BTreeMap::new();
        for class in builtin.chain(foreign) {
            let name = class.descriptor.class.clone();
            if let Some(first) = classes.get(&name) {
                let (first, second) = (pack(&first.origin), pack(&class.origin));
                return Err(DuplicateClass {
                    class: name,
                    first,
                    second,
                });
            }
            classes.insert(name, class);
        }
        Ok(Self {
            classes,
            plugins,
            places: Arc::new(places),
        })
    }

    /// Only the host's nodes.
    #[cfg(test)]
    pub(crate) fn builtin_only() -> Self {
        Self::new(Vec::new(), Places::default()).unwrap()
    }

    /// What a class is.
    pub(crate) fn descriptor(&self, class: &str) -> Option<&NodeDescriptor> {
        self.classes.get(class).map(|class| &class.descriptor)
    }

    /// All classes, by name.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = &NodeDescriptor> {
        self.classes.values().map(|class| &class.descriptor)
    }

    /// Where the host's nodes look for files.
    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    /// The loaded plugins.
    pub(crate) fn plugins(&self) -> &[Plugin] {
        &self.plugins
    }

    /// Opens the devices that plugins compute on, if they are not open; by plugin, with their memory now.
    ///
    /// # Errors
    /// The first plugin that has none to compute on.
    pub(crate) fn devices(&self) -> Result<Devices, DeviceError> {
        let of_plugin = |plugin: &Plugin| Ok((plugin.name.clone(), plugin.devices()?));
        let devices = self.plugins.iter().map(of_plugin);
        Ok(Devices(devices.collect::<Result<_, _>>()?))
    }

    /// What changes when the code of a class does.
    pub(crate) fn build_of(&self, class: &str) -> &str {
        match self.classes.get(class).map(|class| &class.origin) {
            Some(Origin::Plugin(i)) => &self.plugins[*i].build,
            _ => env!("CARGO_PKG_VERSION"),
        }
    }

    /// A node of this class.
    ///
    /// # Errors
    /// The class is not known, or its plugin cannot make it.
    pub(crate) fn create(&self, class: &str) -> Result<Instance, NodeError> {
        match self.classes.get(class).map(|class| &class.origin) {
            Some(Origin::Builtin(builtin)) => {
                Ok(Instance::Builtin((builtin.make)(self.places.clone())))
            }
            Some(Origin::Plugin(i)) => Ok(Instance::Plugin(self.plugins[*i].create(class)?)),
            None => Err(unknown(class)),
        }
    }

    /// A node's own check of complete parameters.
    ///
    /// # Errors
    /// The first problem, or those of [`Self::create`].
    pub(crate) fn validate(
        &self,
        class: &str,
        parameters: &Map<String, Value>,
    ) -> Result<(), NodeError> {
        match self.classes.get(class).map(|class| &class.origin) {
            Some(Origin::Builtin(builtin)) => {
                (builtin.make)(self.places.clone()).validate(parameters)
            }
            Some(Origin::Plugin(i)) => self.plugins[*i].validate(class, &json(parameters)),
            None => Err(unknown(class)),
        }
    }

    /// ComfyUI's `/object_info` document, by class name.
    pub(crate) fn object_info(&self) -> Map<String, Value> {
        let entry = |(name, class): (&String, &Class)| {
            let info = match &class.origin {
                Origin::Plugin(i) => object_info::class(&class.descriptor, &self.plugins[*i].name),
                Origin::Builtin(builtin) => {
                    let mut info = object_info::class(&class.descriptor, OWN_PACK);
                    info["python_module"] = OWN_PACK.into();
                    (builtin.editor_hints)(&mut info);
                    info
                }
            };
            (name.clone(), info)
        };
        self.classes.iter().map(entry).collect()
    }

    /// The graph with a value for every parameter that is neither typed nor linked: other clients of the API demand all.
    pub(crate) fn with_defaults(&self, graph: &Graph) -> Graph {
        let mut graph = graph.clone();
        for node in graph.nodes.values_mut() {
            for widget in self
                .descriptor(&node.class)
                .into_iter()
                .flat_map(|class| &class.widgets)
            {
                let input = node.inputs.entry(widget.name.clone());
                input.or_insert_with(|| Input::Value(widget.default_value()));
            }
        }
        graph
    }
}

/// Devices by the name of the plugin that computes on them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Devices(Vec<(String, Vec<DeviceDescriptor>)>);

impl Devices {
    /// Those of one plugin.
    pub(crate) fn of(&self, plugin: &str) -> &[DeviceDescriptor] {
        let found = self.0.iter().find(|(name, _)| name == plugin);
        found.map_or(&[], |(_, devices)| devices)
    }

    /// All of them, each once.
    pub(crate) fn all(&self) -> Vec<&DeviceDescriptor> {
        let mut all: Vec<&DeviceDescriptor> = Vec::new();
        for device in self.0.iter().flat_map(|(_, devices)| devices) {
            if !all
                .iter()
                .any(|known| (known.kind, known.index) == (device.kind, device.index))
            {
                all.push(device);
            }
        }
        all
    }

    /// A line for each: who computes where.
    pub(crate) fn lines(&self) -> Vec<String> {
        let line = |(plugin, devices): &(String, Vec<DeviceDescriptor>)| {
            let devices: Vec<_> = devices.iter().map(ToString::to_string).collect();
            (!devices.is_empty()).then(|| format!("{plugin} computes on {}", devices.join(" and ")))
        };
        self.0.iter().filter_map(line).collect()
    }
}

/// A node that can run, whoever made it.
pub(crate) enum Instance {
    Builtin(Box<dyn BuiltinNode>),
    Plugin(LoadedNode),
}

impl Instance {
    /// What the result hangs on besides inputs and parameters.
    ///
    /// # Errors
    /// Parameters that cannot be read, or a fault of the node.
    pub(crate) fn fingerprint(&self, parameters: &Map<String, Value>) -> Result<String, NodeError> {
        match self {
            Self::Builtin(node) => Ok(node.fingerprint(parameters)),
            Self::Plugin(node) => node.fingerprint(&json(parameters)),
        }
    }

    /// Runs the node on complete parameters.
    ///
    /// # Errors
    /// The node's error.
    pub(crate) fn run(
        &mut self,
        inputs: BTreeMap<String, WireValue>,
        parameters: &Map<String, Value>,
        context: impl HostContext,
    ) -> Result<Outputs, NodeError> {
        match self {
            Self::Builtin(node) => {
                let (host, fault) = Host::from_context(context);
                fault.or(guarded_host("a node of the host", || {
                    node.run(&mut Inputs::new(inputs), parameters, &host)
                }))
            }
            Self::Plugin(node) => node.run(inputs, &json(parameters), context),
        }
    }
}

fn unknown(class: &str) -> NodeError {
    let text = format!("no node of the class {class} is known");
    NodeError::new(ErrorCode::InvalidInput, text)
}

fn json(parameters: &Map<String, Value>) -> String {
    Value::Object(parameters.clone()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_builtin_class_describes_itself_to_the_editor() {
        let catalog = Catalog::builtin_only();
        let info = catalog.object_info();
        for (name, entry) in &info {
            assert_eq!(entry["name"], name.as_str());
            assert_eq!(entry["python_module"], "nodes");
            for key in [
                "display_name",
                "description",
                "category",
                "output_node",
                "input",
                "input_order",
            ] {
                assert!(!entry[key].is_null(), "{name}.{key}");
            }
            assert!(catalog.create(name).is_ok());
        }
        assert_eq!(
            info["LoadImage"]["input"]["required"]["image"][1]["image_upload"],
            true
        );
    }
}
