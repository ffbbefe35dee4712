//! LoRA files by the names of the tools that write them.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use stable_diffusion::lora::{LoraAdapter, LoraNames};
use stable_diffusion::model::{CheckpointSource, DiffusionModel};
use stable_diffusion::rng::Rng;
use stable_diffusion::weights::WeightMap;

use crate::models::sd2_small;

fn model() -> DiffusionModel {
    DiffusionModel::load(&CheckpointSource::Path(sd2_small()), &Device::Cpu).unwrap()
}

fn noise(shape: &[usize], index: u64) -> Tensor {
    let noise = Rng::new(7, "adapters", index).normal(shape, &Device::Cpu);
    (noise.unwrap() * 0.1).unwrap()
}

/// Rank, down and up of every adapted module of both networks, by diffusers' path.
fn factors(model: &DiffusionModel, rank: usize) -> Vec<(&'static str, String, Tensor, Tensor)> {
    let of = |network, weights: &WeightMap, ends: &[&str]| -> Vec<_> {
        let paths = weights.0.iter().filter_map(|(name, weight)| {
            let path = name.strip_suffix(".weight")?;
            let fits = ends.iter().any(|end| path.ends_with(end));
            fits.then(|| (path.to_owned(), weight.dims().to_vec()))
        });
        let paths: Vec<_> = paths.collect();
        let made = paths.into_iter().enumerate().map(|(i, (path, shape))| {
            let (n_out, n_in) = (shape[0], shape[1..].iter().product());
            let i = i as u64;
            (
                network,
                path,
                noise(&[rank, n_in], 2 * i),
                noise(&[n_out, rank], 2 * i + 1),
            )
        });
        made.collect()
    };
    let mut all = of(
        "unet",
        &model.unet.weights().clone(),
        &["to_q", "to_k", "to_v", "to_out.0"],
    );
    all.extend(of(
        "text_encoder",
        &model.text_encoder_weights,
        &["q_proj", "out_proj", "fc1"],
    ));
    all
}

fn write(path: &Path, tensors: &HashMap<String, Tensor>) {
    candle_core::safetensors::save(tensors, path).unwrap();
}

/// The largest difference between the loaded weights and base + scale · up · down.
fn error_of(path: &Path, strength: f64, scale: f64, with_text_encoder: bool) -> f32 {
    let base = model();
    let (loaded, left_out) = base.with_tuned_weights(path, strength).unwrap();
    assert_eq!(left_out, [""; 0]);
    let mut worst = 0.0f32;
    for (network, path, down, up) in factors(&base, 2) {
        let name = format!("{path}.weight");
        let (before, after) = match network {
            "unet" => (
                &base.unet.weights().0[&name],
                &loaded.unet.weights().0[&name],
            ),
            _ => (
                &base.text_encoder_weights.0[&name],
                &loaded.text_encoder_weights.0[&name],
            ),
        };
        let change = if network == "unet" || with_text_encoder {
            scale * strength
        } else {
            0.0
        };
        let change = (up.matmul(&down).unwrap() * change).unwrap();
        let expected = (before + change.reshape(before.shape()).unwrap()).unwrap();
        let difference = (after - expected)
            .unwrap()
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap();
        worst = worst.max(difference.max(0).unwrap().to_scalar().unwrap());
    }
    worst
}

/// As older diffusers names what belongs to an attention.
fn of_processor(network: &str, path: &str, is_up: bool) -> Option<String> {
    let (attention, projection) = path.rsplit_once(".to_").filter(|_| network == "unet")?;
    let projection = projection.trim_end_matches(".0");
    let end = if is_up { "up" } else { "down" };
    Some(format!(
        "{attention}.processor.to_{projection}_lora.{end}.weight"
    ))
}

