//! What the editor shows of a running job: progress, previews and text on the nodes, and the results.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use image::codecs::jpeg::JpegEncoder;
use parking_lot::Mutex;
use plugin_api::{OutputSocket, Value as WireValue};
use serde_json::{Map, Value, json};

use super::folders::Folders;
use super::hub::{Hub, Message};
use super::shown::ShownFiles;
use crate::catalog::Catalog;
use crate::clock::now_ms;
use crate::console::complain;
use crate::events::{Event, NodeLabel, Observer};
use crate::pictures::{self, RgbPicture};
use crate::png_text;

/// Least time between two progress messages of a stage: 20 a second are smooth.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
const JPEG_QUALITY: u8 = 88;
/// Most pictures of its work that a node shows.
const MAX_SHOWN: usize = 64;
/// Most bytes of the pictures of a node that exists to show: they lie in the folder of what is shown beside others.
const MAX_OUTPUT: usize = 128 << 20;

/// Starts the names of series that show what was learned so far.
const SAMPLES: &str = "sample";

#[derive(Clone, Copy)]
struct NodeProgress {
    value: u64,
    max: u64,
    state: &'static str,
}

struct Shown {
    key: String,
    picture: RgbPicture,
}

#[derive(Default)]
struct State {
    progress: BTreeMap<String, NodeProgress>,
    current: Option<NodeLabel>,
    executed: Vec<String>,
    /// Of the current node.
    pictures: Vec<Shown>,
    /// How many more there were.
    n_left_out: usize,
    saved: Vec<Value>,
    last_progress: Option<Instant>,
    main_series: Option<String>,
    /// Of the whole job.
    outputs: Map<String, Value>,
    messages: Vec<Value>,
}

impl State {
    /// Whether one more picture of the current node is shown.
    fn has_room(&self, picture: &RgbPicture, is_output: bool) -> bool {
        if !is_output {
            return self.pictures.len() < MAX_SHOWN;
        }
        let shown = self.pictures.iter().map(|shown| shown.picture.pixels.len());
        shown.sum::<usize>() + picture.pixels.len() <= MAX_OUTPUT
    }
}

/// Tells the clients of one job.
pub(crate) struct Live {
    hub: Arc<Hub>,
    folders: Arc<Folders>,
    catalog: Arc<Catalog>,
    files: Arc<ShownFiles>,
    prompt_id: String,
    client_id: String,
    previews: Previews,
    state: Mutex<State>,
}

/// Who is sent previews of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Previews {
    /// Nobody: the job said so.
    Never,
    /// Clients that announced that they understand them.
    Announced,
    /// All: the job asked for them.
    Asked,
}

impl Previews {
    /// What `preview_method` of a job's `extra_data` says, by ComfyUI's names.
    pub(crate) fn of(extra_data: &Value) -> Self {
        match extra_data["preview_method"].as_str() {
            Some("none") => Self::Never,
            Some("auto" | "latent2rgb" | "taesd") => Self::Asked,
            _ => Self::Announced,
        }
    }
}

impl Live {
    pub(crate) fn new(
        hub: Arc<Hub>,
        folders: Arc<Folders>,
        catalog: Arc<Catalog>,
        files: Arc<ShownFiles>,
        (prompt_id, client_id): (&str, &str),
        previews: Previews,
    ) -> Self {
        Self {
            hub,
            folders,
            catalog,
            files,
            prompt_id: prompt_id.to_owned(),
            client_id: client_id.to_owned(),
            previews,
            state: Mutex::default(),
        }
    }

    /// Sends an event.
    pub(crate) fn send(&self, kind: &str, data: Value) {
        self.hub.send(&self.client_id, &Message::Event(kind, data));
    }

    /// Keeps an event for the history; returns it as it is sent.
    pub(crate) fn note(&self, kind: &str, mut data: Value) -> Value {
        data["prompt_id"] = json!(self.prompt_id);
        data["timestamp"] = json!(now_ms());
        self.state.lock().messages.push(json!([kind, data]));
        data
    }

    /// Keeps an event for the history and sends it.
    pub(crate) fn tell(&self, kind: &str, data: Value) {
        let data = self.note(kind, data);
        self.send(kind, data);
    }

    /// What the nodes showed and what was told.
    pub(crate) fn take_results(&self) -> (Map<String, Value>, Vec<Value>) {
        let mut state = self.state.lock();
        (
            std::mem::take(&mut state.outputs),
            std::mem::take(&mut state.messages),
        )
    }

    /// The nodes that are done so far.
    pub(crate) fn executed(&self) -> Vec<String> {
        self.state.lock().executed.clone()
    }

    /// No node runs any more.
    pub(crate) fn finish(&self) {
        self.state.lock().current = None;
        self.send(
            "executing",
            json!({"node": null, "display_node": null, "prompt_id": self.prompt_id}),
        );
    }

