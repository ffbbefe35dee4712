//! A plugin in Rust for hosts in C.
#![expect(
    unsafe_code,
    reason = "functions of the C contract take pointers that its rules vouch for"
)]

use std::collections::BTreeMap;
use std::ffi::c_char;
use std::ptr::{NonNull, null, null_mut};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use abi_stable::std_types::{RString, Tuple2};

use super::abi::{
    NODE_PLUGIN_INTERNAL, NODE_PLUGIN_MAGIC, NODE_PLUGIN_MAJOR, NODE_PLUGIN_MINOR, NodePluginError,
    NodePluginExtension, NodePluginHost, NodePluginInput, NodePluginNode, NodePluginSink,
    NodePluginTable, NodePluginValueSink,
};
use super::extensions::{ExportedExtension, call};
use super::padded;
use super::texts::{c_text, ended, text, write};
use super::values::{exported, push_all, taken};
use crate::abi::{HostAdapter, NodeBox, RunRequest};
use crate::extension::{Extension, LoadedExtension};
use crate::guard::guarded;
use crate::host::HostContext;
use crate::root::{Plugin, created, described, found};
use crate::{ErrorCode, NodeError, Preview, Progress, RunInfo, Value};

/// The table of a plugin.
#[must_use]
pub const fn table_of<P: Plugin>() -> NodePluginTable {
    NodePluginTable {
        magic: padded(NODE_PLUGIN_MAGIC),
        struct_size: size_of::<NodePluginTable>() as u32,
        major: NODE_PLUGIN_MAJOR,
        minor: NODE_PLUGIN_MINOR,
        reserved: 0,
        name: padded(P::NAME),
        version: padded(P::VERSION),
        describe: describe::<P>,
        extension: extension::<P>,
        node_new: node_new::<P>,
        node_free,
        node_validate,
        node_fingerprint,
        node_run,
        node_extension,
    }
}

/// A node as its pointer in C means it.
struct ExportedNode {
    node: NodeBox,
    /// Handed out; they live as long as the node.
    extensions: BTreeMap<String, Box<ExportedExtension>>,
}

/// # Safety
/// NULL, or a node of [`node_new`] that nobody else uses for `'a`.
unsafe fn node_at<'a>(node: *mut NodePluginNode) -> Result<&'a mut ExportedNode, NodeError> {
    // SAFETY: the caller vouches for it.
    unsafe { node.cast::<ExportedNode>().as_mut() }
        .ok_or_else(|| NodeError::new(ErrorCode::InvalidInput, "there is no node at NULL"))
}

unsafe extern "C" fn describe<P: Plugin>(json: NodePluginSink, error: *mut NodePluginError) -> u32 {
    // SAFETY: the sink is valid during this call.
    let result = described::<P>().map(|text| unsafe { write(json, &text) });
    // SAFETY: NULL or valid.
    unsafe { ended(result, error) }
}

unsafe extern "C" fn extension<P: Plugin>(id: *const c_char) -> *const NodePluginExtension {
    /// Those that were asked for; a library has one plugin, and never unloads.
    static KNOWN: Mutex<BTreeMap<String, &'static ExportedExtension>> = Mutex::new(BTreeMap::new());
    let found = guarded("an extension", || {
        // SAFETY: the text is as the contract has it.
        let id = unsafe { text(id) }?;
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(extension) = known.get(id) {
            return Ok(extension.as_ptr());
        }
        let Some(extension) = found::<P>(id) else {
            return Ok(null());
        };
        let extension: &'static _ = Box::leak(Box::new(ExportedExtension::new(extension)));
        known.insert(id.to_owned(), extension);
        Ok(extension.as_ptr())
    });
    found.unwrap_or(null())
}

unsafe extern "C" fn node_new<P: Plugin>(
    class_name: *const c_char,
    error: *mut NodePluginError,
) -> *mut NodePluginNode {
    // SAFETY: the text is as the contract has it.
    let made = unsafe { text(class_name) }.and_then(created::<P>);
    match made {
        Ok(node) => Box::into_raw(Box::new(ExportedNode {
            node,
            extensions: BTreeMap::new(),
        }))
        .cast(),
        Err(found) => {
            // SAFETY: NULL or valid.
            unsafe { ended(Err(found), error) };
            null_mut()
        }
    }
}

