//! A whole checkpoint in memory: diffusers' folder, a single file, or one that is part of the program.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use durable_files::{NewFolder, write_over};
use serde::Deserialize;

use crate::config::{ModelConfig, SchedulerConfig, TextEncoderConfig, UNetConfig, VaeConfig};
use crate::error::{CheckpointError, Error, Result};
use crate::lora::LoraAdapter;
use crate::lora_file::LoraFile;
use crate::memory::Memory;
use crate::noise_schedule::NoiseSchedule;
use crate::ops::Precision;
use crate::single_file::{self, Components};
use crate::text_encoder::TextEncoder;
use crate::tokenizer::Tokenizer;
use crate::unet::UNet;
use crate::vae::{self, Vae};
use crate::weights::{TensorFile, WeightMap, refuse_pickle, regular, write_tensors};

/// Name of the weights in a folder of diffusers' layout.
const TUNED_WEIGHTS: &str = "diffusion_pytorch_model.safetensors";
/// Ends the name of the vocabulary's embeddings.
const TOKEN_TABLE: &str = "embeddings.token_embedding.weight";
/// Metadata of tuned weights: the checkpoint that they belong to.
const BASE_MODEL: &str = "base_model_blake3";

/// Where a checkpoint is.
#[derive(Debug, Clone)]
pub enum CheckpointSource {
    /// A folder in diffusers' layout (`unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`),
    /// or a single `.safetensors` file of SD 1.x or 2.x. CLIP's vocabulary is not in a single file:
    /// it is looked for beside it, as `tokenizer/`, as `tokenizer.json`, or as `vocab.json` and
    /// `merges.txt`. A `scheduler_config.json` beside it overrides what its version implies.
    Path(PathBuf),
    /// Files in diffusers' layout that are part of the program.
    Embedded {
        /// What errors call the checkpoint.
        name: &'static str,
        /// Path within the checkpoint (`unet/config.json`) and contents.
        files: &'static [(&'static str, &'static [u8])],
    },
}

/// A checkpoint, ready to use. Cloning shares the weights.
#[derive(Debug, Clone)]
pub struct DiffusionModel {
    /// What the networks look like.
    pub config: ModelConfig,
    /// Text to ids.
    pub tokenizer: Tokenizer,
    /// Ids to text embeddings.
    pub text_encoder: Arc<TextEncoder>,
    /// Its weights, by transformers' names.
    pub text_encoder_weights: WeightMap,
    /// The denoiser.
    pub unet: Arc<UNet>,
    /// Pictures to latents and back.
    pub vae: Arc<Vae>,
    /// Its weights, by diffusers' names.
    pub vae_weights: WeightMap,
    /// The noise.
    pub noise_schedule: NoiseSchedule,
    /// Where the tensors are.
    pub device: Device,
    /// blake3 over the weight files, in hexadecimal.
    pub fingerprint: String,
    /// The adapter that is part of `unet`, if one was applied.
    pub lora: Option<LoraAdapter>,
    /// Whether weights of `unet` are not the checkpoint's, besides the adapter.
    pub is_tuned: bool,
}

impl DiffusionModel {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// One message that names the file and everything wrong with it: missing, truncated, a pickle,
    /// not supported, or tensors missing, left over or of the wrong shape.
    pub fn load(source: &CheckpointSource, device: &Device) -> Result<Self> {
        Self::load_with(source, None, Precision::F32, device)
    }

    /// Loads a checkpoint with the VAE of another file, or of a folder in diffusers' layout, in the place of its own, and the
    /// denoiser in this precision.
    ///
    /// # Errors
    /// Those of [`load`](Self::load), and [`Error::Argument`] for f16 on a CPU.
    pub fn load_with(
        source: &CheckpointSource,
        vae: Option<&Path>,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        match source {
            CheckpointSource::Path(path) if path.is_dir() => {
                load_folder(&Folder::Directory(path), vae, precision, device)
            }
            CheckpointSource::Path(path) => load_single_file(path, vae, precision, device),
            CheckpointSource::Embedded { name, files } => {
                load_folder(&Folder::Embedded { name, files }, vae, precision, device)
            }
        }
    }

