//! Learned concepts on disk: one `.safetensors` file per concept.
//!
//! | form | tensor | loads in |
//! | --- | --- | --- |
//! | shared (default) | `emb_params` `[V, D]` | ComfyUI, A1111, InvokeAI; diffusers with `token=` |
//! | diffusers | `<token>` `[V, D]` | diffusers |
//!
//! The metadata says what it is: token, class word, role, steps, seed, hash of the base model, and the workflow if the
//! user wants it in there, so that dropping the file on an editor's canvas restores the graph.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use stable_diffusion::weights::{encode_tensors, write_whole};

use crate::error::{Error, Result};
use crate::learned::LearnedConcepts;
use crate::optimizer::AdamWState;
use crate::scene::{Concept, Role};

/// Largest file that is read as a concept: thousands of vectors of any text encoder.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// Which name the tensor gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConceptForm {
    /// `emb_params`.
    Shared,
    /// The token itself.
    Diffusers,
}

/// The file's bytes for one concept; `extra` metadata are added as they are.
///
/// # Errors
/// The tensor library fails.
pub fn concept_bytes(
    learned: &LearnedConcepts,
    concept: usize,
    form: ConceptForm,
    extra: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let vectors = learned.vectors_per_concept;
    let rows = learned.rows.narrow(0, concept * vectors, vectors)?;
    let Concept {
        token,
        class_word,
        role,
    } = &learned.concepts[concept];
    let name = match form {
        ConceptForm::Shared => "emb_params",
        ConceptForm::Diffusers => token,
    };
    let mut metadata = extra.clone();
    let role = if *role == Role::Background {
        "background"
    } else {
        "object"
    };
    metadata.extend([
        ("format".to_owned(), "pt".to_owned()),
        ("token".to_owned(), token.clone()),
        ("class_word".to_owned(), class_word.clone()),
        ("role".to_owned(), role.to_owned()),
        ("steps".to_owned(), learned.step.to_string()),
        ("seed".to_owned(), learned.seed.to_string()),
        (
            "base_model_blake3".to_owned(),
            learned.base_fingerprint.clone(),
        ),
    ]);
    let tensors = BTreeMap::from([(name.to_owned(), rows)]);
    Ok(encode_tensors(&tensors, &metadata)?)
}

/// Reads concept files into one value, in their order. They can be used and trained on; the optimizer starts anew.
///
/// # Errors
/// A file that is missing, too large, no concept, of another width than the others, or not finite.
pub fn load_concepts(paths: &[&Path], device: &Device) -> Result<LearnedConcepts> {
    let loaded = paths
        .iter()
        .map(|path| load_one(path))
        .collect::<Result<Vec<_>>>()?;
    let first = loaded.first().ok_or(Error::NoConceptFile)?;
    let (vectors, width) = (first.vectors, first.values.len() / first.vectors);
    for (one, path) in loaded.iter().zip(paths) {
        if one.vectors != vectors || one.values.len() != vectors * width {
            let found = [one.vectors, one.values.len() / one.vectors];
            return Err(Error::file(
                path,
                format!("has the shape {found:?}, the first file has [{vectors}, {width}]"),
            ));
        }
    }
    let rows: Vec<f32> = loaded
        .iter()
        .flat_map(|one| one.values.iter().copied())
        .collect();
    let rows = Tensor::from_vec(rows, (loaded.len() * vectors, width), device)?;
    let number = |key: &str| {
        first
            .metadata
            .get(key)
            .and_then(|v| v.parse::<u64>().ok())
            .unwrap_or(0)
    };
    Ok(LearnedConcepts {
        vectors_per_concept: vectors,
        initial_rows: rows.clone(),
        optimizer: AdamWState::zeros(std::slice::from_ref(&rows))?,
        rows,
        // What was saved has learned.
        from_words: true,
        step: number("steps") as usize,
        seed: number("seed"),
        base_fingerprint: first
            .metadata
            .get("base_model_blake3")
            .cloned()
            .unwrap_or_default(),
        concepts: loaded.into_iter().map(|one| one.concept).collect(),
    })
}

struct LoadedConcept {
    concept: Concept,
    vectors: usize,
    values: Vec<f32>,
    metadata: HashMap<String, String>,
}

fn load_one(path: &Path) -> Result<LoadedConcept> {
    let pickled = path
        .extension()
        .is_some_and(|extension| ["pt", "bin", "ckpt"].iter().any(|e| extension == *e));
    if pickled {
        return Err(Error::file(
            path,
            "is a pickle, which is never read; convert it to .safetensors",
        ));
    }
    let size = std::fs::metadata(path)
        .map_err(|error| Error::file(path, error))?
        .len();
    if size > MAX_BYTES {
        return Err(Error::file(
            path,
            format!("has {size} bytes, too many for a concept"),
        ));
    }
    let bytes = std::fs::read(path).map_err(|error| Error::file(path, error))?;
    let broken = |error: safetensors::SafeTensorError| {
        Error::file(path, format!("is no .safetensors file: {error}"))
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let tensors = SafeTensors::deserialize(&bytes).map_err(broken)?;
    let names = tensors.names();
    let [name] = names[..] else {
        return Err(Error::file(
            path,
            format!("holds {} tensors, a concept is one", names.len()),
        ));
    };
    let view = tensors.tensor(name).map_err(broken)?;
    let (vectors, values) = match (view.shape(), view.dtype()) {
        ([width], Dtype::F32) => (1, (*width, f32_values(view.data()))),
        ([vectors, width], Dtype::F32) if *vectors > 0 => {
            (*vectors, (*width, f32_values(view.data())))
        }
        (shape, dtype) => {
            return Err(Error::file(
                path,
                format!("holds {dtype:?} {shape:?}, a concept is F32 [vectors, width]"),
            ));
        }
    };
    let (width, values) = values;
    if width == 0 || values.iter().any(|v| !v.is_finite()) {
        return Err(Error::file(
            path,
            "holds values that are not finite, or none",
        ));
    }
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().replace(char::is_whitespace, "-"));
    let in_brackets = |name: &str| format!("<{}>", name.trim_matches(['<', '>']));
    let token = match metadata.get("token") {
        Some(token) => in_brackets(token),
        None if name != "emb_params" => in_brackets(name),
        None => in_brackets(&stem.unwrap_or_default()),
    };
    let class_word = metadata.get("class_word").cloned().unwrap_or_default();
    let background = metadata
        .get("role")
        .is_some_and(|role| role == "background");
    let role = if background {
        Role::Background
    } else {
        Role::Object
    };
    Ok(LoadedConcept {
        concept: Concept {
            token,
            class_word,
            role,
        },
        vectors,
        values,
        metadata,
    })
}

fn f32_values(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// Writes a temporary sibling, then renames it: a reader sees the old file, the new one, or none.
///
/// # Errors
/// [`Error::CannotWrite`] with the path and the system's reason.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let cannot = |error: std::io::Error| Error::CannotWrite {
        file: path.display().to_string(),
        reason: error.to_string(),
    };
    write_whole(path, |file| file.write_all(bytes)).map_err(cannot)
}
