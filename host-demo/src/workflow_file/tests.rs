use serde_json::json;

use super::*;

fn read(document: &Value) -> Result<Workflow, WorkflowError> {
    Workflow::parse(
        "test",
        document.to_string().as_bytes(),
        &Catalog::builtin_only(),
    )
}

fn api(document: &Value) -> Value {
    read(document).unwrap().graph.to_api()
}

/// LoadImage → (what is given) → SaveImage, as the editor saves it.
fn editor(middle: Vec<Value>, links: Value) -> Value {
    let mut nodes = vec![
        json!({"id": 1, "type": "LoadImage", "mode": 0, "inputs": [],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}, {"name": "MASK", "type": "MASK", "links": null}],
            "widgets_values": ["demo:man-and-cat.png", "image"], "color": "#223"}),
        json!({"id": 9, "type": "SaveImage", "title": "Keep", "mode": 0,
            "inputs": [{"name": "images", "type": "IMAGE", "link": 2},
                {"name": "filename_prefix", "type": "STRING", "widget": {"name": "filename_prefix"}, "link": null}],
            "outputs": [], "widgets_values": ["old"], "widgets_values_named": {"filename_prefix": "kept"}}),
    ];
    nodes.extend(middle);
    json!({"id": "x", "revision": 0, "nodes": nodes, "links": links, "groups": [{"title": "g"}], "version": 0.4})
}

const DIRECT: &str = r#"[[2, 1, 0, 9, 0, "IMAGE"]]"#;

fn direct() -> Value {
    editor(Vec::new(), serde_json::from_str(DIRECT).unwrap())
}

fn image_source(document: &Value) -> Value {
    api(document)["9"]["inputs"]["images"].clone()
}

fn through(class: &str, mode: i64, inputs: Value, links: Value) -> Value {
    let node = json!({"id": 5, "type": class, "mode": mode, "inputs": inputs,
        "outputs": [{"name": "o", "type": "IMAGE", "links": [2]}]});
    editor(vec![node], links)
}

fn two_links() -> Value {
    json!([[1, 1, 0, 5, 0, "IMAGE"], [2, 5, 0, 9, 0, "IMAGE"]])
}

#[test]
fn the_editors_document_becomes_the_graph_that_it_shows() {
    let expected = json!({
        "1": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat.png"}, "_meta": {"title": "LoadImage"}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "kept", "images": ["1", 0]}, "_meta": {"title": "Keep"}},
    });
    assert_eq!(api(&direct()), expected);
    // Both formats give the same graph, and the document is kept with all its keys.
    assert_eq!(api(&expected), expected);
    assert_eq!(read(&direct()).unwrap().document(), direct());
}

#[test]
fn links_of_format_1_are_objects() {
    let mut document = direct();
    document["version"] = json!(1);
    document["links"] = json!([{"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": 9, "target_slot": 0, "type": "IMAGE"}]);
    assert_eq!(image_source(&document), json!(["1", 0]));
}

#[test]
fn virtual_and_switched_off_nodes_are_followed_through() {
    let socket = json!([{"name": "", "type": "*", "link": 1}]);
    let typed = json!([{"name": "mask", "type": "MASK", "link": null}, {"name": "image", "type": "IMAGE", "link": 1}]);
    let source = |class: &str, mode, inputs: &Value| {
        let document = through(class, mode, inputs.clone(), two_links());
        let graph = api(&document);
        assert!(graph.get("5").is_none(), "{graph}");
        graph["9"]["inputs"].get("images").cloned()
    };
    assert_eq!(source("Reroute", 0, &socket), Some(json!(["1", 0])));
    assert_eq!(source("ImageBatch", 4, &typed), Some(json!(["1", 0])));
    assert_eq!(source("ImageBatch", 2, &typed), None);
    let note = editor(
        vec![json!({"id": 7, "type": "Note", "widgets_values": ["hello"]})],
        json!([[2, 1, 0, 9, 0, "IMAGE"]]),
    );
    assert_eq!(image_source(&note), json!(["1", 0]));
}

#[test]
fn a_primitive_gives_its_value() {
    let primitive = json!({"id": 5, "type": "PrimitiveNode", "outputs": [{"name": "STRING", "type": "STRING"}],
        "widgets_values": ["from-primitive", "fixed"]});
    let links = json!([[2, 1, 0, 9, 0, "IMAGE"], [3, 5, 0, 9, 1, "STRING"]]);
    let mut document = editor(vec![primitive], links);
    document["nodes"][1]["inputs"][1]["link"] = json!(3);
    assert_eq!(
        api(&document)["9"]["inputs"]["filename_prefix"],
        "from-primitive"
    );
}

