//! The editor's document to a plain graph: subgraphs are opened, reroutes, pairs of Set and Get nodes and bypassed nodes
//! become the links that they stand for, notes and muted nodes are gone.

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

/// Nodes of the editor alone that pass their input on.
const REROUTES: [&str; 2] = ["Reroute", "Reroute (rgthree)"];
/// Nodes of the editor alone that give their input a name, and those that take it from there.
const SETTERS: [&str; 2] = ["SetNode", "easy setNode"];
const GETTERS: [&str; 2] = ["GetNode", "easy getNode"];
/// Starts the classes of group nodes, the form before subgraphs.
const GROUP_NODES: [&str; 2] = ["workflow>", "workflow/"];

/// Where a value comes from once everything in between is followed.
enum Source {
    Node(NodeId, usize),
    Value(Value),
    Nothing,
}

/// One graph, or one use of a subgraph.
struct Scope<'a> {
    graph: &'a EditorGraph,
    nodes: BTreeMap<String, &'a EditorNode>,
    links: BTreeMap<i64, &'a EditorLink>,
    /// Links to the outputs of this subgraph, by their slots.
    outward: BTreeMap<usize, i64>,
    /// The scope and node that stand for this subgraph.
    outer: Option<(usize, &'a EditorNode)>,
    /// `12:` inside of node 12.
    prefix: String,
    /// Subgraph nodes in here, by node id.
    inner: BTreeMap<String, usize>,
    /// Slots of the subgraph's inputs that lead to widgets, in order, with the nodes and widgets that they lead to.
    widgets: BTreeMap<usize, Vec<(String, &'a str)>>,
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
        let nodes: BTreeMap<String, &EditorNode> =
            graph.nodes.iter().map(|node| (node.id(), node)).collect();
        let links: BTreeMap<i64, &EditorLink> = graph
            .links
            .iter()
            .flatten()
            .map(|link| (link.id(), link))
            .collect();
        let mut outward = BTreeMap::new();
        for (&id, link) in &links {
            let (target, slot) = link.target();
            if target == SUBGRAPH_OUTPUT {
                outward.entry(slot).or_insert(id);
            }
        }
        self.all.push(Scope {
            graph,
            widgets: promoted_widgets(graph, &nodes),
            nodes,
            links,
            outward,
            outer,
            prefix,
            inner: BTreeMap::new(),
        });
        for node in &graph.nodes {
            let is_open = node.mode != MODE_MUTED && node.mode != MODE_BYPASSED;
            let starts_so = |start: &&str| node.class.starts_with(start);
            if let Some(name) = node
                .class
                .get("workflow>".len()..)
                .filter(|_| is_open && GROUP_NODES.iter().any(starts_so))
            {
                return Err(format!(
                    "the node {} is the group node \"{name}\", which is no longer made: open the workflow in ComfyUI, \
                     convert the group node to a subgraph or to its nodes, and save it again",
                    node.id()
                ));
            }
            if let Some(subgraph) = subgraphs.get(&node.class).filter(|_| is_open) {
                let inner = self.open(subgraph, Some((index, node)), subgraphs, depth + 1)?;
                self.all[index].inner.insert(node.id(), inner);
            }
        }
        Ok(index)
    }

    fn runs(&self, scope: usize, node: &EditorNode) -> bool {
        let class = node.class.as_str();
        let is_virtual = node.is_note()
            || class == "PrimitiveNode"
            || [REROUTES, SETTERS, GETTERS].concat().contains(&class);
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
            (_, class) if REROUTES.contains(&class) || SETTERS.contains(&class) => {
                passed_on(node.inputs().first())
            }
            (_, class) if GETTERS.contains(&class) => self.follow_name(scope, node, hops),
            (_, "PrimitiveNode") => {
                let value = node.first_value().cloned();
                Ok(value.map_or(Source::Nothing, Source::Value))
            }
            _ => Ok(Source::Node(here.id(node), slot)),
        }
    }

    /// From a Get node to what the Set node of its name is given, here or in a graph around.
    fn follow_name(
        &self,
        scope: usize,
        getter: &EditorNode,
        hops: usize,
    ) -> Result<Source, String> {
        let name = getter.first_value();
        let sets_it = |node: &&&EditorNode| {
            SETTERS.contains(&node.class.as_str()) && name.is_some() && node.first_value() == name
        };
        let mut around = Some(scope);
        while let Some(scope) = around {
            let here = &self.all[scope];
            if let Some(setter) = here.nodes.values().find(sets_it) {
                let link = setter.inputs().first().and_then(|socket| socket.link);
                return match link.filter(|_| setter.mode != MODE_MUTED) {
                    Some(link) => self.follow(scope, link, hops + 1),
                    None => Ok(Source::Nothing),
                };
            }
            around = here.outer.map(|(outer, _)| outer);
        }
        let name = name.and_then(Value::as_str).unwrap_or_default();
        Err(format!(
            "the node {} ({}) asks for \"{name}\", which no Set node gives",
            getter.id(),
            getter.class
        ))
    }

    /// From inside of a subgraph to what its node is given.
    fn follow_outward(&self, scope: usize, slot: usize, hops: usize) -> Result<Source, String> {
        let Some((outer, node)) = self.all[scope].outer else {
            return Err("a link comes from the inputs of a subgraph outside of any".to_owned());
        };
        let definition = &self.all[scope].graph.inputs;
        let name = match definition.get(slot) {
            Some(input) => &input.name,
            None => match node.inputs().get(slot) {
                Some(socket) => &socket.name,
                None => return Ok(Source::Nothing),
            },
        };
        // Sockets of widgets that nothing is linked to may be left out: slots are those of the definition.
        let socket = node.inputs().iter().find(|socket| socket.name == *name);
        if let Some(link) = socket.and_then(|socket| socket.link) {
            return self.follow(outer, link, hops + 1);
        }
        let value = self.promoted_value(scope, node, slot, name);
        Ok(value.map_or(Source::Nothing, |value| Source::Value(value.clone())))
    }

    /// What was typed on a subgraph's node for one of its inputs.
    fn promoted_value<'n>(
        &self,
        scope: usize,
        node: &'n EditorNode,
        slot: usize,
        name: &str,
    ) -> Option<&'n Value> {
        if let Some(value) = node
            .widgets_values_named
            .as_ref()
            .and_then(|named| named.get(name))
        {
            return Some(value);
        }
        if let Value::Object(named) = &node.widgets_values {
            return named.get(name);
        }
        let values = node.widgets_values.as_array()?;
        let proxies = node.proxy_widgets();
        let widgets = &self.all[scope].widgets;
        let inner = widgets.get(&slot);
        let position = if !proxies.is_empty() && proxies.len() == values.len() {
            proxies.iter().position(|proxy| {
                let is_shown =
                    |(id, widget): &(String, &str)| *id == proxy.node && *widget == proxy.widget;
                match proxy.node.as_str() {
                    "-1" => proxy.widget == name,
                    _ => inner.is_some_and(|inner| inner.iter().any(is_shown)),
                }
            })?
        } else {
            inner.map(|_| widgets.range(..slot).count())?
        };
        values.get(position)
    }

    /// From a subgraph's output to the node inside that makes it.
    fn follow_inward(&self, inner: usize, slot: usize, hops: usize) -> Result<Source, String> {
        match self.all[inner].outward.get(&slot) {
            Some(&link) => self.follow(inner, link, hops + 1),
            None => Ok(Source::Nothing),
        }
    }
}

