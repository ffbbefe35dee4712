//! Files, graphs and folders that cannot be used: one sentence each, exit code 1, nothing left behind.

use serde_json::{Value, json};

use crate::support::{Done, Place, done, node};

fn show(image: &str) -> Value {
    json!({
        "1": node("LoadImage", json!({"image": image})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    })
}

/// The first bytes of a PNG that claims this size.
fn png_of_size(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    png.extend(&header);
    png.extend(crc32(&header).to_be_bytes());
    png.extend(b"\0\0\0\0IDAT");
    png.extend(crc32(b"IDAT").to_be_bytes());
    png
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 {
                crc >> 1 ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    })
}

#[track_caller]
fn refused(place: &Place, done: Done, parts: &[&str]) {
    let before = place.names(".");
    done.failed_with(parts);
    assert!(
        !before
            .iter()
            .any(|name| name == "out" || name == "runs" || name.starts_with('.')),
        "{before:?}"
    );
}

#[test]
fn a_file_that_is_no_picture() {
    let place = Place::with_faulty();
    place.write("notes.png", "these are notes");
    refused(
        &place,
        place.run(&show("notes.png"), &[]),
        &[
            "node 1 (LoadImage), input image",
            "notes.png cannot be read",
        ],
    );
    place.write("empty.png", "");
    refused(
        &place,
        place.run(&show("empty.png"), &[]),
        &["empty.png cannot be read"],
    );
    place.write("half.png", png_of_size(64, 64));
    refused(
        &place,
        place.run(&show("half.png"), &[]),
        &["half.png cannot be read"],
    );
    refused(
        &place,
        place.run(&show("gone.png"), &[]),
        &["there is no picture gone.png", "custom_validation_failed"],
    );
    refused(
        &place,
        place.run(&show("demo:gone.png"), &[]),
        &["there is no built-in picture demo:gone.png"],
    );
}

#[test]
fn a_picture_that_is_too_large() {
    let place = Place::with_faulty();
    place.write("huge.png", png_of_size(20_000, 20_000));
    refused(
        &place,
        place.run(&show("huge.png"), &[]),
        &[
            "huge.png is 20000×20000 pixels",
            "the largest size that is read is 8192×8192",
            "scale it down",
        ],
    );
    // Within the sides, but more memory than its file could ever fill.
    place.write("bomb.png", png_of_size(8192, 8192));
    refused(
        &place,
        place.run(&show("bomb.png"), &[]),
        &["bomb.png cannot be read"],
    );
}

#[test]
fn pictures_of_two_sizes_in_a_batch() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
        "2": node("Lie", json!({"about": "bad_preview"})),
        "3": node("ImageBatch", json!({"image1": ["1", 0], "image2": ["2", 0]})),
        "4": node("PreviewImage", json!({"images": ["3", 0]})),
    });
    refused(
        &place,
        place.run(&workflow, &[]),
        &["node 3 (ImageBatch), input image2", "4×4", "128×128"],
    );
}

#[test]
fn a_graph_that_cannot_run() {
    let place = Place::with_faulty();
    let passthrough = |source: &str| node("Passthrough", json!({"images": [source, 0]}));
    let preview = |source: &str| node("PreviewImage", json!({"images": [source, 0]}));
    let cycle = json!({"1": passthrough("2"), "2": passthrough("1"), "3": preview("2")});
    refused(
        &place,
        place.run(&cycle, &[]),
        &[
            "form a cycle",
            "2 (Passthrough) → 1 (Passthrough)",
            "dependency_cycle",
        ],
    );
    let wrong = json!({"1": node("LoadImageMask", json!({})), "2": preview("1")});
    refused(
        &place,
        place.run(&wrong, &[]),
        &[
            "node 2 (PreviewImage), input images",
            "gives MASK",
            "return_type_mismatch",
        ],
    );
    let out_of_bounds = json!({"1": node("Slow", json!({"steps": 10_001})), "2": preview("1")});
    refused(
        &place,
        place.run(&out_of_bounds, &[]),
        &[
            "node 1 (Slow), input steps: steps is 10001, the largest value is 10000",
            "value_bigger_than_max",
        ],
    );
    let unknown = json!({"1": node("Slower", json!({})), "2": preview("1")});
    refused(
        &place,
        place.run(&unknown, &[]),
        &["node 1 (Slower): no node of the class Slower is known"],
    );
    let idle = json!({"1": node("Slow", json!({}))});
    refused(
        &place,
        place.run(&idle, &[]),
        &["no output node", "prompt_no_outputs"],
    );
    let missing = json!({"2": node("PreviewImage", json!({}))});
    refused(
        &place,
        place.run(&missing, &[]),
        &[
            "node 2 (PreviewImage), input images",
            "required_input_missing",
        ],
    );
}

