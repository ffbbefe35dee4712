//! Where a run stands, as one file: a run that is stopped loses nothing.

mod fits;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use stable_diffusion::weights::{TensorFile, write_tensors};

pub(crate) use fits::check_evidence;

use crate::attention::{AttentionSums, LayerSum};
use crate::error::{Error, Result};
use crate::evidence::{Affinity, Evidence, MeanAttention, Observation};
use crate::learned::LearnedConcepts;
use crate::maps::AttentionMaps;
use crate::mask::{ImageMasks, SceneMasks};
use crate::observation::{Begun, Looked, Looking};
use crate::optimizer::AdamWState;
use crate::scene::{Concept, Role};
use crate::size::Size;

/// The alternation after any of its steps. Going on from it gives the same bits as never having stopped.
#[derive(Debug, Clone)]
pub struct EmState {
    /// The tokens with their optimizer.
    pub learned: LearnedConcepts,
    /// Whether they are still in textual inversion.
    pub is_inverting: bool,
    /// The masks; empty before the first ones.
    pub masks: SceneMasks,
    /// What they were concluded from, one per picture; empty if the masks were given.
    pub observations: Vec<Observation>,
    /// Free energy of each picture's CRF, in nats per pixel; empty if the masks were given.
    pub energies: Vec<f64>,
    /// Rounds done.
    pub round: usize,
    /// How far the E-step has come that ends the round after them.
    pub looked: Looked,
}

/// [`EmState`], borrowed.
#[derive(Debug, Clone, Copy)]
pub struct EmMoment<'a> {
    /// The tokens with their optimizer.
    pub learned: &'a LearnedConcepts,
    /// Whether they are still in textual inversion.
    pub is_inverting: bool,
    /// The masks; empty before the first ones.
    pub masks: &'a [ImageMasks],
    /// What they were concluded from.
    pub observations: &'a [Observation],
    /// Free energy of each picture's CRF.
    pub energies: &'a [f64],
    /// Rounds done.
    pub round: usize,
    /// How far the E-step has come.
    pub looking: Option<Looking<'a>>,
    /// Whether all rounds are done.
    pub is_last: bool,
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
    is_inverting: bool,
    round: usize,
    mask_sizes: Vec<(usize, Size)>,
    /// Observations by picture; none if the masks were given.
    observations: Vec<ObservationEntry>,
    /// Bits of `f64`: decimal digits would not come back exactly.
    energies: Vec<u64>,
    /// Those of the E-step that is on its way.
    looked: Vec<ObservationEntry>,
    begun: Option<BegunEntry>,
}

#[derive(Serialize, Deserialize)]
struct ObservationEntry {
    n_concepts: usize,
    size: Size,
    evidence: Option<EvidenceEntry>,
}

/// Draws are bits of `f64`.
#[derive(Serialize, Deserialize)]
struct EvidenceEntry {
    n_concepts: usize,
    size: Size,
    draws: u64,
    attention_size: Size,
    attention_weight: u64,
    affinity_size: Size,
    affinity_draws: u64,
}

#[derive(Serialize, Deserialize)]
struct BegunEntry {
    n_draws: usize,
    n_concepts: usize,
    vectors_per_concept: usize,
    /// Bits of `f32`.
    weight: u32,
    layers: Vec<(usize, Size)>,
    evidence: Option<EvidenceEntry>,
}

#[derive(Serialize, Deserialize)]
struct ConceptEntry {
    token: String,
    class_word: String,
    background: bool,
}

const VERSION: u32 = 6;

/// Where the header is, in the file's metadata.
const METADATA: &str = "em_state";

/// Starts of the names of tensors: of the masks' observations, of those of the E-step that is on its way, and of the picture
/// after them.
const SEEN: &str = "";
const LOOKED: &str = "looked.";
const BEGUN: &str = "begun.";

impl EmState {
    /// With these tokens and nothing else.
    pub(crate) fn beginning(learned: LearnedConcepts, is_inverting: bool) -> Self {
        Self {
            learned,
            is_inverting,
            masks: Vec::new(),
            observations: Vec::new(),
            energies: Vec::new(),
            round: 0,
            looked: Looked::default(),
        }
    }