unsafe extern "C" fn node_free(node: *mut NodePluginNode) {
    let _ = guarded("a node that is freed", || {
        if !node.is_null() {
            // SAFETY: of `node_new`; the contract lets it be freed once.
            drop(unsafe { Box::from_raw(node.cast::<ExportedNode>()) });
        }
        Ok(())
    });
}

unsafe extern "C" fn node_validate(
    node: *mut NodePluginNode,
    parameters: *const c_char,
    error: *mut NodePluginError,
) -> u32 {
    let result = guarded("a node", || {
        // SAFETY: as the contract has it, here and below.
        let (node, parameters) = unsafe { (node_at(node)?, text(parameters)?) };
        node.node.validate(parameters.into()).into_result()
    });
    // SAFETY: NULL or valid.
    unsafe { ended(result, error) }
}

unsafe extern "C" fn node_fingerprint(
    node: *mut NodePluginNode,
    parameters: *const c_char,
    sink: NodePluginSink,
    error: *mut NodePluginError,
) -> u32 {
    let result = guarded("a node", || {
        // SAFETY: as the contract has it, here and below.
        let (node, parameters) = unsafe { (node_at(node)?, text(parameters)?) };
        let print = node.node.fingerprint(parameters.into()).into_result()?;
        // SAFETY: the sink is valid during this call.
        unsafe { write(sink, &print) };
        Ok(())
    });
    // SAFETY: NULL or valid.
    unsafe { ended(result, error) }
}

unsafe extern "C" fn node_run(
    node: *mut NodePluginNode,
    inputs: *mut NodePluginInput,
    n_inputs: usize,
    parameters: *const c_char,
    host: *const NodePluginHost,
    outputs: NodePluginValueSink,
    error: *mut NodePluginError,
) -> u32 {
    let result = guarded("a node", || {
        // SAFETY: as the contract has it, here and below.
        let (node, parameters) = unsafe { (node_at(node)?, text(parameters)?) };
        let mut named = Vec::with_capacity(n_inputs);
        for i in 0..n_inputs {
            // SAFETY: the caller has as many inputs as it says; what is taken is no longer in its place.
            let (name, value) = unsafe {
                let input = &mut *inputs.add(i);
                (text(input.name)?, taken(&mut input.value))
            };
            if let Some(value) = value {
                let value = value.map_err(|error| NodeError {
                    input: name.into(),
                    message: format!("the input {name} cannot be read: {error}").into(),
                    ..error
                })?;
                named.push(Tuple2(RString::from(name), value));
            }
        }
        let host = NonNull::new(host.cast_mut()).ok_or_else(|| {
            NodeError::new(ErrorCode::InvalidInput, "a node runs with a host, got NULL")
        })?;
        let request = RunRequest {
            inputs: named.into(),
            parameters: if parameters.is_empty() {
                "{}"
            } else {
                parameters
            }
            .into(),
        };
        let lent = Arc::new(Lent(RwLock::new(Some(host))));
        let (host, fault) = HostAdapter::boxed(ForeignHost(lent.clone()));
        let result = node.node.run(request, host).into_result();
        lent.end();
        let values = fault.or(result)?;
        // SAFETY: the sink is valid during this call.
        unsafe { push_all(values.into_vec(), outputs) }
    });
    // SAFETY: NULL or valid.
    unsafe { ended(result, error) }
}

unsafe extern "C" fn node_extension(
    node: *mut NodePluginNode,
    id: *const c_char,
) -> *const NodePluginExtension {
    let found = guarded("an extension", || {
        // SAFETY: as the contract has it.
        let (node, id) = unsafe { (node_at(node)?, text(id)?) };
        if let Some(extension) = node.extensions.get(id) {
            return Ok(extension.as_ptr());
        }
        let Some(found) = LoadedExtension::new(node.node.extension(id.into())) else {
            return Ok(null());
        };
        let found = move |request: Vec<Value>| found.call(request);
        let exported = Box::new(ExportedExtension::new(Box::new(found)));
        let pointer = exported.as_ptr();
        node.extensions.insert(id.to_owned(), exported);
        Ok(pointer)
    });
    found.unwrap_or(null())
}

