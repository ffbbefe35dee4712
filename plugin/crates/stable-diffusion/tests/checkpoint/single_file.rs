use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use stable_diffusion::config::{ModelConfig, Prediction};
use stable_diffusion::model::{CheckpointSource, DiffusionModel};
use stable_diffusion::ops::Precision;
use stable_diffusion::single_file::{self, text_encoder_name, unet_name, vae_name};
use stable_diffusion::text_encoder::TextEncoder;
use stable_diffusion::unet::UNet;
use stable_diffusion::vae::Vae;
use stable_diffusion::weights::{TensorFile, WeightMap};

use crate::models::{random, shrunk};
use crate::original_layout::{self, Entry};

type Shapes = BTreeMap<String, Vec<usize>>;

/// Checks that `translate` takes `entries` one to one to `expected`.
fn one_to_one(
    entries: &[Entry],
    prefix: &str,
    expected: &Shapes,
    translate: impl Fn(&str) -> Option<String>,
) {
    let mut places: Shapes = BTreeMap::new();
    for entry in entries {
        let name = entry.original.strip_prefix(prefix).unwrap();
        let place = translate(name).unwrap_or_else(|| panic!("{name} has no place"));
        // A packed projection counts as its three parts.
        let shape = match entry.diffusers.len() {
            1 => entry.shape.clone(),
            n => [&[entry.shape[0] / n], &entry.shape[1..]].concat(),
        };
        for part in &entry.diffusers {
            let place = if entry.diffusers.len() == 1 {
                &place
            } else {
                part
            };
            assert_eq!(place, part, "{name}");
            assert!(
                places
                    .insert(place.clone(), linear(place, &shape))
                    .is_none(),
                "{place} is taken twice"
            );
        }
    }
    assert_eq!(&places, expected);
}

/// The original VAE's attention has 1×1 convolutions where diffusers has linear layers.
fn linear(name: &str, shape: &[usize]) -> Vec<usize> {
    if name.contains("coder.mid_block.attentions") {
        shape[..shape.len().min(2)].to_vec()
    } else {
        shape.to_vec()
    }
}

#[test]
fn every_tensor_of_the_published_models_has_one_place() {
    for (config, n_text) in [(ModelConfig::sd_1_5(), 196), (ModelConfig::sd_2_1(), 372)] {
        let unet = WeightMap::shapes(|w| UNet::build(&config.unet, w)).unwrap();
        let vae = WeightMap::shapes(|w| Vae::new(&config.vae, w).map(drop)).unwrap();
        let text =
            WeightMap::shapes(|w| TextEncoder::new(&config.text_encoder, w).map(drop)).unwrap();
        assert_eq!((unet.len(), vae.len(), text.len()), (686, 248, n_text));
        let parameters = |shapes: &Shapes| {
            shapes
                .values()
                .map(|s| s.iter().product::<usize>())
                .sum::<usize>()
        };
        // The published counts: 859.5 and 865.9 million for the U-Nets, 83.65 for the VAE.
        let counts = if n_text == 196 {
            (859_520_964, 123_060_480)
        } else {
            (865_910_724, 340_387_840)
        };
        assert_eq!((parameters(&unet), parameters(&text)), counts);
        assert_eq!(parameters(&vae), 83_653_863);

        let entries = original_layout::unet(&config.unet);
        assert_eq!(entries.len(), 686);
        one_to_one(&entries, "model.diffusion_model.", &unet, |name| {
            unet_name(&config.unet, name)
        });
        let entries = original_layout::vae(&config.vae);
        assert_eq!(entries.len(), 248);
        one_to_one(&entries, "first_stage_model.", &vae, |name| {
            vae_name(&config.vae, name)
        });
        if n_text == 196 {
            let entries = original_layout::clip(&config);
            one_to_one(&entries, "cond_stage_model.transformer.", &text, |name| {
                Some(name.to_owned())
            });
        } else {
            one_to_one(
                &original_layout::open_clip(&config),
                "cond_stage_model.model.",
                &text,
                text_encoder_name,
            );
        }
    }
}

#[test]
fn names_that_no_model_has_are_refused() {
    let config = ModelConfig::sd_1_5();
    for name in [
        "input_blocks.12.0.in_layers.0.weight",
        "input_blocks.10.1.norm.weight",
        "input_blocks.3.1.op.weight",
        "output_blocks.12.0.in_layers.0.weight",
        "output_blocks.2.2.conv.weight",
        "output_blocks.11.2.conv.weight",
        "output_blocks.0.1.norm.weight",
        "input_blocks.1.0.nonsense.weight",
        "label_emb.0.0.weight",
        "",
        "out",
    ] {
        assert_eq!(unet_name(&config.unet, name), None, "{name}");
    }
    for name in [
        "encoder.up.0.block.0.norm1.weight",
        "decoder.up.4.block.0.norm1.weight",
        "encoder",
        "x.conv_in.weight",
    ] {
        assert_eq!(vae_name(&config.vae, name), None, "{name}");
    }
}