    /// What a user is told who goes on from it.
    #[must_use]
    pub fn going_on(&self) -> String {
        let step = self.learned.step;
        match &self.looked.begun {
            Some(begun) => format!(
                "going on after step {step}, picture {}, timestep {} of the extraction",
                self.looked.done.len() + 1,
                begun.n_draws
            ),
            None if self.is_inverting => {
                format!("going on after step {step} of textual inversion")
            }
            None => format!("going on after step {step}"),
        }
    }

    /// Whether it is in an E-step.
    #[must_use]
    pub fn is_looking(&self) -> bool {
        self.looked.begun.is_some()
    }

    /// As it is offered.
    pub(crate) fn moment(&self) -> EmMoment<'_> {
        EmMoment {
            learned: &self.learned,
            is_inverting: self.is_inverting,
            masks: &self.masks,
            observations: &self.observations,
            energies: &self.energies,
            round: self.round,
            looking: self.looked.begun.as_ref().map(|begun| Looking {
                done: &self.looked.done,
                begun,
            }),
            is_last: false,
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
        let reader = Reader { file: &file, path };
        let masks = header
            .mask_sizes
            .iter()
            .enumerate()
            .map(|(picture, &(n_concepts, size))| {
                let planes = file.read_u8(&format!("masks.{picture}"))?;
                if n_concepts == 0
                    || size.area() == 0
                    || planes.len() != n_concepts.saturating_mul(size.area())
                {
                    let reason = "holds masks of another size than it says";
                    return Err(Error::file(path, reason));
                }
                let planes = planes.chunks_exact(size.area()).map(<[u8]>::to_vec);
                ImageMasks::new(size, planes.collect())
            });
        let masks = masks.collect::<Result<SceneMasks>>()?;
        let tensor = |name: &str| file.read(name, device);
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
            is_inverting: header.is_inverting,
            masks,
            observations: reader.observations(SEEN, &header.observations)?,
            energies: header.energies.into_iter().map(f64::from_bits).collect(),
            round: header.round,
            looked: Looked {
                done: reader.observations(LOOKED, &header.looked)?,
                begun: header.begun.map(|entry| reader.begun(&entry)).transpose()?,
            },
        })
    }
}

impl EmMoment<'_> {
    /// About how many numbers are in it.
    pub(crate) fn numbers(&self) -> usize {
        let looked = self.looking.map_or(&[][..], |looking| looking.done);
        let begun = self
            .looking
            .and_then(|looking| looking.begun.evidence.as_ref());
        let of_evidence = |evidence: &Evidence| {
            let maps = evidence.attention.maps.iter().map(Vec::len).sum::<usize>();
            evidence.size.area() * evidence.log_likelihoods.len()
                + maps
                + evidence.affinity.parts().0.len()
        };
        let of_observation = |seen: &Observation| {
            seen.maps.maps.len() * seen.maps.size.area()
                + seen.evidence.as_ref().map_or(0, of_evidence)
        };
        let seen = self.observations.iter().chain(looked).map(of_observation);
        seen.sum::<usize>() + begun.map_or(0, of_evidence)
    }

    /// Writes the state, tensor by tensor.
    pub(crate) fn write(&self, file: &mut dyn Write) -> io::Result<()> {
        let learned = self.learned;
        let mut tensors = BTreeMap::from([
            ("rows".to_owned(), learned.rows.clone()),
            ("initial_rows".to_owned(), learned.initial_rows.clone()),
            ("optimizer.m".to_owned(), learned.optimizer.m[0].clone()),
            ("optimizer.v".to_owned(), learned.optimizer.v[0].clone()),
        ]);
        let mut fill = || -> Result<()> {
            for (picture, masks) in self.masks.iter().enumerate() {
                let Size { width, height } = masks.size();
                let shape = (masks.planes().len(), height, width);
                let planes = Tensor::from_vec(masks.planes().concat(), shape, &Device::Cpu)?;
                tensors.insert(format!("masks.{picture}"), planes);
            }
            put_observations(&mut tensors, SEEN, self.observations)?;
            if let Some(Looking { done, begun }) = self.looking {
                put_observations(&mut tensors, LOOKED, done)?;
                for (layer, sum) in &begun.sums.layers {
                    put(
                        &mut tensors,
                        format!("{BEGUN}layer.{layer}"),
                        &sum.maps,
                        sum.size,
                    )?;
                }
                if let Some(evidence) = &begun.evidence {
                    put_evidence(&mut tensors, BEGUN, 0, evidence)?;
                }
            }
            Ok(())
        };
        fill().map_err(io::Error::other)?;
        let header = serde_json::to_string(&self.header())?;
        let metadata = BTreeMap::from([(METADATA.to_owned(), header)]);
        write_tensors(file, &tensors, DType::F32, &metadata)
    }

    fn header(&self) -> Header {
        let learned = self.learned;
        let entry = |concept: &Concept| ConceptEntry {
            token: concept.token.clone(),
            class_word: concept.class_word.clone(),
            background: concept.role == Role::Background,
        };
        let entries = |seen: &[Observation]| seen.iter().map(ObservationEntry::of).collect();
        Header {
            version: VERSION,
            concepts: learned.concepts.iter().map(entry).collect(),
            vectors: learned.vectors.clone(),
            from_words: learned.from_words,
            step: learned.step,
            optimizer_step: learned.optimizer.t,
            seed: learned.seed,
            base_fingerprint: learned.base_fingerprint.clone(),
            is_inverting: self.is_inverting,
            round: self.round,
            mask_sizes: self
                .masks
                .iter()
                .map(|masks| (masks.planes().len(), masks.size()))
                .collect(),
            observations: entries(self.observations),
            energies: self
                .energies
                .iter()
                .map(|energy| energy.to_bits())
                .collect(),
            looked: self
                .looking
                .map_or_else(Vec::new, |looking| entries(looking.done)),
            begun: self.looking.map(|looking| BegunEntry::of(looking.begun)),
        }
    }
}

