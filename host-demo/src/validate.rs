//! Whether a graph can run: all problems at once, each with its code, node, input and sentence.
//!
//! The codes are ComfyUI's, so that its editor can show them on the nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::ZonedDateTime;
use serde_json::{Map, Value};

use crate::builtin_nodes::Places;
use crate::catalog::Catalog;
use crate::confined::PathError;
use crate::file_words;
use crate::graph::{Graph, GraphNode, Input, NodeId};
use crate::schedule::{self, Cycle};
use plugin_api::{InputSocket, NodeDescriptor, ProblemKind, Widget, WidgetKind};

/// Something that keeps a graph from running.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Problem {
    /// Stable name of the kind of problem.
    pub(crate) code: String,
    /// The node and its class, unless the problem is the whole graph's.
    pub(crate) node: Option<(NodeId, String)>,
    /// The input.
    pub(crate) input: Option<String>,
    /// One sentence.
    pub(crate) message: String,
}

impl Problem {
    /// A problem of the whole graph.
    pub(crate) fn general(code: &str, message: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            node: None,
            input: None,
            message: message.into(),
        }
    }

    /// A problem of one node.
    pub(crate) fn of_node(
        code: &str,
        id: &NodeId,
        class: &str,
        message: impl Into<String>,
    ) -> Self {
        let node = Some((id.clone(), class.to_owned()));
        Self {
            node,
            ..Self::general(code, message)
        }
    }

    /// Names the input.
    pub(crate) fn at(self, input: &str) -> Self {
        Self {
            input: Some(input.to_owned()),
            ..self
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.node, &self.input) {
            (Some((id, class)), Some(input)) => write!(f, "node {id} ({class}), input {input}: ")?,
            (Some((id, class)), None) => write!(f, "node {id} ({class}): ")?,
            (None, _) => {}
        }
        write!(f, "{} [{}]", self.message, self.code)
    }
}

/// What runs: the nodes that the output nodes need, sources first.
pub(crate) type Plan = Vec<NodeId>;

/// What of a graph can run, and what keeps the rest from it.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// The output nodes that can run.
    pub(crate) outputs: Vec<NodeId>,
    /// What they need, sources first.
    pub(crate) plan: Plan,
    /// Everything that is wrong.
    pub(crate) problems: Vec<Problem>,
    /// The output nodes that need a node with a problem.
    pub(crate) dependents: BTreeMap<NodeId, Vec<NodeId>>,
}

/// Checks a graph against the classes that there are.
///
/// # Errors
/// All problems of the nodes that would run.
pub(crate) fn validate(graph: &Graph, catalog: &Catalog) -> Result<Plan, Vec<Problem>> {
    let verdict = judge(graph, catalog, None);
    if verdict.problems.is_empty() {
        Ok(verdict.plan)
    } else {
        Err(verdict.problems)
    }
}

/// Checks every output node by itself; only those in `wanted`, if it is given.
pub(crate) fn judge(graph: &Graph, catalog: &Catalog, wanted: Option<&[NodeId]>) -> Verdict {
    let mut verdict = Verdict::default();
    for (id, node) in &graph.nodes {
        if catalog.descriptor(&node.class).is_none() {
            let message = format!(
                "no node of the class {} is known; `host-demo nodes` lists all, and --plugin adds a library",
                node.class
            );
            let problem = Problem::of_node("invalid_prompt", id, &node.class, message);
            verdict.problems.push(problem);
        }
    }
    let is_output = |id: &NodeId, node: &GraphNode| {
        catalog
            .descriptor(&node.class)
            .is_some_and(|class| class.output_node)
            && wanted.is_none_or(|wanted| wanted.contains(id))
    };
    let targets: Vec<_> = graph
        .nodes
        .iter()
        .filter(|(id, node)| is_output(id, node))
        .map(|(id, _)| id.clone())
        .collect();
    if targets.is_empty() {
        let message =
            "the workflow has no output node, so nothing would run; add for example SaveImage";
        verdict
            .problems
            .push(Problem::general("prompt_no_outputs", message));
    }
    let mut needs = Vec::new();
    for target in targets {
        let order = schedule::order(graph, std::slice::from_ref(&target));
        if let Err(cycle) = &order {
            let problem = cycle_problem(graph, cycle);
            if !verdict.problems.contains(&problem) {
                verdict.problems.push(problem);
            }
        }
        needs.push((target, order.ok()));
    }
    // With a cycle there is no order; the nodes are checked all the same.
    let needed: BTreeSet<&NodeId> = if needs.iter().any(|(_, order)| order.is_none()) {
        graph.nodes.keys().collect()
    } else {
        needs
            .iter()
            .flat_map(|(_, order)| order.iter().flatten())
            .collect()
    };
    for id in needed {
        let node = &graph.nodes[id];
        if let Some(descriptor) = catalog.descriptor(&node.class) {
            let found = node_problems(graph, catalog, id, node, descriptor);
            verdict.problems.extend(found);
        }
    }
    settle(graph, &needs, &mut verdict);
    verdict
}

