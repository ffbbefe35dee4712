//! What cannot be used - checkpoints, masks, words, parameters - is named in one sentence.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::{em_loop, refused, sampler, wide_picture, with};
use crate::contract::run;
use crate::doors;
use crate::support::{Place, conceptloom, node, repository};

#[test]
fn masks_of_another_shape_are_refused() {
    let place = Place::with_conceptloom();
    wide_picture(&place);
    let square = image::GrayImage::from_pixel(128, 128, image::Luma([255]));
    square.save(place.path().join("square.png")).unwrap();
    let mask = || {
        node(
            "LoadImageMask",
            json!({"image": "square.png", "channel": "red"}),
        )
    };
    let batch = json!({"mask_1": ["7", 0], "mask_2": ["8", 0], "mask_3": ["10", 0]});
    let masks =
        json!({"7": mask(), "8": mask(), "10": mask(), "9": node("MaskBatch", batch.clone())});
    let mut workflow = with(em_loop(json!({"mode": "given", "masks": ["9", 0]})), masks);
    workflow["2"] = node("LoadImage", json!({"image": "wide.png"}));
    let parts = ["another shape", "128 x 128", "144 x 96", "whole pictures"];
    refused(
        &place,
        &workflow,
        &[&["node 3 (EmLoop), input masks"][..], &parts].concat(),
    );
    workflow["3"] = node(
        "DenseCrfRefine",
        json!({"images": ["2", 0], "masks": ["9", 0]}),
    );
    let workflow = json!({
        "2": workflow["2"], "3": workflow["3"], "7": workflow["7"], "8": workflow["8"], "9": workflow["9"],
        "10": workflow["10"], "5": node("MaskToImage", json!({"mask": ["3", 0]})),
        "6": node("SaveImage", json!({"images": ["5", 0]})),
    });
    let parts = [
        "node 3 (DenseCrfRefine), input masks",
        "another shape",
        "192 x 128",
    ];
    refused(&place, &workflow, &parts);
}

/// A copy of the bundled checkpoint.
fn copy_of_the_checkpoint(folder: &Path) -> PathBuf {
    let from = repository().join("plugin/crates/sprites/model");
    let to = folder.join("model");
    for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        std::fs::create_dir_all(to.join(part)).unwrap();
        for file in std::fs::read_dir(from.join(part)).unwrap().flatten() {
            std::fs::copy(file.path(), to.join(part).join(file.file_name())).unwrap();
        }
    }
    to
}

