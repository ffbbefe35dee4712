use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use stable_diffusion::Result;
use stable_diffusion::model::{CheckpointSource, DiffusionModel};
use stable_diffusion::ops::Precision;
use tempfile::TempDir;

use crate::models::sd2_small;

fn load(folder: &Path) -> Result<DiffusionModel> {
    DiffusionModel::load(&CheckpointSource::Path(folder.to_owned()), &Device::Cpu)
}

/// A copy of the small checkpoint that a test may damage.
fn copy() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for part in fs::read_dir(sd2_small())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|p| p.is_dir())
    {
        let target = copy.path().join(part.file_name().unwrap());
        fs::create_dir(&target).unwrap();
        for file in fs::read_dir(part)
            .unwrap()
            .map(|entry| entry.unwrap().path())
        {
            fs::copy(&file, target.join(file.file_name().unwrap())).unwrap();
        }
    }
    copy
}

/// The message with which a copy is refused after `damage`, without the copy's path.
fn refused(damage: impl Fn(&Path)) -> String {
    let copy = copy();
    damage(copy.path());
    load(copy.path())
        .unwrap_err()
        .to_string()
        .replace(&copy.path().display().to_string(), "M")
}

fn edit_weights(path: &Path, edit: impl Fn(&mut HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn the_small_checkpoint_loads() {
    let model = load(&sd2_small()).unwrap();
    assert_eq!((model.image_size(), model.latent_size()), (64, 16));
    assert_eq!(model.fingerprint.len(), 64);
    // Another byte is another fingerprint.
    let copy = copy();
    edit_weights(
        &copy.path().join("vae/diffusion_pytorch_model.safetensors"),
        |tensors| {
            let bias = tensors["quant_conv.bias"].affine(2.0, 0.5).unwrap();
            tensors.insert("quant_conv.bias".to_owned(), bias);
        },
    );
    assert_ne!(load(copy.path()).unwrap().fingerprint, model.fingerprint);
}

#[test]
fn missing_files_are_named() {
    for file in [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ] {
        assert_eq!(
            refused(|m| fs::remove_file(m.join(file)).unwrap()),
            format!("M/{file}: no such file")
        );
    }
    let message = refused(|m| fs::remove_file(m.join("tokenizer/merges.txt")).unwrap());
    assert_eq!(
        message,
        "M/tokenizer: holds no CLIP vocabulary: neither tokenizer.json nor vocab.json with merges.txt"
    );
    let nowhere = load(Path::new("no/such/model")).unwrap_err().to_string();
    assert_eq!(
        nowhere,
        "no/such/model: there is no such file or folder; name a .safetensors file or a model's folder"
    );
}

#[test]
fn pickles_are_refused_even_as_a_part() {
    let message = refused(|m| {
        let from = m.join("unet/diffusion_pytorch_model.safetensors");
        fs::rename(from, m.join("unet/diffusion_pytorch_model.bin")).unwrap();
    });
    let reason = ".bin files are pickles, which can run any program when loaded: convert it to .safetensors first";
    assert_eq!(
        message,
        format!("M/unet/diffusion_pytorch_model.bin: {reason}")
    );
}

#[test]
fn truncated_weights_are_refused() {
    let file = "unet/diffusion_pytorch_model.safetensors";
    let message = refused(|m| {
        let bytes = fs::read(m.join(file)).unwrap();
        fs::write(m.join(file), &bytes[..bytes.len() - 5]).unwrap();
    });
    assert!(
        message.starts_with(&format!("M/{file}: truncated: ")),
        "{message}"
    );
}

#[test]
fn wrong_tensors_are_all_listed() {
    let message = refused(|m| {
        edit_weights(
            &m.join("unet/diffusion_pytorch_model.safetensors"),
            |tensors| {
                let bias = tensors.remove("conv_in.bias").unwrap();
                tensors.insert("conv_in.offset".to_owned(), bias);
                let weight = tensors["conv_out.weight"]
                    .narrow(0, 0, 3)
                    .unwrap()
                    .contiguous()
                    .unwrap();
                tensors.insert("conv_out.weight".to_owned(), weight);
            },
        );
    });
    assert_eq!(
        message,
        "M, U-Net does not hold the model that its configuration describes:\n  1 missing: conv_in.bias\n  \
         1 unexpected: conv_in.offset\n  \
         1 of the wrong shape: conv_out.weight is [3, 32, 3, 3] and should be [4, 32, 3, 3]"
    );
    for (file, tensor, component) in [
        (
            "text_encoder/model",
            "final_layer_norm.bias",
            "text encoder",
        ),
        (
            "vae/diffusion_pytorch_model",
            "decoder.mid_block.attentions.0.to_q.weight",
            "VAE",
        ),
    ] {
        let message = refused(|m| {
            edit_weights(&m.join(format!("{file}.safetensors")), |tensors| {
                tensors.remove(tensor).unwrap();
            });
        });
        assert!(
            message.starts_with(&format!("M, {component} does not hold")),
            "{message}"
        );
        assert!(
            message.contains("1 missing:") && message.contains(tensor),
            "{message}"
        );
    }
}

#[test]
fn parts_of_different_models_are_refused() {
    let message = refused(|m| {
        let vocab = fs::read_to_string(m.join("tokenizer/vocab.json")).unwrap();
        fs::write(
            m.join("tokenizer/vocab.json"),
            vocab.replacen('{', "{\"new</w>\": 9999, ", 1),
        )
        .unwrap();
    });
    assert!(message.starts_with("M: the tokenizer has "), "{message}");
}

#[test]
fn old_vaes_are_understood() {
    let names = [
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ];
    let copy = copy();
    edit_weights(
        &copy.path().join("vae/diffusion_pytorch_model.safetensors"),
        |tensors| {
            let old = tensors.drain().map(|(name, tensor)| {
                let renamed = names
                    .iter()
                    .fold(name.clone(), |name, (new, old)| name.replace(new, old));
                // Some of these files have convolutions here.
                let is_matrix = renamed != name && renamed.ends_with("weight");
                (
                    renamed,
                    if is_matrix {
                        tensor.unsqueeze(2).unwrap().unsqueeze(3).unwrap()
                    } else {
                        tensor
                    },
                )
            });
            *tensors = old.collect();
        },
    );
    let image = stable_diffusion::rng::Rng::new(2, "test", 0)
        .normal(&[1, 3, 64, 64], &Device::Cpu)
        .unwrap();
    let mean = |folder: &Path| {
        let moments = load(folder).unwrap().vae.moments(&image).unwrap();
        moments
            .mean
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
    };
    assert_eq!(mean(copy.path()), mean(&sd2_small()));
}

#[test]
fn an_embedded_checkpoint_is_the_same_model() {
    let mut files: Vec<(&'static str, &'static [u8])> = Vec::new();
    for part in fs::read_dir(sd2_small())
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        for file in fs::read_dir(&part)
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path())
        {
            let name = file
                .strip_prefix(sd2_small())
                .unwrap()
                .display()
                .to_string();
            files.push((name.leak(), fs::read(file).unwrap().leak()));
        }
    }
    let load = |files| {
        DiffusionModel::load(
            &CheckpointSource::Embedded {
                name: "small",
                files,
            },
            &Device::Cpu,
        )
    };
    let embedded = load(files.clone().leak()).unwrap();
    let on_disk = self::load(&sd2_small()).unwrap();
    assert_eq!(embedded.fingerprint, on_disk.fingerprint);
    assert_eq!(embedded.config, on_disk.config);
    let ids = embedded.tokenizer.encode("a dog").unwrap().ids;
    let encode = |model: &DiffusionModel| {
        let context = model.text_encoder.encode(&ids, None).unwrap();
        context.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(encode(&embedded), encode(&on_disk));

    let cut = |(name, bytes): (&'static str, &'static [u8])| match name {
        "vae/diffusion_pytorch_model.safetensors" => (name, &bytes[..bytes.len() - 1]),
        _ => (name, bytes),
    };
    let truncated: Vec<_> = files.iter().copied().map(cut).collect();
    let error = load(truncated.leak()).unwrap_err().to_string();
    assert!(
        error.starts_with("small/vae/diffusion_pytorch_model.safetensors: truncated"),
        "{error}"
    );
    let none = load(&[]).unwrap_err().to_string();
    assert_eq!(none, "small/unet/config.json: no such file");
}

#[test]
fn what_other_tools_save_loads() {
    let plain = load(&sd2_small()).unwrap();
    let table = "text_model.embeddings.token_embedding.weight";
    let text_encoder = |folder: &Path| folder.join("text_encoder/model.safetensors");
    let rows = plain.config.text_encoder.vocab_size;
    let set_rows = |folder: &Path, n: usize| {
        let config = folder.join("text_encoder/config.json");
        let text = fs::read_to_string(&config).unwrap();
        let mut values: serde_json::Value = serde_json::from_str(&text).unwrap();
        values["vocab_size"] = n.into();
        fs::write(config, values.to_string()).unwrap();
    };
    let grow = |folder: &Path, n: usize| {
        edit_weights(&text_encoder(folder), |tensors| {
            let own = tensors
                .keys()
                .find(|name| table.ends_with(name.as_str()))
                .unwrap()
                .clone();
            let old = &tensors[&own];
            let more = Tensor::ones((n, old.dim(1).unwrap()), old.dtype(), &Device::Cpu).unwrap();
            let grown = Tensor::cat(&[old, &more], 0).unwrap();
            tensors.insert(own, grown);
        });
        set_rows(folder, rows + n);
    };
    let same_weights = |folder: &Path| {
        let model = load(folder).unwrap();
        for (name, weight) in &plain.unet.weights().0 {
            let other = &model.unet.weights().0[name];
            assert_eq!(weight.to_vec1_all(), other.to_vec1_all(), "{name}");
        }
        model
    };

    // A table that is padded beyond the vocabulary.
    let padded = copy();
    grow(padded.path(), 30);
    assert_eq!(
        same_weights(padded.path()).config.text_encoder.vocab_size,
        rows
    );

    // A token that textual inversion added.
    let inverted = copy();
    grow(inverted.path(), 1);
    let added = format!("\u{feff}{{\"<cat-toy>\": {rows}}}");
    fs::write(inverted.path().join("tokenizer/added_tokens.json"), added).unwrap();
    let model = same_weights(inverted.path());
    assert_eq!(model.config.text_encoder.vocab_size, rows + 1);
    assert_eq!(
        model.tokenizer.word_ids("<cat-toy>").unwrap(),
        [rows as u32]
    );
    let elsewhere = copy();
    fs::write(
        elsewhere.path().join("tokenizer/added_tokens.json"),
        "{\"<x>\": 7000000}",
    )
    .unwrap();
    assert!(
        load(elsewhere.path())
            .unwrap_err()
            .to_string()
            .contains("does not follow the vocabulary")
    );

    // CLIP's other parts.
    let whole = copy();
    edit_weights(&text_encoder(whole.path()), |tensors| {
        for name in [
            "text_projection.weight",
            "logit_scale",
            "vision_model.post_layernorm.weight",
        ] {
            tensors.insert(
                name.to_owned(),
                Tensor::ones(3, candle_core::DType::F32, &Device::Cpu).unwrap(),
            );
        }
    });
    same_weights(whole.path());

    // Python's JSON, Windows' mark.
    let python = copy();
    let scheduler = python.path().join("scheduler/scheduler_config.json");
    let text = fs::read_to_string(&scheduler).unwrap().replacen(
        '{',
        "{\"lambda_min_clipped\": -Infinity, ",
        1,
    );
    fs::write(&scheduler, format!("\u{feff}{text}")).unwrap();
    same_weights(python.path());
}

trait AllValues {
    fn to_vec1_all(&self) -> Vec<f32>;
}

impl AllValues for Tensor {
    fn to_vec1_all(&self) -> Vec<f32> {
        self.flatten_all().unwrap().to_vec1().unwrap()
    }
}

#[test]
fn weights_in_several_files_are_read_by_their_index() {
    let plain = load(&sd2_small()).unwrap();
    let sharded = copy();
    let unet = sharded.path().join("unet");
    let whole = unet.join("diffusion_pytorch_model.safetensors");
    let tensors = candle_core::safetensors::load(&whole, &Device::Cpu).unwrap();
    fs::remove_file(&whole).unwrap();
    let mut index = serde_json::Map::new();
    for i in 0..2 {
        let file = format!("diffusion_pytorch_model-0000{}-of-00002.safetensors", i + 1);
        let part: HashMap<_, _> = tensors
            .iter()
            .filter(|(name, _)| name.len() % 2 == i)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        index.extend(part.keys().map(|name| (name.clone(), file.clone().into())));
        candle_core::safetensors::save(&part, unet.join(file)).unwrap();
    }
    let write = |weight_map: &serde_json::Map<String, serde_json::Value>| {
        let json = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
        fs::write(
            unet.join("diffusion_pytorch_model.safetensors.index.json"),
            json.to_string(),
        )
        .unwrap();
    };
    write(&index);
    let model = load(sharded.path()).unwrap();
    for (name, weight) in &plain.unet.weights().0 {
        assert_eq!(
            weight.to_vec1_all(),
            model.unet.weights().0[name].to_vec1_all(),
            "{name}"
        );
    }
    let refused = |change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let mut changed = index.clone();
        change(&mut changed);
        write(&changed);
        load(sharded.path()).unwrap_err().to_string()
    };
    assert!(
        refused(&|map| drop(map.insert("x".into(), "gone.safetensors".into())))
            .contains("its file gone.safetensors is not there")
    );
    assert!(
        refused(&|map| drop(map.insert("x".into(), "../x.safetensors".into())))
            .contains("no name of a file in its folder")
    );
    let some = index.values().next().unwrap().clone();
    assert!(
        refused(&|map| drop(map.insert("absent".into(), some.clone())))
            .contains("does not hold absent")
    );
}

