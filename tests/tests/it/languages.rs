//! Plugins and hosts of other makes: the example on the contract's front page, a plugin in C, a host in Python.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use plugin_api::{ErrorCode, SharedTensor, Value};
use serde_json::json;

use crate::contract::{Listener, run, run_with};
use crate::doors;
use crate::support::{self, Place, node, pixels, repository};

/// The plugin in C, compiled by the system's compiler; nothing where there is none.
pub(crate) fn in_c() -> Option<PathBuf> {
    static BUILT: OnceLock<Option<(tempfile::TempDir, PathBuf)>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libthreshold.so");
        let header = repository().join("plugin-api/include/node_plugin.h");
        compiled("threshold.c", &header, &["-shared"], &library).then_some((folder, library))
    });
    built.as_ref().map(|(_, path)| path.clone())
}

/// Compiles a file of `tests/c-plugin` with a header by the system's compiler; `false` where there is none.
#[expect(clippy::print_stdout, reason = "says what was not tested")]
pub(crate) fn compiled(file: &str, header: &Path, arguments: &[&str], to: &Path) -> bool {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(header, folder.path().join("node_plugin.h")).unwrap();
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut build = cc::Build::new();
    build.host(&target).target(&target).opt_level(1).pic(true);
    build
        .out_dir(folder.path())
        .cargo_metadata(false)
        .cargo_warnings(false);
    let Ok(compiler) = build.try_get_compiler() else {
        println!("skipped: there is no compiler of C");
        return false;
    };
    let done = compiler
        .to_command()
        .args([
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-I",
        ])
        .arg(folder.path())
        .arg(repository().join("tests/c-plugin").join(file))
        .args(arguments)
        .arg("-o")
        .arg(to)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    true
}

#[test]
fn the_example_of_the_front_page_runs_in_the_host() {
    let place = Place::with_faulty();
    let path = support::example("invert");
    let lines =
        std::fs::read_to_string(repository().join("plugin-api/examples/invert.rs")).unwrap();
    assert!(lines.lines().count() < 60);
    let workflow = json!({
        "1": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
        "2": node("SaveImage", json!({"images": ["1", 0], "filename_prefix": "as-it-was"})),
        "3": node("Invert", json!({"images": ["1", 0]})),
        "4": node("SaveImage", json!({"images": ["3", 0], "filename_prefix": "inverted"})),
    });
    place
        .run(&workflow, &["--plugin", path.to_str().unwrap()])
        .succeeded();
    let read = |name: &str| pixels(&place.read(&format!("out/{name}_00001.png")));
    let (before, after) = (read("as-it-was"), read("inverted"));
    assert!(!before.is_empty() && before.len() == after.len());
    let sums = before.iter().zip(&after);
    assert!(
        sums.clone()
            .all(|(a, b)| u16::from(*a) + u16::from(*b) == 255)
    );
    // What may be set is checked before the node sees it.
    let mut wrong = workflow;
    wrong["3"]["inputs"]["strength"] = json!(2);
    let done = place.run(&wrong, &["--plugin", path.to_str().unwrap()]);
    done.failed_with(&["strength is 2, the largest value is 1"]);
}

#[test]
fn a_plugin_in_c_runs_in_a_workflow() {
    let Some(path) = in_c() else { return };
    let place = Place::with_faulty();
    let plugin = ["--plugin", path.to_str().unwrap()];
    let workflow = |threshold: f64| {
        json!({
            "1": node("LoadImageMask", json!({"image": "demo:man-and-cat-mask-man.png", "channel": "red"})),
            "2": node("Threshold", json!({"masks": ["1", 0], "threshold": threshold})),
            "3": node("MaskToImage", json!({"mask": ["2", 0]})),
            "4": node("SaveImage", json!({"images": ["3", 0]})),
        })
    };
    place.run(&workflow(0.5), &plugin).succeeded();
    let png = pixels(&place.read("out/picture_00001.png"));
    assert!(png.iter().all(|&value| value == 0 || value == 255));
    assert!(png.contains(&0) && png.contains(&255));
    let refused = place.host(&["validate", "workflow.json", plugin[0], plugin[1]]);
    refused.succeeded();
    place.write("workflow.json", workflow(0.25).to_string());
    let refused = place.host(&["validate", "workflow.json", plugin[0], plugin[1]]);
    refused.failed_with(&["a quarter is what this node does not like"]);
    let listed = place.host(&["nodes", plugin[0], plugin[1]]).succeeded();
    assert!(listed.stdout.contains("Threshold"), "{}", listed.stdout);
}