/// Tensors by name.
type Tensors = BTreeMap<String, Tensor>;

fn put(tensors: &mut Tensors, name: String, planes: &[Vec<f32>], size: Size) -> Result<()> {
    let shape = (planes.len(), size.height, size.width);
    let planes = Tensor::from_vec(planes.concat(), shape, &Device::Cpu)?;
    tensors.insert(name, planes);
    Ok(())
}

fn put_observations(tensors: &mut Tensors, start: &str, seen: &[Observation]) -> Result<()> {
    for (picture, Observation { maps, evidence }) in seen.iter().enumerate() {
        put(
            tensors,
            format!("{start}maps.{picture}"),
            &maps.maps,
            maps.size,
        )?;
        if let Some(evidence) = evidence {
            put_evidence(tensors, start, picture, evidence)?;
        }
    }
    Ok(())
}

fn put_evidence(
    tensors: &mut Tensors,
    start: &str,
    picture: usize,
    evidence: &Evidence,
) -> Result<()> {
    let mut put = |name: &str, planes: &[Vec<f32>], size: Size| {
        put(tensors, format!("{start}{name}.{picture}"), planes, size)
    };
    put("log_likelihoods", &evidence.log_likelihoods, evidence.size)?;
    let attention = &evidence.attention.maps;
    put("attention", attention, size_of_maps(attention))?;
    let n_cells = evidence.affinity.size().area();
    let (sums, _) = evidence.affinity.parts();
    put("affinity", &[sums.to_vec()], Size::square(n_cells))
}

/// Of maps whose proportions do not matter.
fn size_of_maps(maps: &[Vec<f32>]) -> Size {
    Size::new(maps.first().map_or(0, Vec::len), 1)
}

/// Reads back what the functions above put.
struct Reader<'a> {
    file: &'a TensorFile,
    path: &'a Path,
}

