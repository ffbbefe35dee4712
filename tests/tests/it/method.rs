//! The real plugin through the real binary.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::contract::run;
use crate::doors;
use crate::support::{Done, Place, conceptloom, node, pixels, repository};

const CONCEPTS: &str = "<bob> man\n<tom> cat\n<desk> table (background)";

fn with(mut object: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    object.as_object_mut().unwrap().extend(more);
    object
}

/// Loads the model (1) and the demo's picture (2).
fn sources() -> Value {
    json!({
        "1": node("LoadDiffusionModel", json!({"checkpoint": "sprites"})),
        "2": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
    })
}

/// A loop of 3 steps whose tokens and masks are saved.
fn em_loop(parameters: Value) -> Value {
    let inputs = json!({
        "model": ["1", 0], "images": ["2", 0], "concept_list": CONCEPTS, "steps": 3, "steps_per_round": 3,
        "first_timesteps": 4, "timesteps": 3, "joint_steps": 0, "seed": 11,
    });
    let more = json!({
        "3": node("EmLoop", with(inputs, parameters)),
        "4": node("SaveConcepts", json!({"concepts": ["3", 0]})),
        "5": node("MaskToImage", json!({"mask": ["3", 2]})),
        "6": node("SaveImage", json!({"images": ["5", 0], "filename_prefix": "mask"})),
    });
    with(sources(), more)
}

fn sampler(parameters: Value) -> Value {
    let inputs = json!({"model": ["1", 0], "prompts": "a photo of a cat", "steps": 1});
    let more = json!({
        "3": node("PersonalizedSampler", with(inputs, parameters)),
        "4": node("SaveImage", json!({"images": ["3", 0]})),
    });
    with(sources(), more)
}

/// The learned rows and the masks of a run.
fn results(place: &Place, out: &str) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let rows = ["bob", "tom", "desk"].map(|name| {
        let bytes = place.read(&format!("{out}/concepts/{name}.safetensors"));
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        tensors.tensor("emb_params").unwrap().data().to_vec()
    });
    let masks = (1..=3).map(|i| pixels(&place.read(&format!("{out}/mask_{i:05}.png"))));
    (rows.to_vec(), masks.collect())
}

/// Fails in one sentence with these parts, and leaves nothing.
#[track_caller]
fn refused(place: &Place, workflow: &Value, parts: &[&str]) {
    let before = place.names(".");
    let done = place.run(workflow, &[]).failed_with(parts);
    let mut after = place.names(".");
    after.retain(|name| name != "workflow.json" || before.contains(name));
    assert_eq!(after, before, "{}", done.stderr);
}

#[test]
fn the_demo_ends_with_a_report_masks_concepts_and_pictures() {
    let place = Place::with_conceptloom();
    let few = [
        "EmLoop.steps=4",
        "EmLoop.steps_per_round=2",
        "EmLoop.first_timesteps=2",
        "EmLoop.timesteps=2",
    ];
    let fewer = [
        "EmLoop.joint_steps=2",
        "EmLoop.sample_every=2",
        "EmLoop.joint_scope=lora",
        "PersonalizedSampler.steps=2",
    ];
    let mut arguments = vec!["run"];
    arguments.extend(few.iter().chain(&fewer).flat_map(|set| ["--set", set]));
    let done = place.host(&arguments).succeeded();
    let report = done.stdout.trim();
    let out = report.strip_suffix("/report.html").unwrap();
    assert!(
        out.starts_with("runs/20") && out.ends_with("-demo"),
        "{out}"
    );
    let concepts = place.names(&format!("{out}/concepts"));
    assert_eq!(
        concepts,
        [
            "bob.safetensors",
            "desk.safetensors",
            "lora.safetensors",
            "tom.safetensors"
        ]
    );
    assert_eq!(place.names(&format!("{out}/masks")).len(), 3);
    assert_eq!(place.names(&format!("{out}/samples")).len(), 4);
    // What the sampler shows at its end is the picture itself, not a noisy one.
    let [shown, saved] = [
        "previews/8-sampling/002-step-8.png",
        "samples/picture_00004.png",
    ]
    .map(|name| pixels(&place.read(&format!("{out}/{name}"))));
    assert_eq!(shown, saved);
    let page = String::from_utf8(place.read(report)).unwrap();
    for part in [
        "mask IoU",
        "masked diffusion loss",
        "mask of &lt;bob&gt;",
        "attention alone",
        "mask IoU by attention alone",
        "round 2",
        "a photo of &lt;bob&gt; on grass",
        "EM loop · attention",
        "tokens step 4",
        "joint step 2",
    ] {
        assert!(page.contains(part), "no {part}");
    }
    let concept = place.read(&format!("{out}/concepts/bob.safetensors"));
    let (_, header) = safetensors::SafeTensors::read_metadata(&concept).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert!(serde_json::from_str::<Value>(&metadata["workflow"]).unwrap()["nodes"].is_array());
}