#[test]
fn a_plugin_in_c_writes_in_place_what_nobody_else_holds() {
    let Some(path) = in_c() else { return };
    let plugin = doors::c(&path);
    assert_eq!(plugin.describe().unwrap().nodes[0].class, "Threshold");
    assert!(plugin.extension("devices/1").is_none());
    assert_eq!(
        plugin.create("Nothing").unwrap_err().message,
        "this plugin has the class Threshold alone"
    );
    let masks = || SharedTensor::from_vec(vec![0.2f32, 0.7, 0.6, 0.1], &[1, 2, 2]).unwrap();
    let threshold = |given: SharedTensor, host: Listener| {
        let mut node = plugin.create("Threshold").unwrap();
        assert_eq!(node.fingerprint("{}").unwrap(), "");
        let inputs = [("masks".to_owned(), Value::Tensor(given))];
        node.run(inputs, r#"{"threshold":0.65}"#, host).unwrap()
    };
    let given = masks();
    let address = given.data_address();
    let host = Listener::default();
    let outputs = threshold(given, host.clone());
    let [Value::Tensor(in_place), Value::Json(count)] = outputs.as_slice() else {
        panic!("{outputs:?}")
    };
    assert_eq!((in_place.data_address(), count.as_str()), (address, "1"));
    assert_eq!(*in_place.to_f32().unwrap(), [0.0, 1.0, 0.0, 0.0]);
    let heard = host.heard.lock().unwrap().clone();
    assert_eq!(
        heard,
        [
            "log 0 in place",
            "progress threshold 0/4 ",
            "metric above 0 1"
        ]
    );
    // Held here too: the node makes its own.
    let held = masks();
    let outputs = threshold(held.clone(), Listener::default());
    let Value::Tensor(copy) = &outputs[0] else {
        panic!("no tensor")
    };
    assert_ne!(copy.data_address(), held.data_address());
    assert_eq!(*held.to_f32().unwrap(), [0.2, 0.7, 0.6, 0.1]);
    assert_eq!(*copy.to_f32().unwrap(), [0.0, 1.0, 0.0, 0.0]);
    // And what it made is the holder's to write.
    let Some(Value::Tensor(mut copy)) = outputs.into_iter().next() else {
        panic!("no tensor")
    };
    assert!(copy.is_writable());
}

#[test]
fn errors_and_cancellation_of_a_plugin_in_c_are_the_contracts() {
    let Some(path) = in_c() else { return };
    let plugin = doors::c(&path);
    let mut node = plugin.create("Threshold").unwrap();
    let error = run(&mut node, &[], "{}").unwrap_err();
    assert_eq!(
        (error.error_code(), error.input.as_str()),
        (ErrorCode::InvalidInput, "masks")
    );
    let bytes = Value::Tensor(SharedTensor::from_vec(vec![1u8; 4], &[1, 2, 2]).unwrap());
    let error = run(&mut node, &[("masks", &bytes)], "{}").unwrap_err();
    assert!(error.message.contains("32-bit floats"), "{error}");
    let masks = Value::Tensor(SharedTensor::from_vec(vec![1f32; 4], &[1, 2, 2]).unwrap());
    let canceled = Listener {
        is_canceled: true,
        ..Listener::default()
    };
    let error = run_with(&mut node, &[("masks", &masks)], "{}", canceled).unwrap_err();
    assert_eq!(error.error_code(), ErrorCode::Canceled);
    // A fault of the host in a service that C calls.
    let panics = Listener {
        panics_over: "progress",
        ..Listener::default()
    };
    let error = run_with(&mut node, &[("masks", &masks)], "{}", panics).unwrap_err();
    assert!(error.message.contains("fault of the host"), "{error}");
}

#[test]
fn a_host_in_python_drives_the_library() {
    let python = std::env::var("CONCEPTLOOM_TESTS_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let can = Command::new(&python)
        .args([
            "-c",
            "import numpy; assert numpy.lib.NumpyVersion(numpy.__version__) >= '2.1.0'",
        ])
        .output();
    if !can.is_ok_and(|done| done.status.success()) {
        println!("skipped: {python} has no numpy of 2.1 or later");
        return;
    }
    let done = Command::new(&python)
        .arg(repository().join("tests/python/host.py"))
        .args([support::conceptloom(), support::faulty()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&done.stderr)
    );
    for part in [
        "9 nodes",
        "shared by address",
        "refined without a copy",
        "canceled within one step",
    ] {
        assert!(said.contains(part), "{part}:\n{said}");
    }
}