/// Nodes and widgets inside of a subgraph by the slot of the input that leads to them.
fn promoted_widgets<'a>(
    graph: &'a EditorGraph,
    nodes: &BTreeMap<String, &'a EditorNode>,
) -> BTreeMap<usize, Vec<(String, &'a str)>> {
    let mut widgets: BTreeMap<usize, Vec<_>> = BTreeMap::new();
    for link in graph.links.iter().flatten() {
        let ((source, slot), (id, input)) = (link.source(), link.target());
        let socket = nodes.get(&id).and_then(|node| node.inputs().get(input));
        if let Some(socket) =
            socket.filter(|socket| source == SUBGRAPH_INPUT && socket.widget.is_some())
        {
            widgets
                .entry(slot)
                .or_default()
                .push((id, socket.name.as_str()));
        }
    }
    widgets
}

/// The input that a bypassed node passes on: the one beside the output if it fits, else the first of just its type, else
/// the first that fits.
fn bypass(node: &EditorNode, output: usize) -> Option<&EditorSocket> {
    let kind = &node.outputs().get(output)?.kind;
    let fitting = || {
        node.inputs()
            .iter()
            .filter(|socket| fits(&socket.kind, kind))
    };
    node.inputs()
        .get(output)
        .filter(|socket| fits(&socket.kind, kind))
        .or_else(|| fitting().find(|socket| socket.kind == *kind))
        .or_else(|| fitting().next())
}

/// Whether sockets of these types may be linked: lists of types that share one, or a wildcard.
fn fits(input: &Value, output: &Value) -> bool {
    let names = |kind: &Value| -> Option<Vec<String>> {
        let names = kind.as_str()?;
        let is_wild = names.is_empty() || names == "*";
        (!is_wild).then(|| {
            names
                .to_lowercase()
                .split(',')
                .map(|name| name.trim().to_owned())
                .collect()
        })
    };
    match (names(input), names(output)) {
        (Some(input), Some(output)) => input.iter().any(|name| output.contains(name)),
        // Events are numbers in very old files.
        _ => input == output || !(input.is_number() || output.is_number()),
    }
}
