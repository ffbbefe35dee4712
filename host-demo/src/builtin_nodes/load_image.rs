//! LoadImage and LoadImageMask: a picture file to `IMAGE` and `MASK`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use plugin_api::{ErrorCode, Host, Inputs, NodeDescriptor, NodeError, Outputs, Value as WireValue};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{BuiltinNode, Places, parse};
use crate::demo;
use crate::pictures::{LoadedPicture, read_file};

#[derive(Deserialize, JsonSchema)]
struct ImageParameters {
    /// A picture file (PNG, JPEG or WebP): beside the workflow, in the input folder, or with its whole path; demo:NAME is a picture that is built in
    #[serde(default = "default_image")]
    image: String,
}

#[derive(Deserialize, JsonSchema)]
struct MaskParameters {
    /// A picture file (PNG, JPEG or WebP): beside the workflow, in the input folder, or with its whole path; demo:NAME is a picture that is built in
    #[serde(default = "default_mask")]
    image: String,
    /// Which channel is the mask. As in ComfyUI, alpha means where the picture is transparent
    #[serde(default = "default_channel")]
    channel: Channel,
}

#[derive(Clone, Copy, serde::Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Channel {
    Alpha,
    Red,
    Green,
    Blue,
}

fn default_image() -> String {
    format!("{}{}", demo::PREFIX, demo::PICTURES[0].0)
}
fn default_mask() -> String {
    format!("{}{}", demo::PREFIX, demo::PICTURES[1].0)
}
fn default_channel() -> Channel {
    Channel::Red
}

pub(super) fn image_descriptor() -> NodeDescriptor {
    NodeDescriptor::new::<ImageParameters>("LoadImage", "Load Image", "image", "Reads a picture")
        .output("IMAGE", picture_ports::IMAGE, "The picture")
        .output(
            "MASK",
            picture_ports::MASK,
            "Where it is transparent; 0 everywhere if it is not",
        )
        .aliases(&["open picture", "input"])
}

pub(super) fn mask_descriptor() -> NodeDescriptor {
    NodeDescriptor::new::<MaskParameters>(
        "LoadImageMask",
        "Load Image (as Mask)",
        "mask",
        "Reads one channel of a picture as a mask",
    )
    .output("MASK", picture_ports::MASK, "The channel, 0 to 1")
    .aliases(&["open mask"])
}

/// The editor shows a list of files with a button to add one.
pub(super) fn upload_hint(info: &mut Value) {
    let image = &mut info["input"]["required"]["image"];
    let (default, tooltip) = (image[1]["default"].clone(), image[1]["tooltip"].clone());
    let files: Vec<_> = demo::PICTURES
        .iter()
        .map(|(name, _)| format!("{}{name}", demo::PREFIX))
        .collect();
    *image = json!(["COMBO", {"default": default, "options": files, "image_upload": true, "tooltip": tooltip}]);
}

pub(super) struct LoadImage(pub(super) Arc<Places>);

impl BuiltinNode for LoadImage {
    fn validate(&self, parameters: &Map<String, Value>) -> Result<(), NodeError> {
        let ImageParameters { image } = parse(parameters)?;
        locate(&image, &self.0).map(drop)
    }

    fn fingerprint(&self, parameters: &Map<String, Value>) -> String {
        content_hash(parameters, &self.0)
    }

    fn run(
        &mut self,
        _inputs: &mut Inputs,
        parameters: &Map<String, Value>,
        _host: &Host,
    ) -> Result<Outputs, NodeError> {
        let ImageParameters { image } = parse(parameters)?;
        let picture = load(&image, &self.0)?;
        Ok(vec![
            WireValue::Tensor(picture.image()?),
            WireValue::Tensor(picture.transparency()?),
        ])
    }
}

pub(super) struct LoadImageMask(pub(super) Arc<Places>);

impl BuiltinNode for LoadImageMask {
    fn validate(&self, parameters: &Map<String, Value>) -> Result<(), NodeError> {
        let MaskParameters { image, .. } = parse(parameters)?;
        locate(&image, &self.0).map(drop)
    }

    fn fingerprint(&self, parameters: &Map<String, Value>) -> String {
        content_hash(parameters, &self.0)
    }

