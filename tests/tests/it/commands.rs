//! `nodes`, `validate`, and how the command line is used.

use serde_json::{Value, json};

use crate::support::{Place, node, repository};

#[test]
fn nodes_json_is_what_the_plugin_says() {
    let place = Place::with_conceptloom();
    let now: Value =
        serde_json::from_str(&place.host(&["nodes", "--json"]).succeeded().stdout).unwrap();
    let kept = std::fs::read(repository().join("nodes.json")).unwrap();
    let kept: Value = serde_json::from_slice(&kept).unwrap();
    assert!(
        now == kept,
        "nodes.json is old; write it anew: cargo run --release -- nodes --json > nodes.json"
    );
    for class in [
        "LoadDiffusionModel",
        "ConceptTokenLearner",
        "AttentionMaskExtractor",
        "DenseCrfRefine",
        "EmLoop",
        "PersonalizedSampler",
        "SaveConcepts",
        "LoadConcepts",
    ] {
        assert_eq!(
            now[class]["python_module"], "custom_nodes.conceptloom",
            "{class}"
        );
        // A person who points at a widget reads what it does.
        let inputs = now[class]["input"]["required"].as_object().unwrap();
        assert!(
            inputs.values().all(|input| input[1]["tooltip"].is_string()),
            "{class}"
        );
    }
}

#[test]
fn nodes_are_listed_for_people() {
    let place = Place::with_faulty();
    let list = place.host(&["nodes"]).succeeded().stdout;
    for part in [
        "faulty-plugin 1.0.0",
        "Slow: Counts slowly",
        "steps = 20: How far it counts",
        "→ images (IMAGE)",
        "LoadImage:",
    ] {
        assert!(list.contains(part), "{part}\n{list}");
    }
}

#[test]
fn the_bundled_workflow_can_run() {
    let place = Place::with_conceptloom();
    let file = repository().join("host-demo/workflows/demo.json");
    let done = place
        .host(&["validate", file.to_str().unwrap()])
        .succeeded();
    assert!(done.stdout.starts_with("demo can run"), "{}", done.stdout);
}

#[test]
fn the_bundled_workflow_says_the_same_by_position_as_by_name() {
    // Older editors do not save values by name.
    let place = Place::with_conceptloom();
    let file = repository().join("host-demo/workflows/demo.json");
    let mut demo: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let outcome = |name: &str, document: &Value| {
        place.write(name, document.to_string());
        let api = place.host(&["validate", name, "--api"]).succeeded().stdout;
        serde_json::from_str::<Value>(&api).unwrap()
    };
    let named = outcome("demo.json", &demo);
    for node in demo["nodes"].as_array_mut().unwrap() {
        node.as_object_mut().unwrap().remove("widgets_values_named");
    }
    assert_eq!(outcome("demo.json", &demo), named);
    // And the API format says the same again.
    assert_eq!(outcome("api.json", &named), named);
}

#[test]
fn validate_writes_out_the_parameters_that_were_left_to_their_defaults() {
    // Other clients of ComfyUI's API refuse a node without all of its required inputs.
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Slow", json!({"steps": 3})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    });
    place.write("w.json", workflow.to_string());
    let api = place.host(&["validate", "w.json", "--api"]).succeeded();
    let api: Value = serde_json::from_str(&api.stdout).unwrap();
    assert_eq!(api["1"]["inputs"]["steps"], 3);
    let info = place.host(&["nodes", "--json"]).succeeded();
    let info: Value = serde_json::from_str(&info.stdout).unwrap();
    for (id, class) in [("1", "Slow"), ("2", "SaveImage")] {
        for name in info[class]["input"]["required"].as_object().unwrap().keys() {
            assert!(api[id]["inputs"].get(name).is_some(), "{class} {name}");
        }
    }
    assert_eq!(api["2"]["inputs"]["images"], json!(["1", 0]));
}

#[test]
fn validate_tells_all_problems_at_once() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Slow", json!({"steps": 0, "wait": "long"})),
        "2": node("SaveImage", json!({"images": ["1", 1]})),
        "3": node("SaveImage", json!({})),
        "4": node("Fail", json!({"early": true})),
        "5": node("Mystery", json!({})),
    });
    place.write("w.json", workflow.to_string());
    let done = place.host(&["validate", "w.json", "--set", "Slow.nothing=1"]);
    assert_eq!(done.code, Some(1));
    for line in [
        "node 1 (Slow), input steps: steps is 0, the smallest value is 1 [value_smaller_than_min]",
        "node 1 (Slow), input wait: wait takes a whole number, got \"long\" [invalid_input_type]",
        "node 2 (SaveImage), input images: it takes IMAGE, but the output masks of node 1 (Slow) gives MASK [return_type_mismatch]",
        "node 3 (SaveImage), input images: nothing is linked to it, it needs a link of type IMAGE [required_input_missing]",
        "node 4 (Fail), input code: the code is one that fails [custom_validation_failed]",
        "node 5 (Mystery): no node of the class Mystery is known",
        "Slow has no parameter nothing; its parameters are: steps, wait, prompts, seed [invalid_set_target]",
    ] {
        assert!(done.stderr.contains(line), "{line}\n\n{}", done.stderr);
    }
    assert_eq!(place.names("."), ["w.json"]);
}

#[test]
fn wrong_arguments_end_with_2() {
    let place = Place::with_faulty();
    for arguments in [
        &["run", "--bogus"][..],
        &["paint"],
        &["validate"],
        &["run", "a.json", "b.json"],
    ] {
        let done = place.host(arguments);
        assert_eq!(done.code, Some(2), "{arguments:?}: {}", done.stderr);
    }
    assert!(
        place
            .host(&["--help"])
            .succeeded()
            .stdout
            .contains("validate")
    );
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::with_faulty();
    let mut child = place.command(&["nodes", "--json"]).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}
