//! Ctrl-C stops within a step, leaves nothing half-written, and the same command goes on.
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Place, done, interrupt, node, send, wait_for};

fn slow(place: &Place) {
    let workflow = json!({
        "1": node("Slow", json!({"steps": 60, "wait": 50})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    });
    place.write("w.json", workflow.to_string());
}

/// A file of this name, at any depth.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    entries.map(|entry| entry.path()).find_map(|path| {
        let is_it = path.is_file() && path.file_name().is_some_and(|own| own == name);
        if is_it { Some(path) } else { find(&path, name) }
    })
}

#[test]
fn who_is_asked_to_stop_does_within_a_step_and_the_same_command_goes_on() {
    // Ctrl-C, and a scheduler that wants the machine back.
    for signal in ["-INT", "-TERM"] {
        let place = Place::with_faulty();
        slow(&place);
        let mut child = place.command(&["run", "w.json"]).spawn().unwrap();
        wait_for(&mut child, "counting 1/60");
        std::thread::sleep(Duration::from_millis(400));
        let asked = Instant::now();
        send(&child, signal);
        let ended = done(child.wait_with_output().unwrap());
        assert!(
            asked.elapsed() < Duration::from_secs(2),
            "{:?}",
            asked.elapsed()
        );
        assert_eq!(ended.code, Some(130), "{}", ended.stderr);
        assert_eq!(
            ended.sentence(),
            "canceled at node 1 (Slow); nothing was written; the same command goes on where it stopped"
        );
        assert_eq!(place.names("runs"), [".work"]);

        let again = place.host(&["run", "w.json"]).succeeded();
        assert!(again.stderr.contains("goes on at step"), "{}", again.stderr);
        let runs = place.names("runs");
        assert_eq!(runs.len(), 1, "what was kept is gone: {runs:?}");
        let run = place.json(&format!("runs/{}/run.json", runs[0]));
        let n = run["metrics"][0]["points"].as_array().unwrap().len();
        assert!(n > 0 && n < 60, "{n} steps were left");
    }
}

#[test]
fn changed_parameters_start_anew() {
    let place = Place::with_faulty();
    slow(&place);
    let mut child = place.command(&["run", "w.json"]).spawn().unwrap();
    wait_for(&mut child, "counting 1/60");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let other = place
        .host(&["run", "w.json", "--set", "Slow.steps=5"])
        .succeeded();
    assert!(!other.stderr.contains("goes on"), "{}", other.stderr);
}

#[test]
fn ctrl_c_twice_stops_at_once_and_the_next_run_cleans_up() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Slow", json!({"steps": 5, "wait": 10_000})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    });
    place.write("long.json", workflow.to_string());
    let mut child = place.command(&["run", "long.json"]).spawn().unwrap();
    wait_for(&mut child, "[1/2] Slow");
    // Before its first step, which takes ten seconds, the node looks once whether it is to stop.
    std::thread::sleep(Duration::from_millis(500));
    interrupt(&child);
    wait_for(&mut child, "Ctrl-C again stops at once");
    let asked = Instant::now();
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "{:?}",
        asked.elapsed()
    );
    assert!(
        place
            .names("runs")
            .iter()
            .any(|name| name.ends_with(".partial"))
    );
    slow(&place);
    place
        .host(&["run", "w.json", "--set", "Slow.steps=1"])
        .succeeded();
    assert!(
        !place
            .names("runs")
            .iter()
            .any(|name| name.ends_with(".partial"))
    );
}

#[test]
fn a_killed_run_leaves_no_result_and_the_next_one_goes_on() {
    let place = Place::with_faulty();
    slow(&place);
    let mut child = place.command(&["run", "w.json"]).spawn().unwrap();
    wait_for(&mut child, "counting 1/60");
    // Its state is written after that.
    let state = || find(place.path(), "step").is_some();
    while !state() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(place.names("runs").iter().all(|name| name.starts_with('.')));
    let again = place.host(&["run", "w.json"]).succeeded();
    assert!(again.stderr.contains("goes on at step"), "{}", again.stderr);
    assert_eq!(place.names("runs").len(), 1);
}
