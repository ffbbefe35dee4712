//! How often a run was begun in a process that died before it ended: one that takes every process down must not be begun first
//! again and again, or nothing behind it would ever run.

use std::path::{Path, PathBuf};

use durable_files::disk;

use super::WORK;

/// Ends the names of the files beneath `.work` whose length is the number.
pub(super) const SUFFIX: &str = ".tries";
/// What was cut short so often may be what takes its process down.
pub(crate) const MAX_CUT_SHORT: usize = 3;

/// Those of the run that fills the folder of a name; written by who has the claim on it. What cannot be read or written
/// only changes the order of runs.
pub(crate) struct Tries {
    path: PathBuf,
}

impl Tries {
    pub(crate) fn of(root: &Path, name: &str) -> Self {
        Self {
            path: root.join(WORK).join(format!("{name}{SUFFIX}")),
        }
    }

    /// How often its process died.
    pub(crate) fn n_cut_short(&self) -> usize {
        self.path.metadata().map_or(0, |meta| meta.len() as usize)
    }

    /// The run begins. That it ended is known by what is returned: a process that dies drops nothing.
    pub(crate) fn begin(self) -> Trying {
        let work = self.path.parent().map_or(Ok(()), disk::create_dir_all);
        let _ = work
            .and_then(|()| disk::File::open_or_create(&self.path))
            .and_then(|file| file.set_len(self.n_cut_short() as u64 + 1));
        Trying(self)
    }

    /// The run has ended, well or not.
    pub(crate) fn forget(&self) {
        let _ = disk::remove_file(&self.path);
        if let Some(work) = self.path.parent() {
            // Only if nothing is in it.
            let _ = disk::remove_dir(work);
        }
    }
}

/// A run that goes on.
pub(crate) struct Trying(Tries);

impl Drop for Trying {
    fn drop(&mut self) {
        self.0.forget();
    }
}
