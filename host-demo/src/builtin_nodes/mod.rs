//! The host's own nodes: files in, files out, and batches. Described like a plugin's, run without the boundary.

mod batch;
mod load_image;
mod save_image;

use std::path::PathBuf;
use std::sync::Arc;

use plugin_api::{ErrorCode, Host, Inputs, NodeDescriptor, NodeError, Outputs};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::confined::Root;

/// Where the nodes look for files.
#[derive(Debug, Clone)]
pub(crate) enum Places {
    /// Of a person at the command line: whole paths are files too.
    Own {
        /// The folder of the workflow file; looked into first.
        workflow_dir: PathBuf,
        /// The folder for pictures of one's own.
        input_dir: PathBuf,
    },
    /// Of a server: nothing outside of these folders. `name [output]` and `name [temp]` mean the other two, as
    /// ComfyUI's editor writes them.
    Served {
        input: Root,
        output: Root,
        temp: Root,
    },
}

impl Default for Places {
    fn default() -> Self {
        Self::Own {
            workflow_dir: PathBuf::from("."),
            input_dir: PathBuf::from("input"),
        }
    }
}

/// A node of the host. Parameters are complete and fit their widgets.
pub(crate) trait BuiltinNode: Send {
    /// Checks what the widgets cannot.
    fn validate(&self, _parameters: &Map<String, Value>) -> Result<(), NodeError> {
        Ok(())
    }

    /// What the result hangs on besides inputs and parameters: the content of files.
    fn fingerprint(&self, _parameters: &Map<String, Value>) -> String {
        String::new()
    }

    /// Does the work; outputs in the order of the descriptor.
    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: &Map<String, Value>,
        host: &Host,
    ) -> Result<Outputs, NodeError>;
}

/// A class of the host.
pub(crate) struct BuiltinClass {
    pub(crate) descriptor: fn() -> NodeDescriptor,
    pub(crate) make: fn(Arc<Places>) -> Box<dyn BuiltinNode>,
    /// Adds to the entry of `/object_info` what descriptors do not say.
    pub(crate) editor_hints: fn(&mut Value),
}

/// All of them.
pub(crate) static CLASSES: [BuiltinClass; 7] = [
    BuiltinClass {
        descriptor: load_image::image_descriptor,
        make: |places| Box::new(load_image::LoadImage(places)),
        editor_hints: load_image::upload_hint,
    },
    BuiltinClass {
        descriptor: load_image::mask_descriptor,
        make: |places| Box::new(load_image::LoadImageMask(places)),
        editor_hints: load_image::upload_hint,
    },
    BuiltinClass {
        descriptor: batch::image_descriptor,
        make: |_| Box::new(batch::Batch::Images),
        editor_hints: |_| {},
    },
    BuiltinClass {
        descriptor: batch::mask_descriptor,
        make: |_| Box::new(batch::Batch::Masks),
        editor_hints: |_| {},
    },
    BuiltinClass {
        descriptor: batch::mask_to_image_descriptor,
        make: |_| Box::new(batch::MaskToImage),
        editor_hints: |_| {},
    },
    BuiltinClass {
        descriptor: save_image::save_descriptor,
        make: |_| Box::new(save_image::SaveImage),
        editor_hints: |_| {},
    },
    BuiltinClass {
        descriptor: save_image::preview_descriptor,
        make: |_| Box::new(save_image::PreviewImage),
        editor_hints: |_| {},
    },
];

fn parse<P: DeserializeOwned>(parameters: &Map<String, Value>) -> Result<P, NodeError> {
    serde_json::from_value(Value::Object(parameters.clone())).map_err(|error| {
        NodeError::new(
            ErrorCode::InvalidInput,
            format!("the parameters cannot be read: {error}"),
        )
    })
}
