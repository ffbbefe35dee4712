//! What a node is, readable without making one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parameter::{ParameterProblem, Widget, check_all, widgets_of};

/// Everything that a plugin says about itself.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PluginDescriptor {
    /// Name of the plugin: stable.
    pub name: String,
    /// Version of the plugin.
    pub version: String,
    /// Its nodes.
    pub nodes: Vec<NodeDescriptor>,
}

/// A socket that takes a value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InputSocket {
    /// Stable name.
    pub name: String,
    /// A name of [`crate::port`], or a plugin's own.
    pub port: String,
    /// Whether the node runs without it.
    pub optional: bool,
    /// One or two sentences.
    pub tooltip: String,
}

impl InputSocket {
    /// The input's entry in ComfyUI's `/object_info` document.
    #[must_use]
    pub fn object_info(&self) -> Value {
        json!([self.port, {"tooltip": self.tooltip}])
    }
}

/// A socket that gives a value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OutputSocket {
    /// Stable name.
    pub name: String,
    /// A name of [`crate::port`], or a plugin's own.
    pub port: String,
    /// One or two sentences.
    pub tooltip: String,
}

/// A node class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NodeDescriptor {
    /// Stable id.
    pub class: String,
    /// Free label.
    pub display_name: String,
    /// What it does, for a person.
    pub description: String,
    /// Menu path, `/`-separated.
    pub category: String,
    /// Sockets that take values.
    pub inputs: Vec<InputSocket>,
    /// Parameters.
    pub widgets: Vec<Widget>,
    /// Sockets that give values.
    pub outputs: Vec<OutputSocket>,
    /// Whether the graph runs for the sake of this node: it saves or shows something.
    pub output_node: bool,
    /// Other words that find it.
    pub search_aliases: Vec<String>,
}

impl NodeDescriptor {
    /// A node of this class whose widgets are the fields of `P`; add sockets with the methods below.
    #[must_use]
    pub fn new<P: JsonSchema>(
        class: &str,
        display_name: &str,
        category: &str,
        description: &str,
    ) -> Self {
        Self {
            class: class.to_owned(),
            display_name: display_name.to_owned(),
            description: description.to_owned(),
            category: category.to_owned(),
            inputs: Vec::new(),
            widgets: widgets_of::<P>(),
            outputs: Vec::new(),
            output_node: false,
            search_aliases: Vec::new(),
        }
    }

    /// Adds a required input.
    #[must_use]
    pub fn input(self, name: &str, port: &str, tooltip: &str) -> Self {
        self.socket(name, port, tooltip, false)
    }

    /// Adds an optional input.
    #[must_use]
    pub fn optional_input(self, name: &str, port: &str, tooltip: &str) -> Self {
        self.socket(name, port, tooltip, true)
    }

    fn socket(mut self, name: &str, port: &str, tooltip: &str, optional: bool) -> Self {
        self.inputs.push(InputSocket {
            name: name.into(),
            port: port.into(),
            optional,
            tooltip: tooltip.into(),
        });
        self
    }

    /// Adds an output.
    #[must_use]
    pub fn output(mut self, name: &str, port: &str, tooltip: &str) -> Self {
        self.outputs.push(OutputSocket {
            name: name.into(),
            port: port.into(),
            tooltip: tooltip.into(),
        });
        self
    }

    /// Marks a node that the graph runs for.
    #[must_use]
    pub fn output_node(mut self) -> Self {
        self.output_node = true;
        self
    }

    /// Adds words that find the node.
    #[must_use]
    pub fn aliases(mut self, words: &[&str]) -> Self {
        self.search_aliases = words.iter().map(ToString::to_string).collect();
        self
    }

    /// All parameters that do not fit, not only the first.
    #[must_use]
    pub fn check_parameters(&self, given: &Map<String, Value>) -> Vec<ParameterProblem> {
        check_all(&self.widgets, given)
    }

    /// The given parameters that the node has, [converted](Widget::converted), with defaults for the rest.
    #[must_use]
    pub fn completed_parameters(&self, given: &Map<String, Value>) -> Map<String, Value> {
        let value = |widget: &Widget| match given.get(&widget.name) {
            Some(value) => widget.converted(value),
            None => widget.default_value(),
        };
        self.widgets
            .iter()
            .map(|widget| (widget.name.clone(), value(widget)))
            .collect()
    }

    /// What ComfyUI's `/object_info` document says of one input, a socket's or a parameter's.
    #[must_use]
    pub fn input_info(&self, name: &str) -> Option<Value> {
        let socket = self.inputs.iter().find(|socket| socket.name == name);
        let widget = || self.widgets.iter().find(|widget| widget.name == name);
        socket
            .map(InputSocket::object_info)
            .or_else(|| widget().map(Widget::object_info))
    }

    /// The entry of ComfyUI's `/object_info` document; `pack` is the plugin's name.
    #[must_use]
    pub fn object_info(&self, pack: &str) -> Value {
        let entries = |optional: bool| -> Map<String, Value> {
            self.inputs
                .iter()
                .filter(|socket| socket.optional == optional)
                .map(|socket| (socket.name.clone(), socket.object_info()))
                .collect()
        };
        let (mut required, optional) = (entries(false), entries(true));
        required.extend(
            self.widgets
                .iter()
                .map(|widget| (widget.name.clone(), widget.object_info())),
        );
        let names = |map: &Map<String, Value>| map.keys().cloned().collect::<Vec<_>>();
        let outputs = |field: fn(&OutputSocket) -> &String| {
            self.outputs.iter().map(field).collect::<Vec<_>>()
        };
        json!({
            "input_order": {"required": names(&required), "optional": names(&optional)},
            "input": {"required": required, "optional": optional},
            "output": outputs(|socket| &socket.port),
            "output_is_list": vec![false; self.outputs.len()],
            "output_name": outputs(|socket| &socket.name),
            "output_tooltips": outputs(|socket| &socket.tooltip),
            "name": self.class,
            "display_name": self.display_name,
            "description": self.description,
            "python_module": format!("custom_nodes.{pack}"),
            "category": self.category,
            "output_node": self.output_node,
            "search_aliases": self.search_aliases,
            "deprecated": false,
            "experimental": false,
            "is_input_list": false,
        })
    }
}
