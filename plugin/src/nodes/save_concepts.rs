//! SaveConcepts: one `.safetensors` file per concept, and the tuned weights.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use candle_core::DType;
use personalization::LearnedConcepts;
use personalization::concept_file::{ConceptForm, concept_bytes};
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs};
use schemars::JsonSchema;
use serde::Deserialize;
use stable_diffusion::DiffusionModel;
use stable_diffusion::lora::LoraNames;

use crate::failure::{cannot_write, from_method, from_model};
use crate::ports;
use crate::values::{ConceptsValue, ModelValue};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct SaveConcepts;

/// Which name the tensor in a file gets.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Format {
    /// `emb_params`, and LoRA under kohya's names: loads in ComfyUI, A1111 and InvokeAI, and in diffusers (tokens with
    /// `token=`).
    Shared,
    /// The token itself, and LoRA under PEFT's names: loads in diffusers as it is.
    Diffusers,
    /// A file of each kind.
    Both,
}

/// How a tuned U-Net is saved.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum TunedUnet {
    /// 16 bits per weight: half the size, the same pictures but for rounding.
    F16,
    /// 32 bits per weight, as it was tuned.
    F32,
    /// Not at all.
    None,
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
    /// How the weights of a fully tuned U-Net are saved, as a diffusers folder `unet`; a LoRA is saved in any case.
    #[serde(default = "half")]
    tuned_unet: TunedUnet,
}

fn prefix() -> String {
    "concepts/".to_owned()
}
fn shared() -> Format {
    Format::Shared
}
fn half() -> TunedUnet {
    TunedUnet::F16
}

impl Node for SaveConcepts {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "SaveConcepts",
            "Save Concepts",
            "Conceptloom/save",
            "Saves every learned token as .safetensors, and what was tuned of the model",
        )
        .input("concepts", ports::CONCEPTS, "The learned tokens")
        .optional_input(
            "model",
            ports::DIFFUSION_MODEL,
            "The tuned model; its LoRA or U-Net is saved beside the tokens",
        )
        .output_node()
        .aliases(&["embedding", "save lora"])
    }

    fn validate(&self, parameters: &Parameters) -> Result<(), NodeError> {
        safe_prefix(&parameters.filename_prefix).map(drop)?;
        check_length(&parameters.filename_prefix)
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let learned = &inputs.object::<ConceptsValue>("concepts")?.0;
        let prefix = safe_prefix(&parameters.filename_prefix)?;
        let info = host.run_info();
        let base = PathBuf::from(info.output_dir.as_str());
        stays_below(&base, &base.join(format!("{prefix}concept")))?;
        let metadata: BTreeMap<String, String> = host.metadata()?.into_iter().collect();
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
                let name = file_name(learned, index);
                let stem = format!("{prefix}{}{suffix}", shortened(&name, &prefix));
                save(&base, &stem, host, |file| file.write_all(&bytes))?;
            }
        }
        if let Some(model) = inputs.optional_object::<ModelValue>("model")? {
            let base = Base {
                folder: &base,
                prefix: &prefix,
                format: parameters.format,
            };
            base.save_tuned(&model.model, parameters.tuned_unet, &metadata, host)?;
        }
        Ok(Vec::new())
    }
}

/// Where files of this node begin.
struct Base<'a> {
    folder: &'a Path,
    prefix: &'a str,
    format: Format,
}

impl Base<'_> {
    /// The LoRA, or the whole U-Net, if they are not the checkpoint's.
    fn save_tuned(
        &self,
        model: &DiffusionModel,
        unet: TunedUnet,
        metadata: &BTreeMap<String, String>,
        host: &Host,
    ) -> Result<(), NodeError> {
        if let Some(lora) = &model.lora {
            let both = [(LoraNames::Kohya, ""), (LoraNames::Peft, "-diffusers")];
            let names = match self.format {
                Format::Shared => &both[..1],
                Format::Diffusers => &[(LoraNames::Peft, "")],
                Format::Both => &both,
            };
            for (names, suffix) in names {
                let stem = format!("{}lora{suffix}", self.prefix);
                save(self.folder, &stem, host, |file| lora.write(file, *names))?;
            }
        }
        let dtype = match unet {
            TunedUnet::F16 => DType::F16,
            TunedUnet::F32 => DType::F32,
            TunedUnet::None => return Ok(()),
        };
        if model.is_tuned {
            let folders = folders(self.folder, self.prefix);
            for unet in (1..).map(|n| folders(n).join("unet")) {
                stays_below(self.folder, &unet.join("config.json"))?;
                if !unet.exists() {
                    break;
                }
            }
            let path = model
                .save_unet(folders, dtype, metadata)
                .map_err(|error| from_model("model", &error))?;
            // A host that is killed in between should know of the large one.
            host.saved(&path);
            host.saved(&path.with_file_name("config.json"));
        }
        Ok(())
    }
}

