//! The other side: the process that loads plugins and runs their nodes. It ends with the host's.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;

use super::Setup;
use super::frame::{self, EndText, ErrorText, EventText, JobText, Reply, Request};
use crate::cache::Cache;
use crate::catalog::Catalog;
use crate::events::{Event, NodeLabel, Observer};
use crate::executor::{self, Job, RunError};
use crate::graph::{Graph, NodeId};
use crate::run_folder::WorkDirs;
use crate::{child, interrupt, loader, memory};

/// How often a sign of life is passed on.
const SIGN_EVERY: Duration = Duration::from_millis(200);

/// Serves the host whose socket is this process's standard input.
///
/// # Errors
/// What keeps it from working.
pub(crate) fn serve(setup: &str) -> anyhow::Result<()> {
    let setup: Setup = serde_json::from_str(setup).context("only this program calls itself so")?;
    child::without_core_files();
    child::first_to_go();
    interrupt::leave_to_parent()?;
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let socket = UnixStream::from(stdin.context("there is no socket of a host")?);
    let plugins = setup.plugins.iter().map(|path| loader::load(path));
    let plugins = plugins.collect::<Result<_, _>>()?;
    let catalog = Catalog::new(plugins, setup.places.places()?)?;
    let teller = Arc::new(Teller {
        to: Mutex::new(socket.try_clone()?),
        has_polled: AtomicBool::new(false),
    });
    let jobs = listen(socket)?;
    let signs = teller.clone();
    std::thread::Builder::new().spawn(move || signs.pass_signs_on())?;
    let mut cache = Cache::new(setup.cache_budget);
    for task in jobs {
        match task {
            Task::FreeCache => {
                cache.clear();
            }
            Task::Run(job, cancel) => {
                let end = run(&job, &catalog, cancel, &teller, &mut cache);
                teller.tell(&Reply::Ended(end), &[]);
            }
        }
        memory::give_back();
    }
    Ok(())
}

enum Task {
    Run(Box<JobText>, Arc<AtomicBool>),
    FreeCache,
}

/// Hears the host; the process ends when it is gone.
fn listen(mut socket: UnixStream) -> io::Result<Receiver<Task>> {
    let (sender, tasks) = channel();
    std::thread::Builder::new().spawn(move || {
        let mut cancel = Arc::<AtomicBool>::default();
        while let Ok(Some((request, _))) = frame::read(&mut socket) {
            let sent = match request {
                Request::Run(job) => {
                    cancel = Arc::default();
                    sender.send(Task::Run(job, cancel.clone()))
                }
                Request::FreeCache => sender.send(Task::FreeCache),
                Request::Cancel => {
                    cancel.store(true, Ordering::SeqCst);
                    Ok(())
                }
            };
            if sent.is_err() {
                break;
            }
        }
        // Whatever a node is at, nobody waits for it.
        std::process::exit(0);
    })?;
    Ok(tasks)
}

/// Tells the host what happens.
struct Teller {
    to: Mutex<UnixStream>,
    /// A node asked whether to stop since the last sign of life.
    has_polled: AtomicBool,
}

impl Teller {
    fn tell(&self, reply: &Reply, bytes: &[u8]) {
        // A host that is gone ends this process: see `listen`.
        let _ = frame::write(&mut *self.to.lock(), reply, bytes);
    }

    fn pass_signs_on(&self) {
        loop {
            std::thread::sleep(SIGN_EVERY);
            if self.has_polled.swap(false, Ordering::Relaxed) {
                self.tell(&Reply::Alive, &[]);
            }
        }
    }
}

impl Observer for Teller {
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>) {
        let (event, bytes) = EventText::new(event);
        self.tell(&Reply::Event(node.clone(), event), &bytes);
    }

    fn entered(&self, node: &NodeLabel) {
        self.tell(&Reply::Entered(node.clone()), &[]);
    }

    fn polled(&self) {
        self.has_polled.store(true, Ordering::Relaxed);
    }
}

fn run(
    text: &JobText,
    catalog: &Catalog,
    cancel: Arc<AtomicBool>,
    teller: &Arc<Teller>,
    cache: &mut Cache,
) -> EndText {
    let graph = text.graph.as_object();
    let graph = match graph.map_or_else(|| Ok(Graph::default()), Graph::from_api) {
        Ok(graph) => graph,
        Err(error) => return EndText::Worker(error),
    };
    let plan: Vec<_> = text.plan.iter().map(NodeId::new).collect();
    let work_dirs = WorkDirs::new(text.work_dirs.clone());
    let job = Job {
        graph: &graph,
        plan: &plan,
        catalog,
        output_dir: &text.output_dir,
        work_dirs: &work_dirs,
        workflow: text.workflow.clone(),
        prompt: text.prompt.clone(),
        cancel,
        observer: teller.clone(),
    };
    match executor::run(&job, cache) {
        Ok(()) => EndText::Done {
            work: work_dirs.hand_over(),
        },
        Err(RunError::Canceled { node, resumable }) => EndText::Canceled { node, resumable },
        Err(RunError::Node { node, error }) => EndText::Failed {
            node,
            error: ErrorText::from(*error),
        },
        Err(other @ RunError::Crashed { .. }) => EndText::Worker(other.to_string()),
        Err(RunError::Worker(text)) => EndText::Worker(text),
    }
}
