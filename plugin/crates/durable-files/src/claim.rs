//! Names that belong to one living process.
//!
//! The claim comes first and what it is for afterwards; it is given back last. So whatever a process that died has left is
//! known as a dead one's: whoever gets its claim may remove it or go on with it.

use std::fs::{self, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::disk::{self, File};

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A claim cannot be made.
#[derive(Debug)]
pub enum ClaimError {
    /// Another process has it; its number, if it said so.
    Held(Option<u32>),
    /// The system's.
    System(io::Error),
}

impl From<io::Error> for ClaimError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// A file that is locked as long as this value, or this process, lives.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    is_sure: bool,
    /// Held for its lock.
    _file: File,
}

impl Claim {
    /// Takes the file at `path`, which is made if it is not there, with the folders above it. Another process is waited for
    /// as long as `patience`: one that is dying holds its files for a moment.
    ///
    /// # Errors
    /// See [`ClaimError`].
    pub fn take(path: &Path, patience: Duration) -> Result<Self, ClaimError> {
        let begun = Instant::now();
        let mut n_vanished = 0;
        loop {
            if let Some(folder) = path.parent() {
                disk::create_dir_all(folder)?;
            }
            let mut file = match File::open_or_create(path) {
                // The folder was removed in between, by a process that found it empty.
                Err(error) if error.kind() == io::ErrorKind::NotFound && n_vanished < 100 => {
                    n_vanished += 1;
                    continue;
                }
                opened => opened?,
            };
            let is_sure = match file.try_lock() {
                // The one who had it has removed the file.
                Ok(()) if !is_at(path, &file) => continue,
                Ok(()) => true,
                Err(TryLockError::WouldBlock) if begun.elapsed() < patience => {
                    std::thread::sleep(LOOK_EVERY);
                    continue;
                }
                Err(TryLockError::WouldBlock) => return Err(ClaimError::Held(holder(path))),
                Err(TryLockError::Error(_)) => false,
            };
            // For people only: without it the claim is as good.
            let _ = file
                .set_len(0)
                .and_then(|()| file.write_all(std::process::id().to_string().as_bytes()));
            return Ok(Self {
                path: path.to_owned(),
                is_sure,
                _file: file,
            });
        }
    }

    /// Whether no other process has it. A file system without locks does not tell.
    #[must_use]
    pub fn is_sure(&self) -> bool {
        self.is_sure
    }

    /// Gives the claim back, and removes its file: what it was for is gone, or has its own name.
    pub fn give_back(self) {
        // While it is locked: nobody can have it yet. Where locked files cannot be told from others, they stay.
        if cfg!(unix) {
            let _ = disk::remove_file(&self.path);
        }
    }
}

/// Whether the file is the one at this path.
#[cfg(unix)]
fn is_at(path: &Path, file: &File) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
    match (fs::metadata(path), file.inner().metadata()) {
        (Ok(there), Ok(ours)) => identity(there) == identity(ours),
        _ => false,
    }
}

/// Files are never removed there.
#[cfg(not(unix))]
fn is_at(_: &Path, _: &File) -> bool {
    true
}

fn holder(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it_until_it_is_given_back_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/x.lock");
        let claim = Claim::take(&path, Duration::ZERO).unwrap();
        assert!(claim.is_sure());
        let held = Claim::take(&path, Duration::from_millis(50));
        assert!(
            matches!(held, Err(ClaimError::Held(Some(id))) if id == std::process::id()),
            "{held:?}"
        );
        claim.give_back();
        assert!(!path.exists());
        // Who died gave nothing back.
        drop(Claim::take(&path, Duration::ZERO).unwrap());
        assert!(path.exists());
        Claim::take(&path, Duration::ZERO).unwrap().give_back();
    }

    #[test]
    fn who_waits_gets_the_file_that_is_there_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.lock");
        // Each of them holds it alone, whoever removed the file in between.
        let busy = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let claim = Claim::take(&path, Duration::from_secs(60)).unwrap();
                        assert!(!busy.swap(true, std::sync::atomic::Ordering::SeqCst));
                        std::thread::sleep(Duration::from_micros(200));
                        busy.store(false, std::sync::atomic::Ordering::SeqCst);
                        claim.give_back();
                    }
                });
            }
        });
        assert!(!path.exists());
    }
}
