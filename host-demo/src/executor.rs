//! Running a plan: one worker thread owns the nodes, values pass from one to the next by reference.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use jiff::ZonedDateTime;
use plugin_api::extension::METADATA;
use plugin_api::{
    ErrorCode, Extension, HostContext, NodeDescriptor, NodeError, OutputSocket, Preview, Progress,
    RunInfo, Value,
};
use serde_json::{Map, Value as Json};

use crate::cache::{Cache, Evicted, Signature};
use crate::catalog::{Catalog, Instance};
use crate::events::{Event, NodeLabel, Observer};
use crate::file_words;
use crate::graph::{Graph, GraphNode, Input, NodeId};
use crate::memory;
use crate::pictures;
use crate::run_folder::{FolderError, WorkDir, WorkDirs, named};
use crate::validate::Plan;

/// Deep graphs of automatic differentiation are freed by recursion.
pub(crate) const WORKER_STACK: usize = 256 << 20;

/// Everything that one run needs.
pub(crate) struct Job<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) plan: &'a Plan,
    pub(crate) catalog: &'a Catalog,
    /// Where nodes write.
    pub(crate) output_dir: &'a Path,
    /// Where nodes keep what they need to resume; to be finished once the results are kept.
    pub(crate) work_dirs: &'a WorkDirs,
    /// The editor's document and the graph as JSON, for files; empty if unwanted.
    pub(crate) workflow: String,
    pub(crate) prompt: String,
    /// Set to stop.
    pub(crate) cancel: Arc<AtomicBool>,
    pub(crate) observer: Arc<dyn Observer>,
}

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// The user asked to; `resumable` if the node left something to go on from.
    #[error("canceled at node {} ({})", node.id, node.class)]
    Canceled { node: NodeLabel, resumable: bool },
    /// A node failed.
    #[error("node {} ({}){}: {}", node.id, node.class, input(error), error.message)]
    Node {
        node: NodeLabel,
        error: Box<NodeError>,
    },
    /// The process that ran it is gone: see [`crate::isolated`].
    #[error(
        "PluginCrashed: node {} ({}) took its process down: {how}; only this job is lost", node.id, node.class
    )]
    Crashed { node: NodeLabel, how: String },
    /// The worker thread could not be started or died.
    #[error("the worker {0}; this is a fault of the host, please report it")]
    Worker(String),
}

fn input(error: &NodeError) -> String {
    if error.input.is_empty() {
        String::new()
    } else {
        format!(", input {}", error.input)
    }
}

/// Runs all nodes of the plan.
///
/// # Errors
/// The first node's, or that of the user who canceled.
pub(crate) fn run(job: &Job<'_>, cache: &mut Cache) -> Result<(), RunError> {
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new()
            .name("worker".to_owned())
            .stack_size(WORKER_STACK);
        let handle = worker
            .spawn_scoped(scope, || Worker::new(job).run(cache))
            .map_err(|error| RunError::Worker(format!("cannot be started ({error})")))?;
        handle.join().unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(RunError::Worker(format!("panicked ({text})")))
        })
    })
}

/// Values by socket, and complete parameters.
type Given = (BTreeMap<String, Value>, Map<String, Json>);

/// State of a run, on the worker thread.
struct Worker<'a> {
    job: &'a Job<'a>,
    values: BTreeMap<NodeId, Vec<Value>>,
    signatures: BTreeMap<NodeId, Signature>,
    /// Links that still have to be served, by source.
    waiting: BTreeMap<NodeId, usize>,
    /// Held open until the end of the run: a later node may fail and the whole be run again.
    work: Vec<WorkDir>,
    /// That states cannot be kept.
    is_told: bool,
}

impl<'a> Worker<'a> {
    fn new(job: &'a Job<'a>) -> Self {
        let mut waiting = BTreeMap::new();
        for id in job.plan {
            for (_, source, _) in job.graph.nodes[id].links() {
                *waiting.entry(source.clone()).or_insert(0) += 1;
            }
        }
        let (values, signatures, work, is_told) = Default::default();
        Self {
            job,
            values,
            signatures,
            waiting,
            work,
            is_told,
        }
    }

    fn run(mut self, cache: &mut Cache) -> Result<(), RunError> {
        cache.begin_run();
        for (index, id) in self.job.plan.iter().enumerate() {
            let node = &self.job.graph.nodes[id];
            let label = NodeLabel::of(id, node);
            let outputs = match self.run_node(index, id, node, &label, cache) {
                Ok(outputs) => outputs,
                Err(error) => return Err(self.ended(label, error)),
            };
            self.values.insert(id.clone(), outputs);
            self.release(id, node);
        }
        self.job.work_dirs.all_done(self.work);
        Ok(())
    }