/// Outputs that are listed of a node with problems.
const MAX_DEPENDENTS: usize = 64;

/// Which output nodes can run, and which hang on a problem.
fn settle(graph: &Graph, needs: &[(NodeId, Option<Plan>)], verdict: &mut Verdict) {
    let broken: BTreeSet<NodeId> = verdict
        .problems
        .iter()
        .filter_map(|problem| problem.node.as_ref().map(|(id, _)| id.clone()))
        .collect();
    for (target, order) in needs {
        let hit: Vec<_> = order
            .iter()
            .flatten()
            .filter(|id| broken.contains(id))
            .collect();
        if order.is_some() && hit.is_empty() {
            verdict.outputs.push(target.clone());
        }
        for id in hit {
            let dependents = verdict.dependents.entry(id.clone()).or_default();
            if dependents.len() < MAX_DEPENDENTS {
                dependents.push(target.clone());
            }
        }
    }
    // The outputs were ordered one by one: together there is no cycle either.
    verdict.plan = schedule::order(graph, &verdict.outputs).unwrap_or_default();
}

fn cycle_problem(graph: &Graph, Cycle(nodes): &Cycle) -> Problem {
    let names: Vec<_> = nodes
        .iter()
        .map(|id| format!("{id} ({})", graph.nodes[id].class))
        .collect();
    let message = format!(
        "the nodes {} form a cycle, so none of them can run first; remove one of these links",
        names.join(" → ")
    );
    Problem::of_node(
        "dependency_cycle",
        &nodes[0],
        &graph.nodes[&nodes[0]].class,
        message,
    )
}

fn node_problems(
    graph: &Graph,
    catalog: &Catalog,
    id: &NodeId,
    node: &GraphNode,
    descriptor: &NodeDescriptor,
) -> Vec<Problem> {
    let problem = |code: &str, input: &str, message: String| {
        Problem::of_node(code, id, &node.class, message).at(input)
    };
    let mut problems = Vec::new();
    for socket in &descriptor.inputs {
        problems.extend(
            socket_problem(graph, catalog, node, socket)
                .map(|(code, m)| problem(code, &socket.name, m)),
        );
    }
    for widget in &descriptor.widgets {
        let linked = link_problem(graph, catalog, node, &widget.name, widget_port(widget));
        problems.extend(linked.map(|(code, m)| problem(code, &widget.name, m)));
    }
    let parameters = node.parameters();
    let unfit = descriptor.check_parameters(&parameters);
    problems.extend(
        unfit
            .into_iter()
            .map(|p| problem(protocol_code(p.kind), &p.parameter, p.message)),
    );
    if problems.is_empty() {
        problems.extend(own_problem(graph, catalog, id, descriptor, &parameters));
    }
    problems
}

/// What the protocol calls it.
pub(crate) fn protocol_code(kind: ProblemKind) -> &'static str {
    match kind {
        ProblemKind::WrongType => "invalid_input_type",
        ProblemKind::TooSmall => "value_smaller_than_min",
        ProblemKind::TooLarge => "value_bigger_than_max",
        ProblemKind::NotAnOption => "value_not_in_list",
    }
}

