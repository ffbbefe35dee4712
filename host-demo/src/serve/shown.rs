//! What nodes only show: files in a folder that does not grow beyond a size, and what was shown for results that the cache has.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes};
use std::path::PathBuf;
use std::time::SystemTime;

use parking_lot::Mutex;
use serde_json::Value;

use crate::confined::Root;
use crate::run_folder::{self, FolderError};

/// Most bytes in the folder; once there are more, those that were shown longest ago go until half of it is left.
const MAX_BYTES: u64 = 512 << 20;
/// Most results whose pictures are remembered; the cache holds fewer.
const MAX_REMEMBERED: usize = 1024;

/// See the module.
#[derive(Debug)]
pub(crate) struct ShownFiles {
    folder: PathBuf,
    most: u64,
    /// In the folder, as far as this program wrote it.
    bytes: Mutex<u64>,
    /// What a node showed, by the signature of its result.
    before: Mutex<BTreeMap<String, Value>>,
}

impl ShownFiles {
    /// In a folder that is empty.
    pub(crate) fn new(root: &Root) -> Self {
        Self::with_limit(root, MAX_BYTES)
    }

    fn with_limit(root: &Root, most: u64) -> Self {
        Self {
            folder: root.path().to_owned(),
            most,
            bytes: Mutex::new(0),
            before: Mutex::default(),
        }
    }

    /// Writes a picture, if it is not there; its name is its content's.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn keep(&self, png: &[u8]) -> Result<String, FolderError> {
        let hash = blake3::hash(png).to_hex();
        let name = format!("{}.png", &hash[..16]);
        let mut bytes = self.bytes.lock();
        if !self.is_there(&name) {
            run_folder::write_shown(&self.folder.join(&name), png)?;
            *bytes += png.len() as u64;
            if *bytes > self.most {
                *bytes = self.make_room();
            }
        }
        Ok(name)
    }

    /// Remembers what a node showed with the result of this signature.
    pub(crate) fn remember(&self, signature: &str, output: Value) {
        let mut before = self.before.lock();
        if before.len() >= MAX_REMEMBERED {
            before.clear();
        }
        before.insert(signature.to_owned(), output);
    }

    /// What a node showed with the result of this signature, if all of it is still there.
    pub(crate) fn again(&self, signature: &str) -> Option<Value> {
        let output = self.before.lock().get(signature).cloned()?;
        let images = output["images"].as_array().into_iter().flatten();
        let mut temporary = images.filter(|image| image["type"] == "temp");
        let is_whole = temporary.all(|image| {
            let name = image["filename"].as_str();
            name.is_some_and(|name| self.is_there(name))
        });
        is_whole.then_some(output)
    }

    /// The cache is empty.
    pub(crate) fn forget_results(&self) {
        self.before.lock().clear();
    }

    /// Whether there is such a file, which is shown now.
    fn is_there(&self, name: &str) -> bool {
        let Ok(file) = File::options().append(true).open(self.folder.join(name)) else {
            return false;
        };
        // Both: file systems in user space may ignore who sets one. Where times cannot be set, the oldest go first.
        let now = SystemTime::now();
        let _ = file.set_times(FileTimes::new().set_accessed(now).set_modified(now));
        true
    }

    /// Removes files until half of the room is free; returns the bytes of those that stay.
    fn make_room(&self) -> u64 {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .filter_map(|entry| {
                let meta = entry.metadata().ok().filter(fs::Metadata::is_file)?;
                let shown = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                Some((shown, meta.len(), entry.path()))
            })
            .collect();
        files.sort();
        let mut left: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if left <= self.most / 2 {
                break;
            }
            if fs::remove_file(path).is_ok() {
                left -= bytes;
            }
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn the_folder_is_bounded_and_what_was_shown_last_stays() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::create(folder.path()).unwrap();
        let shown = ShownFiles::with_limit(&root, 1000);
        let first = shown.keep(&[0; 100]).unwrap();
        let output = json!({"images": [{"filename": first, "type": "temp"}]});
        shown.remember("a", output.clone());
        let second = shown.keep(&[1; 100]).unwrap();
        shown.remember(
            "b",
            json!({"images": [{"filename": second, "type": "temp"}]}),
        );
        let size = || {
            let entries = fs::read_dir(folder.path()).unwrap();
            entries
                .map(|entry| entry.unwrap().metadata().unwrap().len())
                .sum::<u64>()
        };
        for byte in 2..100 {
            // Times of files are not finer than the system's clock.
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(shown.again("a"), Some(output.clone()));
            shown.keep(&[byte; 100]).unwrap();
            assert!(size() <= 1000);
        }
        assert_eq!(shown.again("b"), None);
        shown.forget_results();
        assert_eq!(shown.again("a"), None);
    }
}