#[test]
fn another_vae_takes_the_place_of_the_checkpoints_own() {
    let folder = copy();
    let file = folder
        .path()
        .join("vae/diffusion_pytorch_model.safetensors");
    let own = load(folder.path()).unwrap();
    edit_weights(&file, |tensors| {
        let bias = tensors["quant_conv.bias"].affine(2.0, 0.5).unwrap();
        tensors.insert("quant_conv.bias".to_owned(), bias);
    });
    let source = CheckpointSource::Path(sd2_small());
    let with =
        |vae: &Path| DiffusionModel::load_with(&source, Some(vae), Precision::F32, &Device::Cpu);
    let (by_file, by_folder) = (with(&file).unwrap(), with(folder.path()).unwrap());
    assert_eq!(by_file.fingerprint, by_folder.fingerprint);
    assert_ne!(by_file.fingerprint, own.fingerprint);
    let image = Tensor::zeros((1, 3, 64, 64), candle_core::DType::F32, &Device::Cpu).unwrap();
    let mean = |model: &DiffusionModel| model.vae.moments(&image).unwrap().mean.to_vec1_all();
    assert_ne!(mean(&by_file), mean(&own));
    assert_eq!(mean(&by_file), mean(&load(folder.path()).unwrap()));
    let none = with(&sd2_small().join("text_encoder/model.safetensors"))
        .unwrap_err()
        .to_string();
    assert!(none.contains("holds no VAE"), "{none}");
}
