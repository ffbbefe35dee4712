//! The editor's document as typed data: format 0.4 (links are lists) and 1 (links are objects).
//!
//! A view for reading only. Keys that are not named here are ignored; the document itself keeps them.

use serde::Deserialize;
use serde_json::{Map, Value};

/// Node modes that change what runs.
pub(super) const MODE_MUTED: i64 = 2;
/// The node is left out and its inputs go through.
pub(super) const MODE_BYPASSED: i64 = 4;

/// Id of the node that stands for a subgraph's inputs inside of it.
pub(super) const SUBGRAPH_INPUT: &str = "-10";
/// Id of the node that stands for a subgraph's outputs inside of it.
pub(super) const SUBGRAPH_OUTPUT: &str = "-20";

/// A graph or a subgraph.
#[derive(Debug, Deserialize)]
pub(super) struct EditorGraph {
    /// Of a subgraph: the class of the nodes that stand for it.
    #[serde(default)]
    pub(super) id: Value,
    pub(super) nodes: Vec<EditorNode>,
    /// Of a subgraph: what its nodes are given, in the order of the slots of [`SUBGRAPH_INPUT`].
    #[serde(default)]
    pub(super) inputs: Vec<SubgraphSocket>,
    #[serde(default)]
    pub(super) links: Vec<Option<EditorLink>>,
    #[serde(default)]
    pub(super) definitions: Definitions,
}

#[derive(Debug, Deserialize)]
pub(super) struct SubgraphSocket {
    #[serde(default)]
    pub(super) name: String,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Definitions {
    #[serde(default)]
    pub(super) subgraphs: Vec<EditorGraph>,
}

#[derive(Debug, Deserialize)]
pub(super) struct EditorNode {
    id: Value,
    #[serde(rename = "type")]
    pub(super) class: String,
    #[serde(default)]
    pub(super) title: Option<String>,
    #[serde(default)]
    pub(super) mode: i64,
    #[serde(default)]
    inputs: Option<Vec<EditorSocket>>,
    #[serde(default)]
    outputs: Option<Vec<EditorSocket>>,
    #[serde(default)]
    pub(super) widgets_values: Value,
    #[serde(default)]
    pub(super) widgets_values_named: Option<Map<String, Value>>,
    #[serde(default)]
    properties: Properties,
}

#[derive(Debug, Default, Deserialize)]
#[serde(from = "Value")]
struct Properties {
    proxy_widgets: Vec<ProxyWidget>,
}

/// Whose widget a subgraph's node shows: an inner node's, or -1 for that of the subgraph's own input of this name.
#[derive(Debug)]
pub(super) struct ProxyWidget {
    pub(super) node: String,
    pub(super) widget: String,
}

impl From<Value> for Properties {
    /// What extensions keep there is theirs: other shapes are no error.
    fn from(properties: Value) -> Self {
        let proxy = |entry: &Value| {
            Some(ProxyWidget {
                node: id_text(entry.get(0)?),
                widget: entry.get(1)?.as_str()?.to_owned(),
            })
        };
        let listed = properties.get("proxyWidgets").and_then(Value::as_array);
        Self {
            proxy_widgets: listed.into_iter().flatten().filter_map(proxy).collect(),
        }
    }
}

impl EditorNode {
    pub(super) fn id(&self) -> String {
        id_text(&self.id)
    }

    pub(super) fn inputs(&self) -> &[EditorSocket] {
        self.inputs.as_deref().unwrap_or_default()
    }

    pub(super) fn outputs(&self) -> &[EditorSocket] {
        self.outputs.as_deref().unwrap_or_default()
    }

    /// In the order of the node's values, as far as there are any.
    pub(super) fn proxy_widgets(&self) -> &[ProxyWidget] {
        &self.properties.proxy_widgets
    }

    /// The first of the saved values.
    pub(super) fn first_value(&self) -> Option<&Value> {
        match &self.widgets_values {
            Value::Array(values) => values.first(),
            Value::Object(named) => named.values().next(),
            _ => None,
        }
    }

    /// Nodes that exist in the editor only.
    pub(super) fn is_note(&self) -> bool {
        matches!(self.class.as_str(), "Note" | "MarkdownNote")
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct EditorSocket {
    #[serde(default)]
    pub(super) name: String,
    /// A name, or a number in very old files.
    #[serde(default, rename = "type")]
    pub(super) kind: Value,
    #[serde(default)]
    pub(super) link: Option<i64>,
    #[serde(default)]
    pub(super) widget: Option<Value>,
}

/// `[id, source, source slot, target, target slot, type]` or an object.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum EditorLink {
    List(
        i64,
        Value,
        usize,
        Value,
        usize,
        #[expect(dead_code, reason = "the sockets tell the type")] Value,
    ),
    Object {
        id: i64,
        origin_id: Value,
        origin_slot: usize,
        target_id: Value,
        target_slot: usize,
    },
}

impl EditorLink {
    pub(super) fn id(&self) -> i64 {
        match self {
            Self::List(id, ..) | Self::Object { id, .. } => *id,
        }
    }

    /// Node and output.
    pub(super) fn source(&self) -> (String, usize) {
        match self {
            Self::List(_, node, slot, ..)
            | Self::Object {
                origin_id: node,
                origin_slot: slot,
                ..
            } => (id_text(node), *slot),
        }
    }

    /// Node and input.
    pub(super) fn target(&self) -> (String, usize) {
        match self {
            Self::List(_, _, _, node, slot, _)
            | Self::Object {
                target_id: node,
                target_slot: slot,
                ..
            } => (id_text(node), *slot),
        }
    }
}

pub(super) fn id_text(id: &Value) -> String {
    id.as_str().map_or_else(|| id.to_string(), str::to_owned)
}
