//! Which libraries are loaded: those that were named, and those that are found in folders.
//!
//! A library that was named must load. One that is found in a folder is tried in a process of its own first: one that crashes,
//! hangs or cannot be loaded is left out, in one sentence. Those that crash or hang are remembered, by what is in the file, and
//! not tried again until the file changes.

use std::collections::{BTreeMap, BTreeSet};
use std::env::consts::DLL_SUFFIX;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use crate::builtin_nodes;
use crate::child::{self, Ended};
use crate::console::{complain, say};
use crate::isolated::IsolationArguments;
use crate::loader::{self, Plugin};

/// Folders (a list as in PATH) when the command line names none.
const FOLDERS_VARIABLE: &str = "CONCEPTLOOM_PLUGINS";
/// Most time that a library may take to load in its own process.
const TRY_LIMIT: Duration = Duration::from_secs(20);

/// The libraries that a user asked for.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Libraries {
    /// A plugin library to load; may be given several times [default: $CONCEPTLOOM_PLUGIN, or the one beside the
    /// program]
    #[arg(long, value_name = "LIBRARY")]
    plugin: Vec<PathBuf>,
    /// A folder of plugin libraries, loaded beside the others; one that crashes is left out. May be given several times
    /// [default: $CONCEPTLOOM_PLUGINS]
    #[arg(long, value_name = "FOLDER")]
    plugins: Vec<PathBuf>,
}

impl Libraries {
    /// Loads them, in this process or each in one of its own.
    ///
    /// # Errors
    /// A library that was named and does not load, or a folder that cannot be read.
    pub(crate) fn load(&self, isolation: &IsolationArguments) -> anyhow::Result<Vec<Plugin>> {
        let load = if isolation.is_on() {
            loader::load_apart
        } else {
            loader::load
        };
        let folders = self.folders();
        let named = match loader::find(&self.plugin) {
            Ok(named) => named,
            // With folders there need be none beside the program.
            Err(_) if !folders.is_empty() => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let mut plugins = Vec::new();
        for path in named {
            plugins.push(load(&path)?);
        }
        let mut crashers = Crashers::read();
        for path in found_in(&folders)? {
            if plugins.iter().any(|plugin| plugin.path == path) {
                continue;
            }
            let tried = try_one(&path, &mut crashers)
                .and_then(|()| load(&path).map_err(|error| error.to_string()));
            match tried.and_then(|plugin| unlike(plugin, &plugins)) {
                Ok(plugin) => plugins.push(plugin),
                Err(why) => {
                    complain(&format!(
                        "warning: the plugin {} is left out: {why}",
                        path.display()
                    ));
                }
            }
        }
        Ok(plugins)
    }

    fn folders(&self) -> Vec<PathBuf> {
        if !self.plugins.is_empty() {
            return self.plugins.clone();
        }
        let list = std::env::var_os(FOLDERS_VARIABLE).filter(|list| !list.is_empty());
        list.map_or_else(Vec::new, |list| std::env::split_paths(&list).collect())
    }
}

/// All libraries in these folders, by name.
fn found_in(folders: &[PathBuf]) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for folder in folders {
        let unreadable = || format!("cannot read the folder of plugins {}", folder.display());
        let entries = std::fs::read_dir(folder);
        if entries
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::NotFound)
        {
            anyhow::bail!(
                "there is no folder of plugins {}; name one that is there with --plugins or {FOLDERS_VARIABLE}",
                folder.display()
            );
        }
        for entry in entries.with_context(unreadable)? {
            let path = entry.with_context(unreadable)?.path();
            let is_library = path.to_string_lossy().ends_with(DLL_SUFFIX);
            if is_library && path.is_file() {
                found.insert(path.canonicalize().with_context(unreadable)?);
            }
        }
    }
    Ok(found)
}

/// The plugin, unless one of its classes is there already.
fn unlike(plugin: Plugin, others: &[Plugin]) -> Result<Plugin, String> {
    let of_host = builtin_nodes::CLASSES
        .iter()
        .map(|class| (class.descriptor)().class);
    let of_others = others
        .iter()
        .flat_map(|other| &other.nodes)
        .map(|node| node.class.clone());
    let known: BTreeSet<String> = of_host.chain(of_others).collect();
    match plugin.nodes.iter().find(|node| known.contains(&node.class)) {
        Some(node) => Err(format!("its node class {} is there already", node.class)),
        None => Ok(plugin),
    }
}

/// Loads a library in a process of its own, which ends then.
///
/// # Errors
/// It does not load, or that process is lost.
fn try_one(path: &Path, crashers: &mut Crashers) -> Result<(), String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let hash = blake3::hash(&bytes).to_hex().to_string();
    drop(bytes);
    if let Some(how) = crashers.how(path, &hash) {
        return Err(format!(
            "when it was last tried {how}, and it has not changed since; {} remembers this",
            crashers.file.display()
        ));
    }
    let tried = child::own_program().and_then(|mut command| {
        command.arg("try-plugin").arg("--").arg(path);
        child::run(&mut command, TRY_LIMIT)
    });
    let tried = tried.map_err(|error| format!("it cannot be tried ({error})"))?;
    let how = match tried.ended {
        Ended::Code(0) => return Ok(()),
        Ended::Code(TRY_FAILED) => {
            let said = tried.stdout.lines().last().unwrap_or_default();
            return Err(said.to_owned());
        }
        Ended::Code(code) => format!("it ended its process with exit code {code}"),
        Ended::Crashed(how) => format!("it took its process down ({how})"),
        Ended::TimedOut => format!("it took longer than {} s", TRY_LIMIT.as_secs()),
    };
    crashers.remember(path, hash, &how);
    Err(how)
}

/// The exit code for a library that says why it does not load.
const TRY_FAILED: i32 = 3;

/// The hidden command: loads one library; the exit code.
pub(crate) fn try_here(path: &Path) -> u8 {
    child::without_core_files();
    match loader::load(path) {
        Ok(_) => 0,
        Err(error) => {
            say(&error.to_string());
            TRY_FAILED as u8
        }
    }
}

/// Libraries that took their process down: how, and what was in the file.
struct Crashers {
    file: PathBuf,
    by_path: BTreeMap<String, (String, String)>,
}

impl Crashers {
    fn read() -> Self {
        let file = cache_folder().join("conceptloom/crashed-plugins.json");
        // A file that cannot be read remembers nothing.
        let text = std::fs::read(&file).unwrap_or_default();
        let by_path = serde_json::from_slice(&text).unwrap_or_default();
        Self { file, by_path }
    }

    fn how(&self, path: &Path, hash: &str) -> Option<&str> {
        let (known, how) = self.by_path.get(&*path.to_string_lossy())?;
        (known == hash).then_some(how)
    }

    /// Where it cannot be written, the library is tried again at the next start.
    fn remember(&mut self, path: &Path, hash: String, how: &str) {
        let key = path.to_string_lossy().into_owned();
        self.by_path.insert(key, (hash, how.to_owned()));
        if let Some(folder) = self.file.parent() {
            let _ = std::fs::create_dir_all(folder);
        }
        let beside = self
            .file
            .with_extension(format!("{}.new", std::process::id()));
        let text = json!(self.by_path).to_string();
        let _ = std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, &self.file));
    }
}

/// The user's folder for what can be made again; the system's for temporary files where there is none.
fn cache_folder() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let own = variable("XDG_CACHE_HOME").or_else(|| variable("LOCALAPPDATA"));
    own.map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
}
