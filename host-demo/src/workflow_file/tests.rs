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
            {"id": 3, "type": "ImageBatch", "inputs": [{"name": "image1", "type": "IMAGE", "link": 12},
                {"name": "image2", "type": "IMAGE", "link": 11}], "outputs": [{"name": "IMAGE", "type": "IMAGE"}]},
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
        json!({"image1": ["5:6", 0], "image2": ["5:4", 0]})
    );
    assert_eq!(graph["5:4"]["inputs"]["mask"], json!(["1", 1]));
    assert_eq!(graph["5:6"]["inputs"]["image"], "outer.png");
}

/// Pictures of three inner nodes by the inputs that the editor promoted, whose sockets it may leave out.
fn promoted(inputs: Value, proxies: Option<Value>, values: Value) -> Value {
    let load = |id: i64, link: i64| {
        json!({"id": id, "type": "LoadImage", "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
            "inputs": [{"name": "image", "type": "COMBO", "widget": {"name": "image"}, "link": link}],
            "widgets_values": ["inner.png"]})
    };
    let link = |id: i64, slot: usize, target: i64| json!({"id": id, "origin_id": -10, "origin_slot": slot, "target_id": target, "target_slot": 0, "type": "COMBO"});
    let out = |id: i64, from: i64, slot: usize| json!({"id": id, "origin_id": from, "origin_slot": 0, "target_id": -20, "target_slot": slot, "type": "IMAGE"});
    let inner = json!({
        "id": "sub", "nodes": [load(3, 10), load(4, 11), load(6, 12),
            {"id": 7, "type": "MaskToImage", "inputs": [{"name": "mask", "type": "MASK", "link": 13}]}],
        "inputs": [{"name": "first"}, {"name": "mask"}, {"name": "second"}, {"name": "third"}],
        "links": [link(10, 0, 3), link(13, 1, 7), link(11, 2, 4), link(12, 3, 6), out(20, 3, 0), out(21, 4, 1), out(22, 6, 2)],
    });
    let node = json!({"id": 5, "type": "sub", "inputs": inputs, "widgets_values": values,
        "properties": {"proxyWidgets": proxies},
        "outputs": [{"name": "IMAGE"}, {"name": "IMAGE_1"}, {"name": "IMAGE_2"}]});
    let primitive = json!({"id": 8, "type": "PrimitiveNode", "outputs": [{"name": "COMBO"}], "widgets_values": ["linked.png"]});
    let mut document = editor(
        vec![node, primitive],
        json!([[2, 5, 0, 9, 0, "IMAGE"], [4, 8, 0, 5, 0, "COMBO"]]),
    );
    document["definitions"] = json!({"subgraphs": [inner]});
    let graph = api(&document);
    Value::from_iter(["5:3", "5:4", "5:6"].map(|id| graph[id]["inputs"]["image"].clone()))
}

#[test]
fn promoted_values_go_by_the_definitions_names() {
    let values = json!(["a.png", "b.png", "c.png"]);
    let socket = |name: &str, link: Value| json!({"name": name, "type": "COMBO", "widget": {"name": name}, "link": link});
    let all = json!(["a.png", "b.png", "c.png"]);
    // Sockets of widgets that nothing is linked to are left out, or there in any order.
    for sockets in [
        json!([]),
        json!([socket("third", Value::Null), socket("first", Value::Null)]),
    ] {
        assert_eq!(promoted(sockets, None, values.clone()), all);
    }
    let linked = json!([socket("second", json!(4))]);
    assert_eq!(
        promoted(linked.clone(), None, values.clone()),
        json!(["a.png", "linked.png", "c.png"])
    );
    // The node's own list of what its values are.
    let own = json!([["-1", "third"], ["-1", "first"], ["-1", "second"]]);
    assert_eq!(
        promoted(json!([]), Some(own), values.clone()),
        json!(["b.png", "c.png", "a.png"])
    );
    let inner = json!([["6", "image"], ["3", "image"], ["4", "image"]]);
    assert_eq!(
        promoted(json!([]), Some(inner.clone()), values),
        json!(["b.png", "c.png", "a.png"])
    );
    // Without values the inner nodes keep theirs.
    assert_eq!(
        promoted(linked, Some(inner), json!([])),
        json!(["inner.png", "linked.png", "inner.png"])
    );
}

