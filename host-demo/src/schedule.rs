//! The order in which nodes run: everything that the output nodes need, sources first. Deterministic.

use std::collections::BTreeMap;

use crate::graph::{Graph, NodeId};

/// Nodes that wait for each other, in the direction of their links; the first one is repeated at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cycle(pub(crate) Vec<NodeId>);

#[derive(Clone, Copy, PartialEq)]
enum Mark {
    Open,
    Done,
}

/// All nodes that `targets` need, each after its sources. Links to nodes that are not there are left out.
///
/// # Errors
/// The first cycle.
pub(crate) fn order(graph: &Graph, targets: &[NodeId]) -> Result<Vec<NodeId>, Cycle> {
    let mut marks: BTreeMap<&NodeId, Mark> = BTreeMap::new();
    let mut order = Vec::new();
    for target in targets {
        visit(graph, target, &mut marks, &mut order)?;
    }
    Ok(order)
}

/// Depth first with a stack of its own: a long chain must not end the thread's.
fn visit<'a>(
    graph: &'a Graph,
    target: &'a NodeId,
    marks: &mut BTreeMap<&'a NodeId, Mark>,
    order: &mut Vec<NodeId>,
) -> Result<(), Cycle> {
    let mut path: Vec<(&NodeId, Vec<&NodeId>)> = Vec::new();
    let mut next = Some(target);
    loop {
        if let Some(id) = next.take().filter(|id| !marks.contains_key(id))
            && let Some(node) = graph.nodes.get(id)
        {
            marks.insert(id, Mark::Open);
            let mut sources: Vec<_> = node.links().map(|(_, source, _)| source).collect();
            sources.reverse();
            path.push((id, sources));
        }
        let Some((id, sources)) = path.last_mut() else {
            return Ok(());
        };
        match sources.pop() {
            Some(source) if marks.get(source) == Some(&Mark::Open) => {
                return Err(cycle(&path, source));
            }
            Some(source) => next = Some(source),
            None => {
                marks.insert(id, Mark::Done);
                order.push((*id).clone());
                path.pop();
            }
        }
    }
}

fn cycle(path: &[(&NodeId, Vec<&NodeId>)], again: &NodeId) -> Cycle {
    let mut nodes: Vec<NodeId> = path
        .iter()
        .map(|(id, _)| *id)
        .skip_while(|id| *id != again)
        .cloned()
        .collect();
    nodes.push(again.clone());
    // The path was walked from consumers to sources.
    nodes.reverse();
    Cycle(nodes)
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value, json};

    use super::*;

    fn graph(links: &[(&str, &[&str])]) -> Graph {
        let entry = |sources: &[&str]| {
            let inputs: Map<String, Value> = sources
                .iter()
                .enumerate()
                .map(|(i, s)| (format!("i{i}"), json!([s, 0])))
                .collect();
            json!({"class_type": "X", "inputs": inputs})
        };
        let document: Map<_, _> = links
            .iter()
            .map(|(id, sources)| ((*id).to_owned(), entry(sources)))
            .collect();
        Graph::from_api(&document).unwrap()
    }

    fn ordered(graph: &Graph, targets: &[&str]) -> Vec<String> {
        let targets: Vec<_> = targets.iter().map(|t| NodeId::new(*t)).collect();
        order(graph, &targets)
            .unwrap()
            .iter()
            .map(|id| id.as_str().to_owned())
            .collect()
    }

    #[test]
    fn sources_come_first_and_only_what_is_needed_comes() {
        let graph = graph(&[
            ("1", &[]),
            ("2", &["1"]),
            ("3", &["2", "1"]),
            ("4", &["1"]),
            ("9", &["gone"]),
        ]);
        assert_eq!(ordered(&graph, &["3"]), ["1", "2", "3"]);
        assert_eq!(ordered(&graph, &["4", "3"]), ["1", "4", "2", "3"]);
        assert_eq!(ordered(&graph, &["9"]), ["9"]);
    }

    #[test]
    fn a_cycle_is_named_in_the_direction_of_its_links() {
        let graph = graph(&[("1", &["3"]), ("2", &["1"]), ("3", &["2"]), ("4", &["3"])]);
        let Cycle(nodes) = order(&graph, &[NodeId::new("4")]).unwrap_err();
        let nodes: Vec<_> = nodes.iter().map(NodeId::as_str).collect();
        assert_eq!(nodes, ["3", "1", "2", "3"]);
    }

    #[test]
    fn a_long_chain_does_not_end_the_stack() {
        let ids: Vec<String> = (0..50_000).map(|i| i.to_string()).collect();
        let document: Map<String, Value> = (0..ids.len())
            .map(|i| {
                let inputs = if i == 0 {
                    json!({})
                } else {
                    json!({"x": [ids[i - 1], 0]})
                };
                (ids[i].clone(), json!({"class_type": "X", "inputs": inputs}))
            })
            .collect();
        let graph = Graph::from_api(&document).unwrap();
        assert_eq!(
            order(&graph, &[NodeId::new("49999")]).unwrap().len(),
            50_000
        );
    }
}
