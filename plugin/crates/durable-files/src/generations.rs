//! A state that is written again and again: the last one that is whole is found.
//!
//! Two files take turns, so that the one before is there until the new one is. Each ends with how it is known to be whole:
//!
//! ```text
//! content | number of the generation, u64 | BLAKE3 of all of that, 32 bytes | "conceptloom state" 17 bytes
//! ```
//! numbers are little-endian. Content is neither written nor read as a whole.

use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::whole::{remove_torn, write_over};

const MARK: [u8; 17] = *b"conceptloom state";
const HASH: usize = 32;
const TRAILER: u64 = (size_of::<u64>() + HASH + MARK.len()) as u64;
const PIECE: usize = 1 << 20;

/// A file of a generation that is not whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Torn {
    /// Which.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// See the module. The folder belongs to this process.
#[derive(Debug)]
pub struct Generations {
    files: [PathBuf; 2],
    /// Number of the last one, and which of the files has it.
    last: Option<(u64, usize)>,
}

impl Generations {
    /// Those called `name` in a folder, and what is not whole of them; the latter is left alone until its turn comes. What a
    /// process that died was writing there is removed.
    #[must_use]
    pub fn open(folder: &Path, name: &str) -> (Self, Vec<Torn>) {
        remove_torn(folder);
        let files = ["a", "b"].map(|turn| folder.join(format!("{name}.{turn}.safetensors")));
        let (mut torn, mut found) = (Vec::new(), Vec::new());
        let mut note = |which: usize, reason: String| {
            torn.push(Torn {
                path: files[which].clone(),
                reason,
            });
        };
        for (which, path) in files.iter().enumerate() {
            match Trailer::read(path) {
                Ok(None) => {}
                Ok(Some(trailer)) => found.push((trailer.number, which)),
                Err(reason) => note(which, reason),
            }
        }
        found.sort_unstable();
        // They may be large: the one before is read only where it is needed.
        let mut last = None;
        while let Some((number, which)) = found.pop() {
            match check(&files[which]) {
                Ok(()) => {
                    last = Some((number, which));
                    break;
                }
                Err(reason) => note(which, reason),
            }
        }
        (Self { files, last }, torn)
    }

    /// The last whole one.
    #[must_use]
    pub fn last(&self) -> Option<&Path> {
        self.last.map(|(_, which)| self.files[which].as_path())
    }

    /// Takes the one before for the last: what the last one holds cannot be used.
    ///
    /// Returns whether there is one.
    pub fn step_back(&mut self) -> bool {
        let Some((number, which)) = self.last else {
            return false;
        };
        let other = 1 - which;
        self.last = match Trailer::read(&self.files[other]) {
            Ok(Some(before)) if before.number < number && check(&self.files[other]).is_ok() => {
                Some((before.number, other))
            }
            _ => None,
        };
        self.last.is_some()
    }

    /// Writes the next one.
    ///
    /// # Errors
    /// Those of the system and of `write`; the last one is what it was then.
    pub fn write(
        &mut self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let (number, which) = match self.last {
            Some((number, which)) => (number.saturating_add(1), 1 - which),
            None => (0, 0),
        };
        write_over(&self.files[which], |file| {
            let mut hashed = Hashed {
                file,
                hasher: blake3::Hasher::new(),
            };
            write(&mut hashed)?;
            hashed.write_all(&number.to_le_bytes())?;
            let Hashed { file, hasher } = hashed;
            file.write_all(hasher.finalize().as_bytes())?;
            file.write_all(&MARK)
        })?;
        self.last = Some((number, which));
        Ok(())
    }

    /// Removes all of them: nothing is to be gone on with.
    pub fn forget(&mut self) {
        for file in &self.files {
            let _ = crate::disk::remove_file(file);
        }
        self.last = None;
    }
}

/// What stands behind the content of a file.
struct Trailer {
    /// Bytes of the content.
    content: u64,
    number: u64,
    hash: [u8; HASH],
}

