//! Folders of runs: filled under another name and renamed when complete, never written over.
//!
//! ```text
//! runs/                                     the root
//!   20260725-170912-demo/                   a complete run
//!   .20260725-171204-demo.partial/          one that runs now
//!   .20260725-171204-demo.partial.lock      its claim: locked by its process, there before the folder and after it
//!   .work/3f9c…/                            what an interrupted node needs to go on, by what it was made from
//!   .work/3f9c….lock                        its claim
//!   .work/rex.tries                         how often an entry of a batch was begun, until it ends
//! ```
//!
//! A run into a folder that is there already has `.run.partial` in it; at its end that is called `.run.complete`, from where
//! the files are moved up one by one. If they were not all moved, the next run does the rest. A complete run whose name, or
//! one of whose files' names, somebody took meanwhile gets the next one that is free: `demo-2`, or `run` in the folder.

mod tries;
mod work_dirs;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use durable_files::{Claim, ClaimError, disk, numbered, rename_numbered};

use crate::console::complain;

pub(crate) use tries::{MAX_CUT_SHORT, Tries};
pub(crate) use work_dirs::{WorkDir, WorkDirs};

const LOCK: &str = ".lock";
const WORK: &str = ".work";
const PARTIAL: &str = ".partial";
/// In a folder that was there before its run.
const RUN: &str = "run";
const COMPLETE: &str = ".run.complete";
/// How long another process is waited for: one that was killed may take a moment to be gone.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// Why a file or folder cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("cannot write {}: {error}; {}", path.display(), hint(error))]
    CannotWrite { path: PathBuf, error: io::Error },
    #[error("cannot write {}: there is a file of this name, and nothing is written over", .0.display())]
    Taken(PathBuf),
    #[error("the folder {} is not empty, and a run never writes over another; name a new one with --out", .0.display())]
    NotEmpty(PathBuf),
    #[error("{} is a file, but the run needs a folder of this name; name another with --out", .0.display())]
    IsAFile(PathBuf),
    #[error(
        "another run{} is writing to {}; wait for it or choose another --out", named(*process), path.display()
    )]
    InUse { path: PathBuf, process: Option<u32> },
    #[error(
        "{} was left by a run, and this file system has no locks that tell whether it still runs; if it does not, remove the \
         folder", .0.display()
    )]
    Unknown(PathBuf),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free some space or name another folder with --out"
        }
        _ => "name a folder that can be written with --out",
    }
}

/// `, process 17,` of a holder that is known.
pub(crate) fn named(process: Option<u32>) -> String {
    process.map_or_else(String::new, |id| format!(", process {id},"))
}

fn at(path: &Path) -> impl Fn(io::Error) -> FolderError + use<> {
    let path = path.to_owned();
    move |error| match error.kind() {
        ErrorKind::AlreadyExists => FolderError::Taken(path.clone()),
        _ => FolderError::CannotWrite {
            path: path.clone(),
            error,
        },
    }
}

/// Claims what is called so for a run that goes to `destination`.
fn claim(lock: &Path, destination: &Path, patience: Duration) -> Result<Claim, FolderError> {
    Claim::take(lock, patience).map_err(|error| match error {
        ClaimError::Held(process) => FolderError::InUse {
            path: destination.to_owned(),
            process,
        },
        ClaimError::System(error) => at(destination)(error),
    })
}

/// Writes a file that is not there yet: complete or not at all. Makes its folders.
///
/// # Errors
/// [`FolderError::CannotWrite`], [`FolderError::Taken`].
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    durable_files::write_new(path, |file| file.write_all(bytes)).map_err(at(path))
}

/// [`write_new`] under the first of the names `numbered(1)`, `numbered(2)`, … of one folder that nobody has. Returns which.
///
/// # Errors
/// [`FolderError::CannotWrite`].
pub(crate) fn write_numbered(
    numbered: impl Fn(u32) -> PathBuf,
    bytes: &[u8],
) -> Result<PathBuf, FolderError> {
    let written = durable_files::write_numbered(&numbered, |file| file.write_all(bytes));
    written.map_err(at(&numbered(1)))
}

