//! Where strangers' bytes enter the host, a function for each, as the fuzz targets in `tests/fuzz` call them.
//!
//! Each function does with the bytes what the program would, without running a node. Bytes that are refused are fine; a panic, a
//! hang and what [`Broken`] says are not.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use jiff::ZonedDateTime;
use plugin_api::{DeviceDescriptor, PluginDescriptor};
use serde_json::{Map, Value, json};
use tokio::runtime::Runtime;

use crate::batch;
use crate::builtin_nodes::Places;
use crate::catalog::Catalog;
use crate::confined::Root;
use crate::file_words;
use crate::graph::Graph;
use crate::loader;
use crate::object_info;
use crate::pictures::LoadedPicture;
use crate::png_text;
use crate::serve::fuzzed::Talk;
use crate::serve::{Folders, fuzzed};
use crate::validate::judge;
use crate::workflow_file::Workflow;

/// Pictures of more pixels are read, but not converted: that takes its time and says nothing new.
const MAX_PIXELS: usize = 1 << 18;

/// What the host promises and did not keep, in words.
pub type Broken = String;

/// A host with its catalog and folders of its own.
pub struct Surfaces {
    catalog: Arc<Catalog>,
    data: PathBuf,
    /// A folder with links that lead out of it.
    names: Root,
    runtime: Runtime,
}

impl std::fmt::Debug for Surfaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surfaces")
            .field("data", &self.data)
            .finish_non_exhaustive()
    }
}

impl Surfaces {
    /// Loads the plugin at `library` and makes folders beneath `folder`.
    ///
    /// # Errors
    /// A library that does not load, or a folder that cannot be written.
    pub fn open(library: &Path, folder: &Path) -> anyhow::Result<Self> {
        let data = folder.join("data");
        let folders = Folders::open(&data)?;
        let places = Places::Served {
            input: folders.input.clone(),
            output: folders.output.clone(),
            temp: folders.temp.clone(),
        };
        Ok(Self {
            catalog: Arc::new(Catalog::new(vec![loader::load(library)?], places)?),
            data,
            names: names(folder).context("cannot make the folder with links")?,
            runtime: fuzzed::runtime()?,
        })
    }

    /// A workflow's file: the editor's document, the API's, or a picture that holds one.
    ///
    /// # Errors
    /// A graph that is another one once it was written and read; a node that panicked on its parameters.
    pub fn workflow(&self, bytes: &[u8]) -> Result<(), Broken> {
        let Ok(mut workflow) = Workflow::parse("fuzzed", bytes, &self.catalog) else {
            return Ok(());
        };
        let api = workflow.graph.to_api();
        let again = api.as_object().map(Graph::from_api);
        match again {
            Some(Ok(again)) if again.to_api() == api => {}
            other => return Err(format!("{api} is read again as {other:?}")),
        }
        let verdict = judge(&workflow.graph, &self.catalog, None);
        let panicked = verdict
            .problems
            .iter()
            .find(|problem| problem.message.contains("panicked"));
        if let Some(problem) = panicked {
            return Err(problem.to_string());
        }
        let full = self.catalog.with_defaults(&workflow.graph);
        for node in full.nodes.values() {
            file_words::replace(&mut node.parameters(), &full, &ZonedDateTime::now());
        }
        workflow.set_seeds(7, &self.catalog);
        let _ = workflow.set("1.steps=3", &self.catalog);
        let _ = workflow.document();
        Ok(())
    }

    /// Names of files and objects, one a line: in a served folder, in a node's parameter, with words to replace.
    ///
    /// # Errors
    /// A name that leads out of its folder, or to another file than its own name does.
    pub fn names(&self, text: &str) -> Result<(), Broken> {
        let root = &self.names;
        let is_inside = |path: &Path| {
            path.starts_with(root.path())
                && !path
                    .components()
                    .any(|part| matches!(part, Component::ParentDir))
        };
        for name in text.lines() {
            if let Ok(path) = root.existing(name) {
                let back = root.name_of(&path).map(|name| root.existing(&name));
                if !is_inside(&path) || !matches!(&back, Some(Ok(same)) if *same == path) {
                    return Err(format!("{name:?} is {}", path.display()));
                }
            }
            if let Ok(path) = root.place(name) {
                let there = path.ancestors().find(|path| path.exists());
                let real = there.and_then(|path| path.canonicalize().ok());
                if !is_inside(&path) || !real.is_some_and(|real| is_inside(&real)) {
                    return Err(format!("{name:?} would be {}", path.display()));
                }
            }
            let mut parameters = Map::from_iter([("filename_prefix".to_owned(), json!(name))]);
            file_words::replace(&mut parameters, &Graph::default(), &ZonedDateTime::now());
            let _ = file_words::sized(name, [1, 2]);
            let parameters = Map::from_iter([("image".to_owned(), json!(name))]);
            let _ = self.catalog.validate("LoadImage", &parameters);
        }
        Ok(())
    }

