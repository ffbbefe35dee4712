//! Finding and loading plugin libraries, and saying in one sentence why one cannot be loaded.

use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use abi_stable::library::{LibraryError, lib_header_from_path};
use object::Endianness;
use object::elf::{ELFMAG, FileHeader64};
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use plugin_api::{
    DeviceDescriptor, ErrorCode, LoadedNode, LoadedPlugin, NodeDescriptor, NodeError,
    PluginDescriptor, PluginModule_Ref,
};

#[cfg(unix)]
use crate::isolated::Informant;
use crate::table::{self, NoTable};

/// Names libraries (a list as in PATH) when the command line does not.
pub(crate) const LIBRARY_VARIABLE: &str = "CONCEPTLOOM_PLUGIN";

/// Why a library cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[error("cannot load the plugin {}: {reason}", path.display())]
pub(crate) struct LoadError {
    path: PathBuf,
    reason: String,
}

impl LoadError {
    /// Why, without the path.
    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }
}

/// Where a library is loaded.
enum Place {
    /// In this process.
    Here(LoadedPlugin),
    /// In another, which can be asked but runs nothing.
    #[cfg(unix)]
    Apart(Informant),
}

/// A loaded library.
pub(crate) struct Plugin {
    /// Its stable name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// BLAKE3 of the file: results of another build are not reused.
    pub(crate) build: String,
    /// Where it was.
    pub(crate) path: PathBuf,
    /// Its classes.
    pub(crate) nodes: Vec<NodeDescriptor>,
    place: Place,
}

/// Why a library's nodes cannot compute.
#[derive(Debug, thiserror::Error)]
#[error("the plugin {plugin} cannot compute: {reason}")]
pub(crate) struct DeviceError {
    plugin: String,
    /// The plugin's own sentence, or how it was lost.
    pub(crate) reason: String,
}

impl Plugin {
    /// The devices that its nodes compute on, with their memory now; none where it leaves that open. The first call opens
    /// them.
    ///
    /// # Errors
    /// [`DeviceError`], with the plugin's own sentence.
    pub(crate) fn devices(&self) -> Result<Vec<DeviceDescriptor>, DeviceError> {
        let devices = match &self.place {
            Place::Here(exports) => exports
                .devices()
                .map_err(|error| error.message.into_string()),
            #[cfg(unix)]
            Place::Apart(informant) => informant.devices(),
        };
        let plugin = || self.name.clone();
        devices.map_err(|reason| DeviceError {
            plugin: plugin(),
            reason,
        })
    }

    /// Lets a new node of this class look at parameters, a JSON object.
    ///
    /// # Errors
    /// The first problem; or the plugin took the process down in which it was asked.
    pub(crate) fn validate(&self, class: &str, parameters: &str) -> Result<(), NodeError> {
        match &self.place {
            Place::Here(exports) => exports.create(class)?.validate(parameters),
            #[cfg(unix)]
            Place::Apart(informant) => {
                let asked = informant.validate(class, parameters.to_owned());
                let lost = |how: String| {
                    let text = format!(
                        "PluginCrashed: the plugin {} was asked about the parameters of {class}, and {how}; only this \
                         question is lost",
                        self.name
                    );
                    NodeError::new(ErrorCode::Internal, text)
                };
                asked.map_err(lost)?.map_err(NodeError::from)
            }
        }
    }

    /// A node of this class, to run it here.
    ///
    /// # Errors
    /// The class is not known, the plugin cannot make it, or it is not loaded in this process.
    pub(crate) fn create(&self, class: &str) -> Result<LoadedNode, NodeError> {
        self.here()?.create(class)
    }

    /// What it exports.
    ///
    /// # Errors
    /// It is not loaded in this process.
    pub(crate) fn here(&self) -> Result<&LoadedPlugin, NodeError> {
        match &self.place {
            Place::Here(exports) => Ok(exports),
            #[cfg(unix)]
            Place::Apart(_) => {
                let text = format!("the plugin {} is loaded in another process", self.name);
                Err(NodeError::new(ErrorCode::Internal, text))
            }
        }
    }
}

/// The libraries to load: those of the command line, else those of [`LIBRARY_VARIABLE`], else the one beside the
/// program.
///
/// # Errors
/// There is none beside the program.
pub(crate) fn find(given: &[PathBuf]) -> Result<Vec<PathBuf>, LoadError> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    if let Some(list) = std::env::var_os(LIBRARY_VARIABLE).filter(|list| !list.is_empty()) {
        return Ok(std::env::split_paths(&list).collect());
    }
    let file = format!("{DLL_PREFIX}conceptloom{DLL_SUFFIX}");
    let program = std::env::current_exe().unwrap_or_default();
    let folder = program.parent().unwrap_or(Path::new("."));
    let places = [folder.join(&file), folder.join("..").join(&file)];
    places.iter().find(|path| path.is_file()).map(|path| vec![path.clone()]).ok_or_else(|| LoadError {
        path: places[0].clone(),
        reason: format!(
            "it is not there; build it with `cargo build --release`, or name it with --plugin or {LIBRARY_VARIABLE}"
        ),
    })
}

