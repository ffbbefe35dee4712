//! What a node may ask of its host while it runs.

use std::fmt;
use std::path::Path;

use abi_stable::StableAbi;
use abi_stable::std_types::{RArc, RString};

use crate::abi::{HostAdapter, HostBox};
use crate::extension::{Extension, LoadedExtension, METADATA};
use crate::{ErrorCode, NodeError, SharedTensor};

/// How far a node is.
#[repr(C)]
#[derive(StableAbi, Debug, Clone)]
pub struct Progress {
    /// Units done of this stage.
    pub done: u64,
    /// Units in this stage; at least 1.
    pub total: u64,
    /// Name of the stage, for example `tokens`.
    pub stage: RString,
    /// One line for a person, for example `step 40/200  loss 0.12  IoU 0.71`.
    pub text: RString,
}

/// A picture that shows what a node is doing.
#[repr(C)]
#[derive(StableAbi, Debug, Clone)]
pub struct Preview {
    /// `[H, W, 3]`, `f32` in [0, 1], sRGB, CPU memory.
    pub picture: SharedTensor,
    /// Pictures of one series belong in one row of a report, for example `masks of <dog>`.
    pub series: RString,
    /// What this one shows, for example `round 2`.
    pub label: RString,
}

/// Facts about the run that a node may need.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Default)]
pub struct RunInfo {
    /// The node's id in the graph.
    pub node_id: RString,
    /// Where results go; exists.
    pub output_dir: RString,
    /// A directory of this node's own that survives a cancellation and is empty for other inputs and parameters; empty if the host
    /// keeps none. A node stores there what it needs to resume.
    pub work_dir: RString,
}

/// Severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// For people who debug the node.
    Debug = 0,
    /// Worth a line.
    Info = 1,
    /// Something is not as asked, and the node goes on.
    Warning = 2,
}

/// A host's services for one run of one node, as the host's author writes them.
///
/// They are called while the node runs, on its worker thread and on threads that the node started and joins before it
/// returns, several at once. None of them may wait for the node or for a person; what takes long is put into a queue. A panic
/// in one of them stays in the host: the node is told to stop and the run ends with it ([`HostFault`]).
pub trait HostContext: Send + Sync + 'static {
    /// True once the user asked to stop; it stays true. Called at least once per step, so it reads a flag.
    fn is_canceled(&self) -> bool;
    /// Shows progress; may be called often.
    fn progress(&self, progress: Progress);
    /// Shows a picture; the host may keep it.
    fn preview(&self, preview: Preview);
    /// Adds a point to a curve, for example (`loss`, step, value). Neither number need be finite.
    fn metric(&self, series: &str, x: f64, y: f64);
    /// Writes a log line; `level` is a number of [`LogLevel`], or one of a newer plugin's.
    fn log(&self, level: u32, text: &str);
    /// Hears about a file that the node wrote into the output directory.
    fn saved(&self, path: &str);
    /// Facts about the run, the same at every call.
    fn run_info(&self) -> RunInfo;
    /// The extension of this id ([`crate::extension`]). An id that is not known, byte by byte, is `None`.
    fn extension(&self, _id: &str) -> Option<Box<dyn Extension>> {
        None
    }
}

/// The first panic in a [`HostContext`], kept for the host: it is the host's fault, not the node's.
pub struct HostFault<T>(RArc<HostAdapter<T>>);

impl<T> fmt::Debug for HostFault<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .with_fault(|fault| f.debug_tuple("HostFault").field(fault).finish())
    }
}

impl<T> HostFault<T> {
    pub(crate) fn of(adapter: RArc<HostAdapter<T>>) -> Self {
        Self(adapter)
    }

    /// `result`, or the host's fault if there was one.
    ///
    /// # Errors
    /// The fault, or that of `result`.
    pub fn or<R>(&self, result: Result<R, NodeError>) -> Result<R, NodeError> {
        match self.0.with_fault(|fault| fault.clone()) {
            Some(fault) => Err(fault),
            None => result,
        }
    }
}

/// The host as a node's author sees it. All methods: worker thread of the running node, or any thread that the node started
/// and joins before it returns. They return at once, and none fails: a host that cannot show a picture says so itself.
pub struct Host(HostBox);

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Host")
    }
}

impl Host {
    pub(crate) fn new(host: HostBox) -> Self {
        Self(host)
    }

    /// A host for nodes that a host runs itself, and for tests of nodes; with what it panicked over.
    pub fn from_context<T: HostContext>(context: T) -> (Self, HostFault<T>) {
        let (host, fault) = HostAdapter::boxed(context);
        (Self(host), fault)
    }

    pub(crate) fn services(&self) -> &HostBox {
        &self.0
    }

    /// True once the user asked to stop. A node asks at least once per optimizer step or every quarter of a second, and then
    /// returns [`NodeError::canceled`] within one step, without a half-written file and with what it needs to go on in
    /// [`RunInfo::work_dir`].
    #[must_use]
    pub fn is_canceled(&self) -> bool {
        self.0.is_canceled()
    }

    /// Shows progress.
    pub fn progress(&self, stage: &str, done: usize, total: usize, text: &str) {
        self.0.progress(Progress {
            done: done as u64,
            total: total.max(1) as u64,
            stage: stage.into(),
            text: text.into(),
        });
    }

    /// Shows a picture `[H, W, 3]` in [0, 1].
    pub fn preview(&self, picture: SharedTensor, series: &str, label: &str) {
        self.0.preview(Preview {
            picture,
            series: series.into(),
            label: label.into(),
        });
    }

    /// Adds a point to a curve.
    pub fn metric(&self, series: &str, x: f64, y: f64) {
        self.0.metric(series.into(), x, y);
    }

    /// Writes a log line.
    pub fn log(&self, level: LogLevel, text: &str) {
        self.0.log(level as u32, text.into());
    }

    /// Tells the host about a file in the output directory.
    pub fn saved(&self, path: &Path) {
        self.0.saved(path.to_string_lossy().as_ref().into());
    }

    /// Facts about the run.
    #[must_use]
    pub fn run_info(&self) -> RunInfo {
        self.0.run_info()
    }

    /// What the host can do beyond this, by the id of the extension.
    #[must_use]
    pub fn extension(&self, id: &str) -> Option<LoadedExtension> {
        LoadedExtension::new(self.0.extension(id.into()))
    }

    /// The texts, by name, that files should carry about how they were made ([`METADATA`]); none from a host without any.
    ///
    /// # Errors
    /// A host whose answer cannot be read.
    pub fn metadata(&self) -> Result<Vec<(String, String)>, NodeError> {
        let Some(extension) = self.extension(METADATA) else {
            return Ok(Vec::new());
        };
        let texts: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&extension.text()?).map_err(|error| {
                let message = format!("the host's {METADATA} cannot be read: {error}");
                NodeError::new(ErrorCode::Internal, message)
            })?;
        let text = |(name, value): (String, serde_json::Value)| {
            let text = value.as_str().map(str::to_owned);
            text.map(|text| (name, text))
        };
        Ok(texts.into_iter().filter_map(text).collect())
    }
}