/// The host of C for as long as a node runs. A node that keeps something of it, or a thread that it did not join, finds
/// nothing there afterwards.
struct Lent(RwLock<Option<NonNull<NodePluginHost>>>);

// SAFETY: the contract lets the host's functions be called by any thread of the node while it runs, several at once; the
// pointer is used only while the lock is held, and taken away under it.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

impl Lent {
    /// Calls the host, if the node still runs.
    fn with<R>(&self, call: impl FnOnce(&NodePluginHost) -> R) -> Option<R> {
        let host = self.0.read().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: valid until the run returns, and `end` waits for the lock before that.
        host.map(|host| call(unsafe { host.as_ref() }))
    }

    fn end(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

struct ForeignHost(Arc<Lent>);

impl HostContext for ForeignHost {
    fn is_canceled(&self) -> bool {
        // SAFETY: the host is as the contract has it, here and in all calls below.
        let ask = |host: &NodePluginHost| unsafe { (host.is_canceled)(host.context) };
        self.0.with(ask).is_none_or(|answer| answer != 0)
    }

    fn progress(&self, progress: Progress) {
        let (stage, text) = (c_text(&progress.stage), c_text(&progress.text));
        let Progress { done, total, .. } = progress;
        // SAFETY: as above.
        self.0.with(|host| unsafe {
            (host.progress)(host.context, stage.as_ptr(), done, total, text.as_ptr());
        });
    }

    fn preview(&self, preview: Preview) {
        let (series, label) = (c_text(&preview.series), c_text(&preview.label));
        // One whose data cannot be made is not shown.
        let Ok(picture) = exported(Value::Tensor(preview.picture)) else {
            return;
        };
        // SAFETY: as above.
        let shown = self.0.with(|host| unsafe {
            (host.preview)(
                host.context,
                picture.tensor,
                series.as_ptr(),
                label.as_ptr(),
            );
        });
        if shown.is_none() {
            // SAFETY: exported above and not handed over.
            drop(unsafe { super::values::imported(picture) });
        }
    }

    fn metric(&self, series: &str, x: f64, y: f64) {
        let series = c_text(series);
        // SAFETY: as above.
        self.0
            .with(|host| unsafe { (host.metric)(host.context, series.as_ptr(), x, y) });
    }

    fn log(&self, level: u32, text: &str) {
        let text = c_text(text);
        // SAFETY: as above.
        self.0
            .with(|host| unsafe { (host.log)(host.context, level, text.as_ptr()) });
    }

    fn saved(&self, path: &str) {
        let path = c_text(path);
        // SAFETY: as above.
        self.0
            .with(|host| unsafe { (host.saved)(host.context, path.as_ptr()) });
    }

    fn run_info(&self) -> RunInfo {
        let info = self.0.with(|host| {
            // SAFETY: as above.
            let text = |of: *const c_char| unsafe { text(of) }.unwrap_or_default().into();
            RunInfo {
                node_id: text(host.node_id),
                output_dir: text(host.output_dir),
                work_dir: text(host.work_dir),
            }
        });
        info.unwrap_or_default()
    }

    fn extension(&self, id: &str) -> Option<Box<dyn Extension>> {
        let id = c_text(id);
        // SAFETY: as above.
        let find = |host: &NodePluginHost| unsafe { (host.extension)(host.context, id.as_ptr()) };
        let extension = NonNull::new(self.0.with(find)?.cast_mut())?;
        let lent = self.0.clone();
        Some(Box::new(ForeignExtension { lent, extension }))
    }
}

struct ForeignExtension {
    lent: Arc<Lent>,
    extension: NonNull<NodePluginExtension>,
}

// SAFETY: as for `Lent`.
unsafe impl Send for ForeignExtension {}
// SAFETY: as for `Lent`.
unsafe impl Sync for ForeignExtension {}

impl Extension for ForeignExtension {
    fn call(&self, request: Vec<Value>) -> Result<Vec<Value>, NodeError> {
        // SAFETY: valid while the node runs.
        let answer = self.lent.with(|_| unsafe { call(self.extension, request) });
        answer.unwrap_or_else(|| {
            let text = "an extension of the host was called after the run";
            Err(NodeError::new(
                ErrorCode::from_number(NODE_PLUGIN_INTERNAL),
                text,
            ))
        })
    }
}
