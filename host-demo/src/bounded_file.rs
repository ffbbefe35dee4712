//! Files that are read as a whole, up to a size.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// A file is not read.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// It has more bytes than wanted; so many at least.
    TooLarge(u64),
    /// The system's.
    System(io::Error),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// All of a file that has at most so many bytes. A pipe is read to its end, and a device that has none to the limit.
///
/// # Errors
/// See [`ReadError`].
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>, ReadError> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Err(io::Error::other("it is a directory; name a file in it").into());
    }
    if meta.len() > most {
        return Err(ReadError::TooLarge(meta.len()));
    }
    let mut bytes = Vec::new();
    // What it says of its length need not be so.
    file.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 {
        n if n > most => Err(ReadError::TooLarge(n)),
        _ => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_read_than_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        assert!(matches!(read(&path, 4), Err(ReadError::TooLarge(5))));
        assert!(matches!(read(folder.path(), 5), Err(ReadError::System(_))));
        if cfg!(unix) {
            let endless = read(Path::new("/dev/zero"), 1000);
            assert!(matches!(endless, Err(ReadError::TooLarge(1001))));
        }
    }
}
