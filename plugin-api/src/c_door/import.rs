//! A plugin in C for hosts in Rust.
#![expect(
    unsafe_code,
    reason = "functions of the C contract take pointers that its rules vouch for"
)]

use std::collections::BTreeMap;
use std::ffi::{c_char, c_void};
use std::ptr::{NonNull, null};
use std::sync::{Arc, Mutex, PoisonError};

use abi_stable::std_types::{ROption, RResult, RStr, RString, RVec, Tuple2};
use abi_stable::type_level::downcasting::TD_Opaque;
use smallvec::SmallVec;

use super::abi::{
    NODE_PLUGIN_MINOR, NODE_PLUGIN_OK, NodePluginError, NodePluginExtension, NodePluginHost,
    NodePluginInput, NodePluginNode, NodePluginTable,
};
use super::dlpack::DLManagedTensorVersioned;
use super::extensions::{ExportedExtension, call};
use super::texts::{CTexts, c_text, collected, no_error, returned, text};
use super::values::{LentValues, exported, pushed};
use crate::abi::{ExtensionBox, HostBox, NodeBox, NodeObject, NodeObject_TO, RunRequest};
use crate::extension::{self, Extension};
use crate::guard::{guarded, guarded_host};
use crate::{ErrorCode, Host, NodeError, Preview, Progress, SharedTensor, Value};

/// A library's table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ForeignPlugin(&'static NodePluginTable);

impl ForeignPlugin {
    /// # Safety
    /// The table is as the contract has it.
    pub(crate) unsafe fn new(table: &'static NodePluginTable) -> Self {
        Self(table)
    }

    pub(crate) fn describe(self) -> Result<String, NodeError> {
        let mut error = no_error();
        // SAFETY: the table is as the contract has it, here and in all calls below.
        let (code, json) = collected(|sink| unsafe { (self.0.describe)(sink, &raw mut error) });
        returned(code, &error)?;
        json
    }

    pub(crate) fn create(self, class: &str) -> Result<NodeBox, NodeError> {
        let (class_text, mut error) = (c_text(class), no_error());
        // SAFETY: as above.
        let node = unsafe { (self.0.node_new)(class_text.as_ptr(), &raw mut error) };
        let Some(node) = NonNull::new(node) else {
            returned(ErrorCode::InvalidInput as u32, &error)?;
            return Err(NodeError::new(
                ErrorCode::InvalidInput,
                format!("{} has no node of the class {class}", self.0.name()),
            ));
        };
        let node = ForeignNode {
            node: Arc::new(OwnedNode {
                table: self.0,
                node,
            }),
            error: Box::new(no_error()),
        };
        Ok(NodeObject_TO::from_value(node, TD_Opaque))
    }

    pub(crate) fn extension(self, id: &str) -> ROption<ExtensionBox> {
        let id = c_text(id);
        // SAFETY: as above.
        let found = unsafe { (self.0.extension)(id.as_ptr()) };
        foreign_extension(found, None)
    }
}

/// An extension of a plugin, valid for ever; or of a node, which it keeps.
struct ForeignExtension {
    extension: NonNull<NodePluginExtension>,
    _node: Option<Arc<OwnedNode>>,
}

fn foreign_extension(
    found: *const NodePluginExtension,
    node: Option<Arc<OwnedNode>>,
) -> ROption<ExtensionBox> {
    let found = NonNull::new(found.cast_mut()).map(|extension| {
        let found = ForeignExtension {
            extension,
            _node: node,
        };
        Box::new(found) as Box<dyn Extension>
    });
    extension::exported(found)
}

// SAFETY: the contract lets extensions be called on any thread, several at once.
unsafe impl Send for ForeignExtension {}
// SAFETY: as above.
unsafe impl Sync for ForeignExtension {}

impl Extension for ForeignExtension {
    fn call(&self, request: Vec<Value>) -> Result<Vec<Value>, NodeError> {
        // SAFETY: valid, see above.
        unsafe { call(self.extension, request) }
    }
}

/// A node that is freed with the last who needs it: itself, or one of its extensions.
struct OwnedNode {
    table: &'static NodePluginTable,
    node: NonNull<NodePluginNode>,
}

