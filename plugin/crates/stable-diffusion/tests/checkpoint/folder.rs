use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use stable_diffusion::Result;
use stable_diffusion::model::{CheckpointSource, DiffusionModel};
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
