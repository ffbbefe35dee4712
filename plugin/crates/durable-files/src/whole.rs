//! Files that are there complete or not at all.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::{self, File};

/// What is written under another name first is called so: nobody else's files are.
const TORN: (&str, &str) = (".conceptloom-", ".tmp");

/// Bytes that are written at once.
const PIECE: usize = 1 << 20;

/// Writes a file beside its place, waits until it is on the disk, and gives it its name: a reader sees the old file, the new
/// one, or none, also after a crash. Makes the folders above it.
///
/// # Errors
/// Those of the system and of `write`; the old file is there then, and nothing else.
pub fn write_over(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let unnamed = written_beside(path, write, File::sync)?;
    disk::rename(&unnamed, path).inspect_err(|_| forget(&unnamed))?;
    disk::sync_dir(folder_of(path));
    Ok(())
}

/// The same for a name that nobody has.
///
/// # Errors
/// As [`write_over`]; [`io::ErrorKind::AlreadyExists`] if somebody has it.
pub fn write_new(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    // What is known before is not written in vain.
    if path.exists() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    named_anew(path, written_beside(path, write, File::sync)?)
}

/// [`write_new`] of what is only looked at: a process that dies leaves it whole or not at all, a machine that loses power may
/// not. The disk is not waited for.
///
/// # Errors
/// As [`write_new`].
pub fn write_shown(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let write = |file: &mut dyn Write| file.write_all(bytes);
    named_anew(path, written_beside(path, write, |_| Ok(()))?)
}

/// The names `path` + `ending`, `path-2` + `ending`, `path-3` + `ending`, …, from 1 on.
pub fn numbered(path: PathBuf, ending: &str) -> impl Fn(u32) -> PathBuf {
    move |n| {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        if n > 1 {
            name.push(format!("-{n}"));
        }
        name.push(ending);
        path.with_file_name(name)
    }
}