    /// Tells a client that came back where the job is.
    pub(crate) fn catch_up(&self, client: &str) {
        if !self.client_id.is_empty() && self.client_id != client {
            return;
        }
        let (executing, progress) = {
            let state = self.state.lock();
            let Some(current) = &state.current else {
                return;
            };
            (self.executing(&current.id), self.progress_state(&state))
        };
        self.hub
            .send(client, &Message::Event("executing", executing));
        self.hub
            .send(client, &Message::Event("progress_state", progress));
    }

    fn executing(&self, node: &str) -> Value {
        json!({"node": node, "display_node": node, "prompt_id": self.prompt_id})
    }

    fn progress_state(&self, state: &State) -> Value {
        let node = |(id, progress): (&String, &NodeProgress)| {
            let entry = json!({
                "value": progress.value, "max": progress.max, "state": progress.state, "node_id": id,
                "prompt_id": self.prompt_id, "display_node_id": id, "parent_node_id": null, "real_node_id": id,
            });
            (id.clone(), entry)
        };
        let nodes: Map<_, _> = state.progress.iter().map(node).collect();
        json!({"prompt_id": self.prompt_id, "nodes": nodes})
    }

    fn set_progress(&self, node: &str, value: u64, max: u64, is_done: bool) {
        let progress = NodeProgress {
            value,
            max,
            state: if is_done { "finished" } else { "running" },
        };
        let mut state = self.state.lock();
        state.progress.insert(node.to_owned(), progress);
        let all = self.progress_state(&state);
        drop(state);
        self.send("progress_state", all);
    }

    fn text(&self, node: &str, text: &str) {
        let (prompt_id, node) = (self.prompt_id.as_str(), node);
        let message = Message::Text {
            node,
            prompt_id,
            text,
        };
        self.hub.send(&self.client_id, &message);
    }

    fn started(&self, node: &NodeLabel) {
        {
            let mut state = self.state.lock();
            state.current = Some(node.clone());
            state.pictures.clear();
            state.n_left_out = 0;
            state.saved.clear();
            state.last_progress = None;
            state.main_series = None;
        }
        self.set_progress(&node.id, 0, 1, false);
        self.send("executing", self.executing(&node.id));
    }

    fn progressed(&self, node: &NodeLabel, progress: &plugin_api::Progress) {
        {
            let mut state = self.state.lock();
            let is_early = state
                .last_progress
                .is_some_and(|at| at.elapsed() < PROGRESS_EVERY);
            if is_early && progress.done < progress.total {
                return;
            }
            state.last_progress = Some(Instant::now());
        }
        self.set_progress(&node.id, progress.done, progress.total, false);
        self.send(
            "progress",
            json!({"value": progress.done, "max": progress.total, "prompt_id": self.prompt_id, "node": node.id}),
        );
        if !progress.text.is_empty() {
            self.text(&node.id, &format!("{}: {}", progress.stage, progress.text));
        }
    }

    fn previewed(&self, node: &NodeLabel, series: &str, label: &str, picture: &RgbPicture) {
        // A node has one place for a picture: the series that it began with, and its samples.
        let is_main = {
            let mut state = self.state.lock();
            let main = state.main_series.get_or_insert_with(|| series.to_owned());
            main == series || series.starts_with(SAMPLES)
        };
        if is_main
            && self.previews != Previews::Never
            && let Some(jpeg) = jpeg(picture)
        {
            let message = Message::Preview {
                asked: self.previews == Previews::Asked,
                node: &node.id,
                prompt_id: &self.prompt_id,
                jpeg: &jpeg,
            };
            self.hub.send(&self.client_id, &message);
        }
        // Of a series that grows the last picture stays; a node that exists to show shows all.
        let is_output = self.is_output(node);
        let key = if is_output {
            format!("{series}/{label}")
        } else {
            series.to_owned()
        };
        let picture = picture.clone();
        let mut state = self.state.lock();
        let place = state.pictures.iter().position(|shown| shown.key == key);
        match place {
            Some(place) => state.pictures[place].picture = picture,
            None if state.has_room(&picture, is_output) => {
                state.pictures.push(Shown { key, picture });
            }
            None => state.n_left_out += 1,
        }
    }

    fn saved(&self, node: &NodeLabel, path: &Path) {
        let Some(name) = self.folders.output.name_of(path) else {
            return;
        };
        let (subfolder, filename) = name.rsplit_once('/').unwrap_or(("", &name));
        let file = json!({"filename": filename, "subfolder": subfolder, "type": "output"});
        self.state.lock().saved.push(file);
        if !is_picture(filename) {
            self.text(&node.id, &format!("saved {name}"));
        }
    }

    /// What the node shows when it is done.
    fn results(&self) -> Option<Value> {
        let (pictures, saved) = {
            let mut state = self.state.lock();
            (
                std::mem::take(&mut state.pictures),
                std::mem::take(&mut state.saved),
            )
        };
        let (mut images, files): (Vec<_>, Vec<_>) = saved
            .into_iter()
            .partition(|file| file["filename"].as_str().is_some_and(is_picture));
        images.extend(
            pictures
                .iter()
                .filter_map(|shown| self.temporary(&shown.picture)),
        );
        let mut output = Map::new();
        if !images.is_empty() {
            output.insert("images".to_owned(), images.into());
        }
        if !files.is_empty() {
            output.insert("files".to_owned(), files.into());
        }
        (!output.is_empty()).then_some(Value::Object(output))
    }

