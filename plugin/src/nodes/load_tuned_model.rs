//! LoadTunedModel: what SaveConcepts wrote of a tuned model, put back on its checkpoint.

use std::path::{Path, PathBuf};

use plugin_api::host::LogLevel;
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs};
use schemars::JsonSchema;
use serde::Deserialize;
use stable_diffusion::PEFT_CONFIGURATION;

use crate::failure::from_model;
use crate::ports;
use crate::values::{ModelValue, model_value};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LoadTunedModel;

/// Parameters of the node.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// A folder with a tuned `unet`, or a LoRA `.safetensors` file: what SaveConcepts, diffusers, PEFT, kohya's scripts or
    /// ComfyUI wrote.
    #[serde(default)]
    path: String,
    /// How many times the change counts: 0 is the checkpoint, 1 the change as it was learned.
    #[serde(default = "whole")]
    #[schemars(range(min = -10.0, max = 10.0), extend("x-step" = 0.05))]
    strength: f64,
}

fn whole() -> f64 {
    1.0
}

impl Node for LoadTunedModel {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "LoadTunedModel",
            "Load Tuned Model",
            "Conceptloom/load",
            "Puts tuned weights or a LoRA on the checkpoint that they were tuned on",
        )
        .input("model", ports::DIFFUSION_MODEL, "The checkpoint")
        .output("model", ports::DIFFUSION_MODEL, "The tuned model")
        .aliases(&["lora", "unet", "fine-tuned"])
    }

    fn validate(&self, parameters: &Parameters) -> Result<(), NodeError> {
        let message = match parameters.path.trim() {
            "" => "no file or folder is named; name what SaveConcepts wrote".to_owned(),
            path if Path::new(path).exists() => return Ok(()),
            path => {
                format!("there is no file or folder \"{path}\"; name what SaveConcepts wrote")
            }
        };
        Err(NodeError::invalid_input("path", message))
    }

    fn fingerprint(&self, parameters: &Parameters) -> String {
        let mut hasher = blake3::Hasher::new();
        let path = Path::new(parameters.path.trim());
        for file in files(path) {
            // What cannot be read is told when the node runs.
            if let Ok(mut file) = std::fs::File::open(file) {
                let _ = hasher.update_reader(&mut file);
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        // A path that came over a wire was not looked at before.
        self.validate(&parameters)?;
        let base = ModelValue::of(inputs)?;
        let (tuned, left_out) = base
            .model
            .with_tuned_weights(Path::new(parameters.path.trim()), parameters.strength)
            .map_err(|error| from_model("path", &error))?;
        if let Some(first) = left_out.first() {
            let text = format!(
                "{} layers of {} were left out, because this model does not have them (the first is {first})",
                left_out.len(),
                parameters.path.trim()
            );
            host.log(LogLevel::Warning, &text);
        }
        Ok(vec![model_value(base.tuned(tuned))])
    }
}

/// The weight files that a path may mean.
fn files(path: &Path) -> Vec<PathBuf> {
    let folders = [path.to_owned(), path.join("unet")];
    let in_folder = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok());
    let mut files: Vec<_> = in_folder
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    if path.is_file() {
        files.push(path.to_owned());
        let configuration = path.with_file_name(PEFT_CONFIGURATION);
        files.extend(configuration.is_file().then_some(configuration));
    }
    files.sort();
    files
}