    /// This model with a denoiser in this precision.
    ///
    /// # Errors
    /// [`Error::Argument`] for f16 on a CPU, [`Error::Tensor`] when the tensor library fails.
    pub fn with_precision(self, precision: Precision) -> Result<Self> {
        let unet = match Arc::try_unwrap(self.unet) {
            Ok(unet) => unet,
            Err(shared) => {
                UNet::new(&self.config.unet, shared.weights(), self.lora.as_ref())?.like(&shared)
            }
        };
        Ok(Self {
            unet: Arc::new(unet.with_precision(precision)?),
            ..self
        })
    }

    /// This model with a denoiser whose steps of learning keep this much, and a VAE that takes pictures of half
    /// again the model's own area in tiles of its size if it is [`Memory::Lean`].
    ///
    /// # Errors
    /// [`Error::Tensor`] when the tensor library fails.
    pub fn with_memory(self, memory: Memory) -> Result<Self> {
        let unet = UNet::new(&self.config.unet, self.unet.weights(), self.lora.as_ref())?
            .like(&self.unet)
            .with_memory(memory);
        let tile = (memory == Memory::Lean).then(|| self.latent_size());
        Ok(Self {
            unet: Arc::new(unet),
            vae: Arc::new(self.vae.with_tile(tile)),
            ..self
        })
    }

    /// A model with random weights, for tests and measurements.
    ///
    /// # Errors
    /// [`Error::Config`] if the parts do not fit together, or not with the tokenizer.
    pub fn random(
        config: &ModelConfig,
        tokenizer: Tokenizer,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let components = Components {
            unet: WeightMap::random(seed, |w| UNet::build(&config.unet, w))?.to_device(device)?,
            vae: WeightMap::random(seed.wrapping_add(1), |w| Vae::new(&config.vae, w).map(drop))?
                .to_device(device)?,
            text_encoder: WeightMap::random(seed.wrapping_add(2), |w| {
                TextEncoder::new(&config.text_encoder, w).map(drop)
            })?
            .to_device(device)?,
        };
        Self::assemble(
            "random model",
            config.clone(),
            tokenizer,
            components,
            device,
            format!("random-{seed}"),
        )
    }

    /// Builds the networks and checks that everything fits. `name` names the checkpoint in errors.
    fn assemble(
        name: &str,
        mut config: ModelConfig,
        tokenizer: Tokenizer,
        components: Components,
        device: &Device,
        fingerprint: String,
    ) -> Result<Self> {
        config.check(name)?;
        let mut text_encoder_weights = components.text_encoder;
        let (ids, rows) = (tokenizer.base_vocab_size(), config.text_encoder.vocab_size);
        if ids > rows {
            let reason = format!(
                "the tokenizer has {ids} tokens, the text encoder's table only {rows} rows"
            );
            return Err(Error::config(name, reason));
        }
        // A table may be padded beyond its vocabulary; concepts' ids follow the vocabulary.
        let tables = text_encoder_weights.0.iter_mut();
        for (_, table) in tables.filter(|(name, _)| name.ends_with(TOKEN_TABLE)) {
            if table.dim(0)? == rows && ids < rows {
                *table = table.narrow(0, 0, ids)?.force_contiguous()?;
            }
        }
        config.text_encoder.vocab_size = ids;
        let text_encoder = text_encoder_weights.build(&format!("{name}, text encoder"), |w| {
            TextEncoder::new(&config.text_encoder, w)
        })?;
        let vae = components
            .vae
            .build(&format!("{name}, VAE"), |w| Vae::new(&config.vae, w))?;
        let unet =
            UNet::new(&config.unet, &components.unet, None).map_err(|error| match error {
                Error::Checkpoint(e) => CheckpointError {
                    file: format!("{name}, U-Net"),
                    ..e
                }
                .into(),
                other => other,
            })?;
        Ok(Self {
            noise_schedule: NoiseSchedule::new(&config.scheduler),
            tokenizer,
            text_encoder: Arc::new(text_encoder),
            text_encoder_weights,
            unet: Arc::new(unet),
            vae: Arc::new(vae),
            vae_weights: components.vae,
            device: device.clone(),
            fingerprint,
            lora: None,
            is_tuned: false,
            config,
        })
    }

