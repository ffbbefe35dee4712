//! What a run leaves, and what it does not do twice.

use serde_json::{Value, json};

use crate::support::{Place, node, pixels, png_texts, tree};

/// Two pictures with prompts, saved; 70 points of every curve.
fn counting() -> Value {
    json!({
        "1": node("Slow", json!({"steps": 70, "prompts": "a <rex> on the moon\nä <vw>", "seed": 90})),
        "2": node("SaveImage", json!({"images": ["1", 0], "filename_prefix": "samples/picture"})),
        "3": node("MaskToImage", json!({"mask": ["1", 1]})),
        "4": node("SaveImage", json!({"images": ["3", 0], "filename_prefix": "masks/mask"})),
    })
}

#[test]
fn a_runs_folder_holds_what_a_person_wants_to_see() {
    let place = Place::with_faulty();
    let done = place.run(&counting(), &[]).succeeded();
    assert_eq!(done.stdout.trim(), "out/report.html");
    assert_eq!(
        place.names("out"),
        [
            "masks",
            "previews",
            "report.html",
            "run.json",
            "samples",
            "workflow.json"
        ]
    );
    assert_eq!(
        place.names("out/samples"),
        ["picture_00001.png", "picture_00002.png"]
    );
    assert_eq!(
        place.names("out/masks"),
        ["mask_00001.png", "mask_00002.png"]
    );
    assert_eq!(place.names("out/previews/1-counted").len(), 14);
    assert_eq!(
        place.names("."),
        ["out", "workflow.json"],
        "nothing else is left"
    );
    assert!(
        pixels(&place.read("out/samples/picture_00001.png"))
            .iter()
            .all(|&byte| byte == 90)
    );
    let run = place.json("out/run.json");
    assert_eq!(run["status"], "success");
    assert_eq!(run["metrics"][0]["points"].as_array().unwrap().len(), 70);
    assert_eq!(
        run["files"][0],
        json!({"node": "2", "file": "samples/picture_00001.png"})
    );
    assert_eq!(run["nodes"].as_array().unwrap().len(), 4);
}

#[test]
fn the_report_needs_nothing_from_outside() {
    let place = Place::with_faulty();
    place.run(&counting(), &[]).succeeded();
    let page = String::from_utf8(place.read("out/report.html")).unwrap();
    for part in [
        "a &lt;rex&gt; on the moon",
        "ä &lt;vw&gt;",
        "<svg class=\"chart\"",
        "data:image/png;base64,",
        "counted",
        "step 65",
        "masks/mask_00001.png",
    ] {
        assert!(page.contains(part), "no {part}");
    }
    for part in [
        "<script", "http:", "https:", "<link", "@import", "url(", ".partial",
    ] {
        // The name space of SVG is a name, not an address that is asked.
        let page = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!page.contains(part), "{part}");
    }
    let sources: Vec<_> = page.split("src=\"").skip(1).collect();
    assert!(
        sources.len() >= 18
            && sources
                .iter()
                .all(|source| source.starts_with("data:image/png;base64,"))
    );
}

#[test]
fn pictures_restore_the_graph_they_came_from() {
    let place = Place::with_faulty();
    place.run(&counting(), &[]).succeeded();
    let png = place.read("out/samples/picture_00001.png");
    let texts = png_texts(&png);
    let keywords: Vec<_> = texts.iter().map(|(keyword, _)| keyword.as_str()).collect();
    assert_eq!(keywords, ["prompt", "workflow"]);
    assert!(texts.iter().all(|(_, text)| text.is_ascii()));
    let prompt: Value = serde_json::from_str(&texts[0].1).unwrap();
    assert_eq!(
        prompt["1"]["inputs"]["prompts"],
        "a <rex> on the moon\nä <vw>"
    );
    place.write("again.json", &texts[1].1);
    place
        .host(&["run", "again.json", "--out", "again"])
        .succeeded();
    assert_eq!(
        pixels(&place.read("again/samples/picture_00001.png")),
        pixels(&png)
    );
    place
        .host(&[
            "run",
            "again.json",
            "--out",
            "private",
            "--disable-metadata",
        ])
        .succeeded();
    assert_eq!(
        png_texts(&place.read("private/samples/picture_00001.png")),
        []
    );
}

