//! Keeps what happens in a run, for its report and its `run.json`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use parking_lot::Mutex;
use plugin_api::{OutputSocket, SharedTensor, Value};
use serde_json::{Value as Json, json};

use crate::events::{Event, NodeLabel, Observer};
use crate::pictures::{self, RgbPicture};

/// Most pictures that are kept of one series; of longer ones every second is let go.
pub(crate) const MAX_FRAMES: usize = 48;

/// A node that was started or came from the cache.
#[derive(Debug, Clone)]
pub(crate) struct NodeRecord {
    pub(crate) label: NodeLabel,
    /// None for a cached node.
    pub(crate) seconds: Option<f64>,
    /// What it returned that can be looked at.
    pub(crate) shown: Vec<ShownOutput>,
}

/// An output that can be looked at.
#[derive(Debug, Clone)]
pub(crate) struct ShownOutput {
    /// Its socket.
    pub(crate) name: String,
    /// Its socket type.
    pub(crate) port: String,
    pub(crate) pictures: Vec<RgbPicture>,
    /// The values of masks and maps are 0 everywhere.
    pub(crate) is_blank: bool,
}

/// A picture of a series.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) label: String,
    pub(crate) picture: RgbPicture,
}

/// Previews that belong in one row.
#[derive(Debug, Clone)]
pub(crate) struct Strip {
    pub(crate) node: NodeLabel,
    pub(crate) series: String,
    pub(crate) frames: Vec<Frame>,
    /// Every `stride`-th picture is kept.
    stride: usize,
    n_seen: usize,
}

/// A curve.
#[derive(Debug, Clone)]
pub(crate) struct Curve {
    pub(crate) node: NodeLabel,
    pub(crate) series: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A line that a node wrote.
#[derive(Debug, Clone)]
pub(crate) struct LogLine {
    pub(crate) node: NodeLabel,
    pub(crate) is_warning: bool,
    pub(crate) text: String,
}

/// Everything that was seen.
#[derive(Debug, Clone, Default)]
pub(crate) struct Record {
    pub(crate) nodes: Vec<NodeRecord>,
    pub(crate) strips: Vec<Strip>,
    pub(crate) curves: Vec<Curve>,
    pub(crate) log: Vec<LogLine>,
    /// Relative to the run's folder if they are in it.
    pub(crate) files: Vec<(NodeLabel, PathBuf)>,
    /// Timed lines of `run.json`.
    pub(crate) events: Vec<Json>,
    stages: Vec<(String, String)>,
}

/// Records the events of one run.
pub(crate) struct Recorder {
    started: Instant,
    folder: PathBuf,
    record: Mutex<Record>,
}

impl Recorder {
    /// `folder` is where the run writes.
    pub(crate) fn new(folder: &Path) -> Self {
        Self {
            started: Instant::now(),
            folder: folder.to_owned(),
            record: Mutex::default(),
        }
    }

    /// What was seen up to now.
    pub(crate) fn record(&self) -> Record {
        self.record.lock().clone()
    }

