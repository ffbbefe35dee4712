//! A folder whose files are named by people who are not trusted: nothing outside of it is reached, not by `..`, not by
//! an absolute path, not by a symbolic link.

use std::io;
use std::path::{Component, Path, PathBuf};

/// Why a name is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PathError {
    #[error("\"{0}\" is no name of a file beneath this folder; write for example pictures/dog.png")]
    NotRelative(String),
    #[error("\"{0}\" is called as what is being written; choose another name")]
    Reserved(String),
    #[error("\"{0}\" leads out of its folder by a link; choose another name")]
    Outside(String),
    #[error("there is no file \"{0}\"")]
    NotFound(String),
    #[error("\"{0}\" cannot be read: {1}")]
    Unreadable(String, io::Error),
}

/// A folder, resolved when it was named.
#[derive(Debug, Clone)]
pub(crate) struct Root(PathBuf);

impl Root {
    /// Makes the folder if it is not there.
    ///
    /// # Errors
    /// It cannot be made or resolved.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        Ok(Self(path.canonicalize()?))
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A file or folder that is there, links resolved.
    ///
    /// # Errors
    /// See [`PathError`].
    pub(crate) fn existing(&self, name: &str) -> Result<PathBuf, PathError> {
        let path = self.0.join(relative(name)?);
        let real = path.canonicalize().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                PathError::NotFound(name.to_owned())
            }
            _ => PathError::Unreadable(name.to_owned(), error),
        })?;
        if real == self.0 {
            // By way of a link: the folder is nothing beneath itself.
            Err(PathError::NotFound(name.to_owned()))
        } else if real.starts_with(&self.0) {
            Ok(real)
        } else {
            Err(PathError::Outside(name.to_owned()))
        }
    }

    /// A file that is there: no folder, and nothing that is waited for, as a pipe is.
    ///
    /// # Errors
    /// See [`PathError`].
    pub(crate) fn file(&self, name: &str) -> Result<PathBuf, PathError> {
        let path = self.existing(name)?;
        if path.is_file() {
            Ok(path)
        } else {
            Err(PathError::NotFound(name.to_owned()))
        }
    }

    /// Where a file of this name is or would be written. Its folder need not be there.
    ///
    /// # Errors
    /// See [`PathError`]; also where the name is a link already, wherever it leads.
    pub(crate) fn place(&self, name: &str) -> Result<PathBuf, PathError> {
        let path = self.0.join(relative(name)?);
        let outside = || PathError::Outside(name.to_owned());
        if name.split('/').any(durable_files::is_torn) {
            // The next start would take it for one that a dead process was writing.
            return Err(PathError::Reserved(name.to_owned()));
        }
        if path.is_symlink() {
            return Err(outside());
        }
        let is_below = durable_files::is_below(&self.0, &path);
        if is_below.map_err(|error| PathError::Unreadable(name.to_owned(), error))? {
            Ok(path)
        } else {
            Err(outside())
        }
    }

    /// `path` as a name beneath this folder, with `/`.
    pub(crate) fn name_of(&self, path: &Path) -> Option<String> {
        let parts = path.strip_prefix(&self.0).ok()?.components();
        let parts: Vec<_> = parts
            .map(|part| part.as_os_str().to_string_lossy())
            .collect();
        Some(parts.join("/"))
    }
}

/// A name that has only ordinary parts, without what the system reads more into: a `/` at its end follows a link.
fn relative(name: &str) -> Result<PathBuf, PathError> {
    let path = Path::new(name);
    let is_plain = !name.is_empty()
        && !name.contains(['\\', '\0', ':'])
        && path
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
    if is_plain {
        Ok(path.components().collect())
    } else {
        Err(PathError::NotRelative(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ordinary_names_beneath_the_folder_are_reached() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::create(&folder.path().join("input")).unwrap();
        std::fs::write(folder.path().join("secret"), "").unwrap();
        std::fs::create_dir(root.path().join("a")).unwrap();
        std::fs::write(root.path().join("a/b.png"), "").unwrap();
        assert_eq!(
            root.existing("a/b.png").unwrap(),
            root.path().join("a/b.png")
        );
        assert_eq!(
            root.name_of(&root.path().join("a/b.png")).unwrap(),
            "a/b.png"
        );
        assert!(matches!(
            root.existing("a/c.png"),
            Err(PathError::NotFound(_))
        ));
        for bad in [
            "",
            "..",
            "../secret",
            "/etc/passwd",
            "a/../../secret",
            "a\\b",
            "c:x",
            "a\0",
            "./a",
        ] {
            assert!(
                matches!(root.existing(bad), Err(PathError::NotRelative(_))),
                "{bad:?}"
            );
            assert!(
                matches!(root.place(bad), Err(PathError::NotRelative(_))),
                "{bad:?}"
            );
        }
        assert!(root.place("new/folder/x.png").is_ok());
    }

    #[cfg(unix)]
    #[test]
    fn links_do_not_lead_out() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::create(&folder.path().join("input")).unwrap();
        std::fs::write(folder.path().join("secret"), "").unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret"), root.path().join("file")).unwrap();
        std::os::unix::fs::symlink(folder.path(), root.path().join("out")).unwrap();
        assert!(matches!(root.existing("file"), Err(PathError::Outside(_))));
        assert!(matches!(
            root.existing("out/secret"),
            Err(PathError::Outside(_))
        ));
        assert!(matches!(root.place("file"), Err(PathError::Outside(_))));
        for name in ["out/new", "out", "out/", "out//", "out/.", "file/"] {
            assert!(
                matches!(root.place(name), Err(PathError::Outside(_))),
                "{name}"
            );
        }
    }
}
