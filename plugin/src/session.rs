//! What nodes share beside their wires: the model that is in use.

use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use plugin_api::NodeError;
use stable_diffusion::memory::Memory;
use stable_diffusion::model::files_beside;
use stable_diffusion::ops::Precision;
use stable_diffusion::{CheckpointSource, DiffusionModel, Error};

use crate::device::device;
use crate::failure::from_model;
use crate::values::{ModelValue, WeakModel};

/// The checkpoint that a user named: the bundled one, a directory, or a file.
pub(crate) fn checkpoint_source(name: &str) -> CheckpointSource {
    let name = name.trim();
    if name == sprites::NAME {
        CheckpointSource::Embedded {
            name: sprites::NAME,
            files: sprites::FILES,
        }
    } else {
        CheckpointSource::Path(PathBuf::from(name))
    }
}

/// The last model, so that two loaders of one checkpoint share its memory. It is freed with the last value that holds
/// it: a host that drops its values has the memory back.
static LAST: Mutex<Option<(String, WeakModel)>> = Mutex::new(None);

/// Loads a checkpoint, with the VAE of another path if one is named, in this precision, and with steps that keep this much,
/// or returns the one that is loaded already.
///
/// # Errors
/// The file is missing, truncated, or no Stable Diffusion 1.x / 2.x checkpoint.
pub(crate) fn load_model(
    name: &str,
    vae: &str,
    precision: Precision,
    memory: Memory,
) -> Result<ModelValue, NodeError> {
    let (name, vae) = (name.trim(), vae.trim());
    let key = format!("{name}\n{vae}\n{precision:?}\n{}", fingerprint(name, vae));
    let mut last = LAST.lock();
    if let Some((loaded, model)) = &*last
        && *loaded == key
        && let Some(model) = model.upgrade()
    {
        if model.model.unet.memory() == memory {
            return Ok(model);
        }
        // Shares the weights of the other one.
        return with_memory((*model.model).clone(), memory).map(ModelValue::new);
    }
    let other_vae = (!vae.is_empty()).then(|| Path::new(vae));
    let source = checkpoint_source(name);
    let loaded = DiffusionModel::load_with(&source, other_vae, precision, device()?);
    let loaded = loaded.map_err(|error| error.during(|| format!("the loading of {name}")));
    let model = loaded.map_err(|error| match &error {
        Error::Argument { what, .. } => from_model(what, &error),
        _ => from_model("checkpoint", &error),
    })?;
    let model = ModelValue::new(with_memory(model, memory)?);
    *last = Some((key, model.downgrade()));
    Ok(model)
}

fn with_memory(model: DiffusionModel, memory: Memory) -> Result<DiffusionModel, NodeError> {
    let model = model.with_memory(memory);
    model.map_err(|error| from_model("checkpoint", &error))
}

/// Changes when a file of the checkpoint or of the other VAE does: names, sizes and times of modification.
pub(crate) fn fingerprint(name: &str, vae: &str) -> String {
    let own = match checkpoint_source(name) {
        CheckpointSource::Embedded { name, .. } => format!("{name} {}", env!("CARGO_PKG_VERSION")),
        CheckpointSource::Path(path) => described(&path),
    };
    match vae.trim() {
        "" => own,
        vae => format!("{own}\n{}", described(Path::new(vae))),
    }
}

/// The weights, configurations and vocabularies that a path may mean: what else lies beside them makes it no other model.
fn described(path: &Path) -> String {
    let parts =
        ["unet", "vae", "text_encoder", "tokenizer", "scheduler"].map(|part| path.join(part));
    let mut files = Vec::new();
    for part in &parts {
        files.extend(model_files(part));
    }
    if path.is_file() {
        files.push(path.to_owned());
        files.extend(files_beside(path));
    } else if !parts[0].is_dir() || !parts[1].is_dir() {
        // A part by itself.
        files.extend(model_files(path));
    }
    let mut seen: Vec<_> = files.iter().filter_map(|file| describe(file)).collect();
    seen.sort();
    seen.join("\n")
}

/// The files of a folder that may belong to a model.
fn model_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let endings = [".safetensors", ".json", ".txt"];
        !name.starts_with('.') && endings.iter().any(|ending| name.ends_with(ending))
    });
    files.collect()
}

fn describe(path: &Path) -> Option<String> {
    let meta = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
    Some(format!(
        "{} {} {:?}",
        path.display(),
        meta.len(),
        meta.modified().ok()?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_shared_while_a_value_holds_it_and_freed_with_the_last() {
        let load = || load_model(sprites::NAME, "", Precision::F32, Memory::Auto).unwrap();
        let (first, second) = (load(), load());
        assert!(std::sync::Arc::ptr_eq(&first.model, &second.model));
        let weak = first.downgrade();
        drop(first);
        assert!(weak.upgrade().is_some());
        drop(second);
        assert!(weak.upgrade().is_none(), "the session keeps nothing");
    }

    #[test]
    fn what_is_read_beside_a_single_file_changes_its_fingerprint() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        std::fs::write(&file, "").unwrap();
        let name = file.display().to_string();
        let mut seen = vec![fingerprint(&name, "")];
        for beside in [
            "scheduler_config.json",
            "vocab.json",
            "tokenizer/merges.txt",
            "scheduler/scheduler_config.json",
        ] {
            let path = folder.path().join(beside);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
            let now = fingerprint(&name, "");
            assert!(!seen.contains(&now), "{beside}");
            seen.push(now);
        }
        std::fs::write(folder.path().join("another.safetensors"), "").unwrap();
        assert_eq!(seen.last(), Some(&fingerprint(&name, "")));
    }

    #[test]
    fn what_lies_in_a_folder_without_being_read_does_not_change_its_fingerprint() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        };
        let now = || fingerprint(&folder.path().display().to_string(), "");
        write("unet/config.json");
        write("vae/config.json");
        let before = now();
        for other in [
            "README.md",
            "model.safetensors",
            "unet/.DS_Store",
            "unet/._config.json",
            "samples/a.json",
        ] {
            write(other);
            assert_eq!(now(), before, "{other}");
        }
        for part in ["unet/model.safetensors", "tokenizer/merges.txt"] {
            let before = now();
            write(part);
            assert_ne!(now(), before, "{part}");
        }
    }
}