#[test]
fn every_tools_names_are_read() {
    let base = model();
    let folder = tempfile::tempdir().unwrap();
    let full = |network: &str, path: &str| match network {
        "text_encoder" if !path.starts_with("text_model.") => format!("text_model.{path}"),
        _ => path.to_owned(),
    };
    type Names = fn(&str, &str, bool) -> Option<String>;
    let tools: [(&str, Names); 7] = [
        ("kohya", |network, path, is_up| {
            let prefix = if network == "unet" {
                "lora_unet"
            } else {
                "lora_te"
            };
            let end = if is_up { "lora_up" } else { "lora_down" };
            Some(format!("{prefix}_{}.{end}.weight", path.replace('.', "_")))
        }),
        ("diffusers with PEFT", |network, path, is_up| {
            Some(format!(
                "{network}.{path}.lora_{}.weight",
                if is_up { "B" } else { "A" }
            ))
        }),
        ("PEFT", |network, path, is_up| {
            let end = if is_up { "B" } else { "A" };
            (network == "unet").then(|| format!("base_model.model.{path}.lora_{end}.weight"))
        }),
        ("diffusers before PEFT", |network, path, is_up| {
            Some(format!(
                "{network}.{path}.lora_linear_layer.{}.weight",
                if is_up { "up" } else { "down" }
            ))
        }),
        ("diffusers' scripts", |network, path, is_up| {
            let end = if is_up { "up" } else { "down" };
            (network == "unet").then(|| format!("{network}.{path}.lora.{end}.weight"))
        }),
        ("attention processors", |network, path, is_up| {
            Some(format!("unet.{}", of_processor(network, path, is_up)?))
        }),
        ("attention processors without a prefix", of_processor),
    ];
    for (tool, names) in tools {
        let mut tensors = HashMap::new();
        let mut with_text_encoder = false;
        for (network, path, down, up) in factors(&base, 2) {
            let path = full(network, &path);
            let (Some(down_name), Some(up_name)) =
                (names(network, &path, false), names(network, &path, true))
            else {
                continue;
            };
            with_text_encoder |= network == "text_encoder";
            tensors.insert(down_name, down);
            tensors.insert(up_name, up);
        }
        let file = folder.path().join("lora.safetensors");
        write(&file, &tensors);
        for strength in [1.0, 0.5] {
            let error = error_of(&file, strength, 1.0, with_text_encoder);
            assert!(error < 1e-6, "{tool}, strength {strength}: {error}");
        }
    }
}

#[test]
fn alpha_scales_and_ranks_may_differ() {
    let base = model();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pytorch_lora_weights.safetensors");
    let mut tensors = HashMap::new();
    for (network, path, down, up) in factors(&base, 2) {
        if network == "unet" {
            let module = format!("lora_unet_{}", path.replace('.', "_"));
            // Every other layer has rank 4: a factor of zeros changes nothing, its alpha keeps alpha / rank.
            let is_wide = path.ends_with("to_k");
            let (down, up, alpha) = if is_wide {
                let wide =
                    |t: &Tensor, dim| Tensor::cat(&[t, &t.zeros_like().unwrap()], dim).unwrap();
                (wide(&down, 0), wide(&up, 1), 2.0f32)
            } else {
                (down, up, 1.0)
            };
            tensors.insert(
                format!("{module}.lora_down.weight"),
                down.to_dtype(DType::F16).unwrap(),
            );
            tensors.insert(format!("{module}.lora_up.weight"), up);
            tensors.insert(
                format!("{module}.alpha"),
                Tensor::new(alpha, &Device::Cpu).unwrap(),
            );
        }
    }
    write(&file, &tensors);
    // A folder means the file in it; half precision is exact to 1e-3 of the change.
    let error = error_of(folder.path(), 1.0, 0.5, false);
    assert!(error < 1e-4, "{error}");
}