#[test]
fn a_tuned_unet_is_saved_and_comes_back() {
    let place = Place::with_conceptloom();
    let few = json!({"steps": 2, "steps_per_round": 2, "first_timesteps": 2, "timesteps": 2, "joint_steps": 2,
        "joint_learning_rate": 0.001, "joint_scope": "full"});
    let mut workflow = em_loop(few);
    let sampler = |model: &str, concepts: &str, slot: usize| {
        let inputs = json!({"model": [model, slot], "concepts": [concepts, 0], "steps": 2,
            "prompts": "a photo of <bob> on grass"});
        node("PersonalizedSampler", inputs)
    };
    workflow["4"] = node(
        "SaveConcepts",
        json!({"concepts": ["3", 0], "model": ["3", 1], "tuned_unet": "f32"}),
    );
    workflow["21"] = sampler("3", "3", 1);
    workflow["22"] = node(
        "SaveImage",
        json!({"images": ["21", 0], "filename_prefix": "tuned"}),
    );
    place.run(&workflow, &[]).succeeded();
    assert_eq!(
        place.names("out/concepts/unet"),
        ["config.json", "diffusion_pytorch_model.safetensors"]
    );
    std::fs::rename(place.path().join("out"), place.path().join("first")).unwrap();

    let files = "first/concepts/bob.safetensors\nfirst/concepts/tom.safetensors";
    let mut again = json!({
        "1": node("LoadDiffusionModel", json!({})),
        "2": node("LoadTunedModel", json!({"model": ["1", 0], "path": "first/concepts"})),
        "3": node("LoadConcepts", json!({"files": files})),
        "4": sampler("2", "3", 0),
        "5": node("SaveImage", json!({"images": ["4", 0], "filename_prefix": "tuned"})),
    });
    place.run(&again, &[]).succeeded();
    let picture = |folder: &str| pixels(&place.read(&format!("{folder}/tuned_00001.png")));
    assert_eq!(picture("out"), picture("first"));
    // The checkpoint alone paints another picture.
    std::fs::remove_dir_all(place.path().join("out")).unwrap();
    again["4"]["inputs"]["model"] = json!(["1", 0]);
    place.run(&again, &[]).succeeded();
    assert_ne!(picture("out"), picture("first"));
}

/// Runs into a folder of this name.
#[track_caller]
fn run_into(place: &Place, out: &str, workflow: &Value) -> Done {
    place.write("workflow.json", workflow.to_string());
    place
        .host(&["run", "workflow.json", "--out", out])
        .succeeded()
}

/// The loop of [`em_loop`], its nodes wired one by one.
fn round_by_hand() -> Value {
    let learner = |more: Value| {
        let inputs =
            json!({"model": ["1", 0], "images": ["2", 0], "concept_list": CONCEPTS, "seed": 11});
        node("ConceptTokenLearner", with(inputs, more))
    };
    let extractor = |concepts: &str, timesteps: usize, more: Value| {
        let inputs = json!({"model": ["1", 0], "images": ["2", 0], "concepts": [concepts, 0], "timesteps": timesteps});
        node("AttentionMaskExtractor", with(inputs, more))
    };
    let crf = |extractor: &str, more: Value| {
        let inputs = json!({"images": ["2", 0], "masks": [extractor, 0], "attention": [extractor, 1], "evidence": [extractor, 3]});
        node("DenseCrfRefine", with(inputs, more))
    };
    let by_hand = json!({
        "10": learner(json!({"steps": 0})),
        "11": extractor("10", 4, json!({})),
        "12": crf("11", json!({})),
        "13": learner(json!({"steps": 3, "masks": ["12", 0], "concepts": ["10", 0]})),
        "14": extractor("13", 3, json!({"evidence": ["11", 3]})),
        "15": crf("14", json!({"previous": ["12", 0]})),
        "16": node("SaveConcepts", json!({"concepts": ["13", 0]})),
        "17": node("MaskToImage", json!({"mask": ["15", 0]})),
        "18": node("SaveImage", json!({"images": ["17", 0], "filename_prefix": "mask"})),
    });
    with(sources(), by_hand)
}

#[test]
fn one_round_wired_by_hand_gives_the_bits_of_the_loop() {
    let place = Place::with_conceptloom();
    run_into(&place, "loop", &em_loop(json!({})));
    run_into(&place, "by-hand", &round_by_hand());
    assert!(
        results(&place, "loop") == results(&place, "by-hand"),
        "the bits differ"
    );
}

