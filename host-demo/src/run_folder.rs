//! Folders of runs: filled under another name and renamed when complete, never written over.
//!
//! ```text
//! runs/                                     the root
//!   20260725-170912-demo/                   a complete run
//!   .20260725-171204-demo.partial/          one that runs now; `.lock` in it is held by its process
//!   .work/3f9c…/                            what an interrupted node needs to go on, by what it was made from
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOCK: &str = ".lock";
const WORK: &str = ".work";
const PARTIAL: &str = ".partial";
/// What nobody went on with for this long is not kept.
const KEEP_WORK: Duration = Duration::from_secs(14 * 24 * 3600);

/// Why a file or folder cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("cannot write {}: {error}; {}", path.display(), hint(error))]
    CannotWrite { path: PathBuf, error: io::Error },
    #[error("the folder {} is not empty, and a run never writes over another; name a new one with --out", .0.display())]
    NotEmpty(PathBuf),
    #[error("{} is a file, but the run needs a folder of this name; name another with --out", .0.display())]
    IsAFile(PathBuf),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free some space or name another folder with --out"
        }
        _ => "name a folder that can be written with --out",
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> FolderError + use<> {
    let path = path.to_owned();
    move |error| FolderError::CannotWrite {
        path: path.clone(),
        error,
    }
}

/// Writes a file that is not there yet: complete or not at all. Makes its folders.
///
/// # Errors
/// [`FolderError::CannotWrite`].
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp"));
    let write = || -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .open(&temporary)?;
        file.write_all(bytes)?;
        drop(file);
        // The folder is this process's own, so nobody takes the name in between.
        if path.exists() {
            return Err(ErrorKind::AlreadyExists.into());
        }
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        at(path)(error)
    })
}

/// Where a run is to go.
#[derive(Debug, Clone)]
pub(crate) enum Destination {
    /// A folder of this name in this root; numbered if it is taken.
    Named { root: PathBuf, name: String },
    /// This folder, which is not there or empty.
    Exactly(PathBuf),
}

enum Commit {
    Rename(PathBuf),
    MoveInto(PathBuf),
}

/// The folder of a run that is not complete; removed unless [`RunFolder::commit`] is called.
pub(crate) struct RunFolder {
    staging: PathBuf,
    commit: Commit,
    lock: Option<File>,
    root: PathBuf,
    /// The root was not there before.
    made_root: bool,
}

impl RunFolder {
    /// Makes the folder, and removes what dead processes left behind.
    ///
    /// # Errors
    /// See [`FolderError`].
    pub(crate) fn create(destination: &Destination) -> Result<Self, FolderError> {
        match destination {
            Destination::Named { root, name } => {
                check_is_folder(root)?;
                let made_root = !root.exists();
                fs::create_dir_all(root).map_err(at(root))?;
                sweep(root);
                Self::numbered(root, name, made_root)
            }
            Destination::Exactly(path) if path.is_dir() => {
                sweep(path);
                if !is_empty(path).map_err(at(path))? {
                    return Err(FolderError::NotEmpty(path.clone()));
                }
                let staging = path.join(format!(".run{PARTIAL}"));
                fs::create_dir(&staging).map_err(at(&staging))?;
                Self::locked(staging, Commit::MoveInto(path.clone()), path, false)
            }
            Destination::Exactly(path) => {
                check_is_folder(path)?;
                let root = path
                    .parent()
                    .filter(|root| !root.as_os_str().is_empty())
                    .unwrap_or(Path::new("."));
                check_is_folder(root)?;
                let made_root = !root.exists();
                fs::create_dir_all(root).map_err(at(path))?;
                sweep(root);
                let staging = partial(
                    root,
                    &path.file_name().unwrap_or_default().to_string_lossy(),
                );
                fs::create_dir(&staging).map_err(at(path))?;
                Self::locked(staging, Commit::Rename(path.clone()), root, made_root)
            }
        }
    }

    fn numbered(root: &Path, name: &str, made_root: bool) -> Result<Self, FolderError> {
        let mut number = 1;
        loop {
            let name = if number == 1 {
                name.to_owned()
            } else {
                format!("{name}-{number}")
            };
            let (staging, complete) = (partial(root, &name), root.join(&name));
            number += 1;
            if complete.exists() {
                continue;
            }
            match fs::create_dir(&staging) {
                Ok(()) => return Self::locked(staging, Commit::Rename(complete), root, made_root),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(at(&complete)(error)),
            }
        }
    }

