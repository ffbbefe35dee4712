//! What passes between the host and the process that runs its nodes: frames of a JSON head and the bytes of pictures.
//!
//! ```text
//! u32 length of the head | u64 length of the bytes | head | bytes     little-endian
//! ```
//! Values of wires stay where they are; of outputs that observers look at (pictures, masks, maps) copies are sent.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use plugin_api::{NodeError, OutputSocket, Progress, SharedTensor, Value};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::cache::Signature;
use crate::events::{Event, NodeLabel, Observer};
use crate::pictures::RgbPicture;

/// Longer heads and bytes are a fault of whoever sends them.
const MAX_HEAD: u32 = 1 << 30;
const MAX_BYTES: u64 = 1 << 36;
/// Memory that is taken before anything has come.
const PIECE: u64 = 1 << 20;

/// Asked of the process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Run(Box<JobText>),
    Cancel,
    FreeCache,
}

/// A job as text; see [`Job`](crate::executor::Job).
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct JobText {
    /// In the API's form.
    pub(crate) graph: Json,
    pub(crate) plan: Vec<String>,
    pub(crate) output_dir: PathBuf,
    pub(crate) work_dirs: PathBuf,
    pub(crate) workflow: String,
    pub(crate) prompt: String,
}

/// Told by the process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// It lives: a node asked whether to stop.
    Alive,
    /// A node is next.
    Entered(NodeLabel),
    Event(NodeLabel, EventText),
    Ended(EndText),
}

/// How a job ended.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum EndText {
    /// `work` are the folders that nobody needs once the results are kept.
    Done {
        work: Vec<String>,
    },
    Canceled {
        node: NodeLabel,
        resumable: bool,
    },
    Failed {
        node: NodeLabel,
        error: ErrorText,
    },
    Worker(String),
}

/// A [`NodeError`] as text.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ErrorText {
    code: u32,
    message: String,
    input: String,
}

impl From<NodeError> for ErrorText {
    fn from(error: NodeError) -> Self {
        Self {
            code: error.code,
            message: error.message.into_string(),
            input: error.input.into_string(),
        }
    }
}

impl From<ErrorText> for NodeError {
    fn from(text: ErrorText) -> Self {
        Self {
            code: text.code,
            message: text.message.into(),
            input: text.input.into(),
        }
    }
}

/// An [`Event`] whose pictures are in the bytes of the frame.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum EventText {
    Started {
        index: usize,
        total: usize,
    },
    Cached(ResultText),
    Progress {
        done: u64,
        total: u64,
        stage: String,
        text: String,
    },
    Preview {
        series: String,
        label: String,
        width: usize,
        height: usize,
    },
    Metric {
        series: String,
        x: Option<f64>,
        y: Option<f64>,
    },
    Log {
        level: u32,
        text: String,
    },
    Saved(PathBuf),
    Finished {
        seconds: f64,
        result: ResultText,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ResultText {
    signature: Signature,
    sockets: Vec<OutputSocket>,
    /// Shapes of the tensors in the bytes, as `f32`; nothing for what is not looked at.
    shapes: Vec<Option<Vec<usize>>>,
}

impl ResultText {
    fn new(
        signature: &Signature,
        sockets: &[OutputSocket],
        outputs: &[Value],
        bytes: &mut Vec<u8>,
    ) -> Self {
        let shape = |(socket, value): (&OutputSocket, &Value)| {
            let is_shown = [
                picture_ports::IMAGE,
                picture_ports::MASK,
                picture_ports::ATTENTION_MAPS,
            ]
            .contains(&socket.port.as_str());
            let Value::Tensor(tensor) = value else {
                return None;
            };
            let values = picture_ports::values(&socket.name, tensor).ok();
            let values = values.filter(|_| is_shown)?;
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            Some(tensor.shape().to_vec())
        };
        let shapes = sockets.iter().zip(outputs).map(shape).collect();
        Self {
            signature: signature.clone(),
            sockets: sockets.to_vec(),
            shapes,
        }
    }

    /// Copies of the outputs that were sent; nothing for the others.
    fn outputs(&self, mut bytes: &[u8]) -> io::Result<Vec<Value>> {
        let mut outputs = Vec::new();
        for shape in &self.shapes {
            let Some(shape) = shape else {
                outputs.push(Value::Json("null".into()));
                continue;
            };
            let n = shape
                .iter()
                .try_fold(size_of::<f32>(), |n, &size| n.checked_mul(size));
            let part = n.and_then(|n| bytes.split_at_checked(n));
            let (part, rest) = part.ok_or_else(|| torn("an output"))?;
            bytes = rest;
            let values = part
                .as_chunks()
                .0
                .iter()
                .map(|word| f32::from_le_bytes(*word));
            let tensor = SharedTensor::from_vec(values.collect::<Vec<_>>(), shape);
            outputs.push(Value::Tensor(tensor.map_err(|_| torn("an output"))?));
        }
        Ok(outputs)
    }
}

fn torn(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} is torn"))
}

