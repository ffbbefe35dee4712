//! A graph as data: nodes, their parameters and their links. No file, no plugin, no picture.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value, json};

/// Bytes of the longest id of a node.
const MAX_ID: usize = 1024;

/// Name of a node in its graph; inside of subgraphs `outer:inner`. Ordered as people count: 2 before 10.
/// Orders and lists of problems name nodes over and over: a copy is cheap.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct NodeId(Arc<str>);

impl NodeId {
    pub(crate) fn new(id: impl AsRef<str>) -> Self {
        Self(id.as_ref().into())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    fn parts(&self) -> impl Iterator<Item = (u64, &str)> {
        let number = |part: &str| part.parse().unwrap_or(u64::MAX);
        self.0.split(':').map(move |part| (number(part), part))
    }
}

impl Ord for NodeId {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(other.parts())
    }
}

impl PartialOrd for NodeId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What stands on an input.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Input {
    /// A parameter.
    Value(Value),
    /// The output number `output` (from 0) of another node.
    Link { node: NodeId, output: usize },
}

/// A node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GraphNode {
    /// Its class.
    pub(crate) class: String,
    /// What its author called it; the class if nothing.
    pub(crate) title: String,
    /// Parameters and links by input name.
    pub(crate) inputs: BTreeMap<String, Input>,
}

impl GraphNode {
    /// The parameters that are values.
    pub(crate) fn parameters(&self) -> Map<String, Value> {
        let value = |(name, input): (&String, &Input)| match input {
            Input::Value(value) => Some((name.clone(), value.clone())),
            Input::Link { .. } => None,
        };
        self.inputs.iter().filter_map(value).collect()
    }

    /// The links, by input name.
    pub(crate) fn links(&self) -> impl Iterator<Item = (&str, &NodeId, usize)> {
        self.inputs.iter().filter_map(|(name, input)| match input {
            Input::Link { node, output } => Some((name.as_str(), node, *output)),
            Input::Value(_) => None,
        })
    }
}

/// Nodes by id.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Graph {
    pub(crate) nodes: BTreeMap<NodeId, GraphNode>,
}

impl Graph {
    /// Reads the form that ComfyUI's API takes: `{id: {class_type, inputs, _meta}}`.
    ///
    /// # Errors
    /// The first entry that is no node, in one sentence.
    pub(crate) fn from_api(document: &Map<String, Value>) -> Result<Self, String> {
        let nodes = document
            .iter()
            .map(|(id, entry)| Ok((NodeId::new(id), node_from_api(id, entry)?)));
        let graph = Self {
            nodes: nodes.collect::<Result<_, String>>()?,
        };
        graph.check_ids()?;
        Ok(graph)
    }

    /// Whether lists may name the nodes.
    ///
    /// # Errors
    /// A sentence about an id that is too long.
    pub(crate) fn check_ids(&self) -> Result<(), String> {
        let is_long = |id: &&NodeId| id.as_str().len() > MAX_ID;
        let Some(id) = self.nodes.keys().find(is_long) else {
            return Ok(());
        };
        let start: String = id.as_str().chars().take(40).collect();
        Err(format!(
            "the id of the node {start}… is longer than {MAX_ID} bytes"
        ))
    }

    /// Writes that form.
    pub(crate) fn to_api(&self) -> Value {
        let entries = self.nodes.iter().map(|(id, node)| {
            let input = |input: &Input| match input {
                // A list would be read as a link.
                Input::Value(list @ Value::Array(_)) => json!({"__value__": list}),
                Input::Value(value) => value.clone(),
                Input::Link { node, output } => json!([node.as_str(), output]),
            };
            let inputs: Map<_, _> = node
                .inputs
                .iter()
                .map(|(name, i)| (name.clone(), input(i)))
                .collect();
            let entry =
                json!({"class_type": node.class, "inputs": inputs, "_meta": {"title": node.title}});
            (id.as_str().to_owned(), entry)
        });
        Value::Object(entries.collect())
    }
}

fn node_from_api(id: &str, entry: &Value) -> Result<GraphNode, String> {
    let Some(class) = entry.get("class_type").and_then(Value::as_str) else {
        return Err(format!("the entry \"{id}\" has no class_type"));
    };
    let title = entry
        .pointer("/_meta/title")
        .and_then(Value::as_str)
        .unwrap_or(class);
    let inputs = match entry.get("inputs") {
        None | Some(Value::Null) => BTreeMap::new(),
        Some(Value::Object(inputs)) => inputs
            .iter()
            .map(|(name, value)| (name.clone(), input_from_api(value)))
            .collect(),
        Some(_) => {
            return Err(format!(
                "the inputs of the node {id} ({class}) are no JSON object"
            ));
        }
    };
    Ok(GraphNode {
        class: class.to_owned(),
        title: title.to_owned(),
        inputs,
    })
}

fn input_from_api(value: &Value) -> Input {
    if let Some([Value::String(node), output]) = value.as_array().map(Vec::as_slice)
        && let Some(output) = output.as_u64()
    {
        return Input::Link {
            node: NodeId::new(node),
            output: output as usize,
        };
    }
    Input::Value(value.get("__value__").unwrap_or(value).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_ordered_as_people_count() {
        let mut ids: Vec<_> = ["10", "2", "12:5", "12", "a", "12:10"]
            .map(NodeId::new)
            .into();
        ids.sort();
        let ids: Vec<_> = ids.iter().map(NodeId::as_str).collect();
        assert_eq!(ids, ["2", "10", "12", "12:5", "12:10", "a"]);
    }

    #[test]
    fn the_api_form_survives_a_round_trip() {
        let document = json!({
            "1": {"class_type": "Load", "inputs": {"image": "a.png"}, "_meta": {"title": "My picture"}},
            "2": {"class_type": "Show", "inputs": {"images": ["1", 0], "sizes": {"__value__": [1, 2]}}, "_meta": {"title": "Show"}}
        });
        let graph = Graph::from_api(document.as_object().unwrap()).unwrap();
        let show = &graph.nodes[&NodeId::new("2")];
        assert_eq!(
            show.inputs["images"],
            Input::Link {
                node: NodeId::new("1"),
                output: 0
            }
        );
        assert_eq!(show.inputs["sizes"], Input::Value(json!([1, 2])));
        assert_eq!(graph.to_api(), document);
    }

    #[test]
    fn entries_that_are_no_nodes_are_named() {
        let document = json!({"7": {"inputs": {}}});
        assert_eq!(
            Graph::from_api(document.as_object().unwrap()).unwrap_err(),
            "the entry \"7\" has no class_type"
        );
    }
}
