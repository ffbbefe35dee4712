//! Inputs that are several files, and files of their own.
//!
//! Before each file stands a line `=== NAME`, or `=== NAME +N` where N zeros belong behind its bytes: weights of a whole model
//! need no bytes of their own.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

/// Starts the line before a file.
pub(crate) const HEAD: &[u8] = b"=== ";
/// Most zeros behind a file.
const MAX_ZEROS: usize = 1 << 20;

/// The files in one input.
pub(crate) fn files(bytes: &[u8]) -> Vec<(&str, Cow<'_, [u8]>)> {
    let mut files = Vec::new();
    let starts: Vec<usize> = (0..bytes.len())
        .filter(|&at| bytes[at..].starts_with(HEAD) && (at == 0 || bytes[at - 1] == b'\n'))
        .collect();
    for (i, &start) in starts.iter().enumerate() {
        let end = starts.get(i + 1).map_or(bytes.len(), |next| next - 1);
        let part = bytes.get(start + HEAD.len()..end).unwrap_or_default();
        let line = part.iter().position(|&byte| byte == b'\n');
        let (head, content) = line.map_or((part, &[][..]), |at| (&part[..at], &part[at + 1..]));
        let Ok(head) = std::str::from_utf8(head) else {
            continue;
        };
        let zeros = |(name, zeros): (_, &str)| Some((name, zeros.parse::<usize>().ok()?));
        let (name, zeros) = head.split_once(" +").and_then(zeros).unwrap_or((head, 0));
        let mut content = Cow::Borrowed(content);
        if zeros > 0 {
            let length = content.len() + zeros.min(MAX_ZEROS);
            content.to_mut().resize(length, 0);
        }
        files.push((name, content));
    }
    files
}

/// The file of this name in an input; nothing if it has none.
pub(crate) fn file(bytes: &[u8], name: &str) -> Vec<u8> {
    let found = files(bytes).into_iter().find(|(file, _)| *file == name);
    found.map_or_else(Vec::new, |(_, content)| content.into_owned())
}

/// Writes those files that are `known`, each in its folder.
pub(crate) fn write(folder: &Path, bytes: &[u8], known: &[&str]) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    for (name, content) in files(bytes) {
        if known.contains(&name) {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap_or(folder)).map_err(failed)?;
            fs::write(path, content).map_err(failed)?;
        }
    }
    Ok(())
}

/// Runs `read` in a new folder below `folder`.
pub(crate) fn in_folder(
    folder: &Path,
    read: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<(), String> {
    let folder = tempfile::tempdir_in(folder).map_err(|error| error.to_string())?;
    read(folder.path())
}

/// Runs `read` on a new file below `folder`.
pub(crate) fn in_file(
    folder: &Path,
    bytes: &[u8],
    read: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<(), String> {
    let path = folder.join("fuzzed.safetensors");
    fs::write(&path, bytes).map_err(|error| error.to_string())?;
    read(&path)
}
