//! Running jobs in a process of their own, so that a plugin that crashes or hangs loses its job and nothing else.
//!
//! The process (`worker`) is this program once more. It loads the plugins, keeps the cache and runs one job after the other;
//! it is told what to run and tells what happens over a socket (`frame`). Values on wires never leave it. When it is gone, or
//! gives no sign of life for too long, its job ends with [`RunError::Crashed`], or as canceled if it was to stop, and the next
//! job gets a new process.
//!
//! What is asked of a plugin without running it is asked of another process (`informant`), which answers while a job runs.
//! The host itself never has a plugin's library in it.

#[cfg(unix)]
mod frame;
#[cfg(unix)]
mod informant;
#[cfg(unix)]
mod parent;
#[cfg(unix)]
mod process;
#[cfg(unix)]
mod worker;

#[cfg(unix)]
pub(crate) use informant::Informant;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::builtin_nodes::Places;
use crate::cache::Cache;
use crate::confined::Root;
use crate::executor::{self, Job, RunError};
use crate::memory;

/// Whether plugins run in a process of their own.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct IsolationArguments {
    /// Runs nodes in a process of their own: one that crashes or hangs loses its job alone
    #[arg(long)]
    isolate: bool,
    /// With --isolate: how long a node may give no sign of life (progress, a question whether to stop)
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    hang_limit: u64,
}

impl IsolationArguments {
    /// Whether the host may not have libraries of plugins in itself.
    pub(crate) fn is_on(&self) -> bool {
        self.isolate
    }
}

/// What the process needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) plugins: Vec<PathBuf>,
    cache_budget: u64,
    places: PlacesText,
}

/// [`Places`] as text.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum PlacesText {
    Own {
        workflow_dir: PathBuf,
        input_dir: PathBuf,
    },
    Served {
        input: PathBuf,
        output: PathBuf,
        temp: PathBuf,
    },
}

impl PlacesText {
    fn new(places: &Places) -> Self {
        match places {
            Places::Own {
                workflow_dir,
                input_dir,
            } => Self::Own {
                workflow_dir: workflow_dir.clone(),
                input_dir: input_dir.clone(),
            },
            Places::Served {
                input,
                output,
                temp,
            } => Self::Served {
                input: input.path().to_owned(),
                output: output.path().to_owned(),
                temp: temp.path().to_owned(),
            },
        }
    }

    fn places(self) -> io::Result<Places> {
        Ok(match self {
            Self::Own {
                workflow_dir,
                input_dir,
            } => Places::Own {
                workflow_dir,
                input_dir,
            },
            Self::Served {
                input,
                output,
                temp,
            } => Places::Served {
                input: Root::create(&input)?,
                output: Root::create(&output)?,
                temp: Root::create(&temp)?,
            },
        })
    }
}

/// Runs jobs, here or in a process of their own.
pub(crate) enum Engine {
    /// In this process, with this cache.
    Here(Cache),
    /// In another.
    #[cfg(unix)]
    Isolated(parent::Isolated),
}

impl Engine {
    /// # Errors
    /// Processes of their own are not to be had on this system.
    pub(crate) fn new(
        isolation: &IsolationArguments,
        cache_budget: u64,
        plugins: Vec<PathBuf>,
        places: &Places,
    ) -> anyhow::Result<Self> {
        if !isolation.isolate {
            return Ok(Self::Here(Cache::new(cache_budget)));
        }
        let setup = Setup {
            plugins,
            cache_budget,
            places: PlacesText::new(places),
        };
        Self::isolated(setup, Duration::from_secs(isolation.hang_limit))
    }

    #[cfg(unix)]
    #[expect(clippy::unnecessary_wraps, reason = "other systems have none")]
    fn isolated(setup: Setup, hang_limit: Duration) -> anyhow::Result<Self> {
        Ok(Self::Isolated(parent::Isolated::new(setup, hang_limit)))
    }

    #[cfg(not(unix))]
    fn isolated(_: Setup, _: Duration) -> anyhow::Result<Self> {
        anyhow::bail!("--isolate needs a Unix system; leave it out")
    }

    /// Runs a job.
    ///
    /// # Errors
    /// See [`executor::run`]; besides, a process that crashed.
    pub(crate) fn run(&mut self, job: &Job<'_>) -> Result<(), RunError> {
        match self {
            Self::Here(cache) => executor::run(job, cache),
            #[cfg(unix)]
            Self::Isolated(isolated) => isolated.run(job),
        }
    }

    /// Lets all kept results go.
    pub(crate) fn free(&mut self) {
        match self {
            Self::Here(cache) => {
                cache.clear();
                memory::give_back();
            }
            #[cfg(unix)]
            Self::Isolated(isolated) => isolated.free(),
        }
    }
}

/// The hidden command: the process of `--isolate`.
///
/// # Errors
/// What keeps it from working.
#[cfg(unix)]
pub(crate) fn serve(setup: &str) -> anyhow::Result<()> {
    worker::serve(setup)
}

/// The hidden command: the process of `--isolate`.
///
/// # Errors
/// Always: there is none on this system.
#[cfg(not(unix))]
pub(crate) fn serve(_: &str) -> anyhow::Result<()> {
    anyhow::bail!("this needs a Unix system")
}

/// The hidden command: the process that answers questions about a plugin.
///
/// # Errors
/// What keeps it from working.
#[cfg(unix)]
pub(crate) fn answer_questions(path: &Path) -> anyhow::Result<()> {
    informant::answer_questions(path)
}

/// The hidden command: the process that answers questions about a plugin.
///
/// # Errors
/// Always: there is none on this system.
#[cfg(not(unix))]
pub(crate) fn answer_questions(_: &Path) -> anyhow::Result<()> {
    anyhow::bail!("this needs a Unix system")
}

/// For [`fuzzing`](crate::fuzzing): what the process tells, as the host hears it.
#[cfg(unix)]
pub(crate) fn fuzzed(mut bytes: &[u8]) {
    let recorder = crate::recorder::Recorder::new(Path::new(""));
    while let Ok(Some((reply, pictures))) = frame::read::<frame::Reply>(&mut bytes) {
        if let frame::Reply::Event(label, event) = reply
            && event.tell(&label, pictures, &recorder).is_err()
        {
            return;
        }
    }
    let _ = recorder.record();
}