#[test]
fn both_formats_give_the_same_pictures() {
    let place = Place::with_faulty();
    let editor = json!({
        "nodes": [
            {"id": 1, "type": "Slow", "mode": 0, "inputs": [{"name": "images", "type": "IMAGE", "link": null}],
                "outputs": [{"name": "images", "type": "IMAGE", "links": [1]}],
                "widgets_values": [7, 0, "a <rex> on the moon\nä <vw>", 90, "randomize"]},
            {"id": 5, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 1}],
                "outputs": [{"name": "", "type": "IMAGE", "links": [2]}]},
            {"id": 2, "type": "SaveImage", "mode": 0, "inputs": [{"name": "images", "type": "IMAGE", "link": 2}],
                "widgets_values": ["samples/picture"]}],
        "links": [[1, 1, 0, 5, 0, "IMAGE"], [2, 5, 0, 2, 0, "IMAGE"]], "version": 0.4, "own": {"key": 1}});
    place.write("editor.json", editor.to_string());
    place
        .host(&[
            "run",
            "editor.json",
            "--out",
            "editor",
            "--set",
            "Slow.steps=70",
        ])
        .succeeded();
    place.run(&counting(), &[]).succeeded();
    for name in ["picture_00001.png", "picture_00002.png"] {
        let [one, other] =
            ["editor", "out"].map(|run| pixels(&place.read(&format!("{run}/samples/{name}"))));
        assert_eq!(one, other);
    }
    // The document is kept, with the changed value.
    let mut expected = editor;
    expected["nodes"][0]["widgets_values"][0] = json!(70);
    assert_eq!(place.json("editor/workflow.json"), expected);
}

#[test]
fn every_run_gets_a_folder_of_its_own() {
    let place = Place::with_faulty();
    place.write("my workflow.json", json!({"1": node("Slow", json!({"steps": 1})), "2": node("PreviewImage", json!({"images": ["1", 0]}))}).to_string());
    for _ in 0..3 {
        place.host(&["run", "my workflow.json"]).succeeded();
    }
    let names = place.names("runs");
    assert_eq!(names.len(), 3);
    assert!(
        names
            .iter()
            .all(|name| name.contains("-my-workflow") && name.starts_with("20")),
        "{names:?}"
    );
    let before = place.read(&format!("runs/{}/run.json", names[0]));
    let out = format!("runs/{}", names[0]);
    place
        .host(&["run", "my workflow.json", "--out", &out])
        .failed_with(&["is not empty", "--out"]);
    assert_eq!(place.read(&format!("runs/{}/run.json", names[0])), before);
    assert_eq!(place.names("runs"), names);
}

#[test]
fn a_node_that_exists_to_show_shows_all_pictures() {
    let place = Place::with_faulty();
    let prompts: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    let workflow = json!({
        "1": node("Slow", json!({"steps": 1, "prompts": prompts.join("\n")})),
        "2": node("PreviewImage", json!({"images": ["1", 0]})),
    });
    place.run(&workflow, &[]).succeeded();
    let shown = tree(&place.path().join("out/previews"));
    let by_node = |name: &&String| name.starts_with("2-");
    assert_eq!(
        shown.keys().filter(by_node).count(),
        100,
        "{:?}",
        shown.keys()
    );
}