/// Writes components in the original layout, with the things that such files have beside them.
fn write(path: &Path, entries: &[Entry], weights: &BTreeMap<String, Tensor>) {
    let mut file = HashMap::new();
    for entry in entries {
        let parts: Vec<&Tensor> = entry.diffusers.iter().map(|name| &weights[name]).collect();
        let tensor = Tensor::cat(&parts, 0)
            .unwrap()
            .reshape(entry.shape.as_slice())
            .unwrap();
        file.insert(entry.original.clone(), tensor);
    }
    let scalar = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    for name in [
        "model_ema.decay",
        "alphas_cumprod",
        "first_stage_model.loss.logvar",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight",
    ] {
        file.insert(name.to_owned(), scalar.clone());
    }
    let ids = Tensor::arange(0_i64, 77, &Device::Cpu).unwrap();
    file.insert(
        "cond_stage_model.transformer.text_model.embeddings.position_ids".to_owned(),
        ids,
    );
    candle_core::safetensors::save(&file, path).unwrap();
}

#[test]
fn both_versions_survive_the_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    for config in [shrunk(ModelConfig::sd_1_5()), shrunk(ModelConfig::sd_2_1())] {
        let linear = config.unet.use_linear_projection;
        let text = if linear {
            original_layout::open_clip(&config)
        } else {
            original_layout::clip(&config)
        };
        let entries = [
            original_layout::unet(&config.unet),
            original_layout::vae(&config.vae),
            text,
        ]
        .concat();
        let components = random(&config, 11);
        let all = [&components.unet, &components.vae, &components.text_encoder];
        let all = all.iter().flat_map(|map| map.0.clone()).collect();
        let path = folder.path().join("model.safetensors");
        write(&path, &entries, &all);
        let file = TensorFile::open(&path).unwrap();
        let read = single_file::read(&file, &config, Precision::F32, &Device::Cpu).unwrap();
        for (found, expected) in [
            (&read.unet, &components.unet),
            (&read.vae, &components.vae),
            (&read.text_encoder, &components.text_encoder),
        ] {
            let names = |map: &WeightMap| map.0.keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(found), names(expected));
            let values = |t: &Tensor| {
                (
                    t.dims().to_vec(),
                    t.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                )
            };
            for (name, tensor) in &found.0 {
                assert_eq!(values(tensor), values(&expected.0[name]), "{name}");
            }
        }
        // Same tensors, same picture of the world: the whole way, not only the names.
        let latents = stable_diffusion::rng::Rng::new(1, "test", 0)
            .normal(&[1, 4, 8, 8], &Device::Cpu)
            .unwrap();
        let context = Tensor::zeros((1, 77, 12), DType::F32, &Device::Cpu).unwrap();
        let run = |map: &WeightMap| {
            let unet = UNet::new(&config.unet, map, None).unwrap();
            unet.forward(&latents, &[10.0], &context)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        assert_eq!(run(&read.unet), run(&components.unet));
    }
}

#[test]
fn tensors_without_a_place_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fake(
        &path,
        &[
            ("model.diffusion_model.label_emb.0.0.weight", &[4, 4]),
            ("first_stage_model.quantize.weight", &[2]),
        ],
    );
    let file = TensorFile::open(&path).unwrap();
    let error = single_file::read(&file, &ModelConfig::sd_1_5(), Precision::F32, &Device::Cpu)
        .unwrap_err()
        .to_string();
    let names = "first_stage_model.quantize.weight, model.diffusion_model.label_emb.0.0.weight";
    assert_eq!(
        error,
        format!("{}: 2 tensors have no place: {names}", path.display())
    );
}

/// A file of zeros.
fn fake(path: &Path, entries: &[(&str, &[usize])]) {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let file: HashMap<&str, Tensor> = entries
        .iter()
        .map(|(name, shape)| (*name, zeros(shape)))
        .collect();
    candle_core::safetensors::save(&file, path).unwrap();
}

const KEYS: &str = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight";