/// `concepts`, `concepts-2`, …
fn folders(base: &Path, prefix: &str) -> impl Fn(u32) -> PathBuf {
    let stem = prefix.trim_end_matches('/');
    move |n| match n {
        1 => base.join(stem),
        n if stem.is_empty() => base.join(format!("unet-{n}")),
        n => base.join(format!("{stem}-{n}")),
    }
}

/// Saves `base/stem.safetensors`, or the first of `-2`, `-3`, … that nobody has.
fn save(
    base: &Path,
    stem: &str,
    host: &Host,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), NodeError> {
    let numbered = durable_files::numbered(base.join(stem), ".safetensors");
    let path = durable_files::write_numbered(&numbered, write)
        .map_err(|error| cannot_write("filename_prefix", &numbered(1), &error))?;
    host.saved(&path);
    Ok(())
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

/// That no link leads a file out of the output folder.
fn stays_below(folder: &Path, file: &Path) -> Result<(), NodeError> {
    let is_below = durable_files::is_below(folder, file);
    if is_below.map_err(|error| cannot_write("filename_prefix", file, &error))? {
        return Ok(());
    }
    Err(NodeError::invalid_input(
        "filename_prefix",
        format!(
            "a link leads {} out of the output folder; use another filename_prefix",
            file.display()
        ),
    ))
}

/// Bytes of a prefix's part between slashes: systems have names of 255, and a token, a number and an ending follow.
const LONGEST_PART: usize = 200;
/// Bytes of such a part with the token.
const LONGEST_STEM: usize = 225;

/// What fits of a token's name behind the prefix.
fn shortened<'a>(name: &'a str, prefix: &str) -> &'a str {
    let before = prefix.rsplit('/').next().unwrap_or_default().len();
    &name[..name.floor_char_boundary(LONGEST_STEM.saturating_sub(before))]
}

/// Whether a part of the prefix is longer than systems have names, which should not be found out when all is learned.
fn check_length(prefix: &str) -> Result<(), NodeError> {
    if prefix.split('/').all(|part| part.len() <= LONGEST_PART) {
        return Ok(());
    }
    Err(NodeError::invalid_input(
        "filename_prefix",
        format!(
            "filename_prefix \"{prefix}\" has a part of more than {LONGEST_PART} bytes; choose a shorter one"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_no_longer_than_systems_have_them() {
        let long = "猫".repeat(LONGEST_PART);
        for prefix in ["", "concepts/", "a/b", &"x".repeat(LONGEST_PART)] {
            assert!(check_length(prefix).is_ok());
            let stem = format!("{prefix}{}", shortened(&long, prefix));
            let last = stem.rsplit('/').next().unwrap();
            assert!(last.len() > LONGEST_STEM - "猫".len() && last.len() <= LONGEST_STEM);
        }
        assert_eq!(shortened("rex", "concepts/"), "rex");
        let error = check_length(&format!("a/{long}")).unwrap_err();
        assert!(error.message.contains("shorter"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn no_link_leads_out() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("output");
        std::fs::create_dir(&output).unwrap();
        std::os::unix::fs::symlink(folder.path(), output.join("mine")).unwrap();
        for file in ["x.safetensors", "new/x.safetensors"] {
            assert!(stays_below(&output, &output.join(file)).is_ok(), "{file}");
        }
        for file in ["mine/x.safetensors", "mine/unet/config.json"] {
            let error = stays_below(&output, &output.join(file)).unwrap_err();
            assert!(error.message.contains("link"), "{error}");
        }
        assert!(stays_below(&folder.path().join("none"), &folder.path().join("none/x")).is_ok());
    }
}
