//! Folders in which nodes keep what they need to go on after a run that ended early.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use durable_files::{Claim, disk};
use parking_lot::Mutex;

use super::{FolderError, LOCK, PATIENCE, at, claim, lock_of, tries};

/// Digits of a node's signature in the name of its folder.
const SIGNATURE: usize = 32;
/// What nobody went on with for this long is not kept.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// What nodes keep between runs.
#[derive(Debug, Clone)]
pub(crate) struct WorkDirs {
    root: PathBuf,
    /// Whether another process is still to be waited for: once in a run is enough.
    is_patient: Arc<AtomicBool>,
    /// Of a run whose nodes are all done.
    done: Arc<Mutex<Vec<WorkDir>>>,
}

impl WorkDirs {
    /// Kept beneath `root`.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self {
            root,
            is_patient: Arc::new(AtomicBool::new(true)),
            done: Arc::default(),
        }
    }

    /// All nodes of a run are done. Their folders are kept until its results are, too.
    pub(crate) fn all_done(&self, work: Vec<WorkDir>) {
        self.done.lock().extend(work);
    }

    /// Leaves the folders of a run whose nodes are all done to another process, which keeps the results.
    pub(crate) fn hand_over(&self) -> Vec<String> {
        let name = |work: WorkDir| {
            let name = work.path.file_name()?.to_string_lossy().into_owned();
            work.keep().then_some(name)
        };
        self.done.lock().drain(..).filter_map(name).collect()
    }

    /// Takes the folders of another process whose nodes are all done.
    pub(crate) fn take_over(&self, names: &[String]) {
        // One that somebody else has is theirs.
        let open = |name: &String| self.open_within(name, Duration::ZERO).ok();
        let ours = names.iter().filter(|name| is_ours(name));
        self.all_done(ours.filter_map(open).collect());
    }

    /// The results are kept: nothing is needed any more.
    pub(crate) fn finish(&self) {
        for work in self.done.lock().drain(..) {
            work.finish();
        }
    }

    /// Whether any node left anything.
    pub(crate) fn has_any(&self) -> bool {
        let folders = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let mut contents = folders.filter_map(|entry| fs::read_dir(entry.path()).ok());
        contents.any(|mut content| content.next().is_some())
    }

    /// Where they are.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where the folder of the node with this signature is.
    pub(crate) fn path_of(&self, signature: &str) -> PathBuf {
        self.root
            .join(signature.get(..SIGNATURE).unwrap_or(signature))
    }

    /// The folder of the node with this signature.
    ///
    /// # Errors
    /// [`FolderError::InUse`] if another process uses it now, [`FolderError::CannotWrite`].
    pub(crate) fn open(&self, signature: &str) -> Result<WorkDir, FolderError> {
        let patience = if self.is_patient.load(Ordering::Relaxed) {
            PATIENCE
        } else {
            Duration::ZERO
        };
        let opened = self.open_within(signature, patience);
        if let Err(FolderError::InUse { .. }) = opened {
            self.is_patient.store(false, Ordering::Relaxed);
        }
        opened
    }

    fn open_within(&self, signature: &str, patience: Duration) -> Result<WorkDir, FolderError> {
        let path = self.path_of(signature);
        let claim = claim(&lock_of(&path), &path, patience)?;
        match disk::create_dir_all(&path) {
            Ok(()) => Ok(WorkDir { path, claim }),
            Err(error) => {
                claim.give_back();
                Err(at(&path)(error))
            }
        }
    }

    /// Forgets what no run has come back for in a fortnight.
    pub(crate) fn sweep(&self) {
        self.forget_older_than(KEEP);
    }

    fn forget_older_than(&self, age: Duration) {
        let is_old = |path: &Path| {
            let modified = path.metadata().and_then(|meta| meta.modified());
            modified.map_or(true, |time| time.elapsed().is_ok_and(|since| since > age))
        };
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // A claim that nobody gave back, or a folder.
            let signature = name.strip_suffix(LOCK).unwrap_or(&name);
            let path = self.root.join(signature);
            // A state that is written renews its folder, and a run that begins its claim.
            if !is_old(&path) || !is_old(&lock_of(&path)) {
                continue;
            }
            if signature.ends_with(tries::SUFFIX) {
                let _ = disk::remove_file(&path);
            } else if is_ours(signature)
                && let Ok(work) = self.open_within(signature, Duration::ZERO)
            {
                work.finish();
            }
        }
    }
}

