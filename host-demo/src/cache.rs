//! Results by what they were made from, so that a node that did not change does not run again.

use std::collections::BTreeMap;

use plugin_api::Value;
use serde::{Deserialize, Serialize};

use crate::graph::{GraphNode, Input, NodeId};

/// Most memory that results in the cache may take where nobody says otherwise: half of what the process may have, so that
/// a model stays between two runs and leaves room to learn with it. A loaded Stable Diffusion 1.5 takes 4 GiB.
pub(crate) fn default_budget() -> u64 {
    /// Where the system does not tell: a model and some pictures.
    const UNKNOWN: u64 = 6 << 30;
    machine_memory::total().map_or(UNKNOWN, |total| total / 2)
}

/// Values need not tell their size, so their number is limited too.
const MAX_ENTRIES: usize = 64;

/// BLAKE3 of everything that a result hangs on.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    memory: BTreeMap<Block, u64>,
    last_use: u64,
}

/// A result that had to leave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Evicted {
    /// The class of the node that made it.
    pub(crate) class: String,
    /// What nothing else in the cache holds.
    pub(crate) bytes: u64,
}

/// Results in memory; the one that was used longest ago leaves first.
pub(crate) struct Cache {
    budget: u64,
    entries: BTreeMap<Signature, Entry>,
    clock: u64,
    /// When the present run began.
    run_began: u64,
}

impl Cache {
    /// An empty cache of `budget` bytes.
    pub(crate) fn new(budget: u64) -> Self {
        Self {
            budget,
            entries: BTreeMap::new(),
            clock: 0,
            run_began: 0,
        }
    }

    /// What is used from now on is the present run's.
    pub(crate) fn begin_run(&mut self) {
        self.run_began = self.clock;
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
        self.clock += 1;
        let memory = blocks(&outputs, self.clock);
        let class = class.to_owned();
        let bytes = memory.values().sum();
        if bytes > self.budget {
            return vec![Evicted { class, bytes }];
        }
        let entry = Entry {
            class,
            outputs,
            memory,
            last_use: self.clock,
        };
        self.entries.insert(signature, entry);
        let mut evicted = Vec::new();
        while self.bytes() > self.budget || self.entries.len() > MAX_ENTRIES {
            let Some(gone) = self.evict_oldest(u64::MAX) else {
                break;
            };
            evicted.push(gone);
        }
        evicted
    }

    /// Lets results go that the present run has not used, for as long as memory `is_scarce`; what the run uses would be
    /// freed by nobody's leaving.
    pub(crate) fn relieve(&mut self, is_scarce: impl Fn() -> bool) -> Vec<Evicted> {
        let mut evicted = Vec::new();
        while !self.entries.is_empty() && is_scarce() {
            let Some(gone) = self.evict_oldest(self.run_began) else {
                break;
            };
            evicted.push(gone);
        }
        evicted
    }

    /// Lets everything go; whether there was anything.
    pub(crate) fn clear(&mut self) -> bool {
        let had_any = !self.entries.is_empty();
        self.entries.clear();
        had_any
    }

    /// Lets the result go that was used longest ago, if that was not after `newest`.
    fn evict_oldest(&mut self, newest: u64) -> Option<Evicted> {
        let before = self.bytes();
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_use);
        let (signature, _) = oldest.filter(|(_, entry)| entry.last_use <= newest)?;
        let signature = signature.clone();
        let Entry { class, .. } = self.entries.remove(&signature)?;
        let bytes = before - self.bytes();
        Some(Evicted { class, bytes })
    }

    /// Bytes of all results; what several of them share counts once.
    fn bytes(&self) -> u64 {
        let memory = self.entries.values().flat_map(|entry| &entry.memory);
        let distinct: BTreeMap<_, _> = memory.collect();
        distinct.into_values().sum()
    }
}

/// What tells a block of memory from others that live.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Block {
    Tensor {
        device: (i32, i32),
        address: u64,
    },
    Object(u64),
    /// Of one output, shared with nobody: of the entry that was made at this time.
    Own {
        clock: u64,
        output: usize,
    },
}

