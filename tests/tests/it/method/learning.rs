//! What comes out: the demo, tuned weights, a round wired by hand, sizes, going on after a stop.

use serde_json::{Value, json};

use super::{CONCEPTS, em_loop, refused, sampler, sources, wide_picture, with};
use crate::support::{Done, Place, node, pixels, repository};

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