impl Trailer {
    /// `None` if the file is not there.
    fn read(path: &Path) -> Result<Option<Self>, String> {
        let mut file = match fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(&error)),
        };
        Self::of(&mut file).map(Some)
    }

    fn of(file: &mut fs::File) -> Result<Self, String> {
        let length = file.metadata().map_err(|error| unreadable(&error))?.len();
        let cut = || format!("is cut off: it has {length} bytes");
        let content = length.checked_sub(TRAILER).ok_or_else(cut)?;
        let (mut number, mut hash, mut mark) = ([0; size_of::<u64>()], [0; HASH], [0; MARK.len()]);
        let read = file.seek(SeekFrom::Start(content)).and_then(|_| {
            file.read_exact(&mut number)?;
            file.read_exact(&mut hash)?;
            file.read_exact(&mut mark)
        });
        read.map_err(|error| unreadable(&error))?;
        if mark != MARK {
            return Err(cut());
        }
        Ok(Self {
            content,
            number: u64::from_le_bytes(number),
            hash,
        })
    }
}

/// Reads all of a file, and says what is wrong with it.
fn check(path: &Path) -> Result<(), String> {
    let mut file = fs::File::open(path).map_err(|error| unreadable(&error))?;
    let trailer = Trailer::of(&mut file)?;
    let mut hasher = blake3::Hasher::new();
    let hashed = file.seek(SeekFrom::Start(0)).and_then(|_| {
        let mut piece = vec![0; PIECE];
        let mut left = trailer.content + size_of::<u64>() as u64;
        while left > 0 {
            let n = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
            file.read_exact(&mut piece[..n])?;
            hasher.update(&piece[..n]);
            left -= n as u64;
        }
        Ok(())
    });
    hashed.map_err(|error| unreadable(&error))?;
    if trailer.hash != *hasher.finalize().as_bytes() {
        return Err("is damaged: its bytes are not those that were written".to_owned());
    }
    Ok(())
}

fn unreadable(error: &io::Error) -> String {
    format!("cannot be read: {error}")
}

struct Hashed<'a> {
    file: &'a mut dyn Write,
    hasher: blake3::Hasher,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(states: &mut Generations, text: &str) {
        states
            .write(|file| file.write_all(text.as_bytes()))
            .unwrap();
    }

    fn last(states: &Generations) -> Option<String> {
        let bytes = fs::read(states.last()?).unwrap();
        let content = &bytes[..bytes.len() - TRAILER as usize];
        Some(String::from_utf8(content.to_vec()).unwrap())
    }

    #[test]
    fn the_last_one_is_found_and_the_one_before_it_stays() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Generations::open(folder.path(), "state");
        let (mut states, torn) = open();
        assert_eq!((last(&states), torn.len()), (None, 0));
        for text in ["one", "two", "three"] {
            write(&mut states, text);
            assert_eq!(last(&open().0).as_deref(), Some(text));
        }
        assert!(states.step_back());
        assert_eq!(last(&states).as_deref(), Some("two"));
        assert!(!states.step_back());
        states.forget();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn any_damage_to_the_last_one_gives_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let (mut states, _) = Generations::open(folder.path(), "state");
        write(&mut states, "the one before");
        write(&mut states, "the last one");
        let path = states.last().unwrap().to_owned();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x20;
            for bytes in [&damaged[..], &whole[..at]] {
                fs::write(&path, bytes).unwrap();
                let (states, torn) = Generations::open(folder.path(), "state");
                assert_eq!(last(&states).as_deref(), Some("the one before"), "{at}");
                assert_eq!(torn.len(), 1, "{at}");
            }
        }
        // It is the one that is written next.
        let (mut states, _) = Generations::open(folder.path(), "state");
        write(&mut states, "another one");
        let (states, torn) = Generations::open(folder.path(), "state");
        assert_eq!(
            (last(&states).as_deref(), torn.len()),
            (Some("another one"), 0)
        );
    }
}
