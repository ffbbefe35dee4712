//! The host's side: it starts the process, hands it jobs, listens, and notices its end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::Setup;
use super::frame::{self, EndText, JobText, Reply, Request};
use crate::child::{self, Ended};
use crate::events::NodeLabel;
use crate::executor::{Job, RunError};

/// How often it is looked whether the user asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Sign of life that is waited for at most once the user asked to stop.
const HANG_LIMIT_CANCELED: Duration = Duration::from_secs(10);
/// How long a process may take to end once its socket is closed.
const END_LIMIT: Duration = Duration::from_secs(10);

struct Worker {
    child: Child,
    to: UnixStream,
    from: Receiver<io::Result<(Reply, Vec<u8>)>>,
}

/// See the module above.
pub(crate) struct Isolated {
    setup: Setup,
    hang_limit: Duration,
    worker: Option<Worker>,
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
        if let Some(worker) = &mut self.worker {
            // A process that is gone keeps nothing.
            let _ = frame::write(&mut worker.to, &Request::FreeCache, &[]);
        }
    }

    /// Runs a job.
    ///
    /// # Errors
    /// The job's own, or [`RunError::Crashed`].
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
        let mut worker = match self.worker.take() {
            Some(worker) if frame::write(&mut &worker.to, &request, &[]).is_ok() => worker,
            // None yet, or one that ended between two jobs.
            gone => {
                if let Some(worker) = gone {
                    worker.end();
                }
                let mut worker = Worker::start(&self.setup).map_err(cannot)?;
                frame::write(&mut worker.to, &request, &[]).map_err(cannot)?;
                worker
            }
        };
        match worker.listen(job, self.hang_limit) {
            Heard::End(result) => {
                self.worker = Some(worker);
                result
            }
            Heard::Gone(node, how) => {
                let ended = worker.end();
                let how = how.unwrap_or(match ended {
                    Ended::Crashed(how) => how,
                    Ended::Code(code) => format!("its process ended with exit code {code}"),
                    Ended::TimedOut => "its process went silent".to_owned(),
                });
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

impl Worker {
    fn start(setup: &Setup) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = child::own_program()?
            .arg("worker")
            .arg(serde_json::to_string(setup)?)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        let (sender, from) = channel();
        let mut reader = ours.try_clone()?;
        std::thread::Builder::new()
            .name("isolated".to_owned())
            .spawn(move || {
                loop {
                    let reply = match frame::read(&mut reader) {
                        Ok(Some(reply)) => Ok(reply),
                        Ok(None) => return,
                        Err(error) => Err(error),
                    };
                    let is_last = reply.is_err();
                    if sender.send(reply).is_err() || is_last {
                        return;
                    }
                }
            })?;
        Ok(Self {
            child,
            to: ours,
            from,
        })
    }

    fn listen(&mut self, job: &Job<'_>, hang_limit: Duration) -> Heard {
        let mut node: Option<NodeLabel> = None;
        let mut is_cancel_sent = false;
        let mut silence = Duration::ZERO;
        loop {
            if !is_cancel_sent && job.cancel.load(Ordering::SeqCst) {
                is_cancel_sent = true;
                silence = Duration::ZERO;
                // If it is gone, that is noticed below.
                let _ = frame::write(&mut self.to, &Request::Cancel, &[]);
            }
            let asked = Instant::now();
            match self.from.recv_timeout(LOOK_EVERY) {
                Ok(Ok((reply, bytes))) => {
                    silence = Duration::ZERO;
                    match reply {
                        Reply::Alive => {}
                        Reply::Entered(label) => node = Some(label),
                        Reply::Event(label, event) => {
                            if event.tell(&label, bytes, &*job.observer).is_err() {
                                return Heard::Gone(node, Some("what it tells is torn".to_owned()));
                            }
                        }
                        Reply::Ended(end) => return Heard::End(end.result()),
                    }
                }
                Ok(Err(error)) => {
                    return Heard::Gone(
                        node,
                        Some(format!("what it tells cannot be read: {error}")),
                    );
                }
                Err(RecvTimeoutError::Timeout) => {
                    // No more than was asked for: this process may have been stopped, and the other with it.
                    silence += asked.elapsed().min(2 * LOOK_EVERY);
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
                Err(RecvTimeoutError::Disconnected) => return Heard::Gone(node, None),
            }
        }
    }

    /// Ends the process, if it has not ended; how it did.
    fn end(mut self) -> Ended {
        let _ = self.to.shutdown(std::net::Shutdown::Both);
        let started = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ended::of(status),
                Ok(None) if started.elapsed() < END_LIMIT => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None) | Err(_) => {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    return Ended::TimedOut;
                }
            }
        }
    }
}

impl EndText {
    fn result(self) -> Result<(), RunError> {
        match self {
            Self::Done => Ok(()),
            Self::Canceled { node, resumable } => Err(RunError::Canceled { node, resumable }),
            Self::Failed { node, error } => Err(RunError::Node {
                node,
                error: Box::new(error.into()),
            }),
            Self::Worker(text) => Err(RunError::Worker(text)),
        }
    }
}
