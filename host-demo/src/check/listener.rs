//! A host that keeps a record of what a node tells it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use plugin_api::{HostContext, Preview, Progress, RunInfo};

use crate::pictures;

/// What was told.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Calls of all services that tell something.
    pub(crate) n_calls: usize,
    /// The first thing that should not have been told.
    pub(crate) wrong: Option<String>,
}

/// What the host and the listener in the node's hands share.
#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    is_over: AtomicBool,
}

/// How a host behaves in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behavior {
    /// Never asks to stop.
    Patient,
    /// Asks to stop after this time; with none, before the run.
    CancelsAfter(Duration),
    /// Its services panic.
    Panics,
}

/// The message of [`Behavior::Panics`].
pub(crate) const HOST_PANIC: &str = "the host was asked to panic";

/// In the node's hands.
pub(crate) struct Listener {
    shared: Arc<Shared>,
    info: RunInfo,
    panics: bool,
    cancel_at: Option<Instant>,
}

/// The host's end of it.
pub(crate) struct Record {
    shared: Arc<Shared>,
    /// When the node is asked to stop.
    pub(crate) cancel_at: Option<Instant>,
}

/// A listener, whose run writes below `folder`, and its record.
pub(crate) fn listener(behavior: Behavior, folder: &Path) -> (Listener, Record) {
    let shared = Arc::<Shared>::default();
    let path = |name: &str| {
        let path = folder.join(name);
        // A node that writes says itself that it cannot.
        let _ = std::fs::create_dir_all(&path);
        path.to_string_lossy().as_ref().into()
    };
    let cancel_at = match behavior {
        Behavior::CancelsAfter(time) => Some(Instant::now() + time),
        Behavior::Patient | Behavior::Panics => None,
    };
    // What a run leaves there is for one with the same inputs and parameters: here every run has a folder of its own.
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let work = format!("work-{}", RUNS.fetch_add(1, Ordering::Relaxed));
    let listener = Listener {
        shared: shared.clone(),
        info: RunInfo {
            node_id: "1".into(),
            output_dir: path("output"),
            work_dir: path(&work),
        },
        panics: behavior == Behavior::Panics,
        cancel_at,
    };
    (listener, Record { shared, cancel_at })
}

impl Record {
    /// What was told until the run was over.
    pub(crate) fn close(&self) -> Heard {
        self.shared.is_over.store(true, Ordering::SeqCst);
        std::mem::take(&mut *self.shared.heard.lock())
    }

    /// What was told after that.
    pub(crate) fn late(&self) -> Heard {
        std::mem::take(&mut *self.shared.heard.lock())
    }

    /// Whether the node's side still has the host.
    pub(crate) fn is_held(&self) -> bool {
        Arc::strong_count(&self.shared) > 1
    }
}

impl Listener {
    #[expect(clippy::panic, reason = "what one of its behaviors is")]
    fn hear(&self, wrong: Option<String>) {
        if self.panics {
            panic!("{HOST_PANIC}");
        }
        let mut heard = self.shared.heard.lock();
        heard.n_calls += 1;
        heard.wrong = heard.wrong.take().or(wrong);
    }
}

impl HostContext for Listener {
    #[expect(clippy::panic, reason = "what one of its behaviors is")]
    fn is_canceled(&self) -> bool {
        if self.panics {
            panic!("{HOST_PANIC}");
        }
        self.cancel_at.is_some_and(|at| Instant::now() >= at)
    }

    fn progress(&self, progress: Progress) {
        let Progress {
            done, total, stage, ..
        } = progress;
        let is_outside = done > total || total == 0;
        self.hear(is_outside.then(|| format!("its progress in {stage} is {done} of {total}")));
    }

    fn preview(&self, preview: Preview) {
        let wrong = pictures::from_preview(&preview.picture).err();
        self.hear(wrong.map(|error| error.message.into_string()));
    }

    fn metric(&self, _: &str, _: f64, _: f64) {
        self.hear(None);
    }

    fn log(&self, _: u32, _: &str) {
        self.hear(None);
    }

    fn saved(&self, path: &str) {
        let path = Path::new(path);
        let is_there = path.starts_with(self.info.output_dir.as_str()) && path.exists();
        let wrong = || {
            let path = path.display();
            format!("it says that it wrote {path}, which is not in the output directory")
        };
        self.hear((!is_there).then(wrong));
    }

    fn run_info(&self) -> RunInfo {
        self.info.clone()
    }
}