    /// Writes the U-Net in diffusers' layout: `unet/config.json` and the weights as `dtype` (`f32` or `f16`) in the first
    /// of the folders `numbered(1)`, `numbered(2)`, … that has no `unet`. It loads with
    /// `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`. Both files are there or neither. Returns where
    /// the weights are.
    ///
    /// # Errors
    /// [`Error::CannotWrite`] when a file cannot be written.
    pub fn save_unet(
        &self,
        numbered: impl Fn(u32) -> PathBuf,
        dtype: DType,
        extra: &BTreeMap<String, String>,
    ) -> Result<PathBuf> {
        let unets = |n: u32| numbered(n).join("unet");
        // By the name that they would have had.
        let failed = |error: std::io::Error| Error::CannotWrite {
            file: unets(1).join(TUNED_WEIGHTS).display().to_string(),
            reason: error.to_string(),
        };
        let mut metadata = extra.clone();
        metadata.insert("format".to_owned(), "pt".to_owned());
        metadata.insert(BASE_MODEL.to_owned(), self.fingerprint.clone());
        let weights = &self.unet.weights().0;
        let text = format!("{:#}", self.config.unet.to_json());
        let written = || {
            let new = NewFolder::create(&unets(1))?;
            let [config, tensors] =
                ["config.json", TUNED_WEIGHTS].map(|name| new.path().join(name));
            write_over(&config, |file| file.write_all(text.as_bytes()))?;
            write_over(&tensors, |file| {
                write_tensors(file, weights, dtype, &metadata)
            })?;
            new.name(unets)
        };
        Ok(written().map_err(failed)?.join(TUNED_WEIGHTS))
    }

    /// This model with weights that were tuned on it: a folder that [`save_unet`](Self::save_unet) wrote (or its weights),
    /// or a LoRA file or folder of any tool (see `lora_file.rs`), whose changes count `strength` times. Also what the file
    /// calls layers that this model does not have.
    ///
    /// # Errors
    /// One message that names the file: it cannot be read, was tuned on another model, or does not fit.
    pub fn with_tuned_weights(&self, path: &Path, strength: f64) -> Result<(Self, Vec<String>)> {
        let in_folder = [
            path.join("unet").join(TUNED_WEIGHTS),
            path.join(TUNED_WEIGHTS),
        ];
        let file = in_folder.iter().find(|file| file.is_file());
        let path = file.cloned().unwrap_or_else(|| LoraFile::find(path));
        if path.is_dir() {
            return Err(Error::unreadable(
                path.display().to_string(),
                "this folder holds neither a tuned U-Net nor a LoRA; name its .safetensors file",
            ));
        }
        let weights = TensorFile::open(&path)?;
        let name = path.display().to_string();
        let base = weights.metadata().get(BASE_MODEL);
        if base.is_some_and(|base| *base != self.fingerprint) {
            return Err(Error::unreadable(
                name,
                "it was tuned on another model; load that one",
            ));
        }
        let mine = self.unet_weights()?;
        if LoraFile::is_one(&weights) {
            let beside = path.parent().unwrap_or(Path::new("."));
            let file = LoraFile::new(weights, beside)?;
            let changed = file.applied(
                &mine,
                &self.text_encoder_weights,
                &self.config.unet,
                strength,
            )?;
            let text_encoder = changed
                .text_encoder
                .build(&name, |w| TextEncoder::new(&self.config.text_encoder, w))?;
            let tuned = Self {
                text_encoder: Arc::new(text_encoder),
                text_encoder_weights: changed.text_encoder,
                ..self.with_unet(&changed.unet)?
            };
            return Ok((tuned, changed.left_out));
        }
        let weights = WeightMap::read(&weights, &self.device)?;
        let named = |error| match error {
            Error::Checkpoint(e) => CheckpointError {
                file: name.clone(),
                ..e
            }
            .into(),
            other => other,
        };
        let tuned = self.with_unet(&weights).map_err(named)?;
        if strength == 1.0 {
            return Ok((tuned, Vec::new()));
        }
        Ok((
            self.with_unet(&mine.towards(&weights, strength)?)?,
            Vec::new(),
        ))
    }