impl EventText {
    /// An event with the bytes of its pictures.
    pub(crate) fn new(event: &Event<'_>) -> (Self, Vec<u8>) {
        let mut bytes = Vec::new();
        let text = match event {
            Event::Started { index, total } => Self::Started {
                index: *index,
                total: *total,
            },
            Event::Cached {
                signature,
                sockets,
                outputs,
            } => Self::Cached(ResultText::new(signature, sockets, outputs, &mut bytes)),
            Event::Progress(progress) => Self::Progress {
                done: progress.done,
                total: progress.total,
                stage: progress.stage.to_string(),
                text: progress.text.to_string(),
            },
            Event::Preview {
                series,
                label,
                picture,
            } => {
                bytes.extend(&picture.pixels);
                Self::Preview {
                    series: (*series).to_owned(),
                    label: (*label).to_owned(),
                    width: picture.width,
                    height: picture.height,
                }
            }
            Event::Metric { series, x, y } => Self::Metric {
                series: (*series).to_owned(),
                // JSON has no other numbers.
                x: x.is_finite().then_some(*x),
                y: y.is_finite().then_some(*y),
            },
            Event::Log { level, text } => Self::Log {
                level: *level,
                text: (*text).to_owned(),
            },
            Event::Saved { path } => Self::Saved((*path).to_owned()),
            Event::Finished {
                seconds,
                signature,
                sockets,
                outputs,
            } => Self::Finished {
                seconds: *seconds,
                result: ResultText::new(signature, sockets, outputs, &mut bytes),
            },
        };
        (text, bytes)
    }

    /// Tells the event to an observer of this process.
    ///
    /// # Errors
    /// Bytes that do not fit the head.
    pub(crate) fn tell(
        &self,
        node: &NodeLabel,
        bytes: Vec<u8>,
        observer: &dyn Observer,
    ) -> io::Result<()> {
        let event = |event: Event<'_>| observer.on_event(node, &event);
        match self {
            &Self::Started { index, total } => event(Event::Started { index, total }),
            Self::Cached(result) => event(Event::Cached {
                signature: &result.signature,
                sockets: &result.sockets,
                outputs: &result.outputs(&bytes)?,
            }),
            Self::Progress {
                done,
                total,
                stage,
                text,
            } => event(Event::Progress(&Progress {
                done: *done,
                total: *total,
                stage: stage.as_str().into(),
                text: text.as_str().into(),
            })),
            Self::Preview {
                series,
                label,
                width,
                height,
            } => {
                if width.saturating_mul(*height).saturating_mul(3) != bytes.len() {
                    return Err(torn("a preview"));
                }
                let picture = RgbPicture {
                    width: *width,
                    height: *height,
                    pixels: bytes,
                };
                event(Event::Preview {
                    series,
                    label,
                    picture: &picture,
                });
            }
            Self::Metric { series, x, y } => event(Event::Metric {
                series,
                x: x.unwrap_or(f64::NAN),
                y: y.unwrap_or(f64::NAN),
            }),
            Self::Log { level, text } => event(Event::Log {
                level: *level,
                text,
            }),
            Self::Saved(path) => event(Event::Saved { path }),
            Self::Finished { seconds, result } => event(Event::Finished {
                seconds: *seconds,
                signature: &result.signature,
                sockets: &result.sockets,
                outputs: &result.outputs(&bytes)?,
            }),
        }
        Ok(())
    }
}

/// Writes a frame.
///
/// # Errors
/// The other side is gone.
pub(crate) fn write(to: &mut impl Write, head: &impl Serialize, bytes: &[u8]) -> io::Result<()> {
    let head = serde_json::to_vec(head)?;
    let mut start = Vec::with_capacity(12 + head.len());
    start.extend((head.len() as u32).to_le_bytes());
    start.extend((bytes.len() as u64).to_le_bytes());
    start.extend(head);
    to.write_all(&start)?;
    to.write_all(bytes)?;
    to.flush()
}