type Found = Option<(&'static str, String)>;

fn socket_problem(
    graph: &Graph,
    catalog: &Catalog,
    node: &GraphNode,
    socket: &InputSocket,
) -> Found {
    let InputSocket {
        name,
        port,
        optional,
        ..
    } = socket;
    match node.inputs.get(name) {
        None if *optional => None,
        None => Some((
            "required_input_missing",
            format!("nothing is linked to it, it needs a link of type {port}"),
        )),
        Some(Input::Value(Value::Null)) if *optional => None,
        Some(Input::Value(value)) => Some((
            "invalid_input_type",
            format!("it needs a link of type {port}, got the value {value}"),
        )),
        Some(Input::Link { .. }) => link_problem(graph, catalog, node, name, port),
    }
}

/// What is wrong with the link on an input; `None` too if there is none.
fn link_problem(
    graph: &Graph,
    catalog: &Catalog,
    node: &GraphNode,
    input: &str,
    port: &str,
) -> Found {
    let Some(Input::Link {
        node: source_id,
        output,
    }) = node.inputs.get(input)
    else {
        return None;
    };
    let Some(source) = graph.nodes.get(source_id) else {
        return Some((
            "bad_linked_input",
            format!("it is linked to the node {source_id}, which is not there"),
        ));
    };
    // An unknown class is reported where it stands.
    let given = &catalog.descriptor(&source.class)?.outputs;
    let class = &source.class;
    match given.get(*output) {
        None => Some((
            "bad_linked_input",
            format!(
                "it is linked to output {output} of node {source_id} ({class}), which has {}",
                given.len()
            ),
        )),
        Some(socket) if socket.port != port => Some((
            "return_type_mismatch",
            format!(
                "it takes {port}, but the output {} of node {source_id} ({class}) gives {}",
                socket.name, socket.port
            ),
        )),
        Some(_) => None,
    }
}

/// The socket type of a widget that is linked instead of typed.
fn widget_port(widget: &Widget) -> &'static str {
    match widget.kind {
        WidgetKind::Integer { .. } => "INT",
        WidgetKind::Float { .. } => "FLOAT",
        WidgetKind::Text { .. } => "STRING",
        WidgetKind::Boolean { .. } => "BOOLEAN",
        WidgetKind::Choice { .. } => "COMBO",
    }
}

/// What the node itself says: files that are not there, lists that cannot be read.
fn own_problem(
    graph: &Graph,
    catalog: &Catalog,
    id: &NodeId,
    descriptor: &NodeDescriptor,
    parameters: &Map<String, Value>,
) -> Option<Problem> {
    let node = &graph.nodes[id];
    // A linked parameter is known only when the graph runs.
    let is_linked =
        |widget: &Widget| matches!(node.inputs.get(&widget.name), Some(Input::Link { .. }));
    if descriptor.widgets.iter().any(is_linked) {
        return None;
    }
    let mut complete = descriptor.completed_parameters(parameters);
    file_words::replace(&mut complete, graph, &ZonedDateTime::now());
    let problem =
        |message: &str| Problem::of_node("custom_validation_failed", id, &node.class, message);
    if let Some(text) = leads_out(catalog, &complete) {
        return Some(problem(&text).at(file_words::PARAMETER));
    }
    let error = catalog.validate(&node.class, &complete).err()?;
    let problem = problem(&error.message);
    Some(if error.input.is_empty() {
        problem
    } else {
        problem.at(&error.input)
    })
}