#[test]
fn versions_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let conv = "model.diffusion_model.input_blocks.0.0.weight";
    let detect = |entries: &[(&str, &[usize])]| {
        fake(&path, entries);
        single_file::detect(&TensorFile::open(&path).unwrap())
    };
    assert_eq!(
        detect(&[(KEYS, &[320, 768]), (conv, &[320, 4, 3, 3])]).unwrap(),
        ModelConfig::sd_1_5()
    );
    assert_eq!(
        detect(&[(KEYS, &[320, 1024])]).unwrap(),
        ModelConfig::sd_2_1_base()
    );
    let refuse = |entries: &[(&str, &[usize])]| {
        let error = detect(entries).unwrap_err().to_string();
        error
            .strip_prefix(&format!("{}: ", path.display()))
            .unwrap()
            .to_owned()
    };
    let inpainting = refuse(&[(KEYS, &[320, 768]), (conv, &[320, 9, 3, 3])]);
    assert_eq!(
        inpainting,
        "this is an inpainting model (9 input channels); a text-to-image model is needed"
    );
    let sdxl = refuse(&[("conditioner.embedders.0.transformer.x", &[1])]);
    assert_eq!(
        sdxl,
        "this is SDXL; supported are Stable Diffusion 1.x and 2.x"
    );
    let lora = refuse(&[("lora_unet_down.weight", &[1])]);
    assert_eq!(
        lora,
        "this is no Stable Diffusion 1.x or 2.x checkpoint: it has no attn2.to_k in its U-Net"
    );
    let bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias";
    for (std, prediction) in [(0.05_f32, Prediction::Epsilon), (0.2, Prediction::Velocity)] {
        let values = Tensor::new(&[1.0 - std, 1.0 + std], &Device::Cpu).unwrap();
        let keys = Tensor::zeros((2, 1024), DType::F32, &Device::Cpu).unwrap();
        candle_core::safetensors::save(&HashMap::from([(bias, values), (KEYS, keys)]), &path)
            .unwrap();
        let config = single_file::detect(&TensorFile::open(&path).unwrap()).unwrap();
        assert_eq!(config.scheduler.prediction, prediction);
    }
}

#[test]
fn a_single_file_without_its_vocabulary_is_refused_before_its_weights_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fake(&path, &[(KEYS, &[320, 768])]);
    let error = DiffusionModel::load(&CheckpointSource::Path(path), &Device::Cpu)
        .unwrap_err()
        .to_string();
    let reason = "holds no CLIP vocabulary: neither tokenizer.json nor vocab.json with merges.txt";
    assert_eq!(error, format!("{}: {reason}", folder.path().display()));
    for name in ["model.ckpt", "model.pt"] {
        let path = folder.path().join(name);
        std::fs::write(&path, b"anything").unwrap();
        let error = DiffusionModel::load(&CheckpointSource::Path(path), &Device::Cpu)
            .unwrap_err()
            .to_string();
        assert!(error.contains("are pickles"), "{error}");
    }
}

/// A file of zeros that take no space on the disk, and a vocabulary beside it.
fn write_true_size(folder: &Path, config: &ModelConfig) -> PathBuf {
    let entries = [
        original_layout::unet(&config.unet),
        original_layout::vae(&config.vae),
        original_layout::clip(config),
    ];
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for entry in entries.concat() {
        let next = end + 2 * entry.shape.iter().product::<usize>();
        let value =
            serde_json::json!({"dtype": "F16", "shape": entry.shape, "data_offsets": [end, next]});
        header.insert(entry.original, value);
        end = next;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let path = folder.join("v1-5.safetensors");
    std::fs::write(
        &path,
        [&(header.len() as u64).to_le_bytes(), header.as_slice()].concat(),
    )
    .unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    let pieces: Vec<String> = (0..49406).map(|i| format!("{i}</w>")).collect();
    let vocab = pieces
        .iter()
        .map(String::as_str)
        .chain(["<|startoftext|>", "<|endoftext|>"]);
    let vocab: serde_json::Map<_, _> = vocab
        .enumerate()
        .map(|(i, t)| (t.to_owned(), i.into()))
        .collect();
    std::fs::write(
        folder.join("vocab.json"),
        serde_json::to_vec(&vocab).unwrap(),
    )
    .unwrap();
    std::fs::write(folder.join("merges.txt"), "#version: 0.2\n").unwrap();
    path
}

/// A whole single file of SD 1.5's true size, of zeros that take no space on the disk.
/// `cargo test --release -p stable-diffusion --test checkpoint -- --ignored --nocapture`
#[test]
#[ignore = "needs 5 GB of memory"]
fn a_single_file_of_true_size_loads() {
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig::sd_1_5();
    let path = write_true_size(folder.path(), &config);
    let start = std::time::Instant::now();
    let model = DiffusionModel::load(&CheckpointSource::Path(path), &Device::Cpu).unwrap();
    println!("loaded in {:.1} s", start.elapsed().as_secs_f64());
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    println!(
        "{}",
        status
            .lines()
            .find(|line| line.starts_with("VmHWM"))
            .unwrap_or_default()
    );
    assert_eq!(model.config, config);
    let context = model
        .text_encoder
        .encode(&model.tokenizer.encode("").unwrap().ids, None)
        .unwrap();
    let latents = Tensor::zeros((1, 4, 64, 64), DType::F32, &Device::Cpu).unwrap();
    let start = std::time::Instant::now();
    assert_eq!(
        model
            .unet
            .forward(&latents, &[1.0], &context)
            .unwrap()
            .dims(),
        [1, 4, 64, 64]
    );
    println!(
        "one evaluation of the U-Net in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    let start = std::time::Instant::now();
    assert_eq!(model.vae.decode(&latents).unwrap().dims(), [1, 3, 512, 512]);
    println!(
        "one picture decoded in {:.1} s",
        start.elapsed().as_secs_f64()
    );
}
