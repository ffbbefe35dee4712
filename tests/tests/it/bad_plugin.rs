//! Libraries that cannot be loaded, and nodes that fail, lie and panic.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::{Place, faulty, node, pixels};

fn load(place: &Place, path: &str) -> crate::support::Done {
    place.host(&["nodes", "--plugin", path])
}

/// Some library that is no plugin: a procedural macro, of which every build of this workspace has one.
fn other_library() -> Option<PathBuf> {
    let folder = faulty().parent()?.join("deps");
    let suffix = std::env::consts::DLL_SUFFIX;
    let is_macro = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.contains("thiserror_impl") && name.ends_with(suffix)
    };
    std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .find(is_macro)
}

#[test]
fn a_library_that_cannot_be_loaded_says_why() {
    let place = Place::with_faulty();
    place.write("text.so", "not a library");
    load(&place, "gone.so").failed_with(&[
        "cannot load the plugin gone.so",
        "it is not there; name a library",
    ]);
    load(&place, ".").failed_with(&["cannot load the plugin ."]);
    load(&place, "text.so").failed_with(&["text.so", "the system cannot open it as a library"]);
    match other_library() {
        Some(path) => {
            load(&place, path.to_str().unwrap())
                .failed_with(&["it is a library, but no plugin: it does not export node_plugin"]);
        }
        None => println!("skipped: no other library is at hand"),
    }
}

#[test]
fn a_library_of_another_contract_version_is_refused_in_one_sentence() {
    let place = Place::with_faulty();
    let mut library = std::fs::read(faulty()).unwrap();
    // magic [16], size u32, major u32
    let magic = b"NODEPLUGINTABLE\0";
    let places: Vec<_> = (0..library.len() - 24)
        .filter(|&i| &library[i..i + 16] == magic && library[i + 20..i + 24] == 1u32.to_le_bytes())
        .collect();
    assert_eq!(places.len(), 1);
    library[places[0] + 20] = 2;
    place.write("newer.so", &library);
    load(&place, "newer.so").failed_with(&[
        "newer.so",
        "faulty-plugin 1.0.0 speaks version 2.0",
        "this host version 1.0.0",
    ]);
    library[places[0]] = b'X';
    place.write("other.so", &library);
    load(&place, "other.so").failed_with(&["what its node_plugin gives is no plugin's table"]);
}

/// Lengths of what is left of a library, and what part of the sentence says so.
#[cfg(target_os = "linux")]
fn cut_short() -> Vec<(Vec<u8>, &'static str)> {
    let library = std::fs::read(faulty()).unwrap();
    let at = |i: usize| u64::from_le_bytes(library[i..i + 8].try_into().unwrap()) as usize;
    let (table, n) = (at(32), usize::from(library[56]));
    // Offset and size of a segment in the file.
    let ends = (0..n).map(|i| at(table + 56 * i + 8) + at(table + 56 * i + 32));
    let end = ends.max().unwrap();
    let lengths = [5, 63, 64, 300, 4096, end / 4, end / 2, end / 4 * 3, end - 1];
    let system = [(0, "the system cannot open it as a library")];
    let known = lengths.map(|length| (length, "it is cut short"));
    let cuts = system.into_iter().chain(known);
    cuts.map(|(length, part)| (library[..length].to_vec(), part))
        .collect()
}

#[cfg(target_os = "linux")]
#[test]
fn a_library_that_is_cut_short_is_refused_in_one_sentence() {
    let place = Place::with_faulty();
    for (library, part) in cut_short() {
        place.write("cut.so", &library);
        load(&place, "cut.so").failed_with(&["cannot load the plugin cut.so", part]);
        // Nor does one in a folder of plugins take a process down, or stay away once it is whole.
        place.write("plugins/cut.so", &library);
        let plugin = faulty();
        let plugin = plugin.to_str().unwrap();
        let mut command = place.command(&["nodes", "--plugin", plugin, "--plugins", "plugins"]);
        command.env("XDG_CACHE_HOME", place.path().join("cache"));
        let done = crate::support::done(command.output().unwrap()).succeeded();
        let said = done.sentence();
        assert!(
            said.contains("cut.so is left out: ") && said.contains(part),
            "{said}"
        );
        assert!(!place.path().join("cache").exists(), "{said}");
    }
}

#[test]
fn two_plugins_with_one_class_are_refused() {
    let place = Place::with_faulty();
    let path = faulty();
    std::fs::copy(&path, place.path().join("copy.so")).unwrap();
    let done = place.host(&[
        "nodes",
        "--plugin",
        path.to_str().unwrap(),
        "--plugin",
        "copy.so",
    ]);
    done.failed_with(&[
        "the node class",
        "is in the plugin",
        "load only one of them",
    ]);
}

