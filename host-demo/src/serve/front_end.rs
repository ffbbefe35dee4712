//! The editor's files: a folder or a wheel that the user brought. Nothing of it is part of this program.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use parking_lot::Mutex;
use zip::ZipArchive;

use crate::confined::Root;

/// What `pip install comfyui-frontend-package` installs.
const PACKAGE: &str = "comfyui_frontend_package";
/// Where the editor is in its package.
const STATIC: &str = "static";
/// For a folder that does not tell: the newest version that this server was seen with.
const ASSUMED_VERSION: &str = "1.58.1";
/// Largest file of the editor: a wheel could claim any size.
const MAX_FILE: u64 = 64 << 20;

/// The editor cannot be served from there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrontEndError {
    #[error("there is no ComfyUI editor in {}: expected a folder with index.html, or a wheel of comfyui-frontend-package", .0.display())]
    NotThere(PathBuf),
    #[error("cannot read the editor's wheel {}: {reason}", path.display())]
    BadWheel { path: PathBuf, reason: String },
}

enum Files {
    Nowhere,
    Folder(Root),
    Wheel(Mutex<ZipArchive<File>>),
}

/// See the module.
pub(crate) struct FrontEnd {
    files: Files,
    version: String,
}

impl FrontEnd {
    /// The one that was named, else the installed one, else none.
    ///
    /// # Errors
    /// What was named is no editor.
    pub(crate) fn find(named: Option<&Path>) -> Result<Self, FrontEndError> {
        match named {
            Some(path) if path.is_dir() => {
                let nested = [
                    path.to_owned(),
                    path.join(STATIC),
                    path.join(PACKAGE).join(STATIC),
                ];
                let folder = nested
                    .iter()
                    .find(|folder| folder.join("index.html").is_file());
                let folder = folder.ok_or_else(|| FrontEndError::NotThere(path.to_owned()))?;
                Self::in_folder(folder)
            }
            Some(path) if path.is_file() => Self::in_wheel(path),
            Some(path) => Err(FrontEndError::NotThere(path.to_owned())),
            None => match installed() {
                Some(folder) => Self::in_folder(&folder),
                None => Ok(Self::none()),
            },
        }
    }

    /// No editor.
    pub(crate) fn none() -> Self {
        Self {
            files: Files::Nowhere,
            version: ASSUMED_VERSION.to_owned(),
        }
    }

    fn in_folder(folder: &Path) -> Result<Self, FrontEndError> {
        let root = Root::create(folder).map_err(|_| FrontEndError::NotThere(folder.to_owned()))?;
        let version = version_beside(root.path()).unwrap_or_else(|| ASSUMED_VERSION.to_owned());
        Ok(Self {
            files: Files::Folder(root),
            version,
        })
    }

    fn in_wheel(path: &Path) -> Result<Self, FrontEndError> {
        let bad = |reason: String| FrontEndError::BadWheel {
            path: path.to_owned(),
            reason,
        };
        let file = File::open(path).map_err(|error| bad(error.to_string()))?;
        let mut archive = ZipArchive::new(file).map_err(|error| bad(error.to_string()))?;
        if archive.by_name(&in_package("index.html")).is_err() {
            return Err(bad("it holds no editor".to_owned()));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let version = name.split('-').nth(1).unwrap_or(ASSUMED_VERSION).to_owned();
        Ok(Self {
            files: Files::Wheel(Mutex::new(archive)),
            version,
        })
    }

    /// Whether there is one.
    pub(crate) fn is_there(&self) -> bool {
        !matches!(self.files, Files::Nowhere)
    }

    /// Its version.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// A file by its name, with `/`. Blocks.
    pub(crate) fn read(&self, name: &str) -> Option<Vec<u8>> {
        match &self.files {
            Files::Nowhere => None,
            Files::Folder(root) => std::fs::read(root.file(name).ok()?).ok(),
            Files::Wheel(archive) => {
                let mut archive = archive.lock();
                let file = archive.by_name(&in_package(name)).ok()?;
                let mut bytes = Vec::new();
                file.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
                Some(bytes)
            }
        }
    }
}

fn in_package(name: &str) -> String {
    format!("{PACKAGE}/{STATIC}/{name}")
}

/// The folder that Python would import the package from.
fn installed() -> Option<PathBuf> {
    let script = format!(
        "import importlib.util as u; s = u.find_spec('{PACKAGE}'); print(s.submodule_search_locations[0] if s else '')"
    );
    let ask = |python: &str| -> io::Result<String> {
        let output = Command::new(python).args(["-c", &script]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    ["python3", "python"]
        .iter()
        .filter_map(|python| ask(python).ok())
        .filter(|folder| !folder.is_empty())
        .map(|folder| Path::new(&folder).join(STATIC))
        .find(|folder| folder.join("index.html").is_file())
}

/// `comfyui_frontend_package-1.2.3.dist-info` stands beside the package.
fn version_beside(folder: &Path) -> Option<String> {
    let site = folder.parent()?.parent()?;
    let names = std::fs::read_dir(site).ok()?.flatten();
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .find_map(|name| {
            let version = name.strip_prefix(PACKAGE)?.strip_prefix('-')?;
            Some(version.strip_suffix(".dist-info")?.to_owned())
        })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_folder_and_a_wheel_give_the_same_files() {
        let folder = tempfile::tempdir().unwrap();
        let package = folder.path().join(PACKAGE).join(STATIC);
        std::fs::create_dir_all(package.join("assets")).unwrap();
        std::fs::write(package.join("index.html"), "<html>").unwrap();
        std::fs::write(package.join("assets/a.js"), "1").unwrap();
        std::fs::create_dir(folder.path().join(format!("{PACKAGE}-1.2.3.dist-info"))).unwrap();
        let wheel = folder
            .path()
            .join(format!("{PACKAGE}-1.2.4-py3-none-any.whl"));
        let mut archive = zip::ZipWriter::new(File::create(&wheel).unwrap());
        for (name, text) in [("index.html", "<html>"), ("assets/a.js", "1")] {
            let options = zip::write::SimpleFileOptions::default();
            archive.start_file(in_package(name), options).unwrap();
            archive.write_all(text.as_bytes()).unwrap();
        }
        archive.finish().unwrap();
        for (path, version) in [
            (package.as_path(), "1.2.3"),
            (folder.path(), "1.2.3"),
            (&wheel, "1.2.4"),
        ] {
            let front_end = FrontEnd::find(Some(path)).unwrap();
            assert_eq!(front_end.version(), version);
            assert_eq!(front_end.read("assets/a.js").unwrap(), b"1");
            assert!(
                front_end.read("assets/b.js").is_none()
                    && front_end.read("../index.html").is_none()
            );
        }
    }

    #[test]
    fn what_is_no_editor_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            FrontEnd::find(Some(folder.path())),
            Err(FrontEndError::NotThere(_))
        ));
        let file = folder.path().join("a.whl");
        std::fs::write(&file, "no zip").unwrap();
        assert!(matches!(
            FrontEnd::find(Some(&file)),
            Err(FrontEndError::BadWheel { .. })
        ));
    }
}
