//! The one thread that runs jobs: it owns the cache, and with it the device, or the process that does.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use plugin_api::ErrorCode;
use serde_json::{Value, json};

use super::Server;
use super::ended::{Ended, Outcome, Results};
use super::job::Job;
use super::live::{Live, Previews};
use super::queue::{Running, Task};
use super::shown::ShownFiles;
use crate::clock::now_ms;
use crate::console::complain;
use crate::events::{Event, NodeLabel, Observer};
use crate::executor::{self, RunError};
use crate::graph::{Graph, NodeId};
use crate::isolated::Engine;
use crate::memory;
use crate::run_folder::WorkDirs;
use crate::validate::{Problem, judge};

/// What interrupted nodes left is looked through so often.
const SWEEP_EVERY: Duration = Duration::from_secs(24 * 3600);

/// Runs jobs until the queue is closed.
pub(crate) fn work(server: &Arc<Server>, mut engine: Engine) {
    let files = Arc::new(ShownFiles::new(&server.folders.temp));
    let mut swept: Option<Instant> = None;
    loop {
        if swept.is_none_or(|at| at.elapsed() > SWEEP_EVERY) {
            server.folders.work_dirs().sweep();
            swept = Some(Instant::now());
        }
        match server.queue.next() {
            Task::Stop => return,
            Task::FreeCache => {
                engine.free();
                files.forget_results();
            }
            Task::Run(running) => {
                run(server, &running, &mut engine, &files);
                server.tell_status();
                memory::give_back();
            }
        }
    }
}

fn run(server: &Arc<Server>, running: &Running, engine: &mut Engine, files: &Arc<ShownFiles>) {
    let job = &running.job;
    let live = Arc::new(Live::new(
        server.hub.clone(),
        server.folders.clone(),
        server.catalog.clone(),
        files.clone(),
        (&job.id, &job.client_id),
        Previews::of(&job.extra_data),
    ));
    server.queue.set_live(live.clone());
    server.tell_status();
    live.tell("execution_start", json!({}));
    // Nodes from the cache are told as they are reached; clients expect one such message in any case.
    live.tell("execution_cached", json!({"nodes": []}));
    let work_dirs = server.folders.work_dirs();
    let (outcome, kind, data) = match execute(server, running, &live, &work_dirs, engine) {
        Ok(()) => (Outcome::Completed, "execution_success", json!({})),
        Err(Failure::Run(RunError::Canceled { node, .. })) => {
            let data =
                json!({"node_id": node.id, "node_type": node.class, "executed": live.executed()});
            (Outcome::Canceled, "execution_interrupted", data)
        }
        Err(failure) => {
            let data = describe(&failure, &live);
            let message = data["exception_message"].as_str().unwrap_or_default();
            complain(&format!("job {}: {message}", job.id));
            (Outcome::Failed, "execution_error", data)
        }
    };
    let data = live.note(kind, data);
    let (outputs, messages) = live.take_results();
    let results = Results {
        outputs,
        messages,
        started_ms: running.started_ms,
        ended_ms: now_ms(),
    };
    // Who hears of the end finds the job in the history.
    server.queue.end(Ended::new(job, outcome, &results));
    work_dirs.finish();
    live.send(kind, data);
    live.finish();
}

enum Failure {
    Run(RunError),
    /// What could run when it was accepted no longer can.
    Invalid(Vec<Problem>),
    Unreadable(String),
}

/// The data of `execution_error`.
fn describe(failure: &Failure, live: &Live) -> Value {
    let none = String::new;
    let internal = "InternalError";
    let (node, class, kind, message) = match failure {
        Failure::Run(RunError::Node { node, error }) => {
            let input = if error.input.is_empty() {
                String::new()
            } else {
                format!("{}: ", error.input)
            };
            let message = format!("{input}{}", error.message);
            (
                node.id.clone(),
                node.class.clone(),
                exception_type(error.error_code()),
                message,
            )
        }
        Failure::Run(RunError::Crashed { node, how }) => {
            let message = format!("the node took its process down: {how}; only this job is lost");
            (
                node.id.clone(),
                node.class.clone(),
                "PluginCrashed",
                message,
            )
        }
        Failure::Run(error) => (none(), none(), internal, error.to_string()),
        Failure::Invalid(problems) => {
            let all: Vec<_> = problems.iter().map(ToString::to_string).collect();
            (none(), none(), "InvalidInput", all.join("\n"))
        }
        Failure::Unreadable(message) => (none(), none(), "InvalidInput", message.clone()),
    };
    json!({
        "node_id": node, "node_type": class, "exception_type": kind, "exception_message": message,
        "executed": live.executed(), "traceback": [], "current_inputs": {}, "current_outputs": [],
    })
}

/// The editor helps where memory ran out, if it is called so.
fn exception_type(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::OutOfMemory => "OOMError",
        code => code.name(),
    }
}

/// Writes down what a job saves before anybody hears of it.
struct Saves {
    server: Arc<Server>,
    job: Arc<Job>,
    live: Arc<Live>,
    /// Where its files are.
    saved: Mutex<Vec<PathBuf>>,
}

impl Observer for Saves {
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>) {
        if let Event::Saved { path } = event {
            let mut saved = self.saved.lock();
            let path = self.server.queue.saved(&self.job, path, &saved);
            saved.push(path.clone());
            self.live.on_event(node, &Event::Saved { path: &path });
        } else {
            self.live.on_event(node, event);
        }
    }

    fn entered(&self, node: &NodeLabel) {
        self.live.entered(node);
    }

    fn polled(&self) {
        self.live.polled();
    }
}

fn execute(
    server: &Arc<Server>,
    running: &Running,
    live: &Arc<Live>,
    work_dirs: &WorkDirs,
    engine: &mut Engine,
) -> Result<(), Failure> {
    let job = &running.job;
    for file in &job.saved {
        file.take_back(&server.folders.output);
    }
    server.queue.begin(&job.id);
    let saves = Saves {
        server: server.clone(),
        job: job.clone(),
        live: live.clone(),
        saved: Mutex::default(),
    };
    let no_graph = || Failure::Unreadable("the prompt is no graph".to_owned());
    let prompt = job.prompt.as_object().ok_or_else(no_graph)?;
    let graph = Graph::from_api(prompt).map_err(Failure::Unreadable)?;
    let wanted: Vec<_> = job.outputs.iter().map(NodeId::new).collect();
    let verdict = judge(&graph, &server.catalog, Some(&wanted));
    if verdict.outputs.len() < wanted.len() {
        return Err(Failure::Invalid(verdict.problems));
    }
    let (workflow, prompt) = if server.disable_metadata {
        Default::default()
    } else {
        let workflow = job.extra_data.pointer("/extra_pnginfo/workflow");
        (
            workflow.map(Value::to_string).unwrap_or_default(),
            job.prompt.to_string(),
        )
    };
    let job = executor::Job {
        graph: &graph,
        plan: &verdict.plan,
        catalog: &server.catalog,
        output_dir: server.folders.output.path(),
        work_dirs,
        workflow,
        prompt,
        cancel: running.cancel.clone(),
        observer: Arc::new(saves),
    };
    engine.run(&job).map_err(Failure::Run)
}
