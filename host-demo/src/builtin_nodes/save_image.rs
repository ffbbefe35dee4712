//! SaveImage and PreviewImage: pictures to files, and to the eyes only.

use std::path::{Component, Path, PathBuf};

use plugin_api::{ErrorCode, Host, Inputs, NodeDescriptor, NodeError, Outputs, SharedTensor};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{BuiltinNode, parse};
use crate::recorder::MAX_FRAMES;
use crate::{file_words, pictures, png_text, run_folder};

#[derive(Deserialize, JsonSchema)]
struct SaveParameters {
    /// Start of the file names, in the run's folder; a / makes a folder in it, %date:yyyy-MM-dd%, %width%, %height% and
    /// %Node.parameter% are replaced
    #[serde(default = "default_prefix")]
    filename_prefix: String,
}

fn default_prefix() -> String {
    "picture".to_owned()
}

#[derive(JsonSchema)]
struct NoParameters {}

pub(super) fn save_descriptor() -> NodeDescriptor {
    NodeDescriptor::new::<SaveParameters>(
        "SaveImage",
        "Save Image",
        "image",
        "Writes pictures as PNG files with the workflow inside",
    )
    .input("images", picture_ports::IMAGE, "The pictures to write")
    .output_node()
    .aliases(&["write picture", "export"])
}

pub(super) fn preview_descriptor() -> NodeDescriptor {
    NodeDescriptor::new::<NoParameters>(
        "PreviewImage",
        "Preview Image",
        "image",
        "Shows pictures in the report, without files of their own",
    )
    .input("images", picture_ports::IMAGE, "The pictures to show")
    .output_node()
    .aliases(&["show picture"])
}

pub(super) struct SaveImage;

impl BuiltinNode for SaveImage {
    fn validate(&self, parameters: &Map<String, Value>) -> Result<(), NodeError> {
        let SaveParameters { filename_prefix } = parse(parameters)?;
        relative(&filename_prefix).map(drop)
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: &Map<String, Value>,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let SaveParameters { filename_prefix } = parse(parameters)?;
        let info = host.run_info();
        let folder = Path::new(info.output_dir.as_str());
        let texts = metadata(host)?;
        for picture in pictures::from_image("images", inputs.tensor("images")?)? {
            let png = png_text::encode(&picture, &texts)?;
            let prefix = file_words::sized(&filename_prefix, [picture.width, picture.height]);
            let path = folder.join(relative(&prefix)?);
            let cannot = |error: String| NodeError::new(ErrorCode::CannotWrite, error);
            if !durable_files::is_below(folder, &path).map_err(|error| cannot(error.to_string()))? {
                let text =
                    format!("the prefix \"{prefix}\" leads out of the output folder by a link");
                return Err(NodeError::invalid_input("filename_prefix", text));
            }
            let path = run_folder::write_numbered(numbered(path), &png)
                .map_err(|error| cannot(error.to_string()))?;
            host.saved(&path);
        }
        Ok(Vec::new())
    }
}

/// The text chunks that restore the graph; none if metadata are not wanted.
fn metadata(host: &Host) -> Result<Vec<(String, String)>, NodeError> {
    let texts = host.metadata()?.into_iter();
    Ok(texts
        .map(|(keyword, json)| (keyword, png_text::ascii(&json)))
        .collect())
}

/// A prefix that stays in the run's folder.
fn relative(prefix: &str) -> Result<PathBuf, NodeError> {
    let path = Path::new(prefix.trim());
    let stays = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if prefix.trim().is_empty()
        || !stays
        || prefix.contains(['\\', ':', '\0'])
        || prefix.ends_with('/')
    {
        return Err(NodeError::invalid_input(
            "filename_prefix",
            format!(
                "the prefix \"{prefix}\" does not name a file in the run's folder; write for example masks/dog"
            ),
        ));
    }
    file_words::check_length(prefix)?;
    Ok(path.to_owned())
}

/// `prefix_00001.png`, `prefix_00002.png`, …
fn numbered(prefix: PathBuf) -> impl Fn(u32) -> PathBuf {
    let name = prefix.file_name().unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    move |n| prefix.with_file_name(format!("{name}_{n:05}.png"))
}

pub(super) struct PreviewImage;

impl BuiltinNode for PreviewImage {
    fn run(
        &mut self,
        inputs: &mut Inputs,
        _: &Map<String, Value>,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let images = inputs.tensor("images")?;
        for (i, picture) in pictures::from_image("images", images)?.iter().enumerate() {
            // A longer series would be thinned out.
            let series = match i / MAX_FRAMES {
                0 => String::new(),
                row => format!("from picture {} on", row * MAX_FRAMES + 1),
            };
            let values = picture
                .pixels
                .iter()
                .map(|&byte| f32::from(byte) / 255.0)
                .collect();
            let shown: SharedTensor =
                pictures::tensor(values, &[picture.height, picture.width, 3])?;
            host.preview(shown, &series, &format!("picture {}", i + 1));
        }
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_cannot_leave_the_folder() {
        assert_eq!(relative("masks/dog").unwrap(), Path::new("masks/dog"));
        for bad in ["", "..", "../a", "/tmp/a", "a/../../b", "a\\b", "c:x", "a/"] {
            assert!(relative(bad).is_err(), "{bad}");
        }
        let long = "猫".repeat(file_words::LONGEST_PART / 3 + 1);
        let error = relative(&format!("masks/{long}")).unwrap_err();
        assert!(error.message.contains("shorter"), "{error}");
    }
}
