//! The real dynamic library through the real binary.
//!
//! | part | what is shown |
//! | --- | --- |
//! | `hand_wired` | one EM round wired by hand gives the bits of one round of EmLoop |
//! | `bad_input` | one clear sentence, an exit code that is not 0, nothing half-written |
//! | `cancel` | Ctrl-C during EM stops within a step, and the same command goes on |

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// `target/release`, where the tests, the binary and the library are built side by side.
fn built() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().to_path_buf()
}

fn host(folder: &Path) -> Command {
    let binary = built().join("host-demo");
    assert!(
        binary.exists(),
        "{} is not built; run the tests of the whole workspace",
        binary.display()
    );
    let mut command = Command::new(binary);
    command.current_dir(folder);
    command
}

/// Writes the workflow (API format) and runs it into `folder/out`.
fn run(folder: &Path, workflow: &Value) -> Output {
    std::fs::write(folder.join("graph.json"), workflow.to_string()).unwrap();
    host(folder)
        .args(["run", "graph.json", "--out", "out"])
        .output()
        .unwrap()
}

fn node(class: &str, inputs: Value) -> Value {
    json!({"class_type": class, "inputs": inputs})
}

/// Loads the model (1) and the demo's picture (2).
fn sources() -> Value {
    json!({
        "1": node("LoadDiffusionModel", json!({"checkpoint": "sprites"})),
        "2": node("LoadImage", json!({"image": "demo:dog-and-car.png"})),
    })
}

fn with(mut workflow: Value, more: Value) -> Value {
    let nodes = more.as_object().unwrap().clone();
    workflow.as_object_mut().unwrap().extend(nodes);
    workflow
}

const CONCEPTS: &str = "<rex> dog\n<vw> car\n<desk> table (background)";

fn em_loop(parameters: Value) -> Value {
    let inputs = json!({
        "model": ["1", 0], "images": ["2", 0], "concept_list": CONCEPTS, "steps": 3, "steps_per_round": 3,
        "first_timesteps": 4, "timesteps": 3, "joint_steps": 0, "seed": 11,
    });
    with(
        sources(),
        json!({
            "3": node("EmLoop", with(inputs, parameters)),
            "4": node("SaveConcepts", json!({"concepts": ["3", 0]})),
            "5": node("MaskToImage", json!({"mask": ["3", 2]})),
            "6": node("SaveImage", json!({"images": ["5", 0], "filename_prefix": "mask"})),
        }),
    )
}

/// The learned rows and the masks of a run.
fn results(folder: &Path) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let rows = ["rex", "vw", "desk"].map(|name| {
        let bytes = std::fs::read(folder.join(format!("out/concepts/{name}.safetensors"))).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        tensors.tensor("emb_params").unwrap().data().to_vec()
    });
    let masks = (1..=3).map(|i| {
        image::open(folder.join(format!("out/mask_{i:05}.png")))
            .unwrap()
            .into_rgb8()
            .into_raw()
    });
    (rows.to_vec(), masks.collect())
}

fn succeeded(output: &Output) {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn one_round_wired_by_hand_gives_the_bits_of_the_loop() {
    let (loop_folder, hand_folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    succeeded(&run(loop_folder.path(), &em_loop(json!({}))));

    let learner = |more: Value| {
        let inputs =
            json!({"model": ["1", 0], "images": ["2", 0], "concept_list": CONCEPTS, "seed": 11});
        node("ConceptTokenLearner", with(inputs, more))
    };
    let extractor = |concepts: &str, timesteps: usize| {
        let inputs = json!({"model": ["1", 0], "images": ["2", 0], "concepts": [concepts, 0], "timesteps": timesteps});
        node("AttentionMaskExtractor", inputs)
    };
    let crf = |extractor: &str, more: Value| {
        let inputs =
            json!({"images": ["2", 0], "masks": [extractor, 0], "attention": [extractor, 1]});
        node("DenseCrfRefine", with(inputs, more))
    };
    let by_hand = with(
        sources(),
        json!({
            "10": learner(json!({"steps": 0})),
            "11": extractor("10", 4),
            "12": crf("11", json!({})),
            "13": learner(json!({"steps": 3, "masks": ["12", 0], "concepts": ["10", 0]})),
            "14": extractor("13", 3),
            "15": crf("14", json!({"previous": ["12", 0]})),
            "16": node("SaveConcepts", json!({"concepts": ["13", 0]})),
            "17": node("MaskToImage", json!({"mask": ["15", 0]})),
            "18": node("SaveImage", json!({"images": ["17", 0], "filename_prefix": "mask"})),
        }),
    );
    succeeded(&run(hand_folder.path(), &by_hand));
    assert!(
        results(loop_folder.path()) == results(hand_folder.path()),
        "the bits differ"
    );
}

/// Runs what must fail: an exit code, every part in what it says, no panic, nothing half-written.
fn refused(folder: &Path, workflow: &Value, parts: &[&str]) {
    let output = run(folder, workflow);
    let said = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "it ran: {said}");
    assert!(!said.contains("panicked at"), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    assert_no_partial_files(folder);
}

fn assert_no_partial_files(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            assert_no_partial_files(&path);
        }
        assert!(
            path.extension()
                .is_none_or(|e| e != "partial" && e != "tmp"),
            "{} was left",
            path.display()
        );
    }
}

fn sampler(parameters: Value) -> Value {
    let inputs = json!({"model": ["1", 0], "prompts": "a photo of a dog", "steps": 1});
    with(
        sources(),
        json!({
            "3": node("PersonalizedSampler", with(inputs, parameters)),
            "4": node("SaveImage", json!({"images": ["3", 0]})),
        }),
    )
}