/// Loads one library. It is never unloaded.
///
/// # Errors
/// [`LoadError`], with the simplest cause that fits.
pub(crate) fn load(path: &Path) -> Result<Plugin, LoadError> {
    let failed = |reason: String| LoadError {
        path: path.to_owned(),
        reason,
    };
    let bytes = std::fs::read(path).map_err(|error| {
        failed(match error.kind() {
            ErrorKind::NotFound => "it is not there; name a library that is".to_owned(),
            _ => error.to_string(),
        })
    })?;
    let build = blake3::hash(&bytes).to_hex().to_string();
    if is_cut_short(&bytes) {
        return Err(failed(format!(
            "it is cut short, its {} bytes are not all that its header tells of; copy or build it once more",
            bytes.len()
        )));
    }
    drop(bytes);
    // A bare file name would be looked for in the system's folders.
    let absolute = path
        .canonicalize()
        .map_err(|error| failed(error.to_string()))?;
    let table = table::read(&absolute).map_err(|why| failed(no_table(why)))?;
    let exports = match lib_header_from_path(&absolute) {
        Ok(header) => header
            .init_root_module::<PluginModule_Ref>()
            .map(LoadedPlugin::from)
            .map_err(|error| failed(incompatible(&error)))?,
        // Not from Rust: its table is all there is.
        Err(LibraryError::GetSymbolError { .. }) => table::plugin(table),
        Err(error) => return Err(failed(incompatible(&error))),
    };
    let described = exports.describe();
    let PluginDescriptor {
        name,
        version,
        nodes,
    } = described.map_err(|error| failed(error.message.into_string()))?;
    Ok(Plugin {
        name,
        version,
        build,
        path: absolute,
        nodes,
        place: Place::Here(exports),
    })
}

/// Loads one library in a process of its own, where it can be asked; this process stays without it.
///
/// # Errors
/// [`LoadError`], also where it took that process down.
#[cfg(unix)]
pub(crate) fn load_apart(path: &Path) -> Result<Plugin, LoadError> {
    let (informant, facts) = Informant::start(path).map_err(|reason| LoadError {
        path: path.to_owned(),
        reason,
    })?;
    Ok(Plugin {
        name: facts.name,
        version: facts.version,
        build: facts.build,
        path: facts.path,
        nodes: facts.nodes,
        place: Place::Apart(informant),
    })
}

/// Loads one library in a process of its own.
///
/// # Errors
/// Always: there is none on this system.
#[cfg(not(unix))]
pub(crate) fn load_apart(path: &Path) -> Result<Plugin, LoadError> {
    Err(LoadError {
        path: path.to_owned(),
        reason: "--isolate needs a Unix system; leave it out".to_owned(),
    })
}

/// Whether a library for Linux lacks a part that it says it has: the system maps what is not there, and whoever reads it is
/// ended. Other systems look for themselves, and what is no such library is left to the system to refuse.
fn is_cut_short(file: &[u8]) -> bool {
    type Header = FileHeader64<Endianness>;
    let Ok(header) = Header::parse(file) else {
        return file.starts_with(&ELFMAG) && file.len() < size_of::<Header>();
    };
    let Ok(endian) = header.endian() else {
        return false;
    };
    let segments = header.program_headers(endian, file);
    segments.map_or(true, |segments| {
        segments
            .iter()
            .any(|segment| segment.data(endian, file).is_err())
    })
}

fn no_table(why: NoTable) -> String {
    match why {
        NoTable::NotALibrary(words) => format!("the system cannot open it as a library ({words})"),
        NoTable::NoSymbol => {
            "it is a library, but no plugin: it does not export node_plugin".to_owned()
        }
        NoTable::Unusable(reason) => reason,
    }
}

/// The first line of `abi_stable`'s report says little and the rest is pages long.
fn incompatible(error: &LibraryError) -> String {
    match error {
        LibraryError::AbiInstability(_) => {
            "its types are laid out differently from this host's; build both from the same version of plugin-api"
                .to_owned()
        }
        LibraryError::IncompatibleVersionNumber { expected_version, actual_version, .. } => format!(
            "it was built with version {actual_version} of plugin-api and this host with {expected_version}; build \
             both from the same major version"
        ),
        LibraryError::InvalidAbiHeader(_) | LibraryError::InvalidCAbi { .. } => {
            "it was built with another version of abi_stable or for another machine".to_owned()
        }
        other => {
            let text = other.to_string();
            let line = text.lines().map(str::trim).find(|line| !line.is_empty());
            line.unwrap_or("it has no root module").to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_no_plugin_are_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("libtext.so");
        std::fs::write(&text, "not a library").unwrap();
        let reason = |path: &Path| load(path).err().unwrap().reason;
        assert!(reason(&text).contains("cannot open it as a library"));
        assert!(
            reason(&folder.path().join("gone.so")).starts_with("it is not there; name a library")
        );
    }
}