    fn ended(self, node: NodeLabel, error: NodeError) -> RunError {
        let asked = self.job.cancel.load(Ordering::SeqCst);
        let resumable = self
            .work
            .into_iter()
            .map(WorkDir::keep)
            .fold(false, |any, kept| any | kept);
        match error.error_code() {
            ErrorCode::Canceled if asked => RunError::Canceled { node, resumable },
            ErrorCode::Canceled => {
                let message =
                    "it stopped as if canceled, but nobody asked; this is a fault of the plugin";
                RunError::Node {
                    node,
                    error: Box::new(NodeError::new(ErrorCode::Internal, message)),
                }
            }
            _ => RunError::Node {
                node,
                error: Box::new(error),
            },
        }
    }

    /// Frees the values that nobody waits for any more.
    fn release(&mut self, id: &NodeId, node: &GraphNode) {
        for (_, source, _) in node.links() {
            if let Some(n) = self.waiting.get_mut(source) {
                *n -= 1;
                if *n == 0 {
                    self.values.remove(source);
                }
            }
        }
        if !self.waiting.contains_key(id) {
            self.values.remove(id);
        }
    }

    fn run_node(
        &mut self,
        index: usize,
        id: &NodeId,
        node: &GraphNode,
        label: &NodeLabel,
        cache: &mut Cache,
    ) -> Result<Vec<Value>, NodeError> {
        let job = self.job;
        if job.cancel.load(Ordering::SeqCst) {
            return Err(NodeError::canceled());
        }
        job.observer.entered(label);
        let mut instance = job.catalog.create(&node.class)?;
        let Some(descriptor) = job.catalog.descriptor(&node.class) else {
            return Err(NodeError::new(
                ErrorCode::InvalidInput,
                "its class is not known",
            ));
        };
        let (inputs, mut parameters) = self.gather(node, descriptor)?;
        file_words::replace(&mut parameters, job.graph, &ZonedDateTime::now());
        let signature = Signature::of(
            node,
            job.catalog.build_of(&node.class),
            &parameters,
            &instance.fingerprint(&parameters)?,
            &self.signatures,
        );
        self.signatures.insert(id.clone(), signature.clone());
        // Output nodes are run for the files that they write.
        let hit = if descriptor.output_node {
            None
        } else {
            cache.get(&signature)
        };
        if let Some(outputs) = hit {
            job.observer.on_event(
                label,
                &Event::Cached {
                    signature: &signature,
                    sockets: &descriptor.outputs,
                    outputs: &outputs,
                },
            );
            return Ok(outputs);
        }
        job.observer.on_event(
            label,
            &Event::Started {
                index,
                total: job.plan.len(),
            },
        );
        if let Some(text) = unknown_inputs(node, descriptor) {
            job.observer.on_event(
                label,
                &Event::Log {
                    level: 2,
                    text: &text,
                },
            );
        }
        let relieved = cache.relieve(memory::is_scarce);
        self.tell_evicted(label, &relieved, "because little memory is left");
        let started = Instant::now();
        let has_saved = Arc::new(AtomicBool::new(false));
        let n_before = self.work.len();
        let context = self.context(label, &signature, &has_saved)?;
        let outputs = run_with_retry(&mut instance, inputs, &parameters, context, cache)?;
        self.leave_empty(n_before);
        check_outputs(descriptor, &outputs)?;
        let seconds = started.elapsed().as_secs_f64();
        job.observer.on_event(
            label,
            &Event::Finished {
                seconds,
                signature: &signature,
                sockets: &descriptor.outputs,
                outputs: &outputs,
            },
        );
        if !descriptor.output_node && !has_saved.load(Ordering::SeqCst) {
            let evicted = cache.insert(signature, &node.class, outputs.clone());
            self.tell_evicted(label, &evicted, "to keep its budget");
        }
        Ok(outputs)
    }

    fn tell_evicted(&self, label: &NodeLabel, evicted: &[Evicted], why: &str) {
        for Evicted { class, bytes } in evicted {
            let megabytes = bytes >> 20;
            let text = format!("the cache let go of a result of {class} ({megabytes} MiB) {why}");
            let event = Event::Log {
                level: 1,
                text: &text,
            };
            self.job.observer.on_event(label, &event);
        }
    }

    /// The values on the sockets, and complete parameters.
    fn gather(&self, node: &GraphNode, descriptor: &NodeDescriptor) -> Result<Given, NodeError> {
        let mut parameters = node.parameters();
        let mut inputs = BTreeMap::new();
        for (name, input) in &node.inputs {
            let Input::Link {
                node: source,
                output,
            } = input
            else {
                continue;
            };
            let value = self
                .values
                .get(source)
                .and_then(|values| values.get(*output));
            let Some(value) = value else {
                return Err(NodeError::invalid_input(
                    name,
                    format!("the value of node {source} is gone"),
                ));
            };
            match value {
                Value::Json(text)
                    if descriptor.widgets.iter().any(|widget| widget.name == *name) =>
                {
                    let value = serde_json::from_str(text).map_err(|error| {
                        NodeError::invalid_input(
                            name,
                            format!("node {source} gave no JSON: {error}"),
                        )
                    })?;
                    parameters.insert(name.clone(), value);
                }
                value => {
                    inputs.insert(name.clone(), value.clone());
                }
            }
        }
        Ok((inputs, descriptor.completed_parameters(&parameters)))
    }