#[test]
fn a_file_that_is_no_workflow() {
    let place = Place::with_faulty();
    for (content, parts) in [
        ("{", &["w.json is no JSON"][..]),
        ("[1, 2]", &["w.json is no workflow", "class_type"]),
        (
            r#"{"nodes": [{"id": 1}], "links": []}"#,
            &["w.json cannot be read", "type"],
        ),
        (
            r#"{"1": {"class_type": "Slow", "inputs": []}}"#,
            &["the inputs of the node 1 (Slow) are no JSON object"],
        ),
    ] {
        place.write("w.json", content);
        refused(&place, place.host(&["run", "w.json"]), parts);
    }
    refused(
        &place,
        place.host(&["run", "gone.json"]),
        &["there is no workflow gone.json; name a file"],
    );
    refused(
        &place,
        place.host(&["batch", "gone.jsonl", "--out", "all"]),
        &["there is no manifest gone.jsonl; name a file"],
    );
    refused(&place, place.host(&["run", "."]), &["it is a directory"]);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    place.write("w.json", deep);
    refused(
        &place,
        place.host(&["run", "w.json"]),
        &["w.json is no JSON", "recursion"],
    );
}

#[test]
fn a_set_target_that_is_not_there() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Slow", json!({})),
        "2": node("Slow", json!({})),
        "3": node("ImageBatch", json!({"image1": ["1", 0], "image2": ["2", 0]})),
        "4": node("PreviewImage", json!({"images": ["3", 0]})),
    });
    for (assignment, part) in [
        (
            "Blur.radius=3",
            "no node \"Blur\"; its nodes are: 1 (Slow), 2 (Slow)",
        ),
        (
            "Slow.steps=3",
            "\"Slow\" means several nodes; use one of the ids 1, 2",
        ),
        ("1.step=3", "its parameters are: steps, wait, prompts, seed"),
        ("1.steps", "takes node.input=value"),
        (
            "1.steps=many",
            "node 1 (Slow), input steps: steps takes a whole number, got \"many\"",
        ),
    ] {
        refused(
            &place,
            place.run(&workflow, &["--set", assignment]),
            &[part],
        );
    }
}

#[test]
fn a_folder_that_cannot_be_written() {
    let place = Place::with_faulty();
    place.write("w.json", show("demo:man-and-cat.png").to_string());
    place.write("taken", "a file");
    place
        .host(&["run", "w.json", "--out", "taken"])
        .failed_with(&["taken is a file", "--out"]);
    place
        .host(&["run", "w.json", "--out", "taken/run"])
        .failed_with(&["taken is a file", "--out"]);
    place
        .host(&["run", "w.json", "--out", "/proc/run"])
        .failed_with(&["cannot write /proc/run", "--out"]);
    place.write("runs", "a file, too");
    place
        .host(&["run", "w.json"])
        .failed_with(&["runs is a file", "--out"]);
    assert_eq!(place.names("."), ["runs", "taken", "w.json"]);
    assert_eq!(place.read("taken"), b"a file");
}

