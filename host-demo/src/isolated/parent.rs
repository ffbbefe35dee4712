//! The host's side: it starts the process, hands it jobs, listens, and notices its end.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Setup;
use super::frame::{EndText, JobText, Reply, Request};
use super::process::{Next, Process};
use crate::child;
use crate::events::NodeLabel;
use crate::executor::{Job, RunError};

/// How often it is looked whether the user asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Sign of life that is waited for at most once the user asked to stop: a step may take as long. While a state is written,
/// the plugin shows one.
const HANG_LIMIT_CANCELED: Duration = Duration::from_secs(120);
/// Signals to a group of processes arrive within this time.
const SAME_MOMENT: Duration = Duration::from_millis(200);

/// See the module above.
pub(crate) struct Isolated {
    setup: Setup,
    hang_limit: Duration,
    worker: Option<Process<Reply>>,
}

impl Isolated {
    /// The process is started with the first job.
    pub(crate) fn new(setup: Setup, hang_limit: Duration) -> Self {
        Self {
            setup,
            hang_limit,
            worker: None,
        }
    }

    /// Lets the results go that the process keeps.
    pub(crate) fn free(&mut self) {
        if let Some(worker) = &self.worker {
            // A process that is gone keeps nothing.
            let _ = worker.say(&Request::FreeCache);
        }
    }

    /// Runs a job.
    ///
    /// # Errors
    /// The job's own, or [`RunError::Crashed`]; once it was asked to stop, [`RunError::Canceled`] however it ended.
    pub(crate) fn run(&mut self, job: &Job<'_>) -> Result<(), RunError> {
        let request = Request::Run(Box::new(JobText {
            graph: job.graph.to_api(),
            plan: job.plan.iter().map(ToString::to_string).collect(),
            output_dir: job.output_dir.to_owned(),
            work_dirs: job.work_dirs.root().to_owned(),
            workflow: job.workflow.clone(),
            prompt: job.prompt.clone(),
        }));
        let cannot = |error: io::Error| {
            RunError::Worker(format!("of --isolate cannot be started ({error})"))
        };
        let worker = match self.worker.take() {
            Some(worker) if worker.say(&request).is_ok() => worker,
            // None yet, or one that ended between two jobs.
            gone => {
                if let Some(worker) = gone {
                    worker.end();
                }
                let worker = start(&self.setup).map_err(cannot)?;
                worker.say(&request).map_err(cannot)?;
                worker
            }
        };
        match listen(&worker, job, self.hang_limit) {
            Heard::End(result) => {
                self.worker = Some(worker);
                result
            }
            Heard::Gone(node, how) => {
                let ended = worker.end();
                let how = how.unwrap_or(ended);
                // Whoever asked it to stop, or both processes at one time, need not hear how it ended.
                if is_canceled(job)
                    && let Some(node) = node.clone().or_else(|| first_of(job))
                {
                    let resumable = job.work_dirs.has_any();
                    return Err(RunError::Canceled { node, resumable });
                }
                Err(match node {
                    Some(node) => RunError::Crashed { node, how },
                    None => RunError::Worker(format!(
                        "of --isolate ended before its first node ({how})"
                    )),
                })
            }
        }
    }
}

impl Drop for Isolated {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.end();
        }
    }
}

/// How listening to a job ended.
enum Heard {
    /// With the job.
    End(Result<(), RunError>),
    /// With the process, at this node; and why, where it was ended from here.
    Gone(Option<NodeLabel>, Option<String>),
}

/// Whether the job is to stop, or is asked to at about this moment.
fn is_canceled(job: &Job<'_>) -> bool {
    let asked = || job.cancel.load(Ordering::SeqCst);
    asked() || {
        std::thread::sleep(SAME_MOMENT);
        asked()
    }
}

fn first_of(job: &Job<'_>) -> Option<NodeLabel> {
    let id = job.plan.first()?;
    Some(NodeLabel::of(id, &job.graph.nodes[id]))
}

fn start(setup: &Setup) -> io::Result<Process<Reply>> {
    let setup = serde_json::to_string(setup)?;
    Process::start(child::own_program()?.arg("worker").arg(setup))
}

fn listen(worker: &Process<Reply>, job: &Job<'_>, hang_limit: Duration) -> Heard {
    let mut node: Option<NodeLabel> = None;
    let mut is_cancel_sent = false;
    let mut silence = Duration::ZERO;
    loop {
        if !is_cancel_sent && job.cancel.load(Ordering::SeqCst) {
            is_cancel_sent = true;
            silence = Duration::ZERO;
            // If it is gone, that is noticed below.
            let _ = worker.say(&Request::Cancel);
        }
        match worker.next(LOOK_EVERY) {
            Next::Told(reply, bytes) => {
                silence = Duration::ZERO;
                match reply {
                    Reply::Alive => {}
                    Reply::Entered(label) => node = Some(label),
                    Reply::Event(label, event) => {
                        if event.tell(&label, bytes, &*job.observer).is_err() {
                            return Heard::Gone(node, Some("what it tells is torn".to_owned()));
                        }
                    }
                    Reply::Ended(end) => return Heard::End(end.result(job)),
                }
            }
            Next::Gone(how) => return Heard::Gone(node, how),
            Next::Silence(time) => {
                silence += time;
                let limit = if is_cancel_sent {
                    hang_limit.min(HANG_LIMIT_CANCELED)
                } else {
                    hang_limit
                };
                if silence >= limit {
                    let how = format!("no sign of life for {} s", limit.as_secs());
                    return Heard::Gone(node, Some(how));
                }
            }
        }
    }
}

impl EndText {
    fn result(self, job: &Job<'_>) -> Result<(), RunError> {
        match self {
            Self::Done { work } => {
                job.work_dirs.take_over(&work);
                Ok(())
            }
            Self::Canceled { node, resumable } => Err(RunError::Canceled { node, resumable }),
            Self::Failed { node, error } => Err(RunError::Node {
                node,
                error: Box::new(error.into()),
            }),
            Self::Worker(text) => Err(RunError::Worker(text)),
        }
    }
}