    /// The node's own folder; `None` if it cannot be had, which is told.
    fn open_work(&mut self, label: &NodeLabel, signature: &Signature) -> Option<WorkDir> {
        let dirs = self.job.work_dirs;
        let path = dirs.path_of(signature.as_str());
        // Two output nodes of one run may be the same.
        if self.work.iter().any(|work| work.path() == path) {
            return None;
        }
        let why = match dirs.open(signature.as_str()) {
            Ok(work) => return Some(work),
            Err(FolderError::InUse { process, .. }) => {
                format!("another run{} does the same now", named(process))
            }
            // The same for the nodes behind it.
            Err(_) if std::mem::replace(&mut self.is_told, true) => return None,
            Err(error) => error.to_string(),
        };
        let text = format!("{why}; if this one is stopped it cannot go on where it was");
        let event = Event::Log {
            level: 2,
            text: &text,
        };
        self.job.observer.on_event(label, &event);
        None
    }

    /// A node is done. If it kept nothing, other runs of the same need not wait for its folder.
    fn leave_empty(&mut self, n_before: usize) {
        let own = self.work.split_off(n_before);
        self.work
            .extend(own.into_iter().filter_map(WorkDir::leave_if_empty));
    }

    fn context(
        &mut self,
        label: &NodeLabel,
        signature: &Signature,
        has_saved: &Arc<AtomicBool>,
    ) -> Result<Context, NodeError> {
        let job = self.job;
        let output_dir = in_words(job.output_dir)?;
        let work_dir = in_words(&job.work_dirs.path_of(signature.as_str()))?;
        let work = self.open_work(label, signature);
        let work_dir = work.as_ref().map(|_| work_dir).unwrap_or_default().into();
        self.work.extend(work);
        Ok(Context {
            label: label.clone(),
            observer: job.observer.clone(),
            cancel: job.cancel.clone(),
            has_saved: has_saved.clone(),
            info: RunInfo {
                node_id: label.id.as_str().into(),
                output_dir: output_dir.into(),
                work_dir,
            },
            metadata: metadata(job),
        })
    }
}

/// A path as nodes are told it.
fn in_words(path: &Path) -> Result<String, NodeError> {
    let refused = || {
        let text = format!(
            "the name of the folder {} is not UTF-8, which nodes cannot be told; choose another one",
            path.display()
        );
        NodeError::new(ErrorCode::CannotWrite, text)
    };
    path.to_str().map(str::to_owned).ok_or_else(refused)
}

/// Runs the node; once more if memory ran out, the cache held some and nothing is saved yet. A second time it is final, and
/// said so.
fn run_with_retry(
    instance: &mut Instance,
    inputs: BTreeMap<String, Value>,
    parameters: &Map<String, Json>,
    context: Context,
    cache: &mut Cache,
) -> Result<Vec<Value>, NodeError> {
    match instance.run(inputs.clone(), parameters, context.clone()) {
        Err(error)
            if error.error_code() == ErrorCode::OutOfMemory
                && !context.has_saved.load(Ordering::SeqCst)
                && cache.clear() =>
        {
            memory::give_back();
            context.log(
                1,
                "memory ran out; the cache was emptied and the node runs again",
            );
            instance
                .run(inputs, parameters, context)
                .map_err(|error| match error.error_code() {
                    ErrorCode::OutOfMemory => NodeError {
                        message: format!("{error} (the same again after the cache was emptied)")
                            .into(),
                        ..error
                    },
                    _ => error,
                })
        }
        result => result,
    }
}

/// A node must return what its descriptor promises.
pub(crate) fn check_outputs(
    descriptor: &NodeDescriptor,
    outputs: &[Value],
) -> Result<(), NodeError> {
    let lie = |text: String| {
        NodeError::new(
            ErrorCode::Internal,
            format!("{text}; this is a fault of the plugin, please report it"),
        )
    };
    let (promised, got) = (descriptor.outputs.len(), outputs.len());
    if promised != got {
        return Err(lie(format!(
            "the node promised {promised} outputs and returned {got}"
        )));
    }
    for (socket, value) in descriptor.outputs.iter().zip(outputs) {
        if let Some(found) = mismatch(socket, value) {
            let OutputSocket { name, port, .. } = socket;
            return Err(lie(format!(
                "the node promised {port} on its output {name} and returned {found}"
            )));
        }
    }
    Ok(())
}

