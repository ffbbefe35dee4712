//! LoadConcepts: saved tokens come back.

use std::path::{Path, PathBuf};

use personalization::concept_file::load_concepts;
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::device::device;
use crate::failure::from_method;
use crate::ports;
use crate::values::concepts_value;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LoadConcepts;

/// Parameters of the node.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// One `.safetensors` file per line: files of SaveConcepts, or textual-inversion embeddings of other programs.
    #[serde(default)]
    #[schemars(extend("x-multiline" = true))]
    files: String,
}

impl Parameters {
    fn paths(&self) -> Vec<PathBuf> {
        self.files
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(PathBuf::from)
            .collect()
    }
}

impl Node for LoadConcepts {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "LoadConcepts",
            "Load Concepts",
            "Conceptloom/load",
            "Loads learned tokens from .safetensors files",
        )
        .output(
            "concepts",
            ports::CONCEPTS,
            "The tokens, in the order of the files",
        )
        .aliases(&["embedding", "textual inversion"])
    }

    fn validate(&self, parameters: &Parameters) -> Result<(), NodeError> {
        let paths = parameters.paths();
        if paths.is_empty() {
            return Err(NodeError::invalid_input(
                "files",
                "no concept file is named; write one path per line",
            ));
        }
        match paths.iter().find(|path| !path.is_file()) {
            Some(path) => Err(NodeError::invalid_input(
                "files",
                format!("the concept file {} does not exist", path.display()),
            )),
            None => Ok(()),
        }
    }

    fn fingerprint(&self, parameters: &Parameters) -> String {
        let content = |path: &PathBuf| {
            let mut hasher = blake3::Hasher::new();
            // What cannot be read is told when the node runs.
            let mut read = || hasher.update_reader(std::fs::File::open(path)?).map(drop);
            if path.is_file() && read().is_ok() {
                hasher.finalize().to_string()
            } else {
                "missing".to_owned()
            }
        };
        parameters
            .paths()
            .iter()
            .map(content)
            .collect::<Vec<_>>()
            .join(" ")
    }

    fn run(
        &mut self,
        _inputs: &mut Inputs,
        parameters: Parameters,
        _host: &Host,
    ) -> Result<Outputs, NodeError> {
        // Paths that came over a wire were not looked at before.
        self.validate(&parameters)?;
        let paths = parameters.paths();
        let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
        let learned =
            load_concepts(&paths, device()?).map_err(|error| from_method("files", &error))?;
        Ok(vec![concepts_value(learned)])
    }
}
