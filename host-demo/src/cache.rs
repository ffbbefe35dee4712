//! Results by what they were made from, so that a node that did not change does not run again.

use std::collections::BTreeMap;

use plugin_api::Value;

use crate::graph::{GraphNode, Input, NodeId};

/// Most memory that results in the cache may take: what their tensors say they hold.
pub(crate) const DEFAULT_BUDGET: u64 = 512 << 20;
/// Values of a plugin's own types do not tell their size, so their number is limited too.
const MAX_ENTRIES: usize = 64;

/// BLAKE3 of everything that a result hangs on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Signature(String);

impl Signature {
    /// The signature of a node: its class and the build of its code, its complete parameters, its fingerprint (the
    /// content of its files), and where its links come from.
    pub(crate) fn of(
        node: &GraphNode,
        build: &str,
        parameters: &serde_json::Map<String, serde_json::Value>,
        fingerprint: &str,
        upstream: &BTreeMap<NodeId, Self>,
    ) -> Self {
        let links: Vec<_> = node
            .inputs
            .iter()
            .filter_map(|(name, input)| match input {
                Input::Link { node, output } => {
                    Some((name, upstream.get(node).map(Self::as_str), output))
                }
                Input::Value(_) => None,
            })
            .collect();
        let ordered: BTreeMap<_, _> = parameters.iter().collect();
        let text = serde_json::json!([node.class, build, ordered, fingerprint, links]).to_string();
        Self(blake3::hash(text.as_bytes()).to_hex().to_string())
    }

    /// As text, 64 hexadecimal digits.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

struct Entry {
    class: String,
    outputs: Vec<Value>,
    bytes: u64,
    last_use: u64,
}

/// A result that had to leave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Evicted {
    /// The class of the node that made it.
    pub(crate) class: String,
    pub(crate) bytes: u64,
}

/// Results in memory; the one that was used longest ago leaves first.
pub(crate) struct Cache {
    budget: u64,
    entries: BTreeMap<Signature, Entry>,
    clock: u64,
}

impl Cache {
    /// An empty cache of `budget` bytes.
    pub(crate) fn new(budget: u64) -> Self {
        Self {
            budget,
            entries: BTreeMap::new(),
            clock: 0,
        }
    }

    /// The result with this signature.
    pub(crate) fn get(&mut self, signature: &Signature) -> Option<Vec<Value>> {
        self.clock += 1;
        let entry = self.entries.get_mut(signature)?;
        entry.last_use = self.clock;
        Some(entry.outputs.clone())
    }

    /// Keeps a result of a node of `class`; returns those that had to leave for it.
    pub(crate) fn insert(
        &mut self,
        signature: Signature,
        class: &str,
        outputs: Vec<Value>,
    ) -> Vec<Evicted> {
        let bytes = outputs.iter().map(size).sum();
        let class = class.to_owned();
        if bytes > self.budget {
            return vec![Evicted { class, bytes }];
        }
        self.clock += 1;
        let entry = Entry {
            class,
            outputs,
            bytes,
            last_use: self.clock,
        };
        self.entries.insert(signature, entry);
        let mut evicted = Vec::new();
        while self.bytes() > self.budget || self.entries.len() > MAX_ENTRIES {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_use);
            let oldest = oldest.map(|(signature, _)| signature.clone());
            let Some(Entry { class, bytes, .. }) =
                oldest.and_then(|signature| self.entries.remove(&signature))
            else {
                break;
            };
            evicted.push(Evicted { class, bytes });
        }
        evicted
    }

    /// Lets everything go; whether there was anything.
    pub(crate) fn clear(&mut self) -> bool {
        let had_any = !self.entries.is_empty();
        self.entries.clear();
        had_any
    }

    fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes).sum()
    }
}

fn size(value: &Value) -> u64 {
    match value {
        Value::Tensor(tensor) => tensor.allocation_bytes(),
        Value::Json(text) => text.len() as u64,
        Value::Object(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use plugin_api::SharedTensor;
    use serde_json::json;

    use super::*;

    fn signature(text: &str) -> Signature {
        Signature(text.to_owned())
    }

    fn kilobyte() -> Vec<Value> {
        vec![Value::Tensor(
            SharedTensor::from_vec(vec![0.0; 256], &[256]).unwrap(),
        )]
    }

    #[test]
    fn what_was_used_longest_ago_leaves_first() {
        let mut cache = Cache::new(2048);
        cache.insert(signature("a"), "A", kilobyte());
        cache.insert(signature("b"), "B", kilobyte());
        assert!(cache.get(&signature("a")).is_some());
        let evicted = cache.insert(signature("c"), "C", kilobyte());
        let (class, bytes) = ("B".to_owned(), 1024);
        assert_eq!(evicted, [Evicted { class, bytes }]);
        let found = ["a", "b", "c"].map(|name| cache.get(&signature(name)).is_some());
        assert_eq!(found, [true, false, true]);
        assert!(cache.clear() && !cache.clear());
    }

    #[test]
    fn a_signature_changes_with_everything_that_counts() {
        let node = |title: &str, input: Input| GraphNode {
            class: "X".to_owned(),
            title: title.to_owned(),
            inputs: [("a".to_owned(), input)].into(),
        };
        let link = |output| Input::Link {
            node: NodeId::new("1"),
            output,
        };
        let parameters = json!({"n": 1, "m": 2});
        let swapped = json!({"m": 2, "n": 1});
        let other = json!({"n": 1, "m": 3});
        let upstream = |text: &str| BTreeMap::from([(NodeId::new("1"), signature(text))]);
        let of = |node: &GraphNode,
                  build: &str,
                  parameters: &serde_json::Value,
                  print: &str,
                  up: &str| {
            Signature::of(
                node,
                build,
                parameters.as_object().unwrap(),
                print,
                &upstream(up),
            )
        };
        let base = of(&node("t", link(0)), "b", &parameters, "f", "u");
        assert_eq!(
            base,
            of(&node("other title", link(0)), "b", &swapped, "f", "u")
        );
        for changed in [
            of(&node("t", link(1)), "b", &parameters, "f", "u"),
            of(&node("t", link(0)), "b2", &parameters, "f", "u"),
            of(&node("t", link(0)), "b", &other, "f", "u"),
            of(&node("t", link(0)), "b", &parameters, "f2", "u"),
            of(&node("t", link(0)), "b", &parameters, "f", "u2"),
        ] {
            assert_ne!(base, changed);
        }
    }
}