/// What was returned instead of the promised type; `None` if it fits.
fn mismatch(socket: &OutputSocket, value: &Value) -> Option<String> {
    let found = match value {
        Value::Tensor(tensor) => format!("a tensor of shape {:?}", tensor.shape()),
        Value::Object(object) => format!("an object of type {}", object.type_name()),
        Value::Json(text) => format!("the value {text}"),
    };
    let fits = match (socket.port.as_str(), value) {
        (picture_ports::IMAGE, Value::Tensor(tensor)) => matches!(tensor.shape()[..], [_, _, _, 3]),
        (picture_ports::MASK | picture_ports::ATTENTION_MAPS, Value::Tensor(tensor)) => {
            tensor.shape().len() == 3
        }
        (picture_ports::IMAGE | picture_ports::MASK | picture_ports::ATTENTION_MAPS, _) => false,
        (port, Value::Object(object)) => object.type_name() == port,
        // A plugin's own tensors, and numbers and texts: their consumers know them.
        (_, Value::Tensor(_) | Value::Json(_)) => true,
    };
    (!fits).then_some(found)
}

/// What to say of inputs that a node does not have: a slip of the pen, or a parameter of another version.
fn unknown_inputs(node: &GraphNode, descriptor: &NodeDescriptor) -> Option<String> {
    // What editors leave beside the parameters.
    const OF_EDITORS: [&str; 4] = [
        "upload",
        "control_after_generate",
        "is_changed",
        "choose file to upload",
    ];
    let is_known = |name: &str| {
        OF_EDITORS.contains(&name)
            || descriptor.widgets.iter().any(|widget| widget.name == name)
            || descriptor.inputs.iter().any(|socket| socket.name == name)
    };
    let names = node.inputs.keys().filter(|name| !is_known(name));
    let names: Vec<&str> = names.map(String::as_str).collect();
    let (are, they) = match names.len() {
        0 => return None,
        1 => ("is", "it"),
        _ => ("are", "they"),
    };
    Some(format!(
        "{} {are} not among its inputs, and {they} {are} not used; `host-demo nodes` lists them",
        names.join(", ")
    ))
}

/// The host as a running node sees it.
#[derive(Clone)]
struct Context {
    label: NodeLabel,
    observer: Arc<dyn Observer>,
    cancel: Arc<AtomicBool>,
    has_saved: Arc<AtomicBool>,
    info: RunInfo,
    /// A JSON object: see [`METADATA`].
    metadata: Arc<str>,
}

/// The documents that restore the graph, by the names that files carry them under; those that are wanted.
fn metadata(job: &Job<'_>) -> Arc<str> {
    let documents = [("prompt", &job.prompt), ("workflow", &job.workflow)].into_iter();
    let wanted = documents.filter(|(_, document)| !document.is_empty());
    let texts = wanted.map(|(name, document)| (name.to_owned(), document.as_str().into()));
    Json::Object(texts.collect()).to_string().into()
}

impl Context {
    fn tell(&self, event: &Event<'_>) {
        self.observer.on_event(&self.label, event);
    }
}

impl HostContext for Context {
    fn is_canceled(&self) -> bool {
        self.observer.polled();
        self.cancel.load(Ordering::Relaxed)
    }

    fn progress(&self, progress: Progress) {
        self.tell(&Event::Progress(&progress));
    }

    fn preview(&self, preview: Preview) {
        match pictures::from_preview(&preview.picture) {
            Ok(picture) => {
                // A series without a name goes by the node's title.
                let series = if preview.series.is_empty() {
                    &self.label.title
                } else {
                    preview.series.as_str()
                };
                self.tell(&Event::Preview {
                    series,
                    label: &preview.label,
                    picture: &picture,
                });
            }
            Err(error) => self.log(2, &error.message),
        }
    }

    fn metric(&self, series: &str, x: f64, y: f64) {
        self.tell(&Event::Metric { series, x, y });
    }

    fn log(&self, level: u32, text: &str) {
        self.tell(&Event::Log { level, text });
    }

    fn saved(&self, path: &str) {
        self.has_saved.store(true, Ordering::SeqCst);
        self.tell(&Event::Saved {
            path: Path::new(path),
        });
    }

    fn run_info(&self) -> RunInfo {
        self.info.clone()
    }

    fn extension(&self, id: &str) -> Option<Box<dyn Extension>> {
        let metadata = self.metadata.clone();
        (id == METADATA).then(|| -> Box<dyn Extension> {
            Box::new(move |_: Vec<Value>| Ok(vec![Value::Json((&*metadata).into())]))
        })
    }
}

#[cfg(test)]
mod tests;