    /// Time since the run began.
    pub(crate) fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

impl Observer for Recorder {
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>) {
        let mut record = self.record.lock();
        let seconds = (self.seconds() * 1000.0).round() / 1000.0;
        let happened = |event: &str, more: Json| {
            let mut line =
                json!({"seconds": seconds, "node": node.id, "class": node.class, "event": event});
            if let (Json::Object(line), Json::Object(more)) = (&mut line, more) {
                line.extend(more);
            }
            line
        };
        let line = match event {
            Event::Started { .. } => Some(happened("started", json!({}))),
            Event::Cached {
                sockets, outputs, ..
            } => {
                record.nodes.push(NodeRecord {
                    label: node.clone(),
                    seconds: None,
                    shown: shown(sockets, outputs),
                });
                Some(happened("cached", json!({})))
            }
            Event::Progress(progress) => {
                let stage = (node.id.clone(), progress.stage.to_string());
                let is_new = !record.stages.contains(&stage);
                is_new.then(|| {
                    record.stages.push(stage);
                    happened(
                        "stage",
                        json!({"stage": progress.stage.as_str(), "total": progress.total}),
                    )
                })
            }
            Event::Preview {
                series,
                label,
                picture,
            } => {
                record.add_frame(node, series, label, picture);
                Some(happened(
                    "preview",
                    json!({"series": series, "label": label}),
                ))
            }
            Event::Metric { series, x, y } => {
                record.add_point(node, series, *x, *y);
                None
            }
            Event::Log { level, text } => {
                let line = LogLine {
                    node: node.clone(),
                    is_warning: *level >= 2,
                    text: (*text).to_owned(),
                };
                let event = happened("log", json!({"level": level, "text": text}));
                // Lines for people who debug the node stay in run.json.
                if *level >= 1 {
                    record.log.push(line);
                }
                Some(event)
            }
            Event::Saved { path } => {
                let inside = path.strip_prefix(&self.folder).unwrap_or(path).to_owned();
                let line = happened("saved", json!({"file": inside.to_string_lossy()}));
                record.files.push((node.clone(), inside));
                Some(line)
            }
            Event::Finished {
                seconds,
                sockets,
                outputs,
                ..
            } => {
                let node = NodeRecord {
                    label: node.clone(),
                    seconds: Some(*seconds),
                    shown: shown(sockets, outputs),
                };
                record.nodes.push(node);
                Some(happened("finished", json!({"took": seconds})))
            }
        };
        record.events.extend(line);
    }
}

impl Record {
    fn add_frame(&mut self, node: &NodeLabel, series: &str, label: &str, picture: &RgbPicture) {
        let place = self
            .strips
            .iter()
            .position(|strip| strip.node == *node && strip.series == series);
        let place = place.unwrap_or_else(|| {
            let (node, series) = (node.clone(), series.to_owned());
            self.strips.push(Strip {
                node,
                series,
                frames: Vec::new(),
                stride: 1,
                n_seen: 0,
            });
            self.strips.len() - 1
        });
        let strip = &mut self.strips[place];
        if strip.n_seen.is_multiple_of(strip.stride) {
            strip.frames.push(Frame {
                label: label.to_owned(),
                picture: picture.clone(),
            });
        }
        strip.n_seen += 1;
        if strip.frames.len() > MAX_FRAMES {
            let mut index = 0;
            strip.frames.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            strip.stride *= 2;
        }
    }

    fn add_point(&mut self, node: &NodeLabel, series: &str, x: f64, y: f64) {
        let curve = self
            .curves
            .iter_mut()
            .find(|curve| curve.node == *node && curve.series == series);
        match curve {
            Some(curve) => curve.points.push((x, y)),
            None => {
                self.curves.push(Curve {
                    node: node.clone(),
                    series: series.to_owned(),
                    points: vec![(x, y)],
                });
            }
        }
    }
}

fn shown(sockets: &[OutputSocket], outputs: &[Value]) -> Vec<ShownOutput> {
    let tensor = |(socket, value): (&OutputSocket, &Value)| match value {
        Value::Tensor(tensor) => shown_tensor(socket, tensor),
        Value::Object(_) | Value::Json(_) => None,
    };
    sockets.iter().zip(outputs).filter_map(tensor).collect()
}

/// Tensors that are no pictures, or that cannot be read, are not shown.
fn shown_tensor(socket: &OutputSocket, tensor: &SharedTensor) -> Option<ShownOutput> {
    let (name, port) = (socket.name.clone(), socket.port.clone());
    if port == picture_ports::IMAGE {
        let pictures = pictures::from_image(&name, tensor).ok()?;
        return Some(ShownOutput {
            name,
            port,
            pictures,
            is_blank: false,
        });
    }
    let draw = match port.as_str() {
        picture_ports::MASK => pictures::gray,
        picture_ports::ATTENTION_MAPS => pictures::heat,
        _ => return None,
    };
    let (width, height, planes) = pictures::planes(&name, tensor).ok()?;
    let is_blank = planes.iter().flatten().all(|&value| value == 0.0);
    let pictures = planes
        .iter()
        .map(|plane| draw(width, height, plane))
        .collect();
    Some(ShownOutput {
        name,
        port,
        pictures,
        is_blank,
    })
}
