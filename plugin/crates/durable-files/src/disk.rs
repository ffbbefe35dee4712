//! The operations that change what is on the disk.
//!
//! Each is that of [`std::fs`], and one more thing: a test that runs a program with `CONCEPTLOOM_TESTS_TRACE` set to a file
//! finds every operation there, one a line, and `CONCEPTLOOM_TESTS_FAULT=17:ENOSPC` makes number 17 fail so (`EIO`, `ENOSPC`,
//! `EACCES`), `17:STOP` makes it the process's last moment. Of a write half is done then. The host, its library and the
//! processes that it starts count together. Without the variable nothing is counted. `CONCEPTLOOM_TESTS_PACE=0` beside it
//! writes a state after every step: see [`crate::Pace`].

use std::fs::{self, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::fault;

/// An open file.
#[derive(Debug)]
pub struct File {
    file: fs::File,
    path: PathBuf,
}

impl File {
    /// Makes a file that is not there yet, to be written.
    ///
    /// # Errors
    /// The system's.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        fault::pass("create", path)?;
        Self::open(path, fs::File::options().write(true).create_new(true))
    }

    /// Opens a file to write at its end.
    ///
    /// # Errors
    /// The system's.
    pub fn append(path: &Path) -> io::Result<Self> {
        fault::pass("open", path)?;
        Self::open(path, fs::File::options().append(true))
    }

    /// Opens a file to read and write, or makes it; what is in it stays.
    ///
    /// # Errors
    /// The system's.
    pub fn open_or_create(path: &Path) -> io::Result<Self> {
        fault::pass("open", path)?;
        let mut options = fs::File::options();
        Self::open(
            path,
            options.read(true).write(true).create(true).truncate(false),
        )
    }

    fn open(path: &Path, options: &fs::OpenOptions) -> io::Result<Self> {
        Ok(Self {
            file: options.open(path)?,
            path: path.to_owned(),
        })
    }

    /// Waits until content and length are on the disk.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self) -> io::Result<()> {
        fault::pass("sync", &self.path)?;
        self.file.sync_data()
    }

    /// Cuts or lengthens it.
    ///
    /// # Errors
    /// The system's.
    pub fn set_len(&self, bytes: u64) -> io::Result<()> {
        fault::pass("truncate", &self.path)?;
        self.file.set_len(bytes)
    }

    /// Locks it for this process, if nobody else has.
    ///
    /// # Errors
    /// It is locked, or the system's.
    pub fn try_lock(&self) -> Result<(), TryLockError> {
        fault::pass("lock", &self.path).map_err(TryLockError::Error)?;
        self.file.try_lock()
    }

    /// The file itself.
    #[must_use]
    pub fn inner(&self) -> &fs::File {
        &self.file
    }
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let half = &bytes[..bytes.len() / 2];
        fault::pass_after("write", &self.path, || {
            // What a process or a disk that gives up leaves.
            let _ = self.file.write_all(half);
        })?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// As [`fs::create_dir`].
///
/// # Errors
/// The system's.
pub fn create_dir(path: &Path) -> io::Result<()> {
    fault::pass("mkdir", path)?;
    fs::create_dir(path)
}

/// As [`fs::create_dir_all`]; a folder that is there is no operation.
///
/// # Errors
/// The system's; [`io::ErrorKind::NotADirectory`] where a file has the place of a folder: nobody has the name that is wanted below it.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    if path.is_dir() || path.as_os_str().is_empty() {
        return Ok(());
    }
    fault::pass("mkdir", path)?;
    fs::create_dir_all(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => io::ErrorKind::NotADirectory.into(),
        _ => error,
    })
}

/// As [`fs::rename`].
///
/// # Errors
/// The system's.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fault::pass("rename", to)?;
    fs::rename(from, to)
}

/// As [`fs::rename`], under a name that nobody has: also where another process takes it at the same moment.
///
/// # Errors
/// The system's; [`io::ErrorKind::AlreadyExists`] if somebody has the name.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    fault::pass("rename", to)?;
    match rename_without_replacing(from, to) {
        // Not a thing of this system, or of this file system.
        Err(error)
            if [io::ErrorKind::InvalidInput, io::ErrorKind::Unsupported]
                .contains(&error.kind()) =>
        {
            rename_where_nothing_is(from, to)
        }
        renamed => renamed,
    }
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn rename_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(|error| match error {
        // On macOS another number than the one that the standard library takes for this.
        Errno::NOTSUP => io::ErrorKind::Unsupported.into(),
        error => error.into(),
    })
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn rename_without_replacing(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// A file is linked under its new name, which takes nobody's, before it loses its old one. Where there are no links, and of
/// folders, this process's threads alone are kept from taking one name; a folder never replaces one that holds something.
fn rename_where_nothing_is(from: &Path, to: &Path) -> io::Result<()> {
    static NAMING: Mutex<()> = Mutex::new(());
    let _naming = NAMING.lock().unwrap_or_else(PoisonError::into_inner);
    let is_taken = fs::symlink_metadata(to).is_ok();
    if !is_taken && !from.is_dir() && fs::hard_link(from, to).is_ok() {
        return fs::remove_file(from);
    }
    if is_taken || fs::symlink_metadata(to).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    fs::rename(from, to)
}

/// As [`fs::remove_file`].
///
/// # Errors
/// The system's.
pub fn remove_file(path: &Path) -> io::Result<()> {
    fault::pass("remove", path)?;
    fs::remove_file(path)
}

/// As [`fs::remove_dir`].
///
/// # Errors
/// The system's.
pub fn remove_dir(path: &Path) -> io::Result<()> {
    fault::pass("remove", path)?;
    fs::remove_dir(path)
}

/// As [`fs::remove_dir_all`]; a folder that is not there is none to remove.
///
/// # Errors
/// The system's.
pub fn remove_dir_all(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    fault::pass("remove", path)?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Waits until the names in a folder are on the disk. Where folders cannot be synced, they are as lasting as the system
/// makes them.
pub fn sync_dir(path: &Path) {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let synced = fault::pass("sync", path);
    let _ = synced.and_then(|()| fs::File::open(path)?.sync_all());
}

#[cfg(test)]
mod tests {
    use super::*;

    type Rename = fn(&Path, &Path) -> io::Result<()>;

    #[test]
    fn a_new_name_is_nobody_elses_on_every_file_system() {
        for rename in [rename_new as Rename, rename_where_nothing_is] {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            for name in ["file", "taken"] {
                fs::write(path(name), name).unwrap();
            }
            for name in ["folder/below", "empty", "full/below"] {
                fs::create_dir_all(path(name)).unwrap();
            }
            for from in ["file", "folder"] {
                for to in ["taken", "empty", "full"] {
                    let refused = rename(&path(from), &path(to)).unwrap_err();
                    assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists, "{from} {to}");
                }
            }
            #[cfg(unix)]
            {
                std::os::unix::fs::symlink("nowhere", path("link")).unwrap();
                let refused = rename(&path("file"), &path("link")).unwrap_err();
                assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
            }
            rename(&path("file"), &path("new file")).unwrap();
            rename(&path("folder"), &path("new folder")).unwrap();
            assert_eq!(fs::read(path("new file")).unwrap(), b"file");
            assert!(path("new folder/below").is_dir());
            assert!(!path("file").exists() && !path("folder").exists());
            let missing = rename(&path("file"), &path("other")).unwrap_err();
            assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        }
    }
}