#[test]
fn less_memory_learns_the_same_bits_and_paints_large_pictures() {
    let place = Place::with_conceptloom();
    let lean = node("LoadDiffusionModel", json!({"memory": "lean"}));
    let fast = node("LoadDiffusionModel", json!({"memory": "fast"}));
    let [lean_learned, fast_learned] = [("lean", &lean), ("fast", &fast)].map(|(out, loader)| {
        let mut workflow = em_loop(json!({"joint_steps": 2}));
        workflow["1"] = loader.clone();
        run_into(&place, out, &workflow).succeeded();
        results(&place, out)
    });
    assert!(lean_learned == fast_learned, "memory changes bits");
    // Five times the area that the model knows: the VAE decodes it in tiles.
    let mut workflow = sampler(json!({"width": 320, "height": 256}));
    workflow["1"] = lean;
    run_into(&place, "large", &workflow).succeeded();
    let picture = image::load_from_memory(&place.read("large/picture_00001.png")).unwrap();
    assert_eq!((picture.width(), picture.height()), (320, 256));
}

/// Shares of the picture inside of the saved masks.
fn areas(place: &Place, n: usize) -> Vec<f64> {
    let area = |i: usize| {
        let mask = pixels(&place.read(&format!("out/mask_{i:05}.png")));
        mask.iter().filter(|&&v| v > 127).count() as f64 / mask.len() as f64
    };
    (1..=n).map(area).collect()
}

#[test]
fn two_of_one_class_are_told_apart_and_the_energy_falls() {
    let place = Place::with_conceptloom();
    let scenes = "plugin/crates/sprites/scenes/hard/scenes";
    let picture = std::fs::read(repository().join(scenes).join("same_class_000.png")).unwrap();
    place.write("two-dogs.png", picture);
    let mut workflow = em_loop(json!({
        "concept_list": "<a> dog\n<b> dog\n<sea> sea (background)", "steps": 80, "steps_per_round": 20,
        "first_timesteps": 100, "timesteps": 20, "seed": 0, "sample_every": 0,
    }));
    workflow["2"] = node("LoadImage", json!({"image": "two-dogs.png"}));
    let done = place.run(&workflow, &[]).succeeded();
    let told = "<a> and <b> are both called dog";
    assert!(done.stderr.contains(told), "{}", done.stderr);
    let areas = areas(&place, 3);
    assert!(
        areas[0] > 0.03 && areas[1] > 0.03 && areas[2] > 0.5,
        "{areas:?}"
    );
    let run = place.json("out/run.json");
    let metrics = run["metrics"].as_array().unwrap();
    let energy = metrics
        .iter()
        .find(|curve| curve["series"] == "energy")
        .unwrap();
    let points = energy["points"].as_array().unwrap();
    assert_eq!(points.len(), 5);
    let (first, last) = (
        points[0][1].as_f64().unwrap(),
        points[4][1].as_f64().unwrap(),
    );
    assert!(last < first, "{first} {last}");
}

#[test]
fn tokens_without_words_find_the_things_of_a_picture() {
    let place = Place::with_conceptloom();
    let list = "<a>\n<b>\n<c> (background)";
    let few =
        json!({"concept_list": list, "first_timesteps": 20, "steps": 2, "steps_per_round": 2});
    place.run(&em_loop(few), &[]).succeeded();
    let areas = areas(&place, 3);
    let is_thing = |area: f64| (0.02..0.4).contains(&area);
    assert!(
        is_thing(areas[0]) && is_thing(areas[1]) && areas[2] > 0.5,
        "{areas:?}"
    );
    assert!(
        (areas.iter().sum::<f64>() - 1.0).abs() < 1e-9,
        "every pixel is one thing: {areas:?}"
    );
}

/// The demo's picture between the two halves of a wider one, 192 by 128 pixels: what lies at its sides is learned too.
fn wide_picture(place: &Place) {
    let demo = repository().join("host-demo/workflows/pictures/man-and-cat.png");
    let demo = image::open(demo).unwrap().into_rgb8();
    let (width, height) = demo.dimensions();
    let wide = image::RgbImage::from_fn(width * 3 / 2, height, |x, y| {
        *demo.get_pixel((x + width * 3 / 4) % width, y)
    });
    wide.save(place.path().join("wide.png")).unwrap();
}