/// [`write_new`] under the first of the names `numbered(1)`, `numbered(2)`, … of one folder that nobody has, also where somebody
/// takes one while the file is written. Returns which.
///
/// # Errors
/// As [`write_over`]; [`io::ErrorKind::AlreadyExists`] if all are taken.
pub fn write_numbered(
    numbered: impl Fn(u32) -> PathBuf,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<PathBuf> {
    let unnamed = written_beside(&numbered(1), write, File::sync)?;
    let path = rename_numbered(&unnamed, numbered).inspect_err(|_| forget(&unnamed))?;
    disk::sync_dir(folder_of(&path));
    Ok(path)
}

fn named_anew(path: &Path, unnamed: PathBuf) -> io::Result<()> {
    disk::rename_new(&unnamed, path).inspect_err(|_| forget(&unnamed))
}

/// Gives a file or folder the first of the names `numbered(1)`, `numbered(2)`, … that nobody has. Makes the folders above it.
/// Returns which.
///
/// # Errors
/// Those of the system; [`io::ErrorKind::AlreadyExists`] if all are taken.
pub fn rename_numbered(from: &Path, numbered: impl Fn(u32) -> PathBuf) -> io::Result<PathBuf> {
    for path in (1..u32::MAX).map(numbered) {
        if path.symlink_metadata().is_ok() {
            continue;
        }
        disk::create_dir_all(folder_of(&path))?;
        match disk::rename_new(from, &path) {
            // Taken meanwhile.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            renamed => return renamed.map(|()| path),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// A folder that is there with all of its files or not at all: it is filled under another name, and removed unless it is
/// [named](Self::name).
#[derive(Debug)]
pub struct NewFolder {
    unnamed: PathBuf,
    is_named: bool,
}

impl NewFolder {
    /// Makes it, empty, where `place` is or on the same file system; and the folders above it.
    ///
    /// # Errors
    /// Those of the system.
    pub fn create(place: &Path) -> io::Result<Self> {
        disk::create_dir_all(folder_of(place))?;
        let (unnamed, ()) = unnamed(folder_of(place), disk::create_dir)?;
        Ok(Self {
            unnamed,
            is_named: false,
        })
    }

    /// Where its files are written.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.unnamed
    }

    /// Gives it the first of the names `numbered(1)`, `numbered(2)`, … that nobody has; it lasts once this returns which.
    ///
    /// # Errors
    /// As [`rename_numbered`].
    pub fn name(mut self, numbered: impl Fn(u32) -> PathBuf) -> io::Result<PathBuf> {
        disk::sync_dir(&self.unnamed);
        let path = rename_numbered(&self.unnamed, numbered)?;
        self.is_named = true;
        disk::sync_dir(folder_of(&path));
        Ok(path)
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.is_named {
            let _ = disk::remove_dir_all(&self.unnamed);
        }
    }
}

fn written_beside(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    sync: impl Fn(&File) -> io::Result<()>,
) -> io::Result<PathBuf> {
    let folder = folder_of(path);
    disk::create_dir_all(folder)?;
    let (unnamed, file) = unnamed(folder, File::create_new)?;
    let written = || -> io::Result<()> {
        let mut file = BufWriter::with_capacity(PIECE, file);
        write(&mut file)?;
        sync(&file.into_inner().map_err(io::IntoInnerError::into_error)?)
    };
    written().inspect_err(|_| forget(&unnamed))?;
    Ok(unnamed)
}

/// Makes a file or folder under a name that no other process takes; one that has died may have had this process's number.
fn unnamed<T>(folder: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let (start, end) = TORN;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{start}{}-{number}{end}", std::process::id()));
        match make(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|made| (path, made)),
        }
    }
}

/// Nothing half-written stays; if even that fails, who opens the folder next removes it.
fn forget(unnamed: &Path) {
    let _ = disk::remove_file(unnamed);
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// Whether the folder of a file at `path` lies below the folder `root`, or will once it is made: no link on the way leads out.
/// Of the file itself nothing is asked; a rename replaces a link, and follows none.
///
/// # Errors
/// A folder on the way cannot be resolved.
pub fn is_below(root: &Path, path: &Path) -> io::Result<bool> {
    let root = match root.canonicalize() {
        Ok(root) => root,
        // What is made then has no links in it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
    };
    let there = path.ancestors().skip(1).find(|folder| folder.exists());
    let real = there.map_or_else(|| Ok(root.clone()), Path::canonicalize)?;
    Ok(real.starts_with(&root))
}

/// Whether a file or folder of this name is one that was being written.
#[must_use]
pub fn is_torn(name: &str) -> bool {
    name.starts_with(TORN.0) && name.ends_with(TORN.1)
}

/// Removes what dead processes were writing into a folder, and into those in it. Nobody else may write there now.
pub fn remove_torn(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let is_torn = is_torn(&entry.file_name().to_string_lossy());
        if kind.is_dir() && is_torn {
            let _ = disk::remove_dir_all(&entry.path());
        } else if kind.is_dir() {
            remove_torn(&entry.path());
        } else if kind.is_file() && is_torn {
            forget(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_half_way_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/x.bin");
        write_over(&path, |file| file.write_all(b"old")).unwrap();
        let half = |file: &mut dyn Write| {
            file.write_all(b"half of the new")?;
            Err(io::Error::other("out of paper"))
        };
        let free = folder.path().join("a/y.bin");
        for failed in [write_over(&path, half), write_new(&free, half)] {
            assert_eq!(failed.unwrap_err().to_string(), "out of paper");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        let n = std::fs::read_dir(folder.path().join("a")).unwrap().count();
        assert_eq!(n, 1);
    }

    #[test]
    fn a_new_file_takes_no_name_and_another_one_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        write_new(&path, |file| file.write_all(b"one")).unwrap();
        let taken = write_new(&path, |file| file.write_all(b"two")).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        write_over(&path, |file| file.write_all(b"two")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_in_the_place_of_a_folder_is_no_name_that_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), "a").unwrap();
        let below = folder.path().join("a/b/x.bin");
        for failed in [
            write_new(&below, |_| Ok(())),
            write_over(&below, |_| Ok(())),
        ] {
            assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotADirectory);
        }
        let beneath = write_new(&folder.path().join("a/x.bin"), |_| Ok(()));
        assert_eq!(beneath.unwrap_err().kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn one_of_many_threads_gets_a_new_name() {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..50 {
            let path = folder.path().join(format!("{round}.bin"));
            let start = std::sync::Barrier::new(8);
            let write = |n: u8| {
                start.wait();
                write_new(&path, |file| file.write_all(&[n; 9])).is_ok()
            };
            let written: Vec<u8> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || write(n))).collect();
                let ended = threads.into_iter().map(|thread| thread.join().unwrap());
                (0..8)
                    .zip(ended)
                    .filter_map(|(n, is_ok)| is_ok.then_some(n))
                    .collect()
            });
            let [n] = written[..] else {
                panic!("{written:?} were told that the name is theirs");
            };
            assert_eq!(std::fs::read(&path).unwrap(), [n; 9]);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 50);
    }

    #[test]
    fn numbered_files_of_many_threads_are_all_kept() {
        let folder = tempfile::tempdir().unwrap();
        let numbered = numbered(folder.path().join("x"), ".bin");
        std::fs::write(numbered(1), "other").unwrap();
        let start = std::sync::Barrier::new(8);
        let write = |byte: u8| {
            start.wait();
            let write = |_| write_numbered(&numbered, |file| file.write_all(&[byte])).unwrap();
            (0..20).map(write).collect::<Vec<_>>()
        };
        let mut written: Vec<(PathBuf, u8)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8u8)
                .map(|byte| (scope.spawn(move || write(byte)), byte))
                .collect();
            threads
                .into_iter()
                .flat_map(|(thread, byte)| {
                    let paths = thread.join().unwrap();
                    paths.into_iter().map(move |path| (path, byte))
                })
                .collect()
        });
        for (path, byte) in &written {
            assert_eq!(std::fs::read(path).unwrap(), [*byte]);
        }
        written.sort();
        written.dedup_by(|a, b| a.0 == b.0);
        assert_eq!(written.len(), 160);
        assert_eq!(std::fs::read(numbered(1)).unwrap(), b"other");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 161);
    }

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/unet");
        let fill = || {
            let new = NewFolder::create(&path).unwrap();
            std::fs::write(new.path().join("x.json"), "x").unwrap();
            new
        };
        drop(fill());
        assert_eq!(
            std::fs::read_dir(folder.path().join("a")).unwrap().count(),
            0
        );
        let numbered = numbered(path.clone(), "");
        assert_eq!(fill().name(&numbered).unwrap(), path);
        assert_eq!(std::fs::read(path.join("x.json")).unwrap(), b"x");
        let second = fill().name(&numbered).unwrap();
        assert_eq!(second, folder.path().join("a/unet-2"));
        assert_eq!(std::fs::read(second.join("x.json")).unwrap(), b"x");
        // As a dead process leaves it.
        let dead = folder.path().join("a/.conceptloom-7-0.tmp");
        std::fs::create_dir(&dead).unwrap();
        std::fs::write(dead.join("x.json"), "x").unwrap();
        remove_torn(folder.path());
        assert_eq!(
            std::fs::read_dir(folder.path().join("a")).unwrap().count(),
            2
        );
    }

    #[test]
    fn what_the_dead_were_writing_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a")).unwrap();
        let files = [
            ("a/.conceptloom-7-0.tmp", false),
            (".conceptloom-7-1.tmp", false),
            ("a/.x.tmp", true),
            ("a/x.png", true),
        ];
        for (file, _) in files {
            std::fs::write(folder.path().join(file), "").unwrap();
        }
        remove_torn(folder.path());
        for (file, stays) in files {
            assert_eq!(folder.path().join(file).exists(), stays, "{file}");
        }
    }
}
