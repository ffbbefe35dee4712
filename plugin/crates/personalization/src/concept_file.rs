//! Learned concepts on disk: one `.safetensors` file per concept.
//!
//! | form | tensor | loads in |
//! | --- | --- | --- |
//! | shared (default) | `emb_params` `[V, D]` | ComfyUI, A1111, InvokeAI; diffusers with `token=` |
//! | diffusers | `<token>` `[V, D]` | diffusers |
//!
//! The metadata says what it is: token, class word, role, steps, seed, hash of the base model, and the workflow if the
//! user wants it in there, so that dropping the file on an editor's canvas restores the graph.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use stable_diffusion::weights::{TensorFile, encode_tensors};

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
    let own = learned.rows_of(concept);
    let rows = learned.rows.narrow(0, own.start, own.len())?;
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

/// Reads concept files into one value, in their order: what [`concept_bytes`] wrote, and textual-inversion embeddings of
/// other programs, of any length and precision. They can be used and trained on; the optimizer starts anew.
///
/// | tensors | token |
/// | --- | --- |
/// | `emb_params`, `*`, `string_to_param.*` | that of the metadata, else the file's name |
/// | `<token>` | the token |
///
/// # Errors
/// A file that is missing, too large, no concept, of another width than the others, or not finite.
pub fn load_concepts(paths: &[&Path], device: &Device) -> Result<LearnedConcepts> {
    let mut loaded: Vec<LoadedConcept> = Vec::new();
    for path in paths {
        for one in load_file(path)? {
            let first = loaded.first().unwrap_or(&one);
            if one.width != first.width {
                let (found, wanted) = (one.width, first.width);
                let reason = format!(
                    "is {found} wide, the first file {wanted}; they are of different models"
                );
                return Err(Error::file(path, reason));
            }
            loaded.push(one);
        }
    }
    let first = loaded.first().ok_or(Error::NoConceptFile)?;
    let rows: Vec<f32> = loaded
        .iter()
        .flat_map(|one| one.values.iter().copied())
        .collect();
    let shape = (rows.len() / first.width, first.width);
    let rows = Tensor::from_vec(rows, shape, device)?;
    let number = |key: &str| {
        let value = first.metadata.get(key);
        value.and_then(|v| v.parse::<u64>().ok()).unwrap_or(0)
    };
    Ok(LearnedConcepts {
        vectors: loaded
            .iter()
            .map(|one| one.values.len() / one.width)
            .collect(),
        initial_rows: rows.clone(),
        optimizer: AdamWState::zeros(std::slice::from_ref(&rows))?,
        rows,
        // What was saved has learned.
        from_words: true,
        step: (number("steps") as usize).min(MAX_STEPS),
        seed: number("seed"),
        base_fingerprint: first
            .metadata
            .get("base_model_blake3")
            .cloned()
            .unwrap_or_default(),
        concepts: loaded.into_iter().map(|one| one.concept).collect(),
    })
}

/// More than anybody learned; from there on steps can still be counted.
const MAX_STEPS: usize = u32::MAX as usize;
/// Names of a tensor that is the whole embedding, whatever it is called.
const UNNAMED: [&str; 3] = ["emb_params", "*", "string_to_param.*"];
/// Beside the embedding in files that were converted from A1111's.
const IGNORED: [&str; 5] = [
    "string_to_token.",
    "name",
    "step",
    "sd_checkpoint",
    "sd_checkpoint_name",
];

struct LoadedConcept {
    concept: Concept,
    width: usize,
    /// `[V · D]`.
    values: Vec<f32>,
    metadata: BTreeMap<String, String>,
}

fn load_file(path: &Path) -> Result<Vec<LoadedConcept>> {
    let size = std::fs::metadata(path)
        .map_err(|error| Error::file(path, error))?
        .len();
    if size > MAX_BYTES {
        return Err(Error::file(
            path,
            format!("has {size} bytes, too many for a concept"),
        ));
    }
    let file = TensorFile::open(path)?;
    let names: Vec<&str> = file
        .names()
        .filter(|name| !IGNORED.iter().any(|ignored| name.starts_with(ignored)))
        .collect();
    if names.contains(&"clip_g") {
        return Err(Error::file(
            path,
            "is an embedding of SDXL; supported are those of Stable Diffusion 1.x and 2.x",
        ));
    }
    if names.is_empty() || names.len() > MOST_TOKENS {
        let reason = format!(
            "holds {} tensors, an embedding is one per token",
            names.len()
        );
        return Err(Error::file(path, reason));
    }
    let one = names.len() == 1;
    names
        .into_iter()
        .map(|name| load_one(path, &file, name, one))
        .collect()
}

/// Most tokens of one file.
const MOST_TOKENS: usize = 256;

