//! A server that speaks ComfyUI's protocol, so that its editor and its clients drive our nodes.
//!
//! In reading order: where things are (`folders`, `front_end`), who is let in (`guard`), what is to be done (`queue`,
//! kept by `journal`), doing it (`worker`, told by `live` to the clients of `hub`), and what can be asked (`routes`).
//! `pages` has what a browser gets that is ours: the plain page, and a script that the editor loads.

mod answer;
mod ended;
mod folders;
mod front_end;
pub(crate) mod fuzzed;
mod guard;
mod hub;
mod job;
mod journal;
mod listener;
mod live;
mod queue;
mod routes;
mod settings;
mod shown;
mod worker;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::builtin_nodes::Places;
use crate::catalog::Catalog;
use crate::console::{complain, say, tell_devices};
use crate::demo;
use crate::interrupt;
use crate::isolated::{Engine, IsolationArguments};
use crate::plugin_search::Libraries;

pub(crate) use folders::Folders;
use front_end::FrontEnd;
use guard::Guard;
use hub::{Hub, Message};
use journal::Journal;
use queue::Queue;
use settings::Settings;

/// The pack that the bundled workflow belongs to.
pub(crate) const PACK: &str = "conceptloom";

/// How to serve.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) listen: IpAddr,
    pub(crate) port: u16,
    pub(crate) token: Option<String>,
    /// Names by which this machine may be called, beside its own.
    pub(crate) hosts: Vec<String>,
    pub(crate) front_end: Option<PathBuf>,
    pub(crate) data: PathBuf,
    pub(crate) cache_budget: u64,
    pub(crate) disable_metadata: bool,
    pub(crate) resume: bool,
    pub(crate) libraries: Libraries,
    pub(crate) isolation: IsolationArguments,
}

/// Everything that requests share.
pub(crate) struct Server {
    catalog: Arc<Catalog>,
    folders: Arc<Folders>,
    front_end: FrontEnd,
    guard: Guard,
    hub: Arc<Hub>,
    queue: Queue,
    settings: Settings,
    disable_metadata: bool,
}

impl Server {
    /// Tells everybody how long the queue is.
    fn tell_status(&self) {
        self.hub.send("", &Message::Event("status", self.status()));
    }

    fn status(&self) -> serde_json::Value {
        json!({"status": {"exec_info": {"queue_remaining": self.queue.remaining()}}})
    }
}

/// What a process may have open at once where the system does not say.
const FEWEST_FILES: u64 = 256;

/// Serves until Ctrl-C.
///
/// # Errors
/// What keeps the server from starting, in one sentence.
pub(crate) fn serve(options: &Options) -> anyhow::Result<()> {
    let guard = Guard::new(
        options.listen,
        options.token.as_deref(),
        options.hosts.clone(),
    )?;
    let front_end = FrontEnd::find(options.front_end.as_deref())?;
    let folders = Arc::new(Folders::open(&options.data)?);
    let places = Places::Served {
        input: folders.input.clone(),
        output: folders.output.clone(),
        temp: folders.temp.clone(),
    };
    let plugins = options.libraries.load(&options.isolation)?;
    let paths = plugins.iter().map(|plugin| plugin.path.clone()).collect();
    let engine = Engine::new(&options.isolation, options.cache_budget, paths, &places)?;
    let catalog = Arc::new(Catalog::new(plugins, places)?);
    tell_devices(&catalog.devices()?);
    let settings = Settings::open(&folders.user, front_end.version())?;
    let (journal, restored) = Journal::open(&folders.journal())?;
    let n_restored = restored.len();
    for job in restored.iter().filter(|job| job.is_suspected()) {
        complain(&format!(
            "job {} was cut short {} times; it runs after the others",
            job.id,
            job.cut_short.len()
        ));
    }
    let server = Arc::new(Server {
        queue: Queue::new(journal, restored),
        hub: Arc::default(),
        disable_metadata: options.disable_metadata,
        catalog,
        folders,
        front_end,
        guard,
        settings,
    });
    if options.resume {
        server.queue.resume();
    } else if n_restored > 0 {
        complain(&format!(
            "{n_restored} jobs of an earlier run wait; the editor and /conceptloom have a button that runs them, \
             --resume does it at once, POST {{\"resume\": true}} to /api/queue from a program"
        ));
    }
    // Half-open connections must not use up what answers the others.
    let n_files = rlimit::increase_nofile_limit(u64::from(u16::MAX));
    let most_connections = listener::most_connections(n_files.unwrap_or(FEWEST_FILES));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // Each thread keeps memory of its own.
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .context("the server's threads cannot be started")?;
    // Dropped with the worker, however it ends.
    let (works, ended) = oneshot::channel::<Infallible>();
    let worker = {
        let server = server.clone();
        let work = move || {
            let _works = works;
            worker::work(&server, engine);
        };
        std::thread::Builder::new()
            .name("jobs".to_owned())
            .spawn(work)
            .context("the worker cannot be started")?
    };
    let served = runtime.block_on(answer(&server, options, most_connections, ended));
    interrupt::end_at_next_signal();
    let again = if cfg!(unix) {
        "; Ctrl-C again stops at once"
    } else {
        ""
    };
    complain(&format!(
        "stopping; the running job ends at its next step, and waiting jobs are kept{again}"
    ));
    server.queue.close();
    runtime.shutdown_background();
    // Told already where it is why the server ends.
    if worker.join().is_err() && served.is_ok() {
        complain("warning: the worker ended in disorder");
    }
    served
}

/// Until somebody stops the server, or nobody works for it any more.
async fn answer(
    server: &Arc<Server>,
    options: &Options,
    most_connections: usize,
    worker_ended: oneshot::Receiver<Infallible>,
) -> anyhow::Result<()> {
    let address = SocketAddr::new(options.listen, options.port);
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; stop what uses it or name another port with --port")
    })?;
    let address = listener.local_addr().context("the address is not known")?;
    if !server.front_end.is_there() {
        complain(
            "ComfyUI's editor was not found: a plain page is served instead; `pip install \
             comfyui-frontend-package` installs the editor, --front-end-root names a folder or wheel of it",
        );
    }
    say(&format!(
        "http://{address}/?template={}&source={PACK}",
        demo::NAME
    ));
    if server.guard.asks() {
        complain(
            "a browser asks for a user, who may be anybody, and a password, which is the token",
        );
    }
    let router = routes::router(server.clone());
    tokio::select! {
        () = listener::accept(listener, router, most_connections) => Ok(()),
        result = tokio::signal::ctrl_c() => result.context("Ctrl-C cannot be handled"),
        () = terminated() => Ok(()),
        _ = worker_ended => Err(anyhow!(
            "what runs the jobs has panicked; this is a fault of the host, please report it; the next start has all jobs still"
        )),
    }
}

/// Waits for what a service manager sends.
#[cfg(unix)]
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn terminated() {
    std::future::pending().await
}