/// Reads a frame; nothing where the other side is gone.
///
/// # Errors
/// No frame.
pub(crate) fn read<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<(T, Vec<u8>)>> {
    let (mut n_head, mut n_bytes) = ([0; 4], [0; 8]);
    match from.read_exact(&mut n_head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    from.read_exact(&mut n_bytes)?;
    let (n_head, n_bytes) = (u32::from_le_bytes(n_head), u64::from_le_bytes(n_bytes));
    if n_head > MAX_HEAD || n_bytes > MAX_BYTES {
        return Err(torn("a frame"));
    }
    let head = read_part(from, n_head.into())?;
    let bytes = read_part(from, n_bytes)?;
    Ok(Some((serde_json::from_slice(&head)?, bytes)))
}

/// As much as was announced; memory is taken for what comes.
fn read_part(from: &mut impl Read, n: u64) -> io::Result<Vec<u8>> {
    let mut part = Vec::with_capacity(n.min(PIECE) as usize);
    from.take(n).read_to_end(&mut part)?;
    if part.len() as u64 == n {
        Ok(part)
    } else {
        Err(torn("a frame"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    /// Keeps what it hears, in words.
    #[derive(Default)]
    struct Ear(Arc<Mutex<Vec<String>>>);

    impl Observer for Ear {
        fn on_event(&self, _: &NodeLabel, event: &Event<'_>) {
            let values = match event {
                Event::Finished { outputs, .. } => outputs
                    .iter()
                    .map(|value| match value {
                        Value::Tensor(tensor) => format!("{:?}", tensor.to_f32().unwrap()),
                        other => format!("{other:?}"),
                    })
                    .collect(),
                _ => Vec::new(),
            };
            self.0.lock().push(format!("{event:?} {values:?}"));
        }
    }

    #[test]
    fn events_arrive_as_they_were_told() {
        let picture = RgbPicture {
            width: 2,
            height: 1,
            pixels: vec![1, 2, 3, 4, 5, 6],
        };
        let progress = Progress {
            done: 3,
            total: 7,
            stage: "a".into(),
            text: "b".into(),
        };
        let image = SharedTensor::from_vec(vec![0.25f32, 0.5, f32::NAN], &[1, 1, 1, 3]).unwrap();
        let (outputs, signature) = ([Value::Tensor(image)], Signature::default());
        let sockets = [OutputSocket {
            name: "images".to_owned(),
            port: picture_ports::IMAGE.to_owned(),
            tooltip: String::new(),
        }];
        let events = [
            Event::Started { index: 1, total: 2 },
            Event::Progress(&progress),
            Event::Preview {
                series: "s",
                label: "l",
                picture: &picture,
            },
            Event::Metric {
                series: "m",
                x: 0.1,
                y: f64::NAN,
            },
            Event::Log {
                level: 2,
                text: "t",
            },
            Event::Saved {
                path: Path::new("a/b"),
            },
            Event::Finished {
                seconds: 0.5,
                signature: &signature,
                sockets: &sockets,
                outputs: &outputs,
            },
        ];
        let node = NodeLabel {
            id: "1".to_owned(),
            class: "C".to_owned(),
            title: "T".to_owned(),
        };
        let (direct, after) = (Ear::default(), Ear::default());
        let mut pipe = Vec::new();
        for event in &events {
            direct.on_event(&node, event);
            let (text, bytes) = EventText::new(event);
            write(&mut pipe, &Reply::Event(node.clone(), text), &bytes).unwrap();
        }
        let mut pipe = pipe.as_slice();
        while let Some((reply, bytes)) = read::<Reply>(&mut pipe).unwrap() {
            let Reply::Event(label, event) = reply else {
                panic!("{reply:?}")
            };
            assert_eq!(label, node);
            event.tell(&label, bytes, &after).unwrap();
        }
        assert_eq!(*direct.0.lock(), *after.0.lock());
        assert!(
            read::<Reply>(&mut [9u8, 0, 0].as_slice())
                .unwrap()
                .is_none()
        );
        assert!(read::<Reply>(&mut [255u8; 40].as_slice()).is_err());
    }
}