fn model_of(checkpoint: &str) -> Value {
    let loader = node("LoadDiffusionModel", json!({"checkpoint": checkpoint}));
    with(sampler(json!({})), json!({"1": loader}))
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_and_not_waited_for() {
    let place = Place::with_conceptloom();
    let made = Command::new("mkfifo")
        .arg(place.path().join("pipe"))
        .status();
    assert!(made.unwrap().success());
    let loader = |inputs: Value| {
        with(
            sampler(json!({})),
            json!({"1": node("LoadDiffusionModel", inputs)}),
        )
    };
    let tuned = |path: &str| {
        let load = node("LoadTunedModel", json!({"model": ["1", 0], "path": path}));
        with(sampler(json!({"model": ["2", 0]})), json!({"2": load}))
    };
    for path in ["pipe", "/dev/zero"] {
        refused(
            &place,
            &loader(json!({"checkpoint": path})),
            &[path, "this is no file"],
        );
        refused(
            &place,
            &loader(json!({"vae": path})),
            &[path, "this is no file"],
        );
        refused(&place, &tuned(path), &[path, "this is no file"]);
    }
    let model = copy_of_the_checkpoint(place.path());
    let config = model.join("unet/config.json");
    std::fs::remove_file(&config).unwrap();
    std::fs::rename(place.path().join("pipe"), &config).unwrap();
    refused(
        &place,
        &model_of("model"),
        &["unet/config.json", "this is no file"],
    );
    // It has no end.
    for command in ["run", "batch"] {
        let done = place.host(&[command, "/dev/zero", "--out", "out"]);
        done.failed_with(&["/dev/zero", "bytes, at most"]);
    }
}

#[test]
fn a_checkpoint_that_cannot_be_used_is_named() {
    let place = Place::with_conceptloom();
    refused(
        &place,
        &model_of("/nowhere/sd15"),
        &["node 1 (LoadDiffusionModel)", "/nowhere/sd15"],
    );
    place.write("model.ckpt", b"\x80\x02}q\x00.");
    refused(
        &place,
        &model_of("model.ckpt"),
        &["model.ckpt", "safetensors"],
    );

    let model = copy_of_the_checkpoint(place.path());
    let unet = model.join("unet/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&unet).unwrap();
    std::fs::write(&unet, &bytes[..bytes.len() / 2]).unwrap();
    refused(
        &place,
        &model_of("model"),
        &["diffusion_pytorch_model.safetensors"],
    );
    std::fs::remove_file(&unet).unwrap();
    refused(&place, &model_of("model"), &["unet"]);
    std::fs::write(&unet, &bytes).unwrap();

    let config = model.join("unet/config.json");
    let mut content: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    content["block_out_channels"][0] = json!(96);
    std::fs::write(&config, content.to_string()).unwrap();
    refused(
        &place,
        &model_of("model"),
        &["conv_in.weight", "[64, 4, 3, 3]", "[96, 4, 3, 3]"],
    );
}

#[test]
fn a_mask_with_nothing_inside_is_refused() {
    let place = Place::with_conceptloom();
    image::GrayImage::new(128, 128)
        .save(place.path().join("black.png"))
        .unwrap();
    let mask = || {
        node(
            "LoadImageMask",
            json!({"image": "black.png", "channel": "red"}),
        )
    };
    let batch = node(
        "MaskBatch",
        json!({"mask_1": ["7", 0], "mask_2": ["8", 0], "mask_3": ["10", 0]}),
    );
    let masks = json!({"7": mask(), "8": mask(), "10": mask(), "9": batch});
    let workflow = with(em_loop(json!({"mode": "given", "masks": ["9", 0]})), masks);
    refused(&place, &workflow, &["node 3 (EmLoop)", "masks", "empty"]);
}

#[test]
fn words_and_prompts_that_cannot_be_used_are_named() {
    let place = Place::with_conceptloom();
    for (list, parts) in [
        (
            "<>",
            &["node 3 (EmLoop), input concept_list", "<>", "class word"][..],
        ),
        ("", &["concept_list", "one concept per line"]),
    ] {
        refused(&place, &em_loop(json!({"concept_list": list})), parts);
    }
    // The vocabulary knows every byte; this one does not know those of one word.
    let tokenizer = copy_of_the_checkpoint(place.path()).join("tokenizer/tokenizer.json");
    let mut content: Value = serde_json::from_slice(&std::fs::read(&tokenizer).unwrap()).unwrap();
    let vocabulary = content["model"]["vocab"].as_object_mut().unwrap();
    for (i, byte) in ["ç", "ĭ", "Ĺ", "ç</w>", "ĭ</w>", "Ĺ</w>"]
        .into_iter()
        .enumerate()
    {
        let id = vocabulary.remove(byte).unwrap();
        vocabulary.insert(format!("gone{i}"), id);
    }
    std::fs::write(&tokenizer, content.to_string()).unwrap();
    let loader = node("LoadDiffusionModel", json!({"checkpoint": "model"}));
    let workflow = with(
        em_loop(json!({"concept_list": "<bob> 狗"})),
        json!({"1": loader}),
    );
    refused(
        &place,
        &workflow,
        &["node 3 (EmLoop), input concept_list", "狗"],
    );

    refused(
        &place,
        &sampler(json!({"prompts": "a photo of <bob>"})),
        &["node 3 (PersonalizedSampler), input prompts", "<bob>"],
    );
    // What nobody means is told before it takes hours.
    let much = "lorem ".repeat(200_000);
    for input in ["prompts", "negative_prompt"] {
        let parts = [
            &*format!("node 3 (PersonalizedSampler), input {input}"),
            "1200000 characters, at most 20000 are taken: shorten it",
        ];
        refused(&place, &sampler(json!({input: much})), &parts);
    }
    let parts = [
        "node 3 (PersonalizedSampler), input prompts",
        "tokens, at most 4800 are taken: shorten it",
    ];
    let words = "a dog ".repeat(3000);
    refused(&place, &sampler(json!({"prompts": words})), &parts);
    // Longer than the text encoder, and weighted: taken.
    let long = format!("(a dog:1.2) {}", "a dog ".repeat(60));
    place
        .run(&sampler(json!({"prompts": long})), &[])
        .succeeded();
}

#[test]
fn problems_are_told_all_at_once() {
    let place = Place::with_conceptloom();
    let workflow =
        em_loop(json!({"model": ["2", 0], "steps": -1, "learning_rate": 7.0, "mode": "guess"}));
    let done = place.run(&workflow, &[]);
    assert_eq!(done.code, Some(1));
    for part in [
        "cannot run, it has 4 problems",
        "node 3 (EmLoop), input model: it takes DIFFUSION_MODEL, but the output IMAGE of node 2 (LoadImage) gives IMAGE",
        "input steps: steps is -1, the smallest value is 0 [value_smaller_than_min]",
        "input learning_rate: learning_rate is 7.0, the largest value is 1 [value_bigger_than_max]",
        "input mode: mode is \"guess\", it can be one of: em, baseline, given [value_not_in_list]",
    ] {
        assert!(done.stderr.contains(part), "{part}\n\n{}", done.stderr);
    }
    assert_eq!(place.names("."), ["workflow.json"]);
}

#[test]
fn paths_that_are_empty_are_named_where_they_are_used_too() {
    let plugin = doors::rust(&conceptloom());
    for (class, parameters, input) in [
        ("LoadTunedModel", json!({}), "path"),
        ("LoadTunedModel", json!({"path": " "}), "path"),
        ("LoadConcepts", json!({"files": "\n \n"}), "files"),
        (
            "LoadDiffusionModel",
            json!({"checkpoint": ""}),
            "checkpoint",
        ),
    ] {
        let mut node = plugin.create(class).unwrap();
        let parameters = parameters.to_string();
        let looked = node.validate(&parameters).unwrap_err();
        // A path that comes over a wire is there only then.
        let ran = run(&mut node, &[], &parameters).unwrap_err();
        for error in [looked, ran] {
            assert_eq!(error.input, input, "{class}: {error}");
            assert!(error.message.starts_with("no "), "{class}: {error}");
            assert!(error.message.contains(" named; "), "{class}: {error}");
        }
    }
}
