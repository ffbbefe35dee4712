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