fn model_of(checkpoint: &str) -> Value {
    with(
        sampler(json!({})),
        json!({"1": node("LoadDiffusionModel", json!({"checkpoint": checkpoint}))}),
    )
}

/// A copy of the bundled checkpoint.
fn copy_of_the_checkpoint(folder: &Path) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugin/crates/sprites/model");
    let to = folder.join("model");
    for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        std::fs::create_dir_all(to.join(part)).unwrap();
        for file in std::fs::read_dir(from.join(part)).unwrap().flatten() {
            std::fs::copy(file.path(), to.join(part).join(file.file_name())).unwrap();
        }
    }
    to
}

#[test]
fn a_checkpoint_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    refused(
        folder.path(),
        &model_of("/nowhere/sd15"),
        &["/nowhere/sd15"],
    );
}

#[test]
fn a_truncated_checkpoint_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let unet =
        copy_of_the_checkpoint(folder.path()).join("unet/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&unet).unwrap();
    std::fs::write(&unet, &bytes[..bytes.len() / 2]).unwrap();
    refused(
        folder.path(),
        &model_of("model"),
        &["diffusion_pytorch_model.safetensors"],
    );
}

#[test]
fn every_tensor_of_another_shape_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = copy_of_the_checkpoint(folder.path()).join("unet/config.json");
    let text = std::fs::read_to_string(&config)
        .unwrap()
        .replacen("64,", "96,", 1);
    std::fs::write(&config, text).unwrap();
    refused(
        folder.path(),
        &model_of("model"),
        &["conv_in.weight", "[64, 4, 3, 3]", "[96, 4, 3, 3]"],
    );
}

#[test]
fn a_pickle_is_refused_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.ckpt"), b"\x80\x02}q\x00.").unwrap();
    refused(
        folder.path(),
        &model_of("model.ckpt"),
        &["model.ckpt", "safetensors"],
    );
}

#[test]
fn a_picture_that_is_none_is_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.png"), "not a picture").unwrap();
    let workflow = with(
        em_loop(json!({})),
        json!({"2": node("LoadImage", json!({"image": "notes.png"}))}),
    );
    refused(folder.path(), &workflow, &["notes.png"]);
}

#[test]
fn a_mask_with_nothing_inside_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    image::GrayImage::new(128, 128)
        .save(folder.path().join("black.png"))
        .unwrap();
    let mask = || {
        node(
            "LoadImageMask",
            json!({"image": "black.png", "channel": "red"}),
        )
    };
    let workflow = with(
        em_loop(json!({"mode": "given", "masks": ["9", 0]})),
        json!({
            "7": mask(), "8": mask(), "10": mask(),
            "9": node("MaskBatch", json!({"mask_1": ["7", 0], "mask_2": ["8", 0], "mask_3": ["10", 0]})),
        }),
    );
    refused(folder.path(), &workflow, &["masks", "empty"]);
}

#[test]
fn a_concept_without_a_word_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    refused(
        folder.path(),
        &em_loop(json!({"concept_list": "<rex>"})),
        &["<rex>", "class word"],
    );
}

#[test]
fn a_prompt_over_77_tokens_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    refused(
        folder.path(),
        &sampler(json!({"prompts": "a dog ".repeat(60)})),
        &["77"],
    );
}

#[test]
fn a_token_that_nobody_learned_is_named() {
    let folder = tempfile::tempdir().unwrap();
    refused(
        folder.path(),
        &sampler(json!({"prompts": "a photo of <rex>"})),
        &["<rex>"],
    );
}

#[test]
fn a_cycle_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let workflow = with(
        sources(),
        json!({
            "3": node("ImageBatch", json!({"image_1": ["4", 0]})),
            "4": node("ImageBatch", json!({"image_1": ["3", 0]})),
            "5": node("SaveImage", json!({"images": ["4", 0]})),
        }),
    );
    refused(folder.path(), &workflow, &["cycle"]);
}

#[test]
fn problems_are_told_all_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let workflow =
        em_loop(json!({"model": ["2", 0], "steps": -1, "learning_rate": 7.0, "mode": "guess"}));
    refused(
        folder.path(),
        &workflow,
        &[
            "return_type_mismatch",
            "steps",
            "value_smaller_than_min",
            "value_bigger_than_max",
            "value_not_in_list",
        ],
    );
    assert!(
        !folder.path().join("out").exists(),
        "a refused workflow left a folder"
    );
}

#[test]
fn a_taken_output_folder_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("out")).unwrap();
    std::fs::write(folder.path().join("out/precious.txt"), "mine").unwrap();
    refused(folder.path(), &sampler(json!({})), &["out"]);
    let names: Vec<_> = std::fs::read_dir(folder.path().join("out"))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_during_em_stops_within_a_step_and_the_run_goes_on_later() {
    let folder = tempfile::tempdir().unwrap();
    let workflow = em_loop(json!({"steps": 400, "steps_per_round": 2}));
    std::fs::write(folder.path().join("graph.json"), workflow.to_string()).unwrap();
    let mut child = host(folder.path())
        .args(["run", "graph.json", "--out", "out"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Long enough to be in the middle of the loop, whatever else the machine does.
    let started = Instant::now();
    while find_state(folder.path()).is_none() {
        assert!(
            started.elapsed() < Duration::from_secs(300),
            "no state was ever saved"
        );
        assert!(
            child.try_wait().unwrap().is_none(),
            "the run ended by itself"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert_no_partial_files(folder.path());
    assert!(
        find_state(folder.path()).is_some(),
        "nothing was kept to go on from"
    );
}

/// The saved state of a loop, wherever the host keeps it.
#[cfg(unix)]
fn find_state(folder: &Path) -> Option<PathBuf> {
    std::fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if path.is_dir() {
            return find_state(&path);
        }
        (path.file_name()? == "em-state.safetensors").then_some(path)
    })
}
