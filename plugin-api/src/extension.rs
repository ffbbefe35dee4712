//! What a plugin, a node or a host can do beyond the fixed part of the contract, asked for by name.
//!
//! An id is a name, a slash and a version, for example `devices/1`. Ids are compared byte by byte: one that is not known, or
//! that has anything before or behind it, gives nothing, and whoever asked goes on without. An extension never changes once
//! it is published; what would have to change gets the next number, and the old one may stay beside it. Names of plugins'
//! and hosts' own start with their name and a dot (`my-host.queue/1`); names without a dot are this crate's:
//!
//! | id | of | request | answer |
//! | --- | --- | --- | --- |
//! | [`DEVICES`] | a plugin | nothing | JSON: the [`DeviceDescriptor`](crate::DeviceDescriptor)s that its nodes compute on |
//! | [`METADATA`] | a host, while a node runs | nothing | JSON: an object of texts that files should carry |
//!
//! Requests and answers are lists of [`Value`]s, so that an extension may pass tensors and objects as well as text, and so
//! that it adds no type to the contract.

use std::fmt;

use abi_stable::std_types::{ROption, RVec};

use crate::abi::{ExtensionAdapter, ExtensionBox};
use crate::{NodeError, Value};

/// Of a plugin: the devices that its nodes compute on, with their memory now. The first call opens them and may take
/// seconds; an error says in one sentence why there is none. A plugin without it leaves open where it computes.
pub const DEVICES: &str = "devices/1";

/// Of a host: texts by name about how a result is made, for example the graph, that a node puts into the files that it
/// writes. Empty if the user wants none.
pub const METADATA: &str = "metadata/1";

/// An extension as its author writes it; functions of this signature are one.
pub trait Extension: Send + Sync + 'static {
    /// Answers. Any thread, several at once.
    ///
    /// # Errors
    /// What the extension's description says.
    fn call(&self, request: Vec<Value>) -> Result<Vec<Value>, NodeError>;
}

impl<F> Extension for F
where
    F: Fn(Vec<Value>) -> Result<Vec<Value>, NodeError> + Send + Sync + 'static,
{
    fn call(&self, request: Vec<Value>) -> Result<Vec<Value>, NodeError> {
        self(request)
    }
}

/// Hands an extension over the boundary.
pub(crate) fn exported(extension: Option<Box<dyn Extension>>) -> ROption<ExtensionBox> {
    extension.map(ExtensionAdapter::boxed).into()
}

/// An extension of the other side.
pub struct LoadedExtension(ExtensionBox);

impl fmt::Debug for LoadedExtension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LoadedExtension")
    }
}

impl LoadedExtension {
    pub(crate) fn new(extension: ROption<ExtensionBox>) -> Option<Self> {
        extension.into_option().map(Self)
    }

    /// Asks.
    ///
    /// # Errors
    /// The extension's.
    pub fn call(&self, request: Vec<Value>) -> Result<Vec<Value>, NodeError> {
        let answer = self.0.call(RVec::from(request)).into_result();
        answer.map(RVec::into_vec)
    }

    /// Asks without a request for one JSON text.
    ///
    /// # Errors
    /// The extension's, or an answer of another form.
    pub fn text(&self) -> Result<String, NodeError> {
        match self.call(Vec::new())?.as_slice() {
            [Value::Json(text)] => Ok(text.as_str().to_owned()),
            other => {
                let message = format!("an extension should give one JSON text, it gave {other:?}");
                Err(NodeError::new(crate::ErrorCode::Internal, message))
            }
        }
    }
}
