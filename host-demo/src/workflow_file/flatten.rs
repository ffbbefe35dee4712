//! The editor's document to a plain graph: subgraphs are opened, reroutes and bypassed nodes become the links that
//! they stand for, notes and muted nodes are gone.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::editor::{
    EditorGraph, EditorLink, EditorNode, EditorSocket, MODE_BYPASSED, MODE_MUTED, SUBGRAPH_INPUT,
    SUBGRAPH_OUTPUT, id_text,
};
use super::widgets::named_values;
use crate::catalog::Catalog;
use crate::graph::{Graph, GraphNode, Input, NodeId};

/// Deepest nesting of subgraphs, and longest chain of reroutes, that is followed.
const MAX_HOPS: usize = 256;

/// The graph that a document describes.
///
/// # Errors
/// What is wrong with the document, in one sentence without a full stop.
pub(super) fn graph_of(
    document: &Value,
    catalog: &Catalog,
    max_nodes: usize,
) -> Result<Graph, String> {
    let root = EditorGraph::deserialize(document).map_err(|error| error.to_string())?;
    let subgraphs: BTreeMap<String, &EditorGraph> = root
        .definitions
        .subgraphs
        .iter()
        .map(|graph| (id_text(&graph.id), graph))
        .collect();
    let mut scopes = Scopes {
        all: Vec::new(),
        n_nodes: 0,
        max_nodes,
    };
    scopes.open(&root, None, &subgraphs, 0)?;
    let mut graph = Graph::default();
    for (i, scope) in scopes.all.iter().enumerate() {
        for node in scope.nodes.values() {
            if scopes.runs(i, node) {
                graph
                    .nodes
                    .insert(scope.id(node), scopes.node(i, node, catalog)?);
            }
        }
    }
    Ok(graph)
}

/// Where a value comes from once everything in between is followed.
enum Source {
    Node(NodeId, usize),
    Value(Value),
    Nothing,
}

/// One graph, or one use of a subgraph.
struct Scope<'a> {
    nodes: BTreeMap<String, &'a EditorNode>,
    links: BTreeMap<i64, &'a EditorLink>,
    /// The scope and node that stand for this subgraph.
    outer: Option<(usize, &'a EditorNode)>,
    /// `12:` inside of node 12.
    prefix: String,
    /// Subgraph nodes in here, by node id.
    inner: BTreeMap<String, usize>,
}

impl Scope<'_> {
    fn id(&self, node: &EditorNode) -> NodeId {
        NodeId::new(format!("{}{}", self.prefix, node.id()))
    }
}

struct Scopes<'a> {
    all: Vec<Scope<'a>>,
    n_nodes: usize,
    max_nodes: usize,
}