fn load_one(path: &Path, file: &TensorFile, name: &str, is_only: bool) -> Result<LoadedConcept> {
    let width = match file.shape(name) {
        Some([width] | [_, width]) if *width > 0 => *width,
        shape => {
            let reason = format!(
                "{name} has the shape {:?}, an embedding has [vectors, width]",
                shape.unwrap_or_default()
            );
            return Err(Error::file(path, reason));
        }
    };
    let values: Vec<f32> = file.read(name, &Device::Cpu)?.flatten_all()?.to_vec1()?;
    if values.is_empty() {
        return Err(Error::file(path, "holds no vector"));
    }
    let metadata = file.metadata();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let in_brackets = |name: &str| {
        let name = name.trim_matches(['<', '>']);
        format!("<{}>", name.replace(char::is_whitespace, "-"))
    };
    let token = match metadata.get("token").filter(|_| is_only) {
        Some(token) => in_brackets(token),
        None if UNNAMED.contains(&name) => in_brackets(&stem),
        None => in_brackets(name),
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
        width,
        values,
        metadata: metadata.clone(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::DType;

    use super::*;

    fn file(folder: &Path, name: &str, tensors: &[(&str, Tensor)]) -> std::path::PathBuf {
        let path = folder.join(name);
        let tensors: HashMap<String, Tensor> = tensors
            .iter()
            .map(|(name, tensor)| ((*name).to_owned(), tensor.clone()))
            .collect();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        path
    }

    fn ones(shape: &[usize], dtype: DType) -> Tensor {
        Tensor::ones(shape, dtype, &Device::Cpu).unwrap()
    }

    #[test]
    fn embeddings_of_other_programs_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        let converted = [
            ("string_to_param.*", ones(&[2, 8], DType::F32)),
            ("string_to_token.*", ones(&[1], DType::I64)),
        ];
        let several = [
            ("<a>", ones(&[8], DType::F32)),
            ("b", ones(&[2, 8], DType::F32)),
        ];
        let files = [
            file(
                place,
                "half.safetensors",
                &[("emb_params", ones(&[1, 8], DType::F16))],
            ),
            file(
                place,
                "brain.safetensors",
                &[("emb_params", ones(&[3, 8], DType::BF16))],
            ),
            file(
                place,
                "my star.safetensors",
                &[("*", ones(&[2, 8], DType::F32))],
            ),
            file(place, "converted.safetensors", &converted),
            file(place, "several.safetensors", &several),
        ];
        let paths: Vec<&Path> = files.iter().map(std::path::PathBuf::as_path).collect();
        let learned = load_concepts(&paths, &Device::Cpu).unwrap();
        let tokens: Vec<&str> = learned.concepts.iter().map(|c| c.token.as_str()).collect();
        assert_eq!(
            tokens,
            [
                "<half>",
                "<brain>",
                "<my-star>",
                "<converted>",
                "<a>",
                "<b>"
            ]
        );
        assert_eq!(learned.vectors, [1, 3, 2, 2, 1, 2]);
        assert_eq!(learned.rows.dims(), [11, 8]);
        assert_eq!(learned.rows_of(2), 4..6);
        assert_eq!(learned.text_of(1), "<brain> <brain>_1 <brain>_2");
        let uneven = learned.vectors_per_concept().unwrap_err().to_string();
        assert!(uneven.contains("<half> and <brain>"), "{uneven}");
    }

    #[test]
    fn what_is_no_embedding_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |tensors: &[(&str, Tensor)]| {
            let path = file(folder.path(), "x.safetensors", tensors);
            load_concepts(&[&path], &Device::Cpu)
                .err()
                .unwrap()
                .to_string()
        };
        let sdxl = [
            ("clip_g", ones(&[1, 8], DType::F32)),
            ("clip_l", ones(&[1, 8], DType::F32)),
        ];
        assert!(refused(&sdxl).contains("SDXL"));
        assert!(refused(&[("a", ones(&[1, 2, 8], DType::F32))]).contains("[vectors, width]"));
        let infinite = (ones(&[1, 8], DType::F32) * f64::INFINITY).unwrap();
        assert!(refused(&[("a", infinite)]).contains("not finite"));
        let [wide, narrow] = [8, 4].map(|width| {
            let name = format!("{width}.safetensors");
            file(
                folder.path(),
                &name,
                &[("*", ones(&[1, width], DType::F32))],
            )
        });
        let error = load_concepts(&[&wide, &narrow], &Device::Cpu)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("is 4 wide, the first file 8"), "{error}");
        let pickle = folder.path().join("x.pt");
        std::fs::write(&pickle, b"x").unwrap();
        assert!(
            load_concepts(&[&pickle], &Device::Cpu)
                .err()
                .unwrap()
                .to_string()
                .contains("pickle")
        );
    }
}
