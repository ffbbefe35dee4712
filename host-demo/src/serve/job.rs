//! A job, as it is queued, kept in the journal and listed.

use std::cmp::Ordering;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use durable_files::disk;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::confined::Root;
use crate::run_folder::MAX_CUT_SHORT;

/// What a client asked to be run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Job {
    /// A UUID.
    pub(crate) id: String,
    /// Lower numbers run first.
    pub(crate) number: f64,
    /// Who is told; everybody if empty.
    pub(crate) client_id: String,
    /// The graph in its API form.
    pub(crate) prompt: Value,
    /// What came with it, among it the editor's document.
    pub(crate) extra_data: Value,
    /// The output nodes that run.
    pub(crate) outputs: Vec<String>,
    /// When it was accepted.
    pub(crate) created_ms: u64,
    /// When it was begun, by the clock of the disk, if it was neither ended nor left since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) begun: Option<SystemTime>,
    /// The times at which it was running when a server died.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) cut_short: Vec<CutShort>,
    /// What it had saved then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) saved: Vec<SavedFile>,
    /// Left over from a crash: waits until somebody says so.
    #[serde(skip)]
    pub(crate) is_held: bool,
}

/// A time in which a job was running until its server died, by the clock of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CutShort {
    pub(crate) begun: SystemTime,
    /// The next server was there.
    pub(crate) until: SystemTime,
}

/// A file that a job has saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedFile {
    pub(crate) path: PathBuf,
    blake3: String,
}

impl SavedFile {
    /// The file as it is now.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        Ok(Self {
            path: path.to_owned(),
            blake3: hasher.finalize().to_hex().to_string(),
        })
    }

    /// A file beside this one with the same content, written at one of these times and none of `others`: the job's own, saved in
    /// the moment of the crash and not written down any more.
    pub(crate) fn twin_of(&self, times: &[CutShort], others: &[PathBuf]) -> Option<PathBuf> {
        if times.is_empty() {
            return None;
        }
        let bytes = self.path.metadata().ok()?.len();
        let is_of = |time: SystemTime| {
            let mut times = times.iter();
            times.any(|cut| cut.begun <= time && time <= cut.until)
        };
        let entries = std::fs::read_dir(self.path.parent()?).ok()?.flatten();
        entries
            .filter(|entry| {
                let is_like = |meta: std::fs::Metadata| {
                    meta.is_file() && meta.len() == bytes && meta.modified().is_ok_and(is_of)
                };
                entry.metadata().is_ok_and(is_like)
            })
            .map(|entry| entry.path())
            .filter(|path| path.extension() == self.path.extension())
            .filter(|path| *path != self.path && !others.contains(path))
            .find(|path| Self::of(path).is_ok_and(|other| other.blake3 == self.blake3))
    }

    /// Removes the file if nobody has changed it: the job writes it again. Only beneath `output`: the journal may come with a
    /// folder that was copied, and the file belongs to the one that it was copied from.
    pub(crate) fn take_back(&self, output: &Root) {
        let inside = output
            .name_of(&self.path)
            .and_then(|name| output.existing(&name).ok());
        if let Some(path) = inside
            && Self::of(&self.path).is_ok_and(|now| now == *self)
        {
            let _ = disk::remove_file(&path);
            // The folder of a network, whose configuration is named last, would keep its name from the job. Never one that
            // is reached by a link, or has anything in it.
            let is_of_network = path == self.path && path.ends_with("config.json");
            if let Some(folder) = path.parent().filter(|_| is_of_network) {
                let _ = disk::remove_dir(folder);
            }
        }
    }
}

/// A job's number as clients expect it: an integer where it is whole.
pub(crate) fn number_json(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 {
        json!(number as i64)
    } else {
        json!(number)
    }
}

impl Job {
    /// Who runs first: by number, and behind all others those that may take the server down.
    pub(crate) fn order(&self, other: &Self) -> Ordering {
        let by_suspicion = self.is_suspected().cmp(&other.is_suspected());
        by_suspicion.then(self.number.total_cmp(&other.number))
    }

    /// Whether it may be what takes the server down.
    pub(crate) fn is_suspected(&self) -> bool {
        self.cut_short.len() >= MAX_CUT_SHORT
    }

    /// As it stands in `/jobs`.
    pub(crate) fn entry(&self, status: &str) -> Value {
        let mut entry = json!({
            "id": self.id, "status": status, "priority": number_json(self.number), "create_time": self.created_ms,
            "outputs_count": null,
        });
        let workflow_id = self.extra_data.pointer("/extra_pnginfo/workflow/id");
        if let Some(id) = workflow_id.filter(|id| id.is_string()) {
            entry["workflow_id"] = id.clone();
        }
        entry
    }

    /// `[number, id, prompt, extra_data, outputs]`.
    pub(crate) fn tuple(&self) -> Value {
        json!([
            number_json(self.number),
            self.id,
            self.prompt,
            self.extra_data,
            self.outputs
        ])
    }
}