#[test]
fn values_pass_between_nodes_in_the_very_same_memory() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Slow", json!({"steps": 1, "prompts": "a\nb\nc"})),
        "2": node("Passthrough", json!({"images": ["1", 0]})),
        "3": node("Passthrough", json!({"images": ["2", 0]})),
        "4": node("PreviewImage", json!({"images": ["3", 0]})),
    });
    place.run(&workflow, &[]).succeeded();
    let run = place.json("out/run.json");
    let addresses: Vec<_> = run["metrics"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|curve| curve["series"] == "address")
        .map(|curve| curve["points"][0][1].as_f64().unwrap())
        .collect();
    assert_eq!(addresses.len(), 2);
    assert!(
        addresses[0] > 0.0 && addresses[0] == addresses[1],
        "{addresses:?}"
    );
}

#[test]
fn nodes_that_are_the_same_run_once() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Slow", json!({"steps": 1, "seed": 5})),
        "2": node("Slow", json!({"steps": 1, "seed": 5})),
        "3": node("Slow", json!({"steps": 1, "seed": 6})),
        "4": node("ImageBatch", json!({"image1": ["1", 0], "image2": ["2", 0], "image3": ["3", 0]})),
        "5": node("SaveImage", json!({"images": ["4", 0]})),
    });
    place.run(&workflow, &[]).succeeded();
    let run = place.json("out/run.json");
    let cached: Vec<_> = run["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["cached"].as_bool().unwrap())
        .collect();
    assert_eq!(cached, [false, true, false, false, false]);
    let values = [1, 2, 3].map(|i| pixels(&place.read(&format!("out/picture_0000{i}.png")))[0]);
    assert_eq!(values, [5, 5, 6]);
}

#[test]
fn numbers_can_be_linked_to_widgets_and_seeds_set_at_once() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Number", json!({"value": 3})),
        "2": node("Slow", json!({"steps": ["1", 0], "seed": 5})),
        "3": node("SaveImage", json!({"images": ["2", 0]})),
    });
    place.run(&workflow, &["--seed", "77"]).succeeded();
    assert_eq!(
        place.json("out/run.json")["metrics"][0]["points"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    assert_eq!(pixels(&place.read("out/picture_00001.png"))[0], 77);
    // A linked number is checked when it is known.
    place
        .host(&[
            "run",
            "workflow.json",
            "--out",
            "bad",
            "--set",
            "Number.value=0",
        ])
        .failed_with(&["node 2 (Slow)", "steps is 0"]);
    assert!(place.names("bad").is_empty());
}

#[test]
fn pictures_are_found_beside_the_workflow_and_in_the_input_folder() {
    let place = Place::with_faulty();
    let png = |value: u8| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(4, 3, image::Rgb([value; 3]))
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    };
    place.write("graphs/near.png", png(10));
    place.write("pictures/far.png", png(20));
    let workflow = json!({
        "1": node("LoadImage", json!({"image": "near.png"})),
        "2": node("LoadImage", json!({"image": "far.png"})),
        "3": node("ImageBatch", json!({"image1": ["1", 0], "image2": ["2", 0]})),
        "4": node("SaveImage", json!({"images": ["3", 0]})),
    });
    place.write("graphs/w.json", workflow.to_string());
    place
        .host(&[
            "run",
            "graphs/w.json",
            "--out",
            "out",
            "--input",
            "pictures",
        ])
        .succeeded();
    let values = [1, 2].map(|i| pixels(&place.read(&format!("out/picture_0000{i}.png")))[0]);
    assert_eq!(values, [10, 20]);
}

#[test]
fn inputs_that_a_node_does_not_have_are_told() {
    let place = Place::with_faulty();
    let mut workflow = counting();
    workflow["1"]["inputs"]["stepz"] = json!(3);
    // What editors leave beside the parameters is nobody's slip.
    workflow["1"]["inputs"]["control_after_generate"] = json!("fixed");
    let done = place.run(&workflow, &[]).succeeded();
    let told = "stepz is not among its inputs, and it is not used";
    assert!(done.stderr.contains(told), "{}", done.stderr);
    assert!(
        !done.stderr.contains("control_after_generate"),
        "{}",
        done.stderr
    );
    let report = String::from_utf8(place.read("out/report.html")).unwrap();
    assert!(report.contains(told));
}
