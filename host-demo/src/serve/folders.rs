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
//!   queue.jsonl      the journal of jobs; one that could not be read whole is kept as queue.unreadable.jsonl
//!   .lock            held while a server runs
//! ```

use std::io;
use std::path::{Path, PathBuf};

use durable_files::{Claim, ClaimError, disk, remove_torn};

use crate::confined::Root;
use crate::run_folder::{PATIENCE, WorkDirs, named};

/// The folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FoldersError {
    #[error("cannot write the data folder {}: {error}; name another with --data", path.display())]
    CannotWrite { path: PathBuf, error: io::Error },
    #[error(
        "another server{} uses the data folder {}; stop it or name another folder with --data", named(*process),
        path.display()
    )]
    InUse { path: PathBuf, process: Option<u32> },
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
    _claim: Claim,
}

impl Folders {
    /// Makes what is missing, and clears what a server that was killed left half-written. A server that is ending is waited for.
    ///
    /// # Errors
    /// See [`FoldersError`].
    pub(crate) fn open(data: &Path) -> Result<Self, FoldersError> {
        let failed = |error| FoldersError::CannotWrite {
            path: data.to_owned(),
            error,
        };
        // A file system without locks only loses this check.
        let claim = Claim::take(&data.join(".lock"), PATIENCE).map_err(|error| match error {
            ClaimError::Held(process) => FoldersError::InUse {
                path: data.to_owned(),
                process,
            },
            ClaimError::System(error) => failed(error),
        })?;
        remove_torn(data);
        let _ = disk::remove_dir_all(&data.join("temp"));
        let root = |name: &str| Root::create(&data.join(name)).map_err(failed);
        Ok(Self {
            input: root("input")?,
            output: root("output")?,
            temp: root("temp")?,
            user: root("user")?,
            models: root("models")?,
            data: data.to_owned(),
            _claim: claim,
        })
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
    durable_files::write_over(path, |file| file.write_all(bytes))
}

/// Writes a file, complete or not at all, under a name that nobody has; it lasts once this returns.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] if somebody has the name, or takes it meanwhile.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    durable_files::write_new(path, |file| file.write_all(bytes))?;
    path.parent().into_iter().for_each(disk::sync_dir);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_data_folder_has_one_server_and_no_torn_files() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        fs::create_dir_all(data.join("output/a")).unwrap();
        fs::create_dir_all(data.join("temp")).unwrap();
        let files = [
            "output/a/.conceptloom-1-0.tmp",
            "output/a/x.png",
            "temp/y.png",
            ".conceptloom-1-1.tmp",
        ];
        for file in files {
            fs::write(data.join(file), "").unwrap();
        }
        let folders = Folders::open(&data).unwrap();
        let there = files.map(|file| data.join(file).exists());
        assert_eq!(there, [false, true, false, false]);
        let own = std::process::id();
        assert!(
            matches!(Folders::open(&data), Err(FoldersError::InUse { process: Some(id), .. }) if id == own)
        );
        drop(folders);
        assert!(Folders::open(&data).is_ok());
    }
}