#[test]
fn pefts_own_folder_says_what_it_scales_by() {
    let base = model();
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = HashMap::new();
    for (network, path, down, up) in factors(&base, 2) {
        if network == "unet" {
            tensors.insert(format!("base_model.model.{path}.lora_A.weight"), down);
            tensors.insert(format!("base_model.model.{path}.lora_B.weight"), up);
        }
    }
    write(&folder.path().join("adapter_model.safetensors"), &tensors);
    let configuration = folder.path().join("adapter_config.json");
    for (text, scale) in [
        (r#"{"r": 2, "lora_alpha": 8}"#, 4.0),
        (
            r#"{"r": 2, "lora_alpha": 8, "use_rslora": true}"#,
            8.0 / 2.0f64.sqrt(),
        ),
    ] {
        std::fs::write(&configuration, text).unwrap();
        let error = error_of(folder.path(), 1.0, scale, false);
        assert!(error < 1e-5, "{text}: {error}");
    }
    std::fs::write(&configuration, "{").unwrap();
    let error = base.with_tuned_weights(folder.path(), 1.0).unwrap_err();
    assert!(error.to_string().contains("its configuration"), "{error}");
}

#[test]
fn what_is_saved_is_what_is_loaded() {
    let base = model();
    let adapter = LoraAdapter::new(base.unet.weights(), 3, 6.0, 5).unwrap();
    for (i, (_, variable)) in adapter.variables().iter().enumerate() {
        variable.set(&noise(variable.dims(), i as u64)).unwrap();
    }
    let merged = adapter.merged(base.unet.weights()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for names in [LoraNames::Kohya, LoraNames::Peft] {
        let file = folder.path().join("lora.safetensors");
        let mut written = std::fs::File::create(&file).unwrap();
        adapter.write(&mut written, names).unwrap();
        let (loaded, left_out) = base.with_tuned_weights(&file, 1.0).unwrap();
        assert_eq!(left_out, [""; 0]);
        for (name, weight) in &loaded.unet.weights().0 {
            let difference = (weight - &merged.0[name])
                .unwrap()
                .abs()
                .unwrap()
                .flatten_all()
                .unwrap();
            assert!(
                difference.max(0).unwrap().to_scalar::<f32>().unwrap() < 1e-6,
                "{name}"
            );
        }
    }
    // Only the finished file is left.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_is_no_lora_of_this_model_says_so() {
    let base = model();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.safetensors");
    let refused = |tensors: &[(&str, &[usize])]| {
        let tensors = tensors
            .iter()
            .map(|(name, shape)| ((*name).to_owned(), noise(shape, 0)));
        write(&file, &tensors.collect());
        base.with_tuned_weights(&file, 1.0).unwrap_err().to_string()
    };
    let module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k";
    let (down, up) = (
        format!("{module}.lora_A.weight"),
        format!("{module}.lora_B.weight"),
    );
    for (tensors, part) in [
        (
            &[
                ("unet.far.lora_A.weight", &[2, 2][..]),
                ("unet.far.lora_B.weight", &[2, 2]),
            ][..],
            "made for another model",
        ),
        (
            &[(&down, &[2, 5]), (&up, &[5, 2])],
            "made for another model",
        ),
        (&[(&down, &[2, 5])], "one factor of two"),
        (&[("lora_unet_x.hada_w1_a", &[2, 2])], "LoHa"),
        (
            &[(&down, &[2, 5]), ("unet.conv_in.bias", &[3])],
            "unet.conv_in.bias is not part of an adapter",
        ),
    ] {
        let message = refused(tensors);
        assert!(message.contains(part), "{message}");
    }
    let empty = base
        .with_tuned_weights(folder.path(), 1.0)
        .unwrap_err()
        .to_string();
    assert!(
        empty.contains("neither a tuned U-Net nor a LoRA"),
        "{empty}"
    );
    // Some of another model, some of this one: the rest is told.
    let tensors = [
        ("lora_te2_x.lora_down.weight", vec![2, 2]),
        ("lora_te2_x.lora_up.weight", vec![2, 2]),
    ];
    let (_, _, down_values, up_values) = factors(&base, 2).swap_remove(0);
    let mut all: HashMap<_, _> = tensors
        .iter()
        .map(|(name, shape)| ((*name).to_owned(), noise(shape, 1)))
        .collect();
    let first = factors(&base, 2).swap_remove(0).1;
    all.insert(format!("unet.{first}.lora_A.weight"), down_values);
    all.insert(format!("unet.{first}.lora_B.weight"), up_values);
    write(&file, &all);
    assert_eq!(
        base.with_tuned_weights(&file, 1.0).unwrap().1,
        ["lora_te2_x"]
    );
}