/// Whether a folder is called as ours; another may be somebody else's.
fn is_ours(name: &str) -> bool {
    name.len() == SIGNATURE && name.chars().all(|c| c.is_ascii_hexdigit())
}

/// A node's own folder between runs.
#[derive(Debug)]
pub(crate) struct WorkDir {
    path: PathBuf,
    claim: Claim,
}

impl WorkDir {
    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Nothing is needed any more.
    fn finish(self) {
        let _ = disk::remove_dir_all(&self.path);
        self.leave();
    }

    /// The run ended early: keeps what the node left; whether it left anything.
    pub(crate) fn keep(self) -> bool {
        let left = self.leave_if_empty();
        left.map(Self::leave).is_some()
    }

    /// Gives the folder up if there is nothing in it.
    pub(crate) fn leave_if_empty(self) -> Option<Self> {
        if disk::remove_dir(&self.path).is_err() {
            return Some(self);
        }
        self.leave();
        None
    }

    fn leave(self) {
        self.claim.give_back();
        if let Some(root) = self.path.parent() {
            // Only if it was the last one.
            let _ = disk::remove_dir(root);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::names;
    use super::*;

    #[test]
    fn what_a_node_left_is_there_for_the_next_run_and_gone_after_a_complete_one() {
        let folder = tempfile::tempdir().unwrap();
        let dirs = WorkDirs::new(folder.path().join("work"));
        let work = dirs.open("abc").unwrap();
        for _ in 0..2 {
            let own = Some(std::process::id());
            assert!(
                matches!(dirs.open("abc"), Err(FolderError::InUse { process, .. }) if process == own)
            );
        }
        fs::write(work.path().join("state"), "step 3").unwrap();
        assert!(work.keep());
        let work = dirs.open("abc").unwrap();
        assert_eq!(names(work.path()), ["state"]);
        work.finish();
        assert_eq!(names(folder.path()), [] as [&str; 0]);

        let old = "0123456789abcdef0123456789abcdef";
        let work = dirs.open(old).unwrap();
        fs::write(work.path().join("state"), "step 3").unwrap();
        dirs.forget_older_than(Duration::ZERO);
        assert_eq!(names(work.path()), ["state"], "in use");
        work.keep();
        dirs.forget_older_than(KEEP);
        assert_eq!(names(&dirs.root), [old]);
        let other = dirs.root.join("of somebody else");
        fs::create_dir(&other).unwrap();
        dirs.forget_older_than(Duration::ZERO);
        assert_eq!(names(&dirs.root), ["of somebody else"]);
        fs::remove_dir(&other).unwrap();
        fs::remove_dir(&dirs.root).unwrap();
        assert_eq!(names(folder.path()), [] as [&str; 0]);
        assert!(!dirs.open("abc").unwrap().keep());
    }

    #[test]
    fn what_a_process_hands_over_is_there_until_the_other_one_has_kept_the_results() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("work");
        let signature = "0123456789abcdef0123456789abcdef";
        let child = WorkDirs::new(root.clone());
        let work = child.open(signature).unwrap();
        fs::write(work.path().join("state"), "step 3").unwrap();
        let empty = child.open(&signature.replace('0', "1")).unwrap();
        child.all_done(vec![work, empty]);
        let mut handed = child.hand_over();
        assert_eq!(handed, [signature], "there is something in it");
        let host = WorkDirs::new(root.clone());
        handed.push("../of somebody else".to_owned());
        fs::create_dir(folder.path().join("of somebody else")).unwrap();
        host.take_over(&handed);
        assert_eq!(names(&root.join(signature)), ["state"]);
        host.finish();
        assert_eq!(names(folder.path()), ["of somebody else"]);
    }

    #[test]
    fn what_was_gone_on_with_lately_is_kept_whatever_is_old_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let dirs = WorkDirs::new(folder.path().join("work"));
        let signature = "0123456789abcdef0123456789abcdef";
        let work = dirs.open(signature).unwrap();
        fs::write(work.path().join("state"), "step 3").unwrap();
        let path = work.path().to_owned();
        // As a process leaves it that is killed.
        drop(work);
        let old = std::time::SystemTime::now() - 2 * KEEP;
        let age = |path: &Path| fs::File::open(path).unwrap().set_modified(old).unwrap();
        age(&lock_of(&path));
        dirs.sweep();
        assert_eq!(names(&path), ["state"]);
        age(&path);
        dirs.sweep();
        assert_eq!(names(folder.path()), [] as [&str; 0]);
    }
}
