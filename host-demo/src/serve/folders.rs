//! The server's own folders, beneath one that the user names.
//!
//! ```text
//! data/
//!   input/           pictures that were uploaded
//!   output/          what nodes save
//!   temp/            what nodes only show; emptied at every start
//!   user/            settings.json and workflows/
//!   models/          checkpoints/, embeddings/, loras/: listed for clients that ask
//!   work/            what an interrupted node needs to go on
//!   queue.jsonl      the journal of jobs
//!   .lock            held while a server runs
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::confined::Root;
use crate::run_folder::WorkDirs;

/// The folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FoldersError {
    #[error("cannot write the data folder {}: {error}; name another with --data", path.display())]
    CannotWrite { path: PathBuf, error: io::Error },
    #[error("another server uses the data folder {}; stop it or name another folder with --data", .0.display())]
    InUse(PathBuf),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Folders {
    pub(crate) input: Root,
    pub(crate) output: Root,
    pub(crate) temp: Root,
    pub(crate) user: Root,
    pub(crate) models: Root,
    data: PathBuf,
    _lock: File,
}

impl Folders {
    /// Makes what is missing, and clears what a server that was killed left half-written.
    ///
    /// # Errors
    /// See [`FoldersError`].
    pub(crate) fn open(data: &Path) -> Result<Self, FoldersError> {
        let failed = |error| FoldersError::CannotWrite {
            path: data.to_owned(),
            error,
        };
        fs::create_dir_all(data).map_err(failed)?;
        let lock = File::create(data.join(".lock")).map_err(failed)?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(FoldersError::InUse(data.to_owned())),
            // A file system without locks only loses this check.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let _ = fs::remove_dir_all(data.join("temp"));
        let root = |name: &str| Root::create(&data.join(name)).map_err(failed);
        let folders = Self {
            input: root("input")?,
            output: root("output")?,
            temp: root("temp")?,
            user: root("user")?,
            models: root("models")?,
            data: data.to_owned(),
            _lock: lock,
        };
        for root in [&folders.input, &folders.output, &folders.user] {
            remove_torn(root.path());
        }
        Ok(folders)
    }

    /// The journal's file.
    pub(crate) fn journal(&self) -> PathBuf {
        self.data.join("queue.jsonl")
    }

    /// What nodes keep between runs.
    pub(crate) fn work_dirs(&self) -> WorkDirs {
        WorkDirs::new(self.data.join("work"))
    }
}

/// Writes a file, complete or not at all, over one that may be there; it lasts once this returns.
pub(crate) fn write_over(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", uuid::Uuid::new_v4()));
    let write = || {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::create_new(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        if let Some(folder) = path.parent() {
            // Where folders cannot be synced, the rename is as lasting as the system makes it.
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(())
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Files are written under such a name and then renamed.
fn is_torn(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp")
}

fn remove_torn(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        if kind.is_dir() {
            remove_torn(&entry.path());
        } else if kind.is_file() && is_torn(&entry.file_name().to_string_lossy()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_folder_has_one_server_and_no_torn_files() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        fs::create_dir_all(data.join("output/a")).unwrap();
        fs::create_dir_all(data.join("temp")).unwrap();
        for file in ["output/a/.x.png.tmp", "output/a/x.png", "temp/y.png"] {
            fs::write(data.join(file), "").unwrap();
        }
        let folders = Folders::open(&data).unwrap();
        let there = ["output/a/.x.png.tmp", "output/a/x.png", "temp/y.png"]
            .map(|file| data.join(file).exists());
        assert_eq!(there, [false, true, false]);
        assert!(matches!(Folders::open(&data), Err(FoldersError::InUse(_))));
        drop(folders);
        assert!(Folders::open(&data).is_ok());
    }
}