    /// The weights of the U-Net with its adapter in them.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the tensor library fails.
    pub fn unet_weights(&self) -> Result<WeightMap> {
        match &self.lora {
            Some(lora) => lora.merged(self.unet.weights()),
            None => Ok(self.unet.weights().clone()),
        }
    }

    fn with_unet(&self, weights: &WeightMap) -> Result<Self> {
        Ok(Self {
            unet: Arc::new(
                UNet::new(&self.config.unet, weights, None)?
                    .with_precision(self.unet.precision())?
                    .like(&self.unet),
            ),
            lora: None,
            is_tuned: true,
            ..self.clone()
        })
    }

    /// All weights; those that models share are the same tensors in both.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let adapter = self.lora.iter().flat_map(|lora| lora.factors.values());
        let maps = [
            self.unet.weights(),
            &self.text_encoder_weights,
            &self.vae_weights,
        ];
        maps.into_iter()
            .flat_map(|weights| weights.0.values())
            .chain(adapter.flat_map(|factors| [&factors.down, &factors.up]))
    }

    /// Width and height of a picture in pixels: 512 in SD 1.x.
    pub fn image_size(&self) -> usize {
        self.latent_size() * self.config.vae.downsampling()
    }

    /// Sides of a picture that every level of the network halves evenly are multiples of this, in pixels: 64 in SD 1.x.
    pub fn image_unit(&self) -> usize {
        let n_halvings = self.config.unet.block_out_channels.len().saturating_sub(1);
        self.config.vae.downsampling() << n_halvings
    }

    /// Width and height of a latent: 64 in SD 1.x.
    pub fn latent_size(&self) -> usize {
        self.config.unet.sample_size
    }
}

/// The files of a checkpoint in diffusers' layout.
enum Folder<'a> {
    Directory(&'a Path),
    Embedded {
        name: &'a str,
        files: &'static [(&'static str, &'static [u8])],
    },
}

