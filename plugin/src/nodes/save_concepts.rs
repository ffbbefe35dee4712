//! SaveConcepts: one `.safetensors` file per concept, and the tuned weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use personalization::LearnedConcepts;
use personalization::concept_file::{ConceptForm, concept_bytes, write_atomically};
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, port};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::failure::{from_method, from_model};
use crate::values::{ConceptsValue, ModelValue};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct SaveConcepts;

/// Which name the tensor in a file gets.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Format {
    /// `emb_params`: loads in ComfyUI, A1111 and InvokeAI, and in diffusers with `token=`.
    Shared,
    /// The token itself: loads in diffusers as it is.
    Diffusers,
    /// A file of each kind.
    Both,
}

/// Parameters of the node.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// Start of the file names, below the output folder; may name a folder.
    #[serde(default = "prefix")]
    filename_prefix: String,
    /// Which programs the files are for.
    #[serde(default = "shared")]
    format: Format,
}

fn prefix() -> String {
    "concepts/".to_owned()
}
fn shared() -> Format {
    Format::Shared
}

impl Node for SaveConcepts {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "SaveConcepts",
            "Save Concepts",
            "Conceptloom/save",
            "Saves every learned token as .safetensors, and the LoRA of a tuned model",
        )
        .input("concepts", port::CONCEPTS, "The learned tokens")
        .optional_input(
            "model",
            port::DIFFUSION_MODEL,
            "The tuned model; its LoRA is saved beside the tokens",
        )
        .output_node()
        .aliases(&["embedding", "save lora"])
    }

    fn validate(&self, parameters: &Parameters) -> Result<(), NodeError> {
        safe_prefix(&parameters.filename_prefix).map(drop)
    }

    fn run(
        &mut self,
        inputs: &Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let learned = &inputs.object::<ConceptsValue>("concepts")?.0;
        let prefix = safe_prefix(&parameters.filename_prefix)?;
        let info = host.run_info();
        let base = PathBuf::from(info.output_dir.as_str());
        let metadata: BTreeMap<String, String> =
            [("workflow", &info.workflow), ("prompt", &info.prompt)]
                .into_iter()
                .filter(|(_, text)| !text.is_empty())
                .map(|(name, text)| (name.to_owned(), text.to_string()))
                .collect();
        let forms: &[(ConceptForm, &str)] = match parameters.format {
            Format::Shared => &[(ConceptForm::Shared, "")],
            Format::Diffusers => &[(ConceptForm::Diffusers, "")],
            Format::Both => &[
                (ConceptForm::Shared, ""),
                (ConceptForm::Diffusers, "-diffusers"),
            ],
        };
        for index in 0..learned.concepts.len() {
            for (form, suffix) in forms {
                let bytes = concept_bytes(learned, index, *form, &metadata)
                    .map_err(|e| from_method("concepts", &e))?;
                let path = free_path(
                    &base,
                    &format!("{prefix}{}{suffix}", file_name(learned, index)),
                )?;
                write_atomically(&path, &bytes)
                    .map_err(|error| from_method("filename_prefix", &error))?;
                host.saved(&path);
            }
        }
        let tuned = inputs
            .optional_object::<ModelValue>("model")?
            .and_then(|model| model.0.lora.as_ref());
        if let Some(lora) = tuned {
            let path = free_path(&base, &format!("{prefix}lora"))?;
            lora.save(&path)
                .map_err(|error| from_model("model", &error))?;
            host.saved(&path);
        }
        Ok(Vec::new())
    }
}

/// `rex` of `<rex>`, with nothing that a file system objects to.
fn file_name(learned: &LearnedConcepts, index: usize) -> String {
    let token = learned.concepts[index].token.trim_matches(['<', '>']);
    token
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || "-_".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect()
}

/// The prefix, if it stays below the output folder.
fn safe_prefix(prefix: &str) -> Result<String, NodeError> {
    let path = Path::new(prefix);
    let inside = path
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    if inside && !prefix.contains(['\\', '\0']) {
        return Ok(prefix.to_owned());
    }
    Err(NodeError::invalid_input(
        "filename_prefix",
        format!(
            "filename_prefix \"{prefix}\" leads out of the output folder; use a name or a folder/name"
        ),
    ))
}

/// `base/stem.safetensors`, or the first `-2`, `-3`, … that is free; its folder exists afterwards.
fn free_path(base: &Path, stem: &str) -> Result<PathBuf, NodeError> {
    let numbered = |n: usize| match n {
        1 => base.join(format!("{stem}.safetensors")),
        n => base.join(format!("{stem}-{n}.safetensors")),
    };
    let path = (1..)
        .map(numbered)
        .find(|path| !path.exists())
        .unwrap_or_else(|| numbered(1));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|error| {
            let message = format!("the folder {} cannot be made: {error}", folder.display());
            NodeError::new(plugin_api::ErrorCode::CannotWrite, message)
        })?;
    }
    Ok(path)
}