    fn locked(
        staging: PathBuf,
        commit: Commit,
        root: &Path,
        made_root: bool,
    ) -> Result<Self, FolderError> {
        let path = staging.join(LOCK);
        let mut folder = Self {
            staging,
            commit,
            lock: None,
            root: root.to_owned(),
            made_root,
        };
        // It gets its name once it is held: another process would take a free one for a dead run's.
        let unnamed = folder.staging.join(format!("{LOCK}.new"));
        let file = File::create(&unnamed).map_err(at(&unnamed))?;
        // A file system without locks only loses the sweeping.
        let _ = file.try_lock();
        fs::rename(&unnamed, &path).map_err(at(&path))?;
        folder.lock = Some(file);
        Ok(folder)
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.staging
    }

    /// Where it will be.
    pub(crate) fn destination(&self) -> &Path {
        match &self.commit {
            Commit::Rename(path) | Commit::MoveInto(path) => path,
        }
    }

    /// What nodes keep between runs of this root.
    pub(crate) fn work_dirs(&self) -> WorkDirs {
        WorkDirs {
            root: self.root.join(WORK),
        }
    }

    /// Text that names files of the folder, as it reads after the commit.
    pub(crate) fn after_commit(&self, text: &str) -> String {
        text.replace(
            &*self.staging.to_string_lossy(),
            &self.destination().to_string_lossy(),
        )
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// [`FolderError::CannotWrite`]; nothing is left then.
    pub(crate) fn commit(mut self) -> Result<PathBuf, FolderError> {
        let destination = self.destination().to_owned();
        let failed = at(&destination);
        // A folder without the file is never swept; it goes while it is still held.
        fs::remove_file(self.staging.join(LOCK)).map_err(&failed)?;
        self.lock = None;
        match &self.commit {
            Commit::Rename(path) => {
                if path.exists() {
                    return Err(FolderError::NotEmpty(path.clone()));
                }
                fs::rename(&self.staging, path).map_err(&failed)?;
            }
            Commit::MoveInto(path) => {
                for entry in fs::read_dir(&self.staging).map_err(&failed)? {
                    let entry = entry.map_err(&failed)?;
                    fs::rename(entry.path(), path.join(entry.file_name())).map_err(&failed)?;
                }
            }
        }
        Ok(destination)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        self.lock = None;
        let _ = fs::remove_dir_all(&self.staging);
        if self.made_root {
            // Only if nothing is in it.
            let _ = fs::remove_dir(&self.root);
        }
    }
}

fn partial(root: &Path, name: &str) -> PathBuf {
    root.join(format!(".{name}{PARTIAL}"))
}

fn check_is_folder(path: &Path) -> Result<(), FolderError> {
    if path.exists() && !path.is_dir() {
        Err(FolderError::IsAFile(path.to_owned()))
    } else {
        Ok(())
    }
}

/// Empty but for what this module keeps there itself.
fn is_empty(path: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(path)? {
        if entry?.file_name() != WORK {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes incomplete runs whose process is gone, and what nodes kept too long ago.
fn sweep(root: &Path) {
    WorkDirs {
        root: root.join(WORK),
    }
    .forget_older_than(KEEP_WORK);
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !(name.starts_with('.') && name.ends_with(PARTIAL)) {
            continue;
        }
        let Ok(lock) = File::open(entry.path().join(LOCK)) else {
            continue;
        };
        if lock.try_lock().is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// What nodes keep between runs.
#[derive(Debug, Clone)]
pub(crate) struct WorkDirs {
    root: PathBuf,
}

impl WorkDirs {
    /// Kept beneath `root`.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where they are.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of the node with this signature; `None` if another process uses it now.
    ///
    /// # Errors
    /// [`FolderError::CannotWrite`].
    pub(crate) fn open(&self, signature: &str) -> Result<Option<WorkDir>, FolderError> {
        let name = signature.get(..32).unwrap_or(signature);
        let (path, lock_path) = (self.root.join(name), self.root.join(format!("{name}.lock")));
        fs::create_dir_all(&path).map_err(at(&path))?;
        let lock = File::create(&lock_path).map_err(at(&lock_path))?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Ok(None),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(WorkDir {
                path,
                lock_path,
                _lock: lock,
            })),
        }
    }
}

impl WorkDirs {
    /// Forgets what no run has come back for in a fortnight.
    pub(crate) fn sweep(&self) {
        self.forget_older_than(KEEP_WORK);
    }

    fn forget_older_than(&self, age: Duration) {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let modified = entry.metadata().and_then(|meta| meta.modified());
            let is_old = modified.is_ok_and(|time| time.elapsed().is_ok_and(|since| since > age));
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_old
                && entry.path().is_dir()
                && let Ok(Some(work)) = self.open(&name)
            {
                work.finish();
            }
        }
    }
}

/// A node's own folder between runs.
pub(crate) struct WorkDir {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl WorkDir {
    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The run is complete: nothing is needed any more.
    pub(crate) fn finish(self) {
        let _ = fs::remove_dir_all(&self.path);
        self.forget();
    }

    /// The run ended early: keeps what the node left; whether it left anything.
    pub(crate) fn keep(self) -> bool {
        // Fails if there is something in it.
        let kept = fs::remove_dir(&self.path).is_err();
        self.forget();
        kept
    }

    fn forget(&self) {
        let _ = fs::remove_file(&self.lock_path);
        if let Some(root) = self.lock_path.parent() {
            let _ = fs::remove_dir(root);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn named(root: &Path) -> Destination {
        Destination::Named {
            root: root.to_owned(),
            name: "demo".to_owned(),
        }
    }

    #[test]
    fn a_run_appears_complete_and_under_a_name_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("runs");
        let first = RunFolder::create(&named(&root)).unwrap();
        let second = RunFolder::create(&named(&root)).unwrap();
        write_new(&first.path().join("masks/a.png"), b"one").unwrap();
        assert_eq!(names(&root), [".demo-2.partial", ".demo.partial"]);
        assert_eq!(first.commit().unwrap(), root.join("demo"));
        assert_eq!(second.commit().unwrap(), root.join("demo-2"));
        assert_eq!(names(&root), ["demo", "demo-2"]);
        assert_eq!(names(&root.join("demo")), ["masks"]);
        assert!(write_new(&root.join("demo/masks/a.png"), b"two").is_err());
        assert_eq!(fs::read(root.join("demo/masks/a.png")).unwrap(), b"one");
    }

    #[test]
    fn an_incomplete_run_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("runs");
        let run = RunFolder::create(&named(&root)).unwrap();
        write_new(&run.path().join("a.png"), b"one").unwrap();
        drop(run);
        assert_eq!(names(folder.path()), [] as [&str; 0]);
    }

    #[test]
    fn what_a_dead_process_left_is_swept_and_what_runs_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let dead = folder.path().join(".old.partial");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();
        let alive = RunFolder::create(&named(folder.path())).unwrap();
        let other = RunFolder::create(&named(folder.path())).unwrap();
        assert!(!dead.exists() && alive.path().exists() && other.path().exists());
    }

    #[test]
    fn a_given_folder_must_be_new_or_empty() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        fs::create_dir(&out).unwrap();
        let run = RunFolder::create(&Destination::Exactly(out.clone())).unwrap();
        write_new(&run.path().join("report.html"), b"one").unwrap();
        run.commit().unwrap();
        assert_eq!(names(&out), ["report.html"]);
        let again = RunFolder::create(&Destination::Exactly(out.clone()));
        assert!(matches!(again, Err(FolderError::NotEmpty(_))));
        let file = RunFolder::create(&Destination::Exactly(out.join("report.html")));
        assert!(matches!(file, Err(FolderError::IsAFile(_))));
        let below = RunFolder::create(&Destination::Exactly(out.join("report.html/x")));
        assert!(matches!(below, Err(FolderError::IsAFile(_))));
        assert_eq!(names(&out), ["report.html"]);
    }

    #[test]
    fn what_a_node_left_is_there_for_the_next_run_and_gone_after_a_complete_one() {
        let folder = tempfile::tempdir().unwrap();
        let dirs = WorkDirs {
            root: folder.path().join(WORK),
        };
        let work = dirs.open("abc").unwrap().unwrap();
        assert!(dirs.open("abc").unwrap().is_none());
        fs::write(work.path().join("state"), "step 3").unwrap();
        assert!(work.keep());
        let work = dirs.open("abc").unwrap().unwrap();
        assert_eq!(names(work.path()), ["state"]);
        work.finish();
        assert_eq!(names(folder.path()), [] as [&str; 0]);

        let work = dirs.open("old").unwrap().unwrap();
        fs::write(work.path().join("state"), "step 3").unwrap();
        dirs.forget_older_than(Duration::ZERO);
        assert_eq!(names(work.path()), ["state"], "in use");
        work.keep();
        dirs.forget_older_than(KEEP_WORK);
        assert_eq!(names(&dirs.root), ["old"]);
        dirs.forget_older_than(Duration::ZERO);
        assert_eq!(names(folder.path()), [] as [&str; 0]);
        assert!(!dirs.open("abc").unwrap().unwrap().keep());
    }
}