/// [`write_new`] of a picture that is only looked at: the disk is not waited for.
///
/// # Errors
/// As [`write_new`].
pub(crate) fn write_shown(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    durable_files::write_shown(path, bytes).map_err(at(path))
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
    /// Until it is given back.
    claim: Option<Claim>,
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
                let made_root = make_root(root, root)?;
                Self::numbered(root, name, made_root)
            }
            Destination::Exactly(path) if path.is_dir() => {
                sweep(above(path));
                Self::inside(path)
            }
            Destination::Exactly(path) => {
                check_is_folder(path)?;
                let root = above(path);
                check_is_folder(root)?;
                let made_root = make_root(root, path)?;
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let staging = partial(root, &name);
                let claim = claim(&lock_of(&staging), path, PATIENCE)?;
                // The one that was waited for may have become complete.
                if path.exists() {
                    claim.give_back();
                    return Err(FolderError::NotEmpty(path.clone()));
                }
                Self::new(
                    staging,
                    Commit::Rename(path.clone()),
                    claim,
                    root,
                    made_root,
                )
            }
        }
    }

    fn numbered(root: &Path, name: &str, made_root: bool) -> Result<Self, FolderError> {
        let places = numbered(root.join(name), "");
        let mut number = 1;
        loop {
            let complete = places(number);
            let name = complete.file_name().unwrap_or_default();
            let staging = partial(root, &name.to_string_lossy());
            number += 1;
            if complete.exists() {
                continue;
            }
            match claim(&lock_of(&staging), &complete, Duration::ZERO) {
                Err(FolderError::InUse { .. }) => {}
                // It became complete in between.
                Ok(claim) if complete.exists() => claim.give_back(),
                claim => {
                    return Self::new(staging, Commit::Rename(complete), claim?, root, made_root);
                }
            }
        }
    }

    /// In a folder that is there.
    fn inside(path: &Path) -> Result<Self, FolderError> {
        sweep(path);
        let staging = partial(path, RUN);
        let (lock, complete) = (lock_of(&staging), path.join(COMPLETE));
        let own = [Path::new(WORK), &staging, &lock, &complete].map(Path::file_name);
        let is_empty = || -> Result<bool, FolderError> {
            for entry in fs::read_dir(path).map_err(at(path))? {
                let name = entry.map_err(at(path))?.file_name();
                if !own.contains(&Some(&name)) {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if !complete.exists() && !is_empty()? {
            return Err(FolderError::NotEmpty(path.to_owned()));
        }
        let claim = claim(&lock, path, PATIENCE)?;
        let settled = if complete.exists() {
            settle(&complete, path).map(drop)
        } else {
            Ok(())
        };
        if settled.is_err() || !is_empty()? {
            claim.give_back();
            return Err(settled
                .err()
                .map_or_else(|| FolderError::NotEmpty(path.to_owned()), at(path)));
        }
        Self::new(
            staging,
            Commit::MoveInto(path.to_owned()),
            claim,
            path,
            false,
        )
    }

    fn new(
        staging: PathBuf,
        commit: Commit,
        claim: Claim,
        root: &Path,
        made_root: bool,
    ) -> Result<Self, FolderError> {
        if !claim.is_sure() && staging.exists() {
            return Err(FolderError::Unknown(staging));
        }
        let folder = Self {
            staging,
            commit,
            claim: Some(claim),
            root: root.to_owned(),
            made_root,
        };
        // Whose it was is dead, or the claim would not be ours.
        disk::remove_dir_all(&folder.staging)
            .and_then(|()| {
                // Were the lock lost and not the folder, nobody would ever sweep it.
                disk::sync_dir(root);
                disk::create_dir(&folder.staging)
            })
            .map_err(at(folder.destination()))?;
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
        WorkDirs::new(self.root.join(WORK))
    }

    /// Text that names files of the folder, as it reads after the commit.
    pub(crate) fn after_commit(&self, text: &str) -> String {
        text.replace(
            &*self.staging.to_string_lossy(),
            &self.destination().to_string_lossy(),
        )
    }

    /// Gives the folder its name, or the next one that is free. Returns where the results are now, and says so where that is
    /// not the destination.
    ///
    /// # Errors
    /// [`FolderError::CannotWrite`]; nothing is left then, or what the next run moves.
    pub(crate) fn commit(mut self) -> Result<PathBuf, FolderError> {
        sync_folders(&self.staging);
        let place = match &self.commit {
            Commit::Rename(path) => {
                let place = rename_numbered(&self.staging, numbered(path.clone(), ""));
                disk::sync_dir(&self.root);
                place.map_err(at(path))?
            }
            Commit::MoveInto(path) => {
                let complete = path.join(COMPLETE);
                let renamed = disk::rename(&self.staging, &complete);
                let place = renamed.and_then(|()| settle(&complete, path));
                disk::sync_dir(path);
                place.map_err(at(path))?
            }
        };
        if place != self.destination() {
            complain(&format!(
                "somebody wrote to {} meanwhile; the results are in {}",
                self.destination().display(),
                place.display()
            ));
        }
        if let Some(claim) = self.claim.take() {
            claim.give_back();
        }
        Ok(place)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        let Some(claim) = self.claim.take() else {
            return;
        };
        // A claim without its folder is swept by the next run, a folder without its claim by none.
        if disk::remove_dir_all(&self.staging).is_ok() {
            claim.give_back();
        }
        if self.made_root {
            // Only if nothing is in it.
            let _ = disk::remove_dir(&self.root);
        }
    }
}

/// Makes the root of a run to `destination` and clears it up; whether it was not there.
fn make_root(root: &Path, destination: &Path) -> Result<bool, FolderError> {
    let made_root = !root.exists();
    disk::create_dir_all(root).map_err(at(destination))?;
    sweep(root);
    Ok(made_root)
}

/// The folder that a path is in.
fn above(path: &Path) -> &Path {
    path.parent()
        .filter(|root| !root.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn partial(root: &Path, name: &str) -> PathBuf {
    root.join(format!(".{name}{PARTIAL}"))
}

/// The file by which a folder is claimed.
fn lock_of(folder: &Path) -> PathBuf {
    let mut name = folder.file_name().unwrap_or_default().to_owned();
    name.push(LOCK);
    folder.with_file_name(name)
}

fn check_is_folder(path: &Path) -> Result<(), FolderError> {
    if path.exists() && !path.is_dir() {
        Err(FolderError::IsAFile(path.to_owned()))
    } else {
        Ok(())
    }
}

/// Moves what is complete into the folder that it lies in, and, where one of its names is taken there, into one of its own.
/// Returns where it is.
fn settle(complete: &Path, folder: &Path) -> io::Result<PathBuf> {
    match move_up(complete, folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            rename_numbered(complete, numbered(folder.join(RUN), ""))
        }
        moved => moved.map(|()| folder.to_owned()),
    }
}

/// Moves all that is in `from` into `to`, and removes it; nothing, if a name is taken before it begins.
fn move_up(from: &Path, to: &Path) -> io::Result<()> {
    let names: io::Result<Vec<_>> = fs::read_dir(from)?
        .map(|entry| Ok(entry?.file_name()))
        .collect();
    let names = names?;
    let is_taken = |name| to.join(name).symlink_metadata().is_ok();
    if names.iter().any(is_taken) {
        return Err(ErrorKind::AlreadyExists.into());
    }
    for name in &names {
        disk::rename_new(&from.join(name), &to.join(name))?;
    }
    disk::remove_dir(from)
}

/// Waits until the names in a folder, and in those in it, are on the disk; files that are results already are.
fn sync_folders(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            sync_folders(&entry.path());
        }
    }
    disk::sync_dir(folder);
}

/// Removes incomplete runs whose process is gone, and what nodes kept too long ago.
pub(crate) fn sweep(root: &Path) {
    WorkDirs::new(root.join(WORK)).sweep();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(folder) = name.strip_suffix(LOCK) else {
            continue;
        };
        if !(folder.starts_with('.') && folder.ends_with(PARTIAL)) {
            continue;
        }
        if let Ok(claim) = Claim::take(&entry.path(), Duration::ZERO)
            && claim.is_sure()
            && disk::remove_dir_all(&root.join(folder)).is_ok()
        {
            claim.give_back();
        }
    }
}