#[test]
fn a_wide_picture_is_learned_whole() {
    let place = Place::with_conceptloom();
    wide_picture(&place);
    let wide = |mut workflow: Value| {
        workflow["2"] = node("LoadImage", json!({"image": "wide.png"}));
        workflow
    };
    let done = run_into(&place, "loop", &wide(em_loop(json!({}))));
    let told = "pictures of 192 x 128 pixels are learned whole";
    assert!(done.stderr.contains(told), "{}", done.stderr);
    let report = String::from_utf8(place.read("loop/report.html")).unwrap();
    assert!(report.contains(told));
    for i in 1..=3 {
        let mask = place.read(&format!("loop/mask_{i:05}.png"));
        let mask = image::load_from_memory(&mask).unwrap();
        assert_eq!((mask.width(), mask.height()), (144, 96));
    }
    run_into(&place, "by-hand", &wide(round_by_hand()));
    assert!(
        results(&place, "loop") == results(&place, "by-hand"),
        "the bits differ"
    );
}

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

#[test]
fn pictures_of_any_size_are_painted_from_noise_or_from_a_picture() {
    let place = Place::with_conceptloom();
    let painted = |out: &str, parameters: Value| {
        let done = run_into(&place, out, &sampler(with(json!({"steps": 3}), parameters)));
        let picture = place
            .names(out)
            .into_iter()
            .find(|name| name.ends_with(".png"));
        let picture = place.read(&format!("{out}/{}", picture.unwrap()));
        let picture = image::load_from_memory(&picture).unwrap().into_rgb8();
        (done, picture)
    };
    let wide =
        json!({"width": 192, "height": 104, "sampler_name": "uni_pc", "scheduler": "karras"});
    assert_eq!(painted("wide", wide).1.dimensions(), (192, 104));
    // What is a little painted over is still the picture.
    let demo = repository().join("host-demo/workflows/pictures/man-and-cat.png");
    let demo = image::open(demo).unwrap().into_rgb8();
    let distance = |denoise: f64| -> u64 {
        let from = json!({"image": ["2", 0], "denoise": denoise, "width": 64});
        let (done, picture) = painted(&format!("denoise-{denoise}"), from);
        let told = "width and height are not used";
        assert!(done.stderr.contains(told), "{}", done.stderr);
        assert_eq!(picture.dimensions(), demo.dimensions());
        let pairs = picture.as_raw().iter().zip(demo.as_raw());
        pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum()
    };
    let (little, much) = (distance(0.1), distance(1.0));
    assert!(4 * little < much, "{little} {much}");
    let parts = [
        "node 3 (PersonalizedSampler), input width",
        "101",
        "multiples",
    ];
    refused(&place, &sampler(json!({"width": 101})), &parts);
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

#[cfg(unix)]
#[test]
fn ctrl_c_stops_within_a_step_and_the_same_command_gives_the_bits_of_an_uninterrupted_run() {
    use crate::support::{done, interrupt, wait_for};
    let mut by_hand = round_by_hand();
    for (id, parameter, value) in [
        ("10", "start", json!("inversion")),
        ("10", "inversion_steps", json!(12)),
        ("13", "steps", json!(12)),
        ("14", "timesteps", json!(60)),
    ] {
        by_hand[id]["inputs"][parameter] = value;
    }
    let looped = em_loop(json!({"steps": 40, "steps_per_round": 2}));
    for (workflow, seen, node, gone_on) in [
        (&looped, "tokens 3/40", "3 (EmLoop)", "going on after step "),
        (
            &by_hand,
            "inversion 1/12",
            "10 (ConceptTokenLearner)",
            " of textual inversion",
        ),
        (
            &by_hand,
            "tokens 1/12",
            "13 (ConceptTokenLearner)",
            "going on after step ",
        ),
        (
            &by_hand,
            "attention 0/60",
            "14 (AttentionMaskExtractor)",
            " of the extraction",
        ),
    ] {
        let place = Place::with_conceptloom();
        place.write("w.json", workflow.to_string());
        let mut child = place
            .command(&["run", "w.json", "--out", "out"])
            .spawn()
            .unwrap();
        wait_for(&mut child, seen);
        let asked = std::time::Instant::now();
        interrupt(&child);
        let ended = done(child.wait_with_output().unwrap());
        assert!(asked.elapsed().as_secs() < 20, "{:?}", asked.elapsed());
        assert_eq!(ended.code, Some(130), "{}", ended.stderr);
        let told =
            format!("canceled at node {node}; nothing was written; the same command goes on");
        assert!(ended.sentence().starts_with(&told), "{}", ended.stderr);
        assert_eq!(place.names("."), [".work", "w.json"]);

        let again = place.host(&["run", "w.json", "--out", "out"]).succeeded();
        assert!(again.stderr.contains(gone_on), "{}", again.stderr);
        assert_eq!(place.names("."), ["out", "w.json"]);
        place.host(&["run", "w.json", "--out", "whole"]).succeeded();
        assert!(
            results(&place, "out") == results(&place, "whole"),
            "{node}: the bits differ"
        );
    }
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