#[cfg(unix)]
#[test]
fn a_folder_without_permission() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::with_faulty();
    place.write("w.json", show("demo:man-and-cat.png").to_string());
    let closed = place.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o555)).unwrap();
    if std::fs::write(closed.join("probe"), "").is_ok() {
        println!("skipped: this user may write everywhere");
        return;
    }
    place
        .host(&["run", "w.json", "--out", "closed/run"])
        .failed_with(&["cannot write closed/run", "Permission denied"]);
    assert!(place.names("closed").is_empty());
}

/// Files of at most 8 blocks: writing fails in the middle, as on a full disk.
#[cfg(unix)]
#[test]
fn a_file_that_cannot_be_written_to_its_end() {
    let place = Place::with_faulty();
    place.write("w.json", show("demo:man-and-cat.png").to_string());
    let command = place.command(&["run", "w.json", "--out", "out"]);
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""])
        .arg(command.get_program());
    shell
        .args(command.get_args())
        .current_dir(place.path())
        .env("CONCEPTLOOM_PLUGIN", crate::support::faulty());
    let done = crate::support::done(shell.output().unwrap());
    refused(
        &place,
        done,
        &[
            "node 2 (SaveImage)",
            "cannot write out/picture_00001.png",
            "--out",
        ],
    );
    assert_eq!(place.names("."), ["w.json"]);
}

/// A full disk in earnest, where a small one can be made.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_full() {
    let place = Place::with_faulty();
    place.write("w.json", show("demo:man-and-cat.png").to_string());
    let disk = place.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=32k", "tmpfs"])
        .arg(&disk)
        .output();
    if !mount.is_ok_and(|output| output.status.success()) {
        println!("skipped: this user may not mount");
        return;
    }
    let done = place.host(&["run", "w.json", "--out", "disk/run"]);
    let left = place.names("disk");
    let unmounted = std::process::Command::new("umount")
        .arg(&disk)
        .status()
        .unwrap();
    assert!(unmounted.success());
    done.failed_with(&["cannot write disk/run", "No space left", "free some space"]);
    assert_eq!(left, [] as [&str; 0]);
}

#[test]
fn a_precision_that_the_device_lacks_is_named() {
    let place = Place::with_conceptloom();
    let workflow = json!({
        "1": node("LoadDiffusionModel", json!({"precision": "f16"})),
        "2": node("PersonalizedSampler", json!({"model": ["1", 0], "prompts": "a cat", "steps": 1})),
        "3": node("SaveImage", json!({"images": ["2", 0]})),
    });
    place.write("workflow.json", workflow.to_string());
    let mut command = place.command(&["run", "workflow.json"]);
    command.env("CONCEPTLOOM_DEVICE", "cpu");
    done(command.output().unwrap()).failed_with(&[
        "node 1 (LoadDiffusionModel), input precision",
        "f16 is for GPUs; on a processor choose bf16",
    ]);
}

#[test]
#[cfg(target_os = "linux")]
fn pictures_that_cannot_fit_into_memory_are_refused_before_they_are_begun() {
    let place = Place::with_conceptloom();
    let workflow = json!({
        "1": node("LoadDiffusionModel", json!({})),
        "2": node("PersonalizedSampler", json!({
            "model": ["1", 0], "prompts": "a cat", "width": 4096, "height": 4096, "steps": 1,
        })),
        "3": node("SaveImage", json!({"images": ["2", 0]})),
    });
    place.write("workflow.json", workflow.to_string());
    let host = place.command(&["run", "workflow.json", "--out", "out"]);
    let mut limited = std::process::Command::new("sh");
    limited
        .args(["-c", "ulimit -v 3145728; exec \"$0\" \"$@\""])
        .arg(host.get_program())
        .args(host.get_args())
        .current_dir(place.path())
        .envs(
            host.get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
    let done = crate::support::done(limited.output().unwrap());
    done.failed_with(&[
        "node 2 (PersonalizedSampler): a picture of 4096 x 4096 in the VAE takes at least 4.0 GiB of memory, and this \
         process may have 3.0 GiB",
        "memory = lean",
    ]);
}
