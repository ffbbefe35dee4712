//! What a node is, readable without making one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

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
    /// The type of what goes through it: two sockets link when these are equal.
    pub port: String,
    /// Whether the node runs without it.
    #[serde(default)]
    pub optional: bool,
    /// One or two sentences.
    #[serde(default)]
    pub tooltip: String,
}

/// A socket that gives a value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OutputSocket {
    /// Stable name.
    pub name: String,
    /// The type of what goes through it: two sockets link when these are equal.
    pub port: String,
    /// One or two sentences.
    #[serde(default)]
    pub tooltip: String,
}

/// A node class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NodeDescriptor {
    /// Stable id.
    pub class: String,
    /// Free label.
    #[serde(default)]
    pub display_name: String,
    /// What it does, for a person.
    #[serde(default)]
    pub description: String,
    /// Menu path, `/`-separated.
    #[serde(default)]
    pub category: String,
    /// Sockets that take values.
    #[serde(default)]
    pub inputs: Vec<InputSocket>,
    /// Parameters.
    #[serde(default)]
    pub widgets: Vec<Widget>,
    /// Sockets that give values.
    #[serde(default)]
    pub outputs: Vec<OutputSocket>,
    /// Whether the graph runs for the sake of this node: it saves or shows something.
    #[serde(default)]
    pub output_node: bool,
    /// Other words that find it.
    #[serde(default)]
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
}