impl<'a> Scopes<'a> {
    fn open(
        &mut self,
        graph: &'a EditorGraph,
        outer: Option<(usize, &'a EditorNode)>,
        subgraphs: &BTreeMap<String, &'a EditorGraph>,
        depth: usize,
    ) -> Result<usize, String> {
        self.n_nodes += graph.nodes.len();
        if self.n_nodes > self.max_nodes {
            return Err(format!("it has more than {} nodes", self.max_nodes));
        }
        if depth > MAX_HOPS {
            return Err("its subgraphs contain each other".to_owned());
        }
        let prefix = outer.map_or_else(String::new, |(scope, node)| {
            format!("{}:", self.all[scope].id(node))
        });
        let index = self.all.len();
        self.all.push(Scope {
            nodes: graph.nodes.iter().map(|node| (node.id(), node)).collect(),
            links: graph
                .links
                .iter()
                .flatten()
                .map(|link| (link.id(), link))
                .collect(),
            outer,
            prefix,
            inner: BTreeMap::new(),
        });
        for node in &graph.nodes {
            let is_open = node.mode != MODE_MUTED && node.mode != MODE_BYPASSED;
            if let Some(subgraph) = subgraphs.get(&node.class).filter(|_| is_open) {
                let inner = self.open(subgraph, Some((index, node)), subgraphs, depth + 1)?;
                self.all[index].inner.insert(node.id(), inner);
            }
        }
        Ok(index)
    }

    fn runs(&self, scope: usize, node: &EditorNode) -> bool {
        let is_virtual =
            node.is_note() || matches!(node.class.as_str(), "Reroute" | "PrimitiveNode");
        let is_off = node.mode == MODE_MUTED || node.mode == MODE_BYPASSED;
        !is_virtual && !is_off && !self.all[scope].inner.contains_key(&node.id())
    }

    fn node(
        &self,
        scope: usize,
        node: &EditorNode,
        catalog: &Catalog,
    ) -> Result<GraphNode, String> {
        let widgets = catalog
            .descriptor(&node.class)
            .map_or(&[][..], |descriptor| &descriptor.widgets);
        let values = named_values(node, widgets);
        let mut inputs: BTreeMap<String, Input> = values
            .into_iter()
            .map(|(name, value)| (name, Input::Value(value)))
            .collect();
        for socket in node.inputs() {
            let Some(link) = socket.link else { continue };
            match self.follow(scope, link, 0)? {
                Source::Node(node, output) => {
                    inputs.insert(socket.name.clone(), Input::Link { node, output })
                }
                Source::Value(value) => inputs.insert(socket.name.clone(), Input::Value(value)),
                Source::Nothing => None,
            };
        }
        let title = node.title.clone().filter(|title| !title.is_empty());
        Ok(GraphNode {
            class: node.class.clone(),
            title: title.unwrap_or_else(|| node.class.clone()),
            inputs,
        })
    }

    /// Where the value on a link comes from.
    fn follow(&self, scope: usize, link: i64, hops: usize) -> Result<Source, String> {
        if hops > MAX_HOPS {
            return Err(format!(
                "the link {link} goes round in circles without meeting a node that runs"
            ));
        }
        let here = &self.all[scope];
        let Some(found) = here.links.get(&link) else {
            return Err(format!(
                "the link {link} is used but not in the list of links"
            ));
        };
        let (id, slot) = found.source();
        if id == SUBGRAPH_INPUT {
            return self.follow_outward(scope, slot, hops);
        }
        let Some(node) = here.nodes.get(&id) else {
            return Err(format!(
                "the link {link} comes from the node {id}, which is not there"
            ));
        };
        if let Some(&inner) = here.inner.get(&id) {
            return self.follow_inward(inner, slot, hops);
        }
        let passed_on = |socket: Option<&EditorSocket>| match socket.and_then(|socket| socket.link)
        {
            Some(link) => self.follow(scope, link, hops + 1),
            None => Ok(Source::Nothing),
        };
        match (node.mode, node.class.as_str()) {
            (MODE_MUTED, _) => Ok(Source::Nothing),
            (MODE_BYPASSED, _) => passed_on(bypass(node, slot)),
            (_, "Reroute") => passed_on(node.inputs().first()),
            (_, "PrimitiveNode") => Ok(primitive(node)),
            _ => Ok(Source::Node(here.id(node), slot)),
        }
    }

    /// From inside of a subgraph to what its node is given.
    fn follow_outward(&self, scope: usize, slot: usize, hops: usize) -> Result<Source, String> {
        let Some((outer, node)) = self.all[scope].outer else {
            return Err("a link comes from the inputs of a subgraph outside of any".to_owned());
        };
        let Some(socket) = node.inputs().get(slot) else {
            return Ok(Source::Nothing);
        };
        if let Some(link) = socket.link {
            return self.follow(outer, link, hops + 1);
        }
        let is_widget = |socket: &&EditorSocket| socket.widget.is_some();
        let named = node
            .widgets_values_named
            .as_ref()
            .and_then(|named| named.get(&socket.name));
        let position = node.inputs()[..slot].iter().filter(is_widget).count();
        let value = named
            .or_else(|| node.widgets_values.get(position))
            .filter(|_| socket.widget.is_some());
        Ok(value.map_or(Source::Nothing, |value| Source::Value(value.clone())))
    }

    /// From a subgraph's output to the node inside that makes it.
    fn follow_inward(&self, inner: usize, slot: usize, hops: usize) -> Result<Source, String> {
        let leads_out = |link: &&&EditorLink| link.target() == (SUBGRAPH_OUTPUT.to_owned(), slot);
        match self.all[inner].links.values().find(leads_out) {
            Some(link) => self.follow(inner, link.id(), hops + 1),
            None => Ok(Source::Nothing),
        }
    }
}

/// The input that a bypassed node passes on: the one beside the output if it fits, else the first that does.
fn bypass(node: &EditorNode, output: usize) -> Option<&EditorSocket> {
    let kind = &node.outputs().get(output)?.kind;
    let fits = |socket: &&EditorSocket| socket.kind == *kind;
    node.inputs()
        .get(output)
        .filter(fits)
        .or_else(|| node.inputs().iter().find(fits))
}

fn primitive(node: &EditorNode) -> Source {
    let values = match &node.widgets_values {
        Value::Array(values) => values.first(),
        Value::Object(named) => named.values().next(),
        _ => None,
    };
    values.map_or(Source::Nothing, |value| Source::Value(value.clone()))
}