/// What is in a folder.
#[cfg(test)]
fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(
            names(&root),
            [
                ".demo-2.partial",
                ".demo-2.partial.lock",
                ".demo.partial",
                ".demo.partial.lock"
            ]
        );
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
        fs::write(lock_of(&dead), "").unwrap();
        let alive = RunFolder::create(&named(folder.path())).unwrap();
        let other = RunFolder::create(&named(folder.path())).unwrap();
        assert!(!dead.exists() && alive.path().exists() && other.path().exists());
    }

    #[test]
    fn whatever_a_dead_process_left_blocks_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let staging = partial(folder.path(), "out");
        let exactly = Destination::Exactly(out.clone());
        // The claim alone, with its folder, the folder alone.
        for (has_lock, has_folder) in [(true, false), (true, true), (false, true)] {
            if has_lock {
                fs::write(lock_of(&staging), "1").unwrap();
            }
            if has_folder {
                fs::create_dir(&staging).unwrap();
                fs::write(staging.join("old.png"), "").unwrap();
            }
            let run = RunFolder::create(&exactly).unwrap();
            assert_eq!(names(run.path()), [] as [&str; 0]);
            write_new(&run.path().join("new.png"), b"one").unwrap();
            run.commit().unwrap();
            assert_eq!(names(folder.path()), ["out"]);
            assert_eq!(names(&out), ["new.png"]);
            fs::remove_dir_all(&out).unwrap();
        }
        let running = RunFolder::create(&exactly).unwrap();
        let refused = RunFolder::create(&exactly).err().unwrap().to_string();
        let said = format!(
            "another run, process {}, is writing to {}; wait for it or choose another --out",
            std::process::id(),
            out.display()
        );
        assert_eq!(refused, said);
        drop(running);
        assert_eq!(names(folder.path()), [] as [&str; 0]);
    }

    #[test]
    fn a_run_that_was_being_moved_into_its_folder_is_moved_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let complete = folder.path().join(COMPLETE);
        fs::create_dir(&complete).unwrap();
        fs::write(folder.path().join("a.png"), "a").unwrap();
        fs::write(complete.join("b.png"), "b").unwrap();
        let exactly = Destination::Exactly(folder.path().to_owned());
        assert!(matches!(
            RunFolder::create(&exactly),
            Err(FolderError::NotEmpty(_))
        ));
        assert_eq!(names(folder.path()), ["a.png", "b.png"]);
    }

    #[test]
    fn a_complete_run_is_kept_whatever_somebody_else_put_in_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let [new, there] = ["new", "there"].map(|name| folder.path().join(name));
        fs::create_dir(&there).unwrap();
        let runs = [&new, &there].map(|path| {
            let run = RunFolder::create(&Destination::Exactly(path.clone())).unwrap();
            write_new(&run.path().join("a.png"), b"mine").unwrap();
            write_new(&run.path().join("b/c.png"), b"mine").unwrap();
            run
        });
        let theirs = ["new/a.png", "new-2/b.png", "there/b", "there/run"];
        let theirs = theirs.map(|name| folder.path().join(name));
        for path in &theirs {
            fs::create_dir_all(above(path)).unwrap();
            fs::write(path, "theirs").unwrap();
        }
        let places = runs.map(|run| run.commit().unwrap());
        assert_eq!(places, [folder.path().join("new-3"), there.join("run-2")]);
        for place in &places {
            assert_eq!(names(place), ["a.png", "b"]);
            assert_eq!(fs::read(place.join("a.png")).unwrap(), b"mine");
        }
        for path in &theirs {
            assert_eq!(fs::read(path).unwrap(), b"theirs");
        }
        assert_eq!(names(folder.path()), ["new", "new-2", "new-3", "there"]);
        assert_eq!(names(&there), ["b", "run", "run-2"]);
    }

    #[test]
    fn what_a_dead_run_left_complete_gets_a_folder_where_its_names_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let complete = folder.path().join(COMPLETE);
        fs::create_dir(&complete).unwrap();
        for path in [complete.as_path(), folder.path()] {
            fs::write(path.join("a.png"), path.display().to_string()).unwrap();
        }
        let exactly = Destination::Exactly(folder.path().to_owned());
        assert!(matches!(
            RunFolder::create(&exactly),
            Err(FolderError::NotEmpty(_))
        ));
        assert_eq!(names(folder.path()), ["a.png", "run"]);
        assert_eq!(names(&folder.path().join("run")), ["a.png"]);
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
}
