//! Which prompt or concept a picture of a batch belongs to, read from the texts of the nodes that it came from.
//!
//! The host does not know what a node does; it knows that a batch is in the order of a list. A text that is named
//! `prompts` (or `prompt`) or `concepts` (or `concept_list`) and has as many lines as the batch has pictures, or a divisor of that, is that
//! list.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::graph::{Graph, GraphNode, Input, NodeId};

/// Which list to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum List {
    Prompts,
    Concepts,
}

impl List {
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Prompts => &["prompts", "prompt"],
            Self::Concepts => &["concepts", "concept_list"],
        }
    }
}

/// The node's own list, if it has one.
pub(super) fn own_list(graph: &Graph, node: &NodeId, list: List) -> Option<Vec<String>> {
    let inputs = &graph.nodes.get(node)?.inputs;
    let text = list
        .names()
        .iter()
        .find_map(|name| match inputs.get(*name) {
            Some(Input::Value(Value::String(text))) => Some(text),
            _ => None,
        })?;
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect();
    (!lines.is_empty()).then_some(lines)
}

/// Captions for `n` pictures of a batch that `node` made; empty ones if no list fits.
pub(super) fn of_batch(graph: &Graph, node: &NodeId, n: usize, list: List) -> Vec<String> {
    let lines = nearest(graph, node, list).filter(|lines| n > 0 && n.is_multiple_of(lines.len()));
    let Some(lines) = lines else {
        return vec![String::new(); n];
    };
    let repeats = n / lines.len();
    let caption = |i: usize| match list {
        // All pictures of the first prompt, then of the second.
        List::Prompts => lines[i / repeats].clone(),
        // All concepts of the first picture, then of the second.
        List::Concepts if repeats > 1 => format!(
            "{} · picture {}",
            lines[i % lines.len()],
            i / lines.len() + 1
        ),
        List::Concepts => lines[i].clone(),
    };
    (0..n).map(caption).collect()
}

/// The list of the node, or of the nearest one that it hangs on.
fn nearest(graph: &Graph, node: &NodeId, list: List) -> Option<Vec<String>> {
    let mut seen = BTreeSet::new();
    let mut wave = vec![node.clone()];
    while !wave.is_empty() {
        if let Some(lines) = wave.iter().find_map(|id| own_list(graph, id, list)) {
            return Some(lines);
        }
        seen.extend(wave.iter().cloned());
        let sources = wave
            .iter()
            .filter_map(|id| graph.nodes.get(id))
            .flat_map(GraphNode::links);
        wave = sources
            .map(|(_, source, _)| source.clone())
            .filter(|id| !seen.contains(id))
            .collect();
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_batch_gets_the_lines_of_the_nearest_list() {
        let document = json!({
            "1": {"class_type": "Em", "inputs": {"concepts": "<a> dog\n\n<b> car"}},
            "2": {"class_type": "Sample", "inputs": {"concepts": ["1", 0], "prompts": "one\ntwo"}},
            "3": {"class_type": "Refine", "inputs": {"masks": ["1", 1]}},
        });
        let graph = Graph::from_api(document.as_object().unwrap()).unwrap();
        let captions = |id: &str, n, list| of_batch(&graph, &NodeId::new(id), n, list);
        assert_eq!(
            captions("2", 4, List::Prompts),
            ["one", "one", "two", "two"]
        );
        assert_eq!(captions("3", 2, List::Concepts), ["<a> dog", "<b> car"]);
        assert_eq!(captions("3", 4, List::Concepts)[2], "<a> dog · picture 2");
        assert_eq!(captions("3", 3, List::Concepts), ["", "", ""]);
        assert_eq!(captions("1", 1, List::Prompts), [""]);
    }
}
