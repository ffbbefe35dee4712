//! Where a run stands, as one file: a run that is stopped loses nothing.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use stable_diffusion::weights::{TensorFile, save_tensors};

use crate::error::{Error, Result};
use crate::evidence::{Affinity, Evidence, MeanAttention, Observation};
use crate::learned::LearnedConcepts;
use crate::maps::AttentionMaps;
use crate::mask::{ImageMasks, SceneMasks};
use crate::optimizer::AdamWState;
use crate::scene::{Concept, Role};
use crate::size::Size;

/// The alternation between two rounds. Going on from it gives the same bits as never having stopped.
#[derive(Debug, Clone)]
pub struct EmState {
    /// The tokens with their optimizer.
    pub learned: LearnedConcepts,
    /// The masks.
    pub masks: SceneMasks,
    /// What they were concluded from, one per picture; empty if the masks were given.
    pub observations: Vec<Observation>,
    /// Free energy of each picture's CRF, in nats per pixel; empty if the masks were given.
    pub energies: Vec<f64>,
    /// Rounds done.
    pub round: usize,
}

/// On-disk form of everything that is no tensor.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    concepts: Vec<ConceptEntry>,
    vectors: Vec<usize>,
    from_words: bool,
    step: usize,
    optimizer_step: usize,
    seed: u64,
    base_fingerprint: String,
    round: usize,
    mask_sizes: Vec<(usize, Size)>,
    /// Observations by picture; none if the masks were given.
    observations: Vec<ObservationEntry>,
    /// Bits of `f64`: decimal digits would not come back exactly.
    energies: Vec<u64>,
}

#[derive(Serialize, Deserialize)]
struct ObservationEntry {
    evidence: Option<EvidenceEntry>,
}

/// Draws are bits of `f64`.
#[derive(Serialize, Deserialize)]
struct EvidenceEntry {
    size: Size,
    draws: u64,
    attention_weight: u64,
    affinity_size: Size,
    affinity_draws: u64,
}

#[derive(Serialize, Deserialize)]
struct ConceptEntry {
    token: String,
    class_word: String,
    background: bool,
}

const VERSION: u32 = 5;

/// Where the header is, in the file's metadata.
const METADATA: &str = "em_state";

impl EmState {
    /// Takes the evidence out, for the next E-step to add to.
    pub(crate) fn take_evidence(&mut self) -> Vec<Evidence> {
        let observations = self.observations.iter_mut();
        observations
            .filter_map(|seen| seen.evidence.take())
            .collect()
    }