impl Folder<'_> {
    /// What errors call `file`.
    fn name(&self, file: &str) -> String {
        match self {
            Self::Directory(path) => path.join(file).display().to_string(),
            Self::Embedded { name, .. } => format!("{name}/{file}"),
        }
    }

    fn read(&self, file: &str) -> Result<Option<Vec<u8>>> {
        match self {
            Self::Directory(path) => read_optional(&path.join(file)),
            Self::Embedded { files, .. } => Ok(files
                .iter()
                .find(|(name, _)| *name == file)
                .map(|(_, bytes)| bytes.to_vec())),
        }
    }

    fn require(&self, file: &str) -> Result<Vec<u8>> {
        self.read(file)?
            .ok_or_else(|| Error::unreadable(self.name(file), "no such file"))
    }

    /// Opens `folder/stem.safetensors`, its half-precision variant, or the shards that an index lists.
    fn tensors(&self, folder: &str, stem: &str) -> Result<Vec<TensorFile>> {
        let full = format!("{folder}/{stem}.safetensors");
        for file in [&full, &format!("{folder}/{stem}.fp16.safetensors")] {
            if let Some(file) = self.open(file)? {
                return Ok(vec![file]);
            }
        }
        for index in [
            format!("{full}.index.json"),
            format!("{full}.index.fp16.json"),
            format!("{folder}/{stem}.fp16.safetensors.index.json"),
        ] {
            if let Some(json) = self.read(&index)? {
                return self.shards(folder, &index, &json);
            }
        }
        if let Self::Directory(path) = self {
            for file in [
                format!("{folder}/{stem}.bin"),
                format!("{folder}/pytorch_model.bin"),
            ] {
                if path.join(&file).is_file() {
                    refuse_pickle(&path.join(&file))?;
                }
            }
        }
        Err(Error::unreadable(self.name(&full), "no such file"))
    }

    fn open(&self, file: &str) -> Result<Option<TensorFile>> {
        match self {
            Self::Directory(path) if path.join(file).is_file() => {
                TensorFile::open(&path.join(file)).map(Some)
            }
            Self::Directory(_) => Ok(None),
            Self::Embedded { files, .. } => {
                let found = files.iter().find(|(name, _)| *name == file);
                found
                    .map(|(_, bytes)| TensorFile::embedded(self.name(file), bytes))
                    .transpose()
            }
        }
    }

    /// The files of an index, in the order of their names.
    fn shards(&self, folder: &str, index: &str, json: &[u8]) -> Result<Vec<TensorFile>> {
        let fault = |reason: String| Error::config(self.name(index), reason);
        let Index { weight_map } =
            lenient_json::from_slice(json).map_err(|e| fault(format!("not an index: {e}")))?;
        let names: BTreeSet<&String> = weight_map.values().collect();
        let mut shards = Vec::new();
        for name in names {
            if name.contains(['/', '\\']) {
                return Err(fault(format!(
                    "\"{name}\" is no name of a file in its folder"
                )));
            }
            let shard = self.open(&format!("{folder}/{name}"))?;
            shards.push(shard.ok_or_else(|| fault(format!("its file {name} is not there")))?);
        }
        let is_missing = |(tensor, file): &(&String, &String)| {
            !shards
                .iter()
                .any(|shard| shard.name().ends_with(file.as_str()) && shard.shape(tensor).is_some())
        };
        match weight_map.iter().find(is_missing) {
            Some((tensor, file)) => Err(fault(format!("{file} does not hold {tensor}"))),
            None => Ok(shards),
        }
    }
}

/// What Hugging Face's libraries write beside weights in several files.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Most bytes of a file that is read as a whole: configurations, vocabularies.
const MAX_WHOLE: u64 = 64 << 20;

/// A file's bytes, `None` if it is not there.
pub(crate) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    let read = || match regular(path)? {
        n if n > MAX_WHOLE => Err(std::io::Error::other(format!(
            "it has {n} bytes, at most {MAX_WHOLE} are read"
        ))),
        _ => std::fs::read(path),
    };
    match read() {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::unreadable(path.display().to_string(), e)),
    }
}

/// The VAE that was given in the place of a checkpoint's own.
fn other_vae(
    path: &Path,
    config: &VaeConfig,
    hasher: &mut blake3::Hasher,
    device: &Device,
) -> Result<WeightMap> {
    let in_folder = [
        path.join("vae").join(TUNED_WEIGHTS),
        path.join(TUNED_WEIGHTS),
    ];
    let file = in_folder.iter().find(|file| file.is_file());
    let file = TensorFile::open(file.map_or(path, PathBuf::as_path))?;
    file.hash_into(hasher)?;
    single_file::read_vae(&file, config, device)
}

