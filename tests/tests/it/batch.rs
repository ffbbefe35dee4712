//! `host-demo batch`: shards, a kill in the middle, and going on.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Place, done, node, pixels, tree, wait_for};

/// A manifest of three entries.
fn manifest() -> String {
    let set = |steps: u32, prompt: &str| {
        json!({
            "EmLoop.steps": steps, "EmLoop.steps_per_round": steps / 2, "EmLoop.first_timesteps": 2,
            "EmLoop.timesteps": 2, "EmLoop.joint_steps": 0, "New pictures.steps": 2, "New pictures.prompts": prompt,
        })
    };
    let lines = [
        json!({"id": "long", "set": set(120, "a photo of <bob> on grass")}),
        json!({"id": "grass", "set": set(4, "a photo of <bob> on grass")}),
        json!({"id": "snow", "set": set(4, "a photo of <bob> in snow"), "seed": 3}),
    ];
    lines.map(|line| line.to_string()).join("\n")
}

#[test]
fn three_shards_with_one_killed_give_the_tree_of_a_single_run() {
    let place = Place::with_conceptloom();
    place.write("m.jsonl", manifest());
    let single = place
        .host(&["batch", "m.jsonl", "--out", "single"])
        .succeeded();
    assert!(single.stdout.contains("3 done"), "{single:?}");

    let command = |shard: &str| {
        place.command(&[
            "batch", "m.jsonl", "--out", "shards", "--resume", "--shard", shard,
        ])
    };
    let mut children: Vec<_> = ["0/3", "1/3", "2/3"]
        .map(|shard| command(shard).spawn().unwrap())
        .into();
    // The first has the long entry; it is killed once it keeps something to go on from.
    let work = place.path().join("shards/.work");
    let begun = Instant::now();
    while !has_state(&work) {
        assert!(
            begun.elapsed() < Duration::from_secs(300),
            "no state was kept"
        );
        assert!(
            children[0].try_wait().unwrap().is_none(),
            "ended before it was killed"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    children[0].kill().unwrap();
    for child in &mut children {
        child.wait().unwrap();
    }
    assert!(!place.path().join("shards/long").exists());
    let again = done(command("0/3").output().unwrap()).succeeded();
    assert!(again.stdout.contains("1 done"), "{again:?}");
    let (shards, single) = (
        tree(&place.path().join("shards")),
        tree(&place.path().join("single")),
    );
    assert!(
        shards.keys().eq(single.keys()),
        "{:?} {:?}",
        shards.keys(),
        single.keys()
    );
    for (name, content) in &single {
        assert!(shards[name] == *content, "{name} differs");
    }

    let nothing = place
        .host(&["batch", "m.jsonl", "--out", "single", "--resume"])
        .succeeded();
    assert!(
        nothing.stdout.contains("0 done, 3 were there already"),
        "{nothing:?}"
    );
    place
        .host(&["batch", "m.jsonl", "--out", "single"])
        .failed_with(&["--resume"]);
}

#[test]
fn an_entry_that_takes_every_process_down_keeps_the_others_from_nothing() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Slow", json!({"steps": 1, "wait": 0})),
        "2": node("Hazard", json!({"images": ["1", 0], "habit": "well"})),
        "3": node("SaveImage", json!({"images": ["2", 0]})),
    });
    place.write("w.json", workflow.to_string());
    let entry = |id: &str, habit: &str| {
        json!({"id": id, "workflow": "w.json", "set": {"Hazard.habit": habit}}).to_string()
    };
    let entries = |first: &str| [entry("a", first), entry("b", "well"), entry("c", "well")];
    place.write("m.jsonl", entries("abort").join("\n"));
    let batch = || place.host(&["batch", "m.jsonl", "--out", "out", "--resume"]);
    for _ in 0..3 {
        assert_eq!(batch().code, None, "not taken down");
        assert!(!place.names("out").contains(&"b".to_owned()));
    }
    let last = batch();
    assert_eq!(last.code, None, "not taken down");
    let told = "entry a was cut short 3 times; it runs after the others";
    assert!(last.stderr.contains(told), "{last:?}");
    let there = place.names("out");
    assert!(
        ["b", "c"]
            .iter()
            .all(|id| there.contains(&(*id).to_owned()))
    );
    place.write("m.jsonl", entries("well").join("\n"));
    let mended = batch().succeeded();
    assert!(
        mended.stdout.contains("1 done, 2 were there already"),
        "{mended:?}"
    );
    assert!(place.path().join("out/a/done.json").exists());
    let is_counted = |name: &String| name.ends_with(".tries");
    assert!(!place.names("out/.work").iter().any(is_counted));
}

fn has_state(work: &Path) -> bool {
    let folders = std::fs::read_dir(work).into_iter().flatten().flatten();
    folders.map(|entry| entry.path()).any(|path| {
        path.is_dir() && std::fs::read_dir(path).is_ok_and(|mut files| files.next().is_some())
    })
}

#[test]
fn an_entry_is_of_the_files_that_it_read() {
    let place = Place::with_conceptloom();
    let png = |shade: u8| {
        let picture = image::RgbImage::from_pixel(8, 8, image::Rgb([shade; 3]));
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    };
    place.write("x.png", png(1));
    let copy = json!({
        "1": node("LoadImage", json!({"image": "x.png"})),
        "2": node("SaveImage", json!({"images": ["1", 0], "filename_prefix": "x"})),
    });
    place.write("copy.json", copy.to_string());
    let first = manifest().lines().nth(1).unwrap().to_owned();
    let second = json!({"id": "copy", "workflow": "copy.json"});
    place.write("m.jsonl", format!("{first}\n{second}"));
    let arguments = ["batch", "m.jsonl", "--out", "out", "--resume"];
    let mut child = place
        .command(&arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // All files were looked at by now, and the first entry takes a while.
    wait_for(&mut child, "entry 1 of 2");
    place.write("x.png", png(2));
    let ended = done(child.wait_with_output().unwrap());
    ended.succeeded();
    let again = place.host(&arguments).succeeded();
    assert!(again.stdout.contains("2 were there already"), "{again:?}");
    assert_eq!(pixels(&place.read("out/copy/x_00001.png"))[..3], [2; 3]);
}

#[test]
fn everything_that_is_wrong_is_told_before_anything_runs() {
    let place = Place::with_conceptloom();
    let lines = [
        json!({"id": "a", "workflow": "no-such-file.json"}),
        json!({"id": "b", "set": {"Nobody.steps": 1}}),
        json!({"id": "c", "set": {"EmLoop.steps": -1}}),
        json!({"id": "d"}),
    ];
    place.write("m.jsonl", lines.map(|line| line.to_string()).join("\n"));
    let parts = [
        "line 1",
        "no-such-file.json",
        "line 2",
        "Nobody",
        "line 3",
        "steps",
    ];
    let failed = place
        .host(&["batch", "m.jsonl", "--out", "out"])
        .failed_with(&parts);
    assert!(
        !failed.stderr.contains("line 4") && place.names("out").is_empty(),
        "{failed:?}"
    );
}