#[test]
fn subgraphs_are_opened() {
    let inner = json!({
        "id": "sub-1", "version": 1, "inputs": [{"name": "mask"}, {"name": "image"}], "outputs": [{"name": "IMAGE"}],
        "nodes": [
            {"id": 3, "type": "ImageBatch", "inputs": [{"name": "image_1", "type": "IMAGE", "link": 12},
                {"name": "image_2", "type": "IMAGE", "link": 11}], "outputs": [{"name": "IMAGE", "type": "IMAGE"}]},
            {"id": 4, "type": "MaskToImage", "inputs": [{"name": "mask", "type": "MASK", "link": 10}],
                "outputs": [{"name": "IMAGE", "type": "IMAGE"}]},
            {"id": 6, "type": "LoadImage", "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
                "inputs": [{"name": "image", "type": "COMBO", "widget": {"name": "image"}, "link": 14}],
                "widgets_values": ["inner.png"]}],
        "links": [
            {"id": 10, "origin_id": -10, "origin_slot": 0, "target_id": 4, "target_slot": 0, "type": "MASK"},
            {"id": 11, "origin_id": 4, "origin_slot": 0, "target_id": 3, "target_slot": 1, "type": "IMAGE"},
            {"id": 12, "origin_id": 6, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "IMAGE"},
            {"id": 13, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "IMAGE"},
            {"id": 14, "origin_id": -10, "origin_slot": 1, "target_id": 6, "target_slot": 0, "type": "COMBO"}],
    });
    let node = json!({"id": 5, "type": "sub-1", "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
        "inputs": [{"name": "mask", "type": "MASK", "link": 1},
            {"name": "image", "type": "COMBO", "widget": {"name": "image"}, "link": null}],
        "widgets_values": ["outer.png"]});
    let mut document = editor(
        vec![node],
        json!([[1, 1, 1, 5, 0, "MASK"], [2, 5, 0, 9, 0, "IMAGE"]]),
    );
    document["definitions"] = json!({"subgraphs": [inner]});
    let graph = api(&document);
    assert_eq!(graph["9"]["inputs"]["images"], json!(["5:3", 0]));
    assert_eq!(
        graph["5:3"]["inputs"],
        json!({"image_1": ["5:6", 0], "image_2": ["5:4", 0]})
    );
    assert_eq!(graph["5:4"]["inputs"]["mask"], json!(["1", 1]));
    assert_eq!(graph["5:6"]["inputs"]["image"], "outer.png");
}

#[test]
fn controls_between_positional_values_are_skipped() {
    let upload_in_between =
        json!({"id": 5, "type": "LoadImageMask", "widgets_values": ["a.png", "image", "green"]});
    let upload_last =
        json!({"id": 6, "type": "LoadImageMask", "widgets_values": ["a.png", "green", "image"]});
    let graph = api(&editor(
        vec![upload_in_between, upload_last],
        json!([[2, 1, 0, 9, 0, "IMAGE"]]),
    ));
    for id in ["5", "6"] {
        assert_eq!(
            graph[id]["inputs"],
            json!({"channel": "green", "image": "a.png"}),
            "{id}"
        );
    }
}

#[test]
fn set_changes_the_graph_and_the_document() {
    let catalog = Catalog::builtin_only();
    let mut workflow = read(&direct()).unwrap();
    workflow
        .set("SaveImage.filename_prefix=a=b", &catalog)
        .unwrap();
    workflow.set("1.image=other.png", &catalog).unwrap();
    assert_eq!(
        workflow.graph.to_api()["9"]["inputs"]["filename_prefix"],
        "a=b"
    );
    let document = workflow.document();
    assert_eq!(
        document["nodes"][1]["widgets_values_named"]["filename_prefix"],
        "a=b"
    );
    assert_eq!(document["nodes"][1]["widgets_values"], json!(["a=b"]));
    assert_eq!(
        document["nodes"][0]["widgets_values"],
        json!(["other.png", "image"])
    );
    // A document read again gives the changed graph.
    assert_eq!(api(&document), workflow.graph.to_api());
    workflow
        .set("Keep.filename_prefix=title", &catalog)
        .unwrap();
    for (assignment, part) in [
        ("nonsense", "node.input=value"),
        ("Blur.radius=3", "no node \"Blur\""),
        ("SaveImage.radius=3", "its parameters are: filename_prefix"),
    ] {
        let problem = workflow.set(assignment, &catalog).unwrap_err();
        assert!(problem.message.contains(part), "{assignment}: {problem}");
    }
}

#[test]
fn files_that_are_no_workflow_say_what_is_expected() {
    let parse = |bytes: &[u8]| {
        Workflow::parse("w.json", bytes, &Catalog::builtin_only())
            .unwrap_err()
            .to_string()
    };
    assert!(parse(b"{").contains("w.json is no JSON"));
    assert!(parse(b"[1]").contains("is no workflow"));
    assert!(parse(b"{\"a\": 1}").contains("is no workflow"));
    assert!(parse(&direct().to_string().replace("[[2,", "[[3,").into_bytes()).contains("link 2"));
    let rounds = json!({"nodes": [
        {"id": 1, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 1}], "outputs": []},
        {"id": 9, "type": "SaveImage", "inputs": [{"name": "images", "type": "IMAGE", "link": 1}]}],
        "links": [[1, 1, 0, 1, 0, "*"]], "version": 0.4});
    assert!(parse(rounds.to_string().as_bytes()).contains("round in circles"));
    let nested = json!({"nodes": [{"id": 1, "type": "s"}], "links": [], "version": 1,
        "definitions": {"subgraphs": [{"id": "s", "nodes": [{"id": 1, "type": "s"}], "links": []}]}});
    assert!(parse(nested.to_string().as_bytes()).contains("contain each other"));
}

#[test]
fn huge_graphs_are_refused() {
    let nodes: Vec<_> = (0..100_000)
        .map(|id| json!({"id": id, "type": "Note"}))
        .collect();
    assert!(read(&json!({"nodes": nodes, "links": []})).is_err());
    let entries: serde_json::Map<_, _> = (0..5000)
        .map(|id| {
            (
                id.to_string(),
                json!({"class_type": "SaveImage", "inputs": {}}),
            )
        })
        .collect();
    assert!(matches!(
        read(&entries.into()),
        Err(WorkflowError::TooManyNodes { .. })
    ));
}