fn load_folder(
    folder: &Folder<'_>,
    vae: Option<&Path>,
    precision: Precision,
    device: &Device,
) -> Result<DiffusionModel> {
    let json = |file: &str| Ok::<_, Error>((folder.name(file), folder.require(file)?));
    let (unet, vae_config) = (json("unet/config.json")?, json("vae/config.json")?);
    let (text_encoder, scheduler) = (
        json("text_encoder/config.json")?,
        json("scheduler/scheduler_config.json")?,
    );
    let config = ModelConfig {
        unet: UNetConfig::from_json(&unet.0, &unet.1)?,
        text_encoder: TextEncoderConfig::from_json(&text_encoder.0, &text_encoder.1)?,
        vae: VaeConfig::from_json(&vae_config.0, &vae_config.1)?,
        scheduler: SchedulerConfig::from_json(&scheduler.0, &scheduler.1)?,
    };
    let tokenizer = Tokenizer::from_files(
        &folder.name("tokenizer"),
        |file| folder.read(&format!("tokenizer/{file}")),
        config.text_encoder.max_position_embeddings,
    )?;
    let mut hasher = blake3::Hasher::new();
    let mut read = |component: &str, stem: &str, precision: Precision| -> Result<WeightMap> {
        let mut weights = WeightMap::default();
        for file in folder.tensors(component, stem)? {
            file.hash_into(&mut hasher)?;
            let read = WeightMap::read_in(precision, &file, device)?;
            weights.0.extend(read.0);
        }
        Ok(weights)
    };
    let text_encoder = read("text_encoder", "model", Precision::F32)?;
    let unet = read("unet", "diffusion_pytorch_model", precision)?;
    let vae = match vae {
        Some(vae) => other_vae(vae, &config.vae, &mut hasher, device)?,
        None => vae::canonical_names(read("vae", "diffusion_pytorch_model", Precision::F32)?)?,
    };
    let components = Components {
        text_encoder,
        unet,
        vae,
    };
    let name = match folder {
        Folder::Directory(path) => path.display().to_string(),
        Folder::Embedded { name, .. } => (*name).to_owned(),
    };
    let fingerprint = hasher.finalize().to_hex().to_string();
    DiffusionModel::assemble(&name, config, tokenizer, components, device, fingerprint)?
        .with_precision(precision)
}

/// Where the scheduler of a single file may be, beside it.
const SCHEDULERS: [&str; 2] = ["scheduler_config.json", "scheduler/scheduler_config.json"];

/// Files that are read with the single file of a checkpoint where they lie beside it: another of them is another model.
#[must_use]
pub fn files_beside(single_file: &Path) -> Vec<PathBuf> {
    let beside = single_file.parent().unwrap_or(Path::new("."));
    let vocabularies = Tokenizer::FILES
        .into_iter()
        .flat_map(|name| [beside.join(name), beside.join("tokenizer").join(name)]);
    let schedulers = SCHEDULERS.into_iter().map(|name| beside.join(name));
    let all = schedulers.chain(vocabularies);
    all.filter(|path| path.is_file()).collect()
}

fn load_single_file(
    path: &Path,
    vae: Option<&Path>,
    precision: Precision,
    device: &Device,
) -> Result<DiffusionModel> {
    let file = TensorFile::open(path)?;
    if LoraFile::is_one(&file) {
        return Err(Error::config(
            file.name(),
            "this is a LoRA, no checkpoint; load its checkpoint, and put it on with LoadTunedModel",
        ));
    }
    let mut config = single_file::detect(&file)?;
    let beside = path.parent().unwrap_or(Path::new("."));
    for place in SCHEDULERS {
        let place = beside.join(place);
        if let Some(json) = read_optional(&place)? {
            config.scheduler = SchedulerConfig::from_json(&place.display().to_string(), &json)?;
            break;
        }
    }
    let folder = if beside.join("tokenizer").is_dir() {
        beside.join("tokenizer")
    } else {
        beside.to_owned()
    };
    let length = config.text_encoder.max_position_embeddings;
    let mut tokenizer = Tokenizer::from_files(
        &folder.display().to_string(),
        |name| read_optional(&folder.join(name)),
        length,
    )?;
    if let Some(padding) = single_file::padding(&config) {
        tokenizer = tokenizer.with_padding(padding)?;
    }
    let mut components = single_file::read(&file, &config, precision, device)?;
    let mut hasher = blake3::Hasher::new();
    file.hash_into(&mut hasher)?;
    if let Some(vae) = vae {
        components.vae = other_vae(vae, &config.vae, &mut hasher, device)?;
    } else if components.vae.0.is_empty() {
        return Err(Error::config(
            file.name(),
            "it has no VAE; name the file of one as well (the parameter vae)",
        ));
    }
    let fingerprint = hasher.finalize().to_hex().to_string();
    DiffusionModel::assemble(
        file.name(),
        config,
        tokenizer,
        components,
        device,
        fingerprint,
    )?
    .with_precision(precision)
}
