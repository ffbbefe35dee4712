//! The list of what to run: a file of JSON lines.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::bounded_file::{self, ReadError};

/// Largest file.
const MAX_BYTES: u64 = 256 << 20;
const MAX_ID: usize = 100;

/// One line.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// Name of its folder.
    pub(crate) id: String,
    /// The workflow's file, beside the manifest; the bundled demo if none is named.
    #[serde(default)]
    pub(crate) workflow: Option<PathBuf>,
    /// Parameters by `node.input`.
    #[serde(default)]
    pub(crate) set: Map<String, Value>,
    /// For all seeds.
    #[serde(default)]
    pub(crate) seed: Option<u64>,
    /// Where it stands, from 1.
    #[serde(skip)]
    pub(crate) line: usize,
}

/// A manifest that cannot be read, with everything that is wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("there is no manifest {}; name a file with one entry a line", .0.display())]
    Missing(PathBuf),
    #[error("cannot read the manifest {}: {error}", path.display())]
    Unreadable {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("the manifest {} has {bytes} bytes, at most {MAX_BYTES} are read", path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("the manifest {} cannot be read:\n  {}", path.display(), problems.join("\n  "))]
    Malformed {
        path: PathBuf,
        problems: Vec<String>,
    },
}

/// Reads a manifest; empty lines do not count.
///
/// # Errors
/// See [`ManifestError`].
pub(crate) fn read(path: &Path) -> Result<Vec<Entry>, ManifestError> {
    let path = path.to_owned();
    let unreadable = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => ManifestError::Missing(path.clone()),
        _ => ManifestError::Unreadable {
            path: path.clone(),
            error,
        },
    };
    let bytes = bounded_file::read(&path, MAX_BYTES).map_err(|error| match error {
        ReadError::TooLarge(bytes) => ManifestError::TooLarge {
            path: path.clone(),
            bytes,
        },
        ReadError::System(error) => unreadable(error),
    })?;
    let text = String::from_utf8(lenient_json::utf8(&bytes).into_owned())
        .map_err(|error| unreadable(std::io::Error::other(error)))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    parse(&text, folder).map_err(|problems| ManifestError::Malformed {
        path: path.clone(),
        problems,
    })
}

fn parse(text: &str, folder: &Path) -> Result<Vec<Entry>, Vec<String>> {
    let (mut entries, mut problems, mut seen) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (index, text) in text
        .lines()
        .enumerate()
        .filter(|(_, text)| !text.trim().is_empty())
    {
        let line = index + 1;
        let mut entry: Entry = match lenient_json::from_str(text) {
            Ok(entry) => entry,
            Err(error) => {
                problems.push(format!("line {line}: {error}"));
                continue;
            }
        };
        if !is_safe(&entry.id) {
            problems.push(format!(
                "line {line}: the id \"{}\" cannot be a folder's name; use up to {MAX_ID} letters, digits, -, _ and ., not \
                 a . first",
                entry.id
            ));
        }
        // Some file systems do not tell capitals.
        if let Some(first) = seen.insert(entry.id.to_lowercase(), line) {
            problems.push(format!(
                "line {line}: the id \"{}\" is on line {first} too",
                entry.id
            ));
        }
        entry.workflow = entry.workflow.map(|workflow| folder.join(workflow));
        entry.line = line;
        entries.push(entry);
    }
    if entries.is_empty() && problems.is_empty() {
        problems.push(
            "it has no entry; write one per line, for example {\"id\": \"first\"}".to_owned(),
        );
    }
    if problems.is_empty() {
        Ok(entries)
    } else {
        Err(problems)
    }
}

fn is_safe(id: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !id.is_empty() && id.len() <= MAX_ID && !id.starts_with('.') && id.chars().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_entries() {
        let text = "{\"id\": \"a\"}\n\n{\"id\": \"b\", \"workflow\": \"x.json\", \"set\": {\"7.steps\": 3}, \"seed\": 5}\n";
        let entries = parse(text, Path::new("/m")).unwrap();
        assert_eq!((entries[0].id.as_str(), entries[0].line), ("a", 1));
        assert_eq!(entries[1].workflow.as_deref(), Some(Path::new("/m/x.json")));
        assert_eq!((entries[1].seed, entries[1].line), (Some(5), 3));
    }

    #[test]
    fn everything_that_is_wrong_is_told_with_its_line() {
        let lines = [
            "{",
            "{\"id\": \"../a\"}",
            "{\"id\": \"x\"}",
            "{\"id\": \"X\"}",
            "{\"id\": \"y\", \"sed\": 1}",
            "{\"id\": \".z\"}",
        ];
        let problems = parse(&lines.join("\n"), Path::new("")).unwrap_err();
        let starts: Vec<_> = problems.iter().map(|problem| &problem[..7]).collect();
        assert_eq!(
            starts,
            ["line 1:", "line 2:", "line 4:", "line 5:", "line 6:"]
        );
        assert!(parse("\n", Path::new("")).is_err());
    }
}