#[test]
fn a_bypassed_node_passes_on_what_fits() {
    let given = |inputs: Value| {
        let document = through("Anything", 4, inputs, two_links());
        api(&document)["9"]["inputs"].get("images").cloned()
    };
    let one = |kind: &str| given(json!([{"name": "x", "type": kind, "link": 1}]));
    for kind in ["IMAGE", "*", "", "IMAGE,MASK", "mask,image"] {
        assert_eq!(one(kind), Some(json!(["1", 0])), "{kind}");
    }
    assert_eq!(one("MASK"), None);
    let beside = json!([{"name": "a", "type": "IMAGE,MASK", "link": 1}, {"name": "b", "type": "IMAGE", "link": null}]);
    assert_eq!(
        given(beside),
        Some(json!(["1", 0])),
        "what is beside the output comes first"
    );
    let exact = json!([{"name": "a", "type": "MASK", "link": null}, {"name": "b", "type": "*", "link": null},
        {"name": "c", "type": "IMAGE", "link": 1}]);
    assert_eq!(given(exact), Some(json!(["1", 0])), "then its very type");
    assert_eq!(
        api(&through(
            "Reroute",
            4,
            json!([{"name": "", "type": "*", "link": 1}]),
            two_links()
        ))["9"]["inputs"]["images"],
        json!(["1", 0])
    );
}

#[test]
fn set_and_get_nodes_are_followed_by_their_name() {
    let set = |name: &str| json!({"id": 6, "type": "SetNode", "inputs": [{"name": "IMAGE", "type": "IMAGE", "link": 1}], "widgets_values": [name]});
    let get = json!({"id": 5, "type": "GetNode", "outputs": [{"name": "IMAGE", "type": "IMAGE"}], "widgets_values": ["photo"]});
    let links = json!([[1, 1, 0, 6, 0, "IMAGE"], [2, 5, 0, 9, 0, "IMAGE"]]);
    let document = editor(vec![set("photo"), get.clone()], links.clone());
    assert_eq!(image_source(&document), json!(["1", 0]));
    assert_eq!(
        api(&document).as_object().unwrap().len(),
        2,
        "they are no nodes that run"
    );
    let error = read(&editor(vec![set("other"), get], links))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the node 5 (GetNode) asks for \"photo\", which no Set node gives"),
        "{error}"
    );
}

#[test]
fn group_nodes_are_named_with_what_to_do() {
    let group =
        json!({"id": 5, "type": "workflow>pair", "outputs": [{"name": "IMAGE", "type": "IMAGE"}]});
    let error = read(&editor(vec![group], json!([[2, 5, 0, 9, 0, "IMAGE"]])))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("node 5 is the group node \"pair\"") && error.contains("subgraph"),
        "{error}"
    );
}

#[test]
fn other_programs_json_and_pictures_are_read() {
    let parse = |bytes: &[u8]| Workflow::parse("w", bytes, &Catalog::builtin_only());
    let graph = |bytes: &[u8]| parse(bytes).unwrap().graph.to_api();
    let expected = api(&direct());
    let text = direct().to_string();
    assert_eq!(graph(format!("\u{feff}{text}").as_bytes()), expected);
    let with_nan = text.replace(r#""mode":0"#, r#""mode":0,"is_changed":[NaN,-Infinity]"#);
    assert_ne!(with_nan, text);
    assert_eq!(graph(with_nan.as_bytes()), expected);
    let picture = crate::pictures::RgbPicture {
        width: 1,
        height: 1,
        pixels: vec![0; 3],
    };
    let png = |texts: &[(&str, String)]| {
        let texts = texts
            .iter()
            .map(|(name, text)| ((*name).to_owned(), text.clone()));
        crate::png_text::encode(&picture, &texts.collect::<Vec<_>>()).unwrap()
    };
    let both = [("prompt", "{}".to_owned()), ("workflow", text)];
    assert_eq!(graph(&png(&both)), expected);
    assert_eq!(graph(&png(&[("prompt", expected.to_string())])), expected);
    let plain = parse(&png(&[])).unwrap_err().to_string();
    assert!(
        plain.starts_with("w is a picture and holds no workflow"),
        "{plain}"
    );
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