impl Reader<'_> {
    fn planes(&self, name: String, n: usize, size: Size) -> Result<Vec<Vec<f32>>> {
        if n == 0 {
            return Ok(Vec::new());
        }
        let values = self.file.read(&name, &Device::Cpu)?;
        let values = values.flatten_all()?.to_vec1::<f32>()?;
        if size.area() == 0 || values.len() != n.saturating_mul(size.area()) {
            let reason = format!("holds {name} of another size than it says");
            return Err(Error::file(self.path, reason));
        }
        if !values.iter().all(|value| value.is_finite()) {
            let reason = format!("holds values in {name} that are no numbers");
            return Err(Error::file(self.path, reason));
        }
        let planes = values.chunks_exact(size.area());
        Ok(planes.map(<[f32]>::to_vec).collect())
    }

    fn observations(&self, start: &str, entries: &[ObservationEntry]) -> Result<Vec<Observation>> {
        let read = |(picture, entry): (usize, &ObservationEntry)| {
            let name = format!("{start}maps.{picture}");
            let maps = AttentionMaps {
                size: entry.size,
                maps: self.planes(name, entry.n_concepts, entry.size)?,
            };
            let evidence = entry.evidence.as_ref();
            let evidence = evidence.map(|entry| self.evidence(start, picture, entry));
            Ok(Observation {
                maps,
                evidence: evidence.transpose()?,
            })
        };
        entries.iter().enumerate().map(read).collect()
    }

    fn evidence(&self, start: &str, picture: usize, entry: &EvidenceEntry) -> Result<Evidence> {
        let n = entry.n_concepts;
        let planes = |name: &str, n: usize, size: Size| {
            self.planes(format!("{start}{name}.{picture}"), n, size)
        };
        let cells = Size::square(entry.affinity_size.area());
        let sums = planes("affinity", 1, cells)?.concat();
        let draws = f64::from_bits(entry.affinity_draws);
        let affinity = Affinity::from_parts(entry.affinity_size, sums, draws)
            .ok_or_else(|| Error::file(self.path, "holds affinities of another size"))?;
        let n_seen = if entry.attention_size.area() > 0 {
            n
        } else {
            0
        };
        Ok(Evidence {
            size: entry.size,
            log_likelihoods: planes("log_likelihoods", n, entry.size)?,
            n_draws: f64::from_bits(entry.draws),
            attention: MeanAttention {
                maps: planes("attention", n_seen, entry.attention_size)?,
                weight: f64::from_bits(entry.attention_weight),
            },
            affinity,
        })
    }

    fn begun(&self, entry: &BegunEntry) -> Result<Begun> {
        let layer = |&(layer, size): &(usize, Size)| {
            let maps = self.planes(format!("{BEGUN}layer.{layer}"), entry.n_concepts, size)?;
            Ok((layer, LayerSum { size, maps }))
        };
        let evidence = entry.evidence.as_ref();
        let evidence = evidence.map(|entry| self.evidence(BEGUN, 0, entry));
        Ok(Begun {
            n_draws: entry.n_draws,
            sums: AttentionSums {
                n_concepts: entry.n_concepts,
                vectors_per_concept: entry.vectors_per_concept,
                weight: f32::from_bits(entry.weight),
                layers: entry.layers.iter().map(layer).collect::<Result<_>>()?,
            },
            evidence: evidence.transpose()?,
        })
    }
}

impl ObservationEntry {
    fn of(seen: &Observation) -> Self {
        Self {
            n_concepts: seen.maps.maps.len(),
            size: seen.maps.size,
            evidence: seen.evidence.as_ref().map(EvidenceEntry::of),
        }
    }
}

impl EvidenceEntry {
    fn of(evidence: &Evidence) -> Self {
        Self {
            n_concepts: evidence.log_likelihoods.len(),
            size: evidence.size,
            draws: evidence.n_draws.to_bits(),
            attention_size: size_of_maps(&evidence.attention.maps),
            attention_weight: evidence.attention.weight.to_bits(),
            affinity_size: evidence.affinity.size(),
            affinity_draws: evidence.affinity.parts().1.to_bits(),
        }
    }
}

impl BegunEntry {
    fn of(begun: &Begun) -> Self {
        Self {
            n_draws: begun.n_draws,
            n_concepts: begun.sums.n_concepts,
            vectors_per_concept: begun.sums.vectors_per_concept,
            weight: begun.sums.weight.to_bits(),
            layers: begun
                .sums
                .layers
                .iter()
                .map(|(&layer, sum)| (layer, sum.size))
                .collect(),
            evidence: begun.evidence.as_ref().map(EvidenceEntry::of),
        }
    }
}