    /// Writes the state to a temporary sibling, then renames.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let learned = &self.learned;
        let mut tensors = BTreeMap::from([
            ("rows".to_owned(), learned.rows.clone()),
            ("initial_rows".to_owned(), learned.initial_rows.clone()),
            ("optimizer.m".to_owned(), learned.optimizer.m[0].clone()),
            ("optimizer.v".to_owned(), learned.optimizer.v[0].clone()),
        ]);
        for (picture, masks) in self.masks.iter().enumerate() {
            let Size { width, height } = masks.size();
            let shape = (masks.planes().len(), height, width);
            let planes = Tensor::from_vec(masks.planes().concat(), shape, &Device::Cpu)?;
            tensors.insert(format!("masks.{picture}"), planes);
        }
        for (picture, seen) in self.observations.iter().enumerate() {
            let mut put = |name: &str, planes: &[Vec<f32>], size: Size| -> Result<()> {
                let shape = (planes.len(), size.height, size.width);
                let planes = Tensor::from_vec(planes.concat(), shape, &Device::Cpu)?;
                tensors.insert(format!("{name}.{picture}"), planes);
                Ok(())
            };
            let Observation { maps, evidence } = seen;
            put("maps", &maps.maps, maps.size)?;
            if let Some(evidence) = evidence {
                put("log_likelihoods", &evidence.log_likelihoods, evidence.size)?;
                put("attention", &evidence.attention.maps, maps.size)?;
                let n_cells = evidence.affinity.size().area();
                let (sums, _) = evidence.affinity.parts();
                put("affinity", &[sums.to_vec()], Size::square(n_cells))?;
            }
        }
        let header =
            serde_json::to_string(&self.header()).map_err(|error| Error::file(path, error))?;
        let metadata = BTreeMap::from([(METADATA.to_owned(), header)]);
        Ok(save_tensors(path, &tensors, DType::F32, &metadata)?)
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
            vectors: learned.vectors.clone(),
            from_words: learned.from_words,
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
            observations: self.observations.iter().map(ObservationEntry::of).collect(),
            energies: self
                .energies
                .iter()
                .map(|energy| energy.to_bits())
                .collect(),
        }
    }

    /// Reads a state.
    ///
    /// # Errors
    /// The file is missing, truncated, or of another version.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let header = file.metadata().get(METADATA);
        let header = header.ok_or_else(|| Error::file(path, "is no saved state of a run"))?;
        let header: Header =
            serde_json::from_str(header).map_err(|error| Error::file(path, error))?;
        if header.version != VERSION {
            let reason = format!(
                "is a state of version {}, this is {VERSION}",
                header.version
            );
            return Err(Error::file(path, reason));
        }
        let tensor = |name: &str| file.read(name, device);
        let masks = header
            .mask_sizes
            .iter()
            .enumerate()
            .map(|(picture, &(n_concepts, size))| {
                let planes = file.read_u8(&format!("masks.{picture}"))?;
                if n_concepts == 0 || size.area() == 0 || planes.len() != n_concepts * size.area() {
                    let reason = "holds masks of another size than it says";
                    return Err(Error::file(path, reason));
                }
                let planes = planes.chunks_exact(size.area()).map(<[u8]>::to_vec);
                ImageMasks::new(size, planes.collect())
            });
        let masks = masks.collect::<Result<SceneMasks>>()?;
        let planes = |name: String, n: usize, size: Size| -> Result<Vec<Vec<f32>>> {
            let values = tensor(&name)?.flatten_all()?.to_vec1::<f32>()?;
            if size.area() == 0 || values.len() != n * size.area() {
                return Err(Error::file(
                    path,
                    format!("holds {name} of another size than its masks"),
                ));
            }
            let planes = values.chunks_exact(size.area());
            Ok(planes.map(<[f32]>::to_vec).collect())
        };
        let mut observations = Vec::with_capacity(header.observations.len());
        for (picture, (entry, masks)) in header.observations.iter().zip(&masks).enumerate() {
            let (n, size) = (masks.planes().len(), masks.size());
            let maps = planes(format!("maps.{picture}"), n, size)?;
            let evidence = match &entry.evidence {
                None => None,
                Some(entry) => {
                    let cells = Size::square(entry.affinity_size.area());
                    let sums = planes(format!("affinity.{picture}"), 1, cells)?.concat();
                    let draws = f64::from_bits(entry.affinity_draws);
                    let affinity = Affinity::from_parts(entry.affinity_size, sums, draws)
                        .ok_or_else(|| Error::file(path, "holds affinities of another size"))?;
                    let weight = f64::from_bits(entry.attention_weight);
                    let n_seen = if weight > 0.0 { n } else { 0 };
                    let maps = planes(format!("attention.{picture}"), n_seen, size)?;
                    let attention = MeanAttention { maps, weight };
                    let name = format!("log_likelihoods.{picture}");
                    Some(Evidence {
                        size: entry.size,
                        log_likelihoods: planes(name, n, entry.size)?,
                        n_draws: f64::from_bits(entry.draws),
                        attention,
                        affinity,
                    })
                }
            };
            let maps = AttentionMaps { size, maps };
            observations.push(Observation { maps, evidence });
        }
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
            vectors: header.vectors,
            rows: tensor("rows")?,
            initial_rows: tensor("initial_rows")?,
            from_words: header.from_words,
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
            observations,
            energies: header.energies.into_iter().map(f64::from_bits).collect(),
            round: header.round,
        })
    }
}

impl ObservationEntry {
    fn of(seen: &Observation) -> Self {
        let entry = |evidence: &Evidence| EvidenceEntry {
            size: evidence.size,
            draws: evidence.n_draws.to_bits(),
            attention_weight: evidence.attention.weight.to_bits(),
            affinity_size: evidence.affinity.size(),
            affinity_draws: evidence.affinity.parts().1.to_bits(),
        };
        Self {
            evidence: seen.evidence.as_ref().map(entry),
        }
    }
}