// SAFETY: the contract lets a node be used and freed on any thread.
unsafe impl Send for OwnedNode {}
// SAFETY: only `ForeignNode` calls its functions, which is not `Sync`.
unsafe impl Sync for OwnedNode {}

struct ForeignNode {
    node: Arc<OwnedNode>,
    /// Of its runs, one at a time; empty before each.
    error: Box<NodePluginError>,
}

impl Drop for OwnedNode {
    fn drop(&mut self) {
        // SAFETY: of `node_new`, and used no more.
        unsafe { (self.table.node_free)(self.node.as_ptr()) };
    }
}

/// Values for a node, whose names are among `texts`.
fn lent(
    values: RVec<Tuple2<RString, Value>>,
    texts: &mut CTexts,
) -> Result<LentValues<NodePluginInput>, NodeError> {
    let mut inputs = LentValues::with_capacity(values.len());
    let mut names: SmallVec<[usize; 4]> = SmallVec::with_capacity(values.len());
    for Tuple2(name, value) in values {
        inputs.push(NodePluginInput {
            name: null(),
            value: exported(value)?,
        });
        names.push(texts.push(&name));
    }
    for (input, &name) in inputs.as_mut_slice().iter_mut().zip(&names) {
        input.name = texts.at(name);
    }
    Ok(inputs)
}

impl NodeObject for ForeignNode {
    fn validate(&self, parameters: RStr<'_>) -> RResult<(), NodeError> {
        guarded("a node in C", || {
            let (parameters, mut error) = (c_text(&parameters), no_error());
            let (node, parameters) = (self.node.node.as_ptr(), parameters.as_ptr());
            // SAFETY: the table is as the contract has it, here and below; the node is used by one thread at a time.
            let code = unsafe { (self.node.table.node_validate)(node, parameters, &raw mut error) };
            returned(code, &error)
        })
        .into()
    }

    fn fingerprint(&self, parameters: RStr<'_>) -> RResult<RString, NodeError> {
        guarded("a node in C", || {
            let (parameters, mut error) = (c_text(&parameters), no_error());
            let (node, parameters) = (self.node.node.as_ptr(), parameters.as_ptr());
            // SAFETY: as above.
            let (code, text) = collected(|sink| unsafe {
                (self.node.table.node_fingerprint)(node, parameters, sink, &raw mut error)
            });
            returned(code, &error)?;
            text.map(RString::from)
        })
        .into()
    }

    fn run(&mut self, request: RunRequest, host: HostBox) -> RResult<RVec<Value>, NodeError> {
        guarded("a node in C", || {
            let host = Host::new(host);
            let info = host.run_info();
            let mut texts = CTexts::default();
            let parameters = texts.push(&request.parameters);
            let of_info = [&info.node_id, &info.output_dir, &info.work_dir];
            let of_info = of_info.map(|text| texts.push(text));
            // The last texts: from here on they stay where they are.
            let mut inputs = lent(request.inputs, &mut texts)?;
            let services = Services::new(host);
            let table = services.table(of_info.map(|place| texts.at(place)));
            let (table_of_node, node) = (self.node.table, self.node.node.as_ptr());
            let error = &raw mut *self.error;
            let (code, outputs) = pushed(|sink| {
                let inputs = inputs.as_mut_slice();
                // SAFETY: as above; all that is passed lives until it returns.
                unsafe {
                    (table_of_node.node_run)(
                        node,
                        inputs.as_mut_ptr(),
                        inputs.len(),
                        texts.at(parameters),
                        &raw const table,
                        sink,
                        error,
                    )
                }
            });
            drop(inputs);
            if code != NODE_PLUGIN_OK {
                let error = std::mem::replace(&mut *self.error, no_error());
                returned(code, &error)?;
            }
            outputs.map(RVec::from)
        })
        .into()
    }

    fn extension(&self, id: RStr<'_>) -> ROption<ExtensionBox> {
        let id = c_text(&id);
        // SAFETY: as above.
        let found =
            unsafe { (self.node.table.node_extension)(self.node.node.as_ptr(), id.as_ptr()) };
        foreign_extension(found, Some(self.node.clone()))
    }
}