/// Runs `class` into a picture that is saved.
fn ends(class: &str, inputs: Value, parts: &[&str]) {
    let place = Place::with_faulty();
    let is_output = matches!(class, "Fail" | "Panic");
    let mut workflow = json!({"1": node(class, inputs)});
    if !is_output {
        workflow["2"] = node("SaveImage", json!({"images": ["1", 0]}));
    }
    let done = place.run(&workflow, &[]).failed_with(parts);
    assert_eq!(
        place.names("."),
        ["workflow.json"],
        "nothing is left: {}",
        done.stderr
    );
}

#[test]
fn failures_are_one_sentence_with_the_node() {
    for (code, part) in [
        (
            "invalid_input",
            "node 1 (Fail), input code: the code is one that fails",
        ),
        ("invalid_file", "node 1 (Fail): it fails with InvalidFile"),
        ("cannot_write", "node 1 (Fail): it fails with CannotWrite"),
        ("out_of_memory", "node 1 (Fail): it fails with OutOfMemory"),
        ("internal", "node 1 (Fail): it fails with InternalError"),
        ("canceled", "as if canceled, but nobody asked"),
    ] {
        ends("Fail", json!({"code": code}), &[part]);
    }
}

#[test]
fn where_memory_runs_out_the_cache_is_emptied_and_the_node_runs_again() {
    let place = Place::with_faulty();
    // The object is in the cache alone when the hungry node runs.
    let mut workflow = json!({
        "1": node("Counted", json!({})),
        "2": node("Slow", json!({"steps": 1, "seed": ["1", 1]})),
        "3": node("Hungry", json!({"images": ["2", 0]})),
        "4": node("Slow", json!({"steps": 1, "seed": ["3", 0]})),
        "5": node("SaveImage", json!({"images": ["4", 0]})),
    });
    let done = place.run(&workflow, &[]).succeeded();
    let told = "memory ran out; the cache was emptied and the node runs again";
    assert_eq!(done.stderr.matches(told).count(), 1, "{}", done.stderr);
    // Now somebody still waits for it.
    workflow["4"] = node("Counted", json!({"other": ["1", 0], "number": ["3", 0]}));
    workflow["5"] = node("Slow", json!({"steps": 1, "seed": ["4", 1]}));
    workflow["6"] = node("SaveImage", json!({"images": ["5", 0]}));
    place.write("workflow.json", workflow.to_string());
    let done = place.host(&["run", "workflow.json", "--out", "held"]);
    let done = done.failed_with(&[
        "node 3 (Hungry): memory ran out beside 1 objects (the same again after the cache was emptied)",
    ]);
    assert_eq!(done.stderr.matches(told).count(), 1, "{}", done.stderr);
}

#[test]
fn the_cache_holds_no_more_than_it_may() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Counted", json!({"megabytes": 300})),
        "2": node("Counted", json!({"megabytes": 300, "number": ["1", 1]})),
        "3": node("Counted", json!({"megabytes": 300, "number": ["2", 1]})),
        "4": node("Slow", json!({"steps": 1, "seed": ["3", 1]})),
        "5": node("SaveImage", json!({"images": ["4", 0]})),
    });
    let alive = |limit: &str, out: &str| {
        place.write("workflow.json", workflow.to_string());
        let done = place.host(&[
            "run",
            "workflow.json",
            "--out",
            out,
            "--cache-memory",
            limit,
        ]);
        let done = done.succeeded();
        let seen = pixels(&place.read(&format!("{out}/picture_00001.png")))[0];
        (
            seen,
            done.stderr
                .matches("the cache let go of a result of Counted (300 MiB)")
                .count(),
        )
    };
    assert_eq!(alive("1000", "all"), (2, 0));
    assert_eq!(alive("700", "two"), (2, 1));
    // One leaves for each that comes.
    assert_eq!(alive("400", "one"), (1, 2));
    // Not even one is kept; the last one is still on its wire.
    assert_eq!(alive("200", "none"), (1, 3));
}

#[test]
fn lies_are_found() {
    for (about, part) in [
        ("too_few", "promised 1 outputs and returned 0"),
        ("too_many", "promised 1 outputs and returned 2"),
        (
            "wrong_type",
            "promised IMAGE on its output images and returned the value 7",
        ),
        (
            "wrong_shape",
            "promised IMAGE on its output images and returned a tensor of shape [4, 4]",
        ),
        ("not_finite", "images holds values that are not finite"),
    ] {
        ends("Lie", json!({"about": about}), &[part]);
    }
}

#[test]
fn previews_and_curves_that_are_none_do_not_stop_a_run() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Lie", json!({"about": "bad_preview"})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    });
    let done = place.run(&workflow, &[]).succeeded();
    assert!(
        done.stderr
            .contains("a preview is [height, width, 3], got the shape [16]"),
        "{}",
        done.stderr
    );
}

#[test]
fn a_panic_is_one_sentence() {
    ends(
        "Panic",
        json!({}),
        &[
            "node 1 (Panic)",
            "index 3 out of nothing",
            "this is a fault of the plugin",
        ],
    );
}
