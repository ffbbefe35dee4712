//! Where a run stands, as one file: a run that is stopped loses nothing.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::concept_file::write_atomically;
use crate::error::{Error, Result};
use crate::learned::LearnedConcepts;
use crate::maps::AttentionMaps;
use crate::mask::{ImageMasks, SceneMasks};
use crate::optimizer::AdamWState;
use crate::scene::{Concept, Role};

/// The alternation between two rounds. Going on from it gives the same bits as never having stopped.
#[derive(Debug, Clone)]
pub struct EmState {
    /// The tokens with their optimizer.
    pub learned: LearnedConcepts,
    /// The masks.
    pub masks: SceneMasks,
    /// The maps that they came from, one per picture; empty if the masks were given.
    pub maps: Vec<AttentionMaps>,
    /// Rounds done.
    pub round: usize,
}

/// On-disk form of everything that is no tensor.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    concepts: Vec<ConceptEntry>,
    vectors_per_concept: usize,
    step: usize,
    optimizer_step: usize,
    seed: u64,
    base_fingerprint: String,
    round: usize,
    mask_sizes: Vec<(usize, usize)>,
    has_maps: bool,
}

#[derive(Serialize, Deserialize)]
struct ConceptEntry {
    token: String,
    class_word: String,
    background: bool,
}

const VERSION: u32 = 1;

impl EmState {
    /// Writes the state to a temporary sibling, then renames.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let learned = &self.learned;
        let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
        let named = [
            ("rows", &learned.rows),
            ("initial_rows", &learned.initial_rows),
            ("optimizer.m", &learned.optimizer.m[0]),
            ("optimizer.v", &learned.optimizer.v[0]),
        ];
        for (name, tensor) in named {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            tensors.insert(name.to_owned(), (Dtype::F32, tensor.dims().to_vec(), bytes));
        }
        for (picture, masks) in self.masks.iter().enumerate() {
            let shape = vec![masks.planes().len(), masks.size(), masks.size()];
            tensors.insert(
                format!("masks.{picture}"),
                (Dtype::U8, shape, masks.planes().concat()),
            );
        }
        for (picture, maps) in self.maps.iter().enumerate() {
            let values = maps.maps.iter().flatten();
            let bytes = values.flat_map(|v| v.to_le_bytes()).collect();
            let shape = vec![maps.maps.len(), maps.size, maps.size];
            tensors.insert(format!("maps.{picture}"), (Dtype::F32, shape, bytes));
        }
        let header =
            serde_json::to_string(&self.header()).map_err(|error| cannot_write(path, error))?;
        let views = tensors
            .iter()
            .map(|(name, (dtype, shape, bytes))| {
                Ok((
                    name.as_str(),
                    TensorView::new(*dtype, shape.clone(), bytes)?,
                ))
            })
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|error| cannot_write(path, error))?;
        let metadata = HashMap::from([("em_state".to_owned(), header)]);
        let bytes = safetensors::serialize(views, Some(metadata))
            .map_err(|error| cannot_write(path, error))?;
        write_atomically(path, &bytes)
    }

    fn header(&self) -> Header {
        let learned = &self.learned;
        let entry = |concept: &Concept| ConceptEntry {
            token: concept.token.clone(),
            class_word: concept.class_word.clone(),
            background: concept.role == Role::Background,
        };
        Header {
            version: VERSION,
            concepts: learned.concepts.iter().map(entry).collect(),
            vectors_per_concept: learned.vectors_per_concept,
            step: learned.step,
            optimizer_step: learned.optimizer.t,
            seed: learned.seed,
            base_fingerprint: learned.base_fingerprint.clone(),
            round: self.round,
            mask_sizes: self
                .masks
                .iter()
                .map(|masks| (masks.planes().len(), masks.size()))
                .collect(),
            has_maps: !self.maps.is_empty(),
        }
    }

    /// Reads a state.
    ///
    /// # Errors
    /// The file is missing, truncated, or of another version.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::file(path, error))?;
        let (_, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|error| Error::file(path, error))?;
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get("em_state"));
        let header = header.ok_or_else(|| Error::file(path, "is no saved state of a run"))?;
        let header: Header =
            serde_json::from_str(header).map_err(|error| Error::file(path, error))?;
        if header.version != VERSION {
            return Err(Error::file(
                path,
                format!(
                    "is a state of version {}, this is {VERSION}",
                    header.version
                ),
            ));
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| Error::file(path, error))?;
        let raw = |name: &str| {
            tensors
                .tensor(name)
                .map_err(|error| Error::file(path, error))
        };
        let tensor = |name: &str| -> Result<Tensor> {
            let view = raw(name)?;
            let read = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            let values: Vec<f32> = view.data().chunks_exact(4).map(read).collect();
            Ok(Tensor::from_vec(values, view.shape(), device)?)
        };
        let masks = header
            .mask_sizes
            .iter()
            .enumerate()
            .map(|(picture, &(n_concepts, size))| {
                let planes = raw(&format!("masks.{picture}"))?.data().to_vec();
                if n_concepts == 0 || planes.len() != n_concepts * size * size {
                    return Err(Error::file(
                        path,
                        "holds masks of another size than it says",
                    ));
                }
                ImageMasks::new(
                    size,
                    planes
                        .chunks_exact(size * size)
                        .map(<[u8]>::to_vec)
                        .collect(),
                )
            });
        let masks = masks.collect::<Result<SceneMasks>>()?;
        let pictures = if header.has_maps { &masks[..] } else { &[] };
        let maps = pictures.iter().enumerate().map(|(picture, masks)| {
            let size = masks.size();
            let values = tensor(&format!("maps.{picture}"))?
                .flatten_all()?
                .to_vec1::<f32>()?;
            if values.len() != masks.planes().len() * size * size {
                return Err(Error::file(
                    path,
                    "holds attention maps of another size than its masks",
                ));
            }
            let maps = values
                .chunks_exact(size * size)
                .map(<[f32]>::to_vec)
                .collect();
            Ok(AttentionMaps { size, maps })
        });
        let maps = maps.collect::<Result<Vec<_>>>()?;
        let role = |background| {
            if background {
                Role::Background
            } else {
                Role::Object
            }
        };
        let concept = |entry: ConceptEntry| Concept {
            token: entry.token,
            class_word: entry.class_word,
            role: role(entry.background),
        };
        let (m, v) = (vec![tensor("optimizer.m")?], vec![tensor("optimizer.v")?]);
        let learned = LearnedConcepts {
            concepts: header.concepts.into_iter().map(concept).collect(),
            vectors_per_concept: header.vectors_per_concept,
            rows: tensor("rows")?,
            initial_rows: tensor("initial_rows")?,
            step: header.step,
            optimizer: AdamWState {
                m,
                v,
                t: header.optimizer_step,
            },
            seed: header.seed,
            base_fingerprint: header.base_fingerprint,
        };
        Ok(Self {
            learned,
            masks,
            maps,
            round: header.round,
        })
    }
}

fn cannot_write(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::CannotWrite {
        file: path.display().to_string(),
        reason: error.to_string(),
    }
}