    /// What came over one connection: HTTP requests, and the frames of a websocket behind its own.
    ///
    /// # Errors
    /// A connection that does not end, an answer that is no HTTP, or a server that cannot start on what this one left.
    pub fn connection(&self, bytes: &[u8]) -> Result<(), Broken> {
        match self.talk(bytes)? {
            Talk::Refused(why) => Err(format!("the server cannot start: {why}")),
            Talk::Answered(answer) => is_http(&answer),
        }
    }

    /// Where a server keeps its files, for [`left_behind`](Self::left_behind).
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A server on a folder that another one, or anybody, left; and what came over one connection to it.
    ///
    /// # Errors
    /// Those of [`connection`](Self::connection); a server that does not start without saying which file is at fault.
    pub fn left_behind(&self, bytes: &[u8]) -> Result<(), Broken> {
        match self.talk(bytes)? {
            Talk::Refused(why) if why.contains(&*self.data.to_string_lossy()) => Ok(()),
            Talk::Refused(why) => Err(format!("no file is named: {why}")),
            Talk::Answered(answer) => is_http(&answer),
        }
    }

    fn talk(&self, bytes: &[u8]) -> Result<Talk, Broken> {
        let talk = fuzzed::talk(&self.runtime, &self.catalog, &self.data, bytes);
        // What was uploaded and saved.
        let removed = std::fs::remove_dir_all(&self.data);
        let talk = talk.map_err(|error| format!("{error:#}"))?;
        removed.map_err(|error| error.to_string())?;
        Ok(talk)
    }

    /// A folder with the list of a batch, and with what says that an entry is done. Its workflows are not read.
    pub fn batch(&self, folder: &Path) {
        batch::fuzzed(folder, &self.catalog);
    }
}

fn is_http(answer: &[u8]) -> Result<(), Broken> {
    if answer.is_empty() || answer.starts_with(b"HTTP/1.") {
        Ok(())
    } else {
        Err(format!(
            "the answer is {:?}",
            String::from_utf8_lossy(answer)
        ))
    }
}

fn names(folder: &Path) -> std::io::Result<Root> {
    let root = Root::create(&folder.join("names/served"))?;
    std::fs::create_dir_all(root.path().join("a/b"))?;
    std::fs::write(root.path().join("a/b.png"), "")?;
    std::fs::write(folder.join("names/secret"), "")?;
    #[cfg(unix)]
    for (name, target) in [("out", ".."), ("file", "../secret"), ("loop", "loop")] {
        let link = root.path().join(name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(target, link)?;
    }
    Ok(root)
}

/// A picture's file, with what stands beside its pixels.
pub fn picture(bytes: &[u8]) {
    let _ = png_text::workflow(bytes);
    let _ = LoadedPicture::check_size("fuzzed", bytes);
    let Ok(picture) = LoadedPicture::decode("fuzzed", bytes) else {
        return;
    };
    if picture.opaque().as_bytes().len() > 3 * MAX_PIXELS {
        return;
    }
    let _ = picture.image();
    let _ = picture.transparency();
    let _ = picture.mask(0);
    let _ = picture.only_transparency();
    let _ = picture.with_transparency_of(&picture);
}

/// What the process of `--isolate` tells: frames, one behind the other.
pub fn frames(bytes: &[u8]) {
    #[cfg(unix)]
    crate::isolated::fuzzed(bytes);
    #[cfg(not(unix))]
    let _ = bytes;
}

/// What a plugin says of itself, as JSON; and of its devices.
pub fn descriptor(bytes: &[u8]) {
    if let Ok(devices) = serde_json::from_slice::<Vec<DeviceDescriptor>>(bytes) {
        for device in devices {
            let _ = device.to_string();
        }
    }
    let Ok(plugin) = serde_json::from_slice::<PluginDescriptor>(bytes) else {
        return;
    };
    for node in &plugin.nodes {
        let _ = object_info::class(node, &plugin.name);
        for widget in &node.widgets {
            let _ = object_info::input(node, &widget.name);
            let values = [
                Value::Null,
                json!(-1),
                json!(1e300),
                json!("7"),
                widget.default_value(),
            ];
            for value in values {
                let given = Map::from_iter([(widget.name.clone(), value)]);
                let _ = node.check_parameters(&node.completed_parameters(&given));
            }
        }
    }
}