    /// Writes a picture into the folder for what is only looked at.
    fn temporary(&self, picture: &RgbPicture) -> Option<Value> {
        let png = png_text::encode(picture, &[]).ok()?;
        let filename = match self.files.keep(&png) {
            Ok(filename) => filename,
            Err(error) => {
                complain(&format!("warning: a picture cannot be shown: {error}"));
                return None;
            }
        };
        Some(json!({"filename": filename, "subfolder": "", "type": "temp"}))
    }

    fn show(&self, node: &NodeLabel, output: Value) {
        let data = json!({
            "node": node.id, "display_node": node.id, "output": output, "prompt_id": self.prompt_id,
        });
        self.state.lock().outputs.insert(node.id.clone(), output);
        let message = if self.is_output(node) {
            Message::Event("executed", data)
        } else {
            Message::OnTheWay("executed", data)
        };
        self.hub.send(&self.client_id, &message);
    }

    fn is_output(&self, node: &NodeLabel) -> bool {
        let class = self.catalog.descriptor(&node.class);
        class.is_some_and(|class| class.output_node)
    }

    /// A node that showed its work shows the pictures that came of it instead, if it returns any.
    fn show_results_instead(&self, (sockets, outputs): (&[OutputSocket], &[WireValue])) {
        let mut state = self.state.lock();
        if state.pictures.is_empty() {
            return;
        }
        let mut results = Vec::new();
        for (socket, value) in sockets.iter().zip(outputs) {
            if let (picture_ports::IMAGE, WireValue::Tensor(tensor)) = (socket.port.as_str(), value)
                && let Ok(pictures) = pictures::from_image(&socket.name, tensor)
            {
                results.extend(pictures);
            }
        }
        if !results.is_empty() {
            let shown = |picture| Shown {
                key: String::new(),
                picture,
            };
            let main = state.main_series.take();
            let others = std::mem::take(&mut state.pictures).into_iter();
            let others = others.filter(|shown| main.as_ref() != Some(&shown.key));
            let all = results.into_iter().map(shown).chain(others);
            state.pictures = all.take(MAX_SHOWN).collect();
        }
    }

    fn finished(
        &self,
        node: &NodeLabel,
        signature: &str,
        outputs: (&[OutputSocket], &[WireValue]),
    ) {
        self.show_results_instead(outputs);
        let n_left_out = std::mem::take(&mut self.state.lock().n_left_out);
        if n_left_out > 0 && self.is_output(node) {
            self.text(
                &node.id,
                &format!("{n_left_out} more are not shown; SaveImage keeps all"),
            );
        }
        if let Some(output) = self.results() {
            self.files.remember(signature, output.clone());
            self.show(node, output);
        }
        let max = self
            .state
            .lock()
            .progress
            .get(&node.id)
            .map_or(1, |progress| progress.max);
        self.state.lock().executed.push(node.id.clone());
        self.set_progress(&node.id, max, max, true);
    }

    fn cached(&self, node: &NodeLabel, signature: &str) {
        self.tell("execution_cached", json!({"nodes": [node.id]}));
        self.state.lock().executed.push(node.id.clone());
        self.set_progress(&node.id, 1, 1, true);
        if let Some(output) = self.files.again(signature) {
            self.show(node, output);
        }
    }
}

impl Observer for Live {
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>) {
        match event {
            Event::Started { .. } => self.started(node),
            Event::Cached { signature, .. } => self.cached(node, signature.as_str()),
            Event::Progress(progress) => self.progressed(node, progress),
            Event::Preview {
                series,
                label,
                picture,
            } => self.previewed(node, series, label, picture),
            Event::Metric { .. } => {}
            Event::Log { level, text } if *level >= 1 => self.text(&node.id, text),
            Event::Log { .. } => {}
            Event::Saved { path } => self.saved(node, path),
            Event::Finished {
                signature,
                sockets,
                outputs,
                ..
            } => self.finished(node, signature.as_str(), (sockets, outputs)),
        }
    }
}

fn is_picture(name: &str) -> bool {
    let extension = Path::new(name)
        .extension()
        .and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| {
        ["png", "jpg", "jpeg", "webp"].contains(&extension.to_lowercase().as_str())
    })
}

/// A picture as the editor's previews are sent; `None` if it is larger than JPEG allows.
fn jpeg(picture: &RgbPicture) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (width, height) = (picture.width as u32, picture.height as u32);
    JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY)
        .encode(
            &picture.pixels,
            width,
            height,
            image::ExtendedColorType::Rgb8,
        )
        .ok()?;
    Some(bytes)
}