    fn run(
        &mut self,
        _inputs: &mut Inputs,
        parameters: &Map<String, Value>,
        _host: &Host,
    ) -> Result<Outputs, NodeError> {
        let MaskParameters { image, channel } = parse(parameters)?;
        let picture = load(&image, &self.0)?;
        let mask = match channel {
            Channel::Alpha => picture.transparency()?,
            Channel::Red => picture.mask(0)?,
            Channel::Green => picture.mask(1)?,
            Channel::Blue => picture.mask(2)?,
        };
        Ok(vec![WireValue::Tensor(mask)])
    }
}

enum Found {
    BuiltIn(&'static [u8]),
    File(PathBuf),
}

fn locate(name: &str, places: &Places) -> Result<Found, NodeError> {
    let refuse = |reason: String| {
        let mut error = NodeError::new(ErrorCode::InvalidFile, reason);
        error.input = "image".into();
        error
    };
    if name.starts_with(demo::PREFIX) {
        return demo::picture(name).map(Found::BuiltIn).ok_or_else(|| {
            let known: Vec<_> = demo::PICTURES
                .iter()
                .map(|(known, _)| format!("{}{known}", demo::PREFIX))
                .collect();
            refuse(format!(
                "there is no built-in picture {name}; there are {}",
                known.join(", ")
            ))
        });
    }
    if name.trim().is_empty() {
        return Err(refuse(
            "no picture is named; give the name of a PNG, JPEG or WebP file".to_owned(),
        ));
    }
    let found = match places {
        Places::Own {
            workflow_dir,
            input_dir,
        } => own_file(name, workflow_dir, input_dir),
        Places::Served {
            input,
            output,
            temp,
        } => {
            let (name, root) = match name.rsplit_once(" [") {
                Some((name, "output]")) => (name, output),
                Some((name, "temp]")) => (name, temp),
                Some((name, "input]")) => (name, input),
                _ => (name, input),
            };
            root.file(name)
                .map_err(|error| format!("{error}; upload the picture or choose another"))
        }
    };
    found.map(Found::File).map_err(refuse)
}

/// How the editor notes a folder.
const FOLDERS: [&str; 3] = ["input]", "output]", "temp]"];

fn own_file(name: &str, workflow_dir: &Path, input_dir: &Path) -> Result<PathBuf, String> {
    // The editor notes the folder behind the name; a run on the command line has one.
    let plain = match name.rsplit_once(" [") {
        Some((plain, folder)) if FOLDERS.contains(&folder) => plain,
        _ => name,
    };
    // Joining an absolute path gives that path.
    let tried = [name, plain].map(|name| [workflow_dir.join(name), input_dir.join(name)]);
    let found = tried.iter().flatten().find(|path| path.is_file());
    found.cloned().ok_or_else(|| {
        let folder = |path: &Path| match path.parent() {
            Some(parent) if parent != Path::new("") => parent.display().to_string(),
            _ => "the current folder".to_owned(),
        };
        let places = if Path::new(plain).is_absolute() {
            String::new()
        } else {
            let [_, [first, second]] = &tried;
            format!("; looked in {} and {}", folder(first), folder(second))
        };
        format!("there is no picture {plain}{places}")
    })
}

fn load(name: &str, places: &Places) -> Result<LoadedPicture, NodeError> {
    match locate(name, places)? {
        Found::BuiltIn(bytes) => LoadedPicture::decode(name, bytes),
        Found::File(path) => LoadedPicture::decode(&path.display().to_string(), &read_file(&path)?),
    }
}

fn content_hash(parameters: &Map<String, Value>, places: &Places) -> String {
    let name = parameters
        .get("image")
        .and_then(Value::as_str)
        .unwrap_or_default();
    // What cannot be read is reported when the node runs.
    let hash = match locate(name, places) {
        Ok(Found::BuiltIn(bytes)) => Some(blake3::hash(bytes)),
        Ok(Found::File(path)) => read_file(&path).ok().map(|bytes| blake3::hash(&bytes)),
        Err(_) => None,
    };
    hash.map(|hash| hash.to_hex().to_string())
        .unwrap_or_default()
}
