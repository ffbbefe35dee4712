//! Files of weights and what comes with them.

use std::path::Path;

use candle_core::Device;
use personalization::concept_file::load_concepts;
use stable_diffusion::config::{DownBlock, ModelConfig, UpBlock};
use stable_diffusion::ops::Precision;
use stable_diffusion::single_file;
use stable_diffusion::tokenizer::Tokenizer;
use stable_diffusion::weights::TensorFile;
use stable_diffusion::{CheckpointSource, DiffusionModel};

use crate::files::{HEAD, files, in_file, in_folder, write};

/// Files of a model in diffusers' layout, beside those of its tokenizer.
const MODEL: [&str; 11] = [
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/shard-1.safetensors",
    "unet/shard-2.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.bin",
];
/// A VAE in the place of the model's own.
const OTHER_VAE: &str = "other_vae.safetensors";

/// A file of tensors: every one of them.
pub(crate) fn tensors(folder: &Path, bytes: &[u8]) -> Result<(), String> {
    in_file(folder, bytes, |path| {
        let Ok(file) = TensorFile::open(path) else {
            return Ok(());
        };
        for name in file.names() {
            let size = file
                .shape(name)
                .map(|shape| shape.iter().product::<usize>());
            let tensor = file.read(name, &Device::Cpu);
            if let (Ok(tensor), Some(size)) = (tensor, size)
                && tensor.elem_count() != size
            {
                return Err(format!("{name} has {} elements", tensor.elem_count()));
            }
            let _ = file.read_u8(name);
        }
        let _ = single_file::detect(&file);
        let vae = ModelConfig::sd_1_5().vae;
        let _ = single_file::read_vae(&file, &vae, &Device::Cpu);
        Ok(())
    })
}

/// A learned concept, or an embedding of another program.
pub(crate) fn embedding(folder: &Path, bytes: &[u8]) -> Result<(), String> {
    in_file(folder, bytes, |path| {
        if let Ok(learned) = load_concepts(&[path], &Device::Cpu) {
            let rows: usize = learned.vectors.iter().sum();
            if rows != learned.rows.dims()[0] || learned.concepts.len() != learned.vectors.len() {
                return Err(format!("{rows} vectors in {:?}", learned.rows.dims()));
            }
            let _ = learned.placeholders();
        }
        Ok(())
    })
}

/// A LoRA, a tuned U-Net, or a folder with either.
pub(crate) fn lora(folder: &Path, model: &DiffusionModel, bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(HEAD) {
        return in_file(folder, bytes, |path| {
            tuned(model, path);
            Ok(())
        });
    }
    in_folder(folder, |folder| {
        let known = [
            "adapter_model.safetensors",
            "adapter_config.json",
            "pytorch_lora_weights.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
        ];
        write(folder, bytes, &known)?;
        tuned(model, folder);
        Ok(())
    })
}

/// As a part of the way, and as it is.
fn tuned(model: &DiffusionModel, path: &Path) {
    let _ = model.with_tuned_weights(path, 0.7);
    if let Ok((tuned, _)) = model.with_tuned_weights(path, 1.0) {
        let _ = tuned.unet_weights();
    }
}

/// The files of a tokenizer, and a prompt for it in the file `prompt`.
pub(crate) fn tokenizer(bytes: &[u8]) -> Result<(), String> {
    let files = files(bytes);
    let file = |name: &str| {
        let mut found = files.iter().filter(|(file, _)| *file == name);
        found.next().map(|(_, content)| content.to_vec())
    };
    let Ok(tokenizer) = Tokenizer::from_files("fuzzed", |name| Ok(file(name)), 77) else {
        return Ok(());
    };
    let prompt = file("prompt").unwrap_or_default();
    let prompt = String::from_utf8_lossy(&prompt);
    let with = tokenizer.with_placeholders(&["<a>".to_owned(), "b".to_owned()]);
    for tokenizer in [Some(tokenizer), with.ok()].into_iter().flatten() {
        if let Ok(encoded) = tokenizer.encode(&prompt)
            && (encoded.ids.len() != tokenizer.length() || encoded.n_tokens > tokenizer.length())
        {
            return Err(format!("{} ids", encoded.ids.len()));
        }
        for word in prompt.split_whitespace() {
            let _ = tokenizer.word_ids(word);
        }
    }
    Ok(())
}

/// A checkpoint in one file, beside its tokenizer.
pub(crate) fn single_file(folder: &Path, bytes: &[u8]) -> Result<(), String> {
    in_folder(folder, |folder| {
        let mut known = Tokenizer::FILES.to_vec();
        known.extend(["model.safetensors", "scheduler_config.json", OTHER_VAE]);
        write(folder, bytes, &known)?;
        load(&folder.join("model.safetensors"), &folder.join(OTHER_VAE));
        Ok(())
    })
}

/// A checkpoint in diffusers' layout.
pub(crate) fn model_folder(folder: &Path, bytes: &[u8]) -> Result<(), String> {
    in_folder(folder, |folder| {
        let tokenizer = Tokenizer::FILES.map(|name| format!("tokenizer/{name}"));
        let mut known: Vec<&str> = tokenizer.iter().map(String::as_str).collect();
        known.extend(MODEL);
        known.push(OTHER_VAE);
        write(folder, bytes, &known)?;
        load(folder, &folder.join(OTHER_VAE));
        Ok(())
    })
}

/// In half precision: what is done to weights is done there.
fn load(path: &Path, other_vae: &Path) {
    let source = CheckpointSource::Path(path.to_owned());
    let vae = other_vae.is_file().then_some(other_vae);
    let _ = DiffusionModel::load_with(&source, vae, Precision::Bf16, &Device::Cpu);
}

/// A model of few weights, which adapters are put on.
pub(crate) fn small_model() -> Result<DiffusionModel, String> {
    let mut config = ModelConfig::sd_1_5();
    let (unet, text) = (&mut config.unet, &mut config.text_encoder);
    unet.sample_size = 8;
    unet.block_out_channels = vec![8, 8];
    unet.layers_per_block = vec![1, 1];
    unet.down_block_types = vec![DownBlock::CrossAttention, DownBlock::Plain];
    unet.up_block_types = vec![UpBlock::Plain, UpBlock::CrossAttention];
    unet.cross_attention_dim = 8;
    unet.heads = vec![2, 2];
    unet.transformer_layers_per_block = vec![1, 1];
    unet.norm_num_groups = 4;
    text.vocab_size = 8;
    text.hidden_size = 8;
    text.intermediate_size = 8;
    text.num_hidden_layers = 1;
    text.num_attention_heads = 2;
    config.vae.block_out_channels = vec![8, 8];
    config.vae.norm_num_groups = 4;
    let vocabulary = r#"{"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}"#;
    let file = |name: &str| {
        Ok(match name {
            "vocab.json" => Some(vocabulary.into()),
            "merges.txt" => Some(b"#version: 0.2\na b</w>\n".to_vec()),
            _ => None,
        })
    };
    let said = |error: stable_diffusion::Error| error.to_string();
    let tokenizer = Tokenizer::from_files("small", file, 77).map_err(said)?;
    DiffusionModel::random(&config, tokenizer, 3, &Device::Cpu).map_err(said)
}