/// Of files that would be written through a link in a server's output folder, which nodes refuse when all else is done.
fn leads_out(catalog: &Catalog, parameters: &Map<String, Value>) -> Option<String> {
    let Places::Served { output, .. } = catalog.places() else {
        return None;
    };
    let prefix = parameters.get(file_words::PARAMETER)?.as_str()?;
    // What is wrong with it otherwise its node says.
    let refused = [prefix.to_owned(), format!("{prefix}x")]
        .into_iter()
        .filter_map(|name| output.place(&name).err())
        .find(|error| matches!(error, PathError::Outside(_)));
    refused.map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(document: Value) -> Vec<(String, String, String)> {
        let graph = Graph::from_api(document.as_object().unwrap()).unwrap();
        let catalog = Catalog::builtin_only();
        let problems = validate(&graph, &catalog).err().unwrap_or_default();
        problems
            .into_iter()
            .map(|p| {
                (
                    p.node.map(|n| n.0.to_string()).unwrap_or_default(),
                    p.input.unwrap_or_default(),
                    p.code,
                )
            })
            .collect()
    }

    fn node(class: &str, inputs: Value) -> Value {
        json!({"class_type": class, "inputs": inputs})
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let found = check(json!({
            "1": node("LoadImage", json!({"image": "no-such-file.png"})),
            "2": node("SaveImage", json!({"images": ["1", 1]})),
            "3": node("SaveImage", json!({"images": ["1", 7]})),
            "4": node("SaveImage", json!({"images": ["44", 0]})),
            "5": node("SaveImage", json!({"filename_prefix": [3]})),
            "6": node("SaveImage", json!({"images": "a.png"})),
            "7": node("LoadImageMask", json!({"image": "demo:man-and-cat.png", "channel": "infrared"})),
            "8": node("MaskToImage", json!({"mask": ["7", 0]})),
            "9": node("PreviewImage", json!({"images": ["8", 0]})),
            "10": node("Nonsense", json!({})),
        }));
        let expected = [
            ("10", "", "invalid_prompt"),
            ("1", "image", "custom_validation_failed"),
            ("2", "images", "return_type_mismatch"),
            ("3", "images", "bad_linked_input"),
            ("4", "images", "bad_linked_input"),
            ("5", "images", "required_input_missing"),
            ("5", "filename_prefix", "invalid_input_type"),
            ("6", "images", "invalid_input_type"),
            ("7", "channel", "value_not_in_list"),
        ];
        assert_eq!(
            found,
            expected.map(|(a, b, c)| (a.into(), b.into(), c.into()))
        );
    }

    #[test]
    fn a_graph_without_outputs_and_a_cycle_are_named() {
        let found =
            check(json!({"1": node("LoadImage", json!({"image": "demo:man-and-cat.png"}))}));
        assert_eq!(found[0].2, "prompt_no_outputs");
        let found = check(json!({
            "1": node("ImageBatch", json!({"image1": ["2", 0]})),
            "2": node("ImageBatch", json!({"image1": ["1", 0]})),
            "3": node("PreviewImage", json!({"images": ["2", 0]})),
        }));
        assert_eq!(
            found.iter().map(|f| f.2.as_str()).collect::<Vec<_>>(),
            ["dependency_cycle"]
        );
    }

    #[test]
    fn outputs_that_can_run_do_and_the_others_are_named() {
        let graph = json!({
            "1": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
            "2": node("PreviewImage", json!({"images": ["1", 0]})),
            "3": node("LoadImage", json!({"image": "no-such-file.png"})),
            "4": node("PreviewImage", json!({"images": ["3", 0]})),
        });
        let graph = Graph::from_api(graph.as_object().unwrap()).unwrap();
        let catalog = Catalog::builtin_only();
        let ids = |ids: &[&str]| ids.iter().map(|id| NodeId::new(*id)).collect::<Vec<_>>();
        let verdict = judge(&graph, &catalog, None);
        assert_eq!(
            (verdict.outputs, verdict.plan),
            (ids(&["2"]), ids(&["1", "2"]))
        );
        assert_eq!(verdict.problems.len(), 1);
        assert_eq!(verdict.dependents[&NodeId::new("3")], ids(&["4"]));
        let wanted = judge(&graph, &catalog, Some(&ids(&["2"])));
        assert_eq!((wanted.outputs, wanted.problems), (ids(&["2"]), Vec::new()));
    }

    #[test]
    fn nodes_that_nothing_needs_are_not_checked() {
        let found = check(json!({
            "1": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
            "2": node("PreviewImage", json!({"images": ["1", 0]})),
            "3": node("LoadImage", json!({"image": "no-such-file.png"})),
        }));
        assert_eq!(found, []);
    }
}