/// The memory that outputs keep alive.
fn blocks(outputs: &[Value], clock: u64) -> BTreeMap<Block, u64> {
    let mut found = BTreeMap::new();
    for (output, value) in outputs.iter().enumerate() {
        match value {
            Value::Tensor(tensor) => {
                let (device, address) = (tensor.device(), tensor.allocation_address());
                let device = (device.kind, device.index);
                let block = match address {
                    0 => Block::Own { clock, output },
                    address => Block::Tensor { device, address },
                };
                found.insert(block, tensor.allocation_bytes());
            }
            Value::Json(text) => {
                found.insert(Block::Own { clock, output }, text.len() as u64);
            }
            Value::Object(object) => {
                let memory = object.memory().into_iter();
                found.extend(memory.map(|block| (Block::Object(block.id), block.bytes)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use plugin_api::{MemoryBlock, Opaque, SharedObject, SharedTensor};
    use serde_json::json;

    use super::*;

    fn signature(text: &str) -> Signature {
        Signature(text.to_owned())
    }

    fn kilobyte() -> Vec<Value> {
        vec![Value::Tensor(
            SharedTensor::from_vec(vec![0f32; 256], &[256]).unwrap(),
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

    /// An object that says of what blocks it is.
    struct Blocks(&'static [(u64, u64)]);

    impl Opaque for Blocks {
        fn summary(&self) -> String {
            "blocks".into()
        }

        fn memory(&self) -> Vec<MemoryBlock> {
            let blocks = self.0.iter();
            blocks
                .map(|&(id, bytes)| MemoryBlock { id, bytes })
                .collect()
        }
    }

    fn object(blocks: &'static [(u64, u64)]) -> Vec<Value> {
        vec![Value::Object(SharedObject::new("BLOCKS", Blocks(blocks)))]
    }

    #[test]
    fn what_objects_share_counts_once() {
        let mut cache = Cache::new(1500);
        assert_eq!(cache.insert(signature("a"), "A", object(&[(1, 1000)])), []);
        // One that was tuned from it.
        let tuned = object(&[(1, 1000), (2, 400)]);
        assert_eq!(cache.insert(signature("b"), "B", tuned), []);
        assert_eq!(cache.bytes(), 1400);
        // The oldest leaves first, although that alone frees nothing.
        let evicted = cache.insert(signature("c"), "C", object(&[(3, 200)]));
        let gone = |class: &str, bytes| Evicted {
            class: class.to_owned(),
            bytes,
        };
        assert_eq!(evicted, [gone("A", 0), gone("B", 1400)]);
        // What is too large by itself throws nothing out.
        let evicted = cache.insert(signature("d"), "D", object(&[(4, 1501)]));
        assert_eq!(evicted, [gone("D", 1501)]);
        assert_eq!(cache.bytes(), 200);
    }

    #[test]
    fn one_tensor_in_two_results_counts_once() {
        let mut cache = Cache::new(u64::MAX);
        let outputs = kilobyte();
        cache.insert(signature("a"), "A", outputs.clone());
        cache.insert(signature("b"), "B", outputs);
        assert_eq!(cache.bytes(), 1024);
        cache.insert(signature("c"), "C", kilobyte());
        assert_eq!(cache.bytes(), 2048);
    }

    #[test]
    fn where_memory_is_scarce_what_this_run_does_not_use_leaves() {
        let mut cache = Cache::new(u64::MAX);
        for name in ["a", "b", "c"] {
            cache.insert(signature(name), name, kilobyte());
        }
        cache.begin_run();
        assert!(cache.get(&signature("a")).is_some());
        assert_eq!(cache.relieve(|| false), []);
        let classes = |evicted: Vec<Evicted>| -> Vec<String> {
            evicted.into_iter().map(|gone| gone.class).collect()
        };
        let asked = std::cell::Cell::new(0);
        let once = || asked.replace(asked.get() + 1) == 0;
        assert_eq!(classes(cache.relieve(once)), ["b"]);
        assert_eq!(classes(cache.relieve(|| true)), ["c"]);
        assert!(cache.get(&signature("a")).is_some());
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