/// What the host's functions in C work with, for one run.
struct Services {
    host: Host,
    /// Handed out; they live as long as the run.
    extensions: Mutex<BTreeMap<String, Box<ExportedExtension>>>,
}

impl Services {
    fn new(host: Host) -> Self {
        Self {
            host,
            extensions: Mutex::default(),
        }
    }

    /// What the node gets; the texts are of [`RunInfo`](crate::RunInfo), in its order.
    fn table(&self, [node_id, output_dir, work_dir]: [*const c_char; 3]) -> NodePluginHost {
        NodePluginHost {
            struct_size: size_of::<NodePluginHost>() as u32,
            minor: NODE_PLUGIN_MINOR,
            context: std::ptr::from_ref(self).cast_mut().cast(),
            node_id,
            output_dir,
            work_dir,
            is_canceled: host_is_canceled,
            progress: host_progress,
            preview: host_preview,
            metric: host_metric,
            log: host_log,
            saved: host_saved,
            extension: host_extension,
        }
    }
}

/// Runs `body` on the services of a run. What the node passes wrongly, for example text that is not UTF-8, is not shown.
///
/// # Safety
/// `context` is that of [`Services::table`].
unsafe fn served<R>(
    context: *mut c_void,
    body: impl FnOnce(&Services) -> Result<R, NodeError>,
) -> Option<R> {
    guarded_host("a service of the host", || {
        // SAFETY: the caller vouches for it; the services live as long as the run.
        body(unsafe { &*context.cast_const().cast::<Services>() })
    })
    .ok()
}

unsafe extern "C" fn host_is_canceled(context: *mut c_void) -> i32 {
    // SAFETY: here and below: the node passes what the contract says.
    let answer = unsafe { served(context, |services| Ok(services.host.is_canceled())) };
    answer.unwrap_or(true).into()
}

unsafe extern "C" fn host_progress(
    context: *mut c_void,
    stage: *const c_char,
    done: u64,
    total: u64,
    line: *const c_char,
) {
    // SAFETY: as above.
    unsafe {
        served(context, |services| {
            services.host.services().progress(Progress {
                done,
                total: total.max(1),
                stage: text(stage)?.into(),
                text: text(line)?.into(),
            });
            Ok(())
        });
    }
}

unsafe extern "C" fn host_preview(
    context: *mut c_void,
    picture: *mut DLManagedTensorVersioned,
    series: *const c_char,
    label: *const c_char,
) {
    // SAFETY: as above.
    unsafe {
        served(context, |services| {
            let Some(picture) = NonNull::new(picture) else {
                return Ok(());
            };
            services.host.services().preview(Preview {
                picture: SharedTensor::from_dlpack(picture)?,
                series: text(series)?.into(),
                label: text(label)?.into(),
            });
            Ok(())
        });
    }
}

unsafe extern "C" fn host_metric(context: *mut c_void, series: *const c_char, x: f64, y: f64) {
    // SAFETY: as above.
    unsafe {
        served(context, |services| {
            services.host.metric(text(series)?, x, y);
            Ok(())
        });
    }
}

unsafe extern "C" fn host_log(context: *mut c_void, level: u32, line: *const c_char) {
    // SAFETY: as above.
    unsafe {
        served(context, |services| {
            services.host.services().log(level, text(line)?.into());
            Ok(())
        });
    }
}

unsafe extern "C" fn host_saved(context: *mut c_void, path: *const c_char) {
    // SAFETY: as above.
    unsafe {
        served(context, |services| {
            services.host.services().saved(text(path)?.into());
            Ok(())
        });
    }
}

unsafe extern "C" fn host_extension(
    context: *mut c_void,
    id: *const c_char,
) -> *const NodePluginExtension {
    // SAFETY: as above.
    let found = unsafe {
        served(context, |services| {
            let id = text(id)?;
            let mut known = services
                .extensions
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(extension) = known.get(id) {
                return Ok(extension.as_ptr());
            }
            let Some(found) = services.host.extension(id) else {
                return Ok(null());
            };
            let found = move |request: Vec<Value>| found.call(request);
            let exported = Box::new(ExportedExtension::new(Box::new(found)));
            let pointer = exported.as_ptr();
            known.insert(id.to_owned(), exported);
            Ok(pointer)
        })
    };
    found.unwrap_or(null())
}
