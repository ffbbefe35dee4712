//! What happens while a graph runs, told to whoever shows or records it.

use std::path::Path;
use std::sync::Arc;

use plugin_api::{OutputSocket, Progress, Value};
use serde::{Deserialize, Serialize};

use crate::cache::Signature;
use crate::graph::{GraphNode, NodeId};
use crate::pictures::RgbPicture;

/// A node as observers name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeLabel {
    pub(crate) id: String,
    pub(crate) class: String,
    pub(crate) title: String,
}

impl NodeLabel {
    pub(crate) fn of(id: &NodeId, node: &GraphNode) -> Self {
        Self {
            id: id.to_string(),
            class: node.class.clone(),
            title: node.title.clone(),
        }
    }
}

/// Something that happened to a node.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// It runs now, as number `index` (from 0) of `total`.
    Started { index: usize, total: usize },
    /// Its result was there already.
    Cached {
        signature: &'a Signature,
        sockets: &'a [OutputSocket],
        outputs: &'a [Value],
    },
    /// It is this far.
    Progress(&'a Progress),
    /// It shows a picture.
    Preview {
        series: &'a str,
        label: &'a str,
        picture: &'a RgbPicture,
    },
    /// A point of a curve.
    Metric { series: &'a str, x: f64, y: f64 },
    /// A line for a person; levels are numbers of [`plugin_api::host::LogLevel`].
    Log { level: u32, text: &'a str },
    /// It wrote a file.
    Saved { path: &'a Path },
    /// It is done.
    Finished {
        seconds: f64,
        signature: &'a Signature,
        sockets: &'a [OutputSocket],
        outputs: &'a [Value],
    },
}

/// Told from the worker thread, and from threads that a node starts. Must not block for long.
pub(crate) trait Observer: Send + Sync {
    /// Takes one event.
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>);

    /// A node is next: from here on its code is called.
    fn entered(&self, _node: &NodeLabel) {}

    /// The node asked whether to stop: it lives. Called as often as it asks.
    fn polled(&self) {}
}

/// Tells several.
pub(crate) struct Observers(pub(crate) Vec<Arc<dyn Observer>>);

impl Observer for Observers {
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>) {
        for observer in &self.0 {
            observer.on_event(node, event);
        }
    }

    fn entered(&self, node: &NodeLabel) {
        for observer in &self.0 {
            observer.entered(node);
        }
    }

    fn polled(&self) {
        for observer in &self.0 {
            observer.polled();
        }
    }
}
