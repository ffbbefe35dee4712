//! A disk that fails and processes that die, at every operation in turn.
//!
//! What writes is run once for each of its operations: that one fails with an error of the disk, or is the process's last.
//! Then it is run again without, and is right or says why it is not. `CONCEPTLOOM_TESTS_FAULTS=all` tries every fault at every
//! operation, else they take turns.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::Server;
use crate::support::{Done, Place, done, node, tree};

const KINDS: [&str; 4] = ["STOP", "EIO", "ENOSPC", "EACCES"];

/// Operations after the end of a job, which a server that is stopped then may not come to.
const TAIL: usize = 12;

fn is_all() -> bool {
    std::env::var("CONCEPTLOOM_TESTS_FAULTS").is_ok_and(|which| which == "all")
}

fn kinds(operation: usize) -> Vec<&'static str> {
    if is_all() {
        KINDS.to_vec()
    } else {
        vec![KINDS[operation % KINDS.len()]]
    }
}

/// What came of the faults.
#[derive(Debug, Default)]
struct Tally {
    /// Of which operation, how many.
    faults: BTreeMap<String, usize>,
    /// It went well in spite of it.
    harmless: usize,
    /// It failed in a sentence.
    said: usize,
    /// It was stopped.
    stopped: usize,
    /// The next one said that the result is there already.
    complete: usize,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.harmless += other.harmless;
        self.said += other.said;
        self.stopped += other.stopped;
        self.complete += other.complete;
    }
}

/// Sets the variables of a fault.
type Arm<'a> = dyn Fn(&mut Command) + 'a;

/// Tries something with every fault of every operation that it has, as far as its line in the trace `is_wanted`.
fn for_every_operation(
    is_wanted: impl Fn(&str) -> bool,
    mut attempt: impl FnMut(&Arm<'_>, &mut Tally),
) -> Tally {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut traced = |fault: String, tally: &mut Tally| -> Vec<String> {
        let _ = std::fs::remove_file(&trace);
        let arm = |command: &mut Command| {
            command
                .env("CONCEPTLOOM_TESTS_PACE", "0")
                .env("CONCEPTLOOM_TESTS_TRACE", &trace)
                .env("CONCEPTLOOM_TESTS_FAULT", &fault);
        };
        attempt(&arm, tally);
        let done = std::fs::read_to_string(&trace).unwrap();
        done.lines().map(str::to_owned).collect()
    };
    // No operation has this number.
    let whole = traced("0:STOP".to_owned(), &mut Tally::default());
    let mut tally = Tally::default();
    for operation in 1.. {
        let is_known = operation <= whole.len();
        if is_known && !is_wanted(&whole[operation - 1]) {
            continue;
        }
        for kind in kinds(operation) {
            let mut own = Tally::default();
            let done = traced(format!("{operation}:{kind}"), &mut own);
            let Some(line) = done.get(operation - 1) else {
                // It had no more of them.
                assert!(
                    !is_known || operation + TAIL > whole.len(),
                    "{operation} was not reached"
                );
                return tally;
            };
            tally.add(&own);
            let (name, _) = line.split_once(' ').unwrap();
            *tally.faults.entry(format!("{name} {kind}")).or_default() += 1;
        }
    }
    unreachable!("operations have an end")
}

/// How the one with the fault ended.
fn count(ended: &Done, tally: &mut Tally) {
    match ended.code {
        Some(0) => tally.harmless += 1,
        Some(1) => {
            assert_eq!(
                ended.stderr.matches("error: ").count(),
                1,
                "{}",
                ended.stderr
            );
            tally.said += 1;
        }
        code => {
            assert_eq!(code, None, "{}", ended.stderr);
            tally.stopped += 1;
        }
    }
    let lower = ended.stderr.to_lowercase();
    assert!(!lower.contains("panic"), "{}", ended.stderr);
    assert!(!lower.contains("os error 17"), "{}", ended.stderr);
}

/// What hangs neither on times nor on how often it was stopped. What nodes kept and could not be removed is removed later.
fn results(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = tree(folder);
    files.retain(|name, _| !name.starts_with(".work/"));
    files.retain(|name, _| {
        !name.starts_with("previews/") && name != "run.json" && name != "report.html"
    });
    files
}

fn counted() -> Value {
    json!({
        "1": node("Slow", json!({"steps": 6, "wait": 0})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    })
}

/// The same, of so many bytes that the journal is begun anew behind it.
fn long() -> Value {
    let mut job = counted();
    job["1"]["_meta"] = json!({"title": "x".repeat(5 << 20)});
    job
}

/// Runs into `out` with every fault; `prepare` makes what is there before.
fn every_fault_of_a_run(
    place: &Place,
    workflow: &Value,
    is_wanted: &dyn Fn(&str) -> bool,
    prepare: &dyn Fn(),
) -> Tally {
    place.write("w.json", workflow.to_string());
    let run = || place.command(&["run", "w.json", "--out", "out"]);
    let out = place.path().join("out");
    prepare();
    done(run().output().unwrap()).succeeded();
    let whole = results(&out);
    assert!(!whole.is_empty());
    for_every_operation(is_wanted, |arm, tally| {
        let _ = std::fs::remove_dir_all(&out);
        let _ = std::fs::remove_dir_all(place.path().join(".work"));
        prepare();
        let mut command = run();
        arm(&mut command);
        count(&done(command.output().unwrap()), tally);
        let next = done(run().output().unwrap());
        if next.code != Some(0) {
            next.failed_with(&["out is not empty", "--out"]);
            tally.complete += 1;
        }
        assert!(results(&out) == whole, "what is in the folder is not right");
        assert!(out.join("report.html").is_file());
        // What could not be removed at the end of a complete run is removed by a later one.
        let mut names = place.names(".");
        names.retain(|name| name != ".work");
        assert_eq!(names, ["out", "w.json"]);
        let mut inside = place.names("out");
        inside.retain(|name| name != ".work");
        assert!(
            inside.iter().all(|name| !name.starts_with('.')),
            "{inside:?}"
        );
    })
}

#[test]
fn every_fault_of_a_run_is_said_and_the_next_one_is_right() {
    let place = Place::with_faulty();
    println!(
        "{:?}",
        every_fault_of_a_run(&place, &counted(), &|_| true, &|| {})
    );
}

#[test]
fn every_fault_of_a_run_into_a_folder_that_is_there_is_said_and_the_next_one_is_right() {
    let place = Place::with_faulty();
    let make = || std::fs::create_dir(place.path().join("out")).unwrap();
    println!(
        "{:?}",
        every_fault_of_a_run(&place, &counted(), &|_| true, &make)
    );
}

#[test]
fn every_fault_of_what_a_learner_keeps_and_saves_is_said_and_the_next_run_is_right() {
    let place = Place::with_conceptloom();
    let workflow = json!({
        "1": node("LoadDiffusionModel", json!({"checkpoint": "sprites"})),
        "2": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
        "3": node("EmLoop", json!({
            "model": ["1", 0], "images": ["2", 0], "concept_list": "<bob> man\n<desk> table (background)", "steps": 2,
            "mode": "baseline", "first_timesteps": 1, "timesteps": 1, "joint_steps": 2, "seed": 5,
        })),
        "4": node("SaveConcepts", json!({"concepts": ["3", 0], "model": ["3", 1], "filename_prefix": "c/"})),
    });
    // The others are those of any run. By default every third: a learner takes a second.
    let count = std::cell::Cell::new(0);
    let is_wanted = |line: &str| {
        let is_own = line.contains("/.work/") || line.contains("/c/") || line.ends_with("/c");
        count.set(count.get() + usize::from(is_own));
        is_own && (is_all() || count.get().is_multiple_of(3))
    };
    println!(
        "{:?}",
        every_fault_of_a_run(&place, &workflow, &is_wanted, &|| {})
    );
}

#[test]
fn every_fault_of_a_batch_is_said_and_the_next_one_is_right() {
    let place = Place::with_faulty();
    place.write("w.json", counted().to_string());
    let lines = ["a", "b"].map(|id| json!({"id": id, "workflow": "w.json"}).to_string());
    place.write("m.jsonl", lines.join("\n"));
    let batch = || place.command(&["batch", "m.jsonl", "--out", "out", "--resume"]);
    let out = place.path().join("out");
    done(batch().output().unwrap()).succeeded();
    let whole = results(&out);
    let tally = for_every_operation(
        |_| true,
        |arm, tally| {
            let _ = std::fs::remove_dir_all(&out);
            let mut command = batch();
            arm(&mut command);
            count(&done(command.output().unwrap()), tally);
            done(batch().output().unwrap()).succeeded();
            let there = results(&out);
            assert!(there == whole, "{:?}", there.keys());
        },
    );
    println!("{tally:?}");
}

/// What a client was told is done.
#[derive(Debug, Default)]
struct Confirmed {
    job: Option<String>,
    setting: bool,
    file: bool,
    upload: bool,
}

const BOUNDARY: &str = "a-boundary";

/// Asks a server for one thing of each kind. What it does not answer may or may not be done.
fn ask_for_everything(server: &Server, picture: &[u8]) -> Confirmed {
    let is_done =
        |answer: std::io::Result<(u16, Value)>| answer.is_ok_and(|(status, _)| status < 300);
    let json = "application/json";
    let head = format!(
        "--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"image\"; filename=\"up.png\"\r\n\r\n"
    );
    let form = [
        head.as_bytes(),
        picture,
        format!("\r\n--{BOUNDARY}--\r\n").as_bytes(),
    ]
    .concat();
    let form_type = format!("multipart/form-data; boundary={BOUNDARY}");
    Confirmed {
        setting: is_done(server.send("POST", "/api/settings/x", json, b"17")),
        file: is_done(server.send(
            "POST",
            "/api/userdata/workflows%2Fa.json",
            json,
            b"{\"a\": 1}",
        )),
        upload: is_done(server.send("POST", "/api/upload/image", &form_type, &form)),
        job: server.submit(&long()).ok().flatten(),
    }
}

#[test]
fn every_fault_of_a_server_loses_nothing_that_it_confirmed() {
    let place = Place::with_faulty();
    let serve = |more: &[&str]| {
        let arguments = ["serve", "--port", "0", "--data", "data"];
        place.command(&[&arguments, more].concat())
    };
    let wait = |server: &Server| {
        let begun = Instant::now();
        // One with a fault may be gone: nothing is to be waited for.
        while !server.is_idle().unwrap_or(true) {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "a job does not end"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let data = place.path().join("data");
    place.write("w.json", counted().to_string());
    place.host(&["run", "w.json", "--out", "run"]).succeeded();
    let picture = place.read("run/picture_00001.png");
    let tally = for_every_operation(
        |_| true,
        |arm, tally| {
            let _ = std::fs::remove_dir_all(&data);
            let mut command = serve(&[]);
            arm(&mut command);
            command.stderr(std::process::Stdio::null());
            let mut confirmed = Confirmed::default();
            match Server::start(&mut command) {
                Err(child) => match child.wait_with_output().unwrap().status.code() {
                    Some(_) => tally.said += 1,
                    None => tally.stopped += 1,
                },
                Ok(mut server) => {
                    confirmed = ask_for_everything(&server, &picture);
                    wait(&server);
                    // It clears up.
                    std::thread::sleep(Duration::from_millis(100));
                    let is_whole = confirmed.job.is_some()
                        && confirmed.setting
                        && confirmed.file
                        && confirmed.upload;
                    // A job may also have failed, and its history says so.
                    let job = confirmed.job.as_deref().unwrap_or_default();
                    let history = server.send("GET", &format!("/api/history/{job}"), "", b"");
                    let has_failed = history.is_ok_and(|(_, history)| {
                        history.pointer(&format!("/{job}/status/status_str"))
                            == Some(&json!("error"))
                    });
                    if has_failed {
                        confirmed.job = None;
                    }
                    match server.child.try_wait().unwrap() {
                        Some(_) => tally.stopped += 1,
                        None if is_whole && !has_failed => tally.harmless += 1,
                        None => tally.said += 1,
                    }
                }
            }
            let next = Server::start(&mut serve(&["--resume"])).ok().unwrap();
            wait(&next);
            let (_, settings) = next
                .send("GET", "/api/settings", "application/json", b"")
                .unwrap();
            drop(next);
            let there = |name: &str| std::fs::read(data.join(name)).ok();
            let is_right = |name: &str,
                            content: Option<Vec<u8>>,
                            expected: &[u8],
                            is_confirmed: bool| {
                match content {
                    None => assert!(!is_confirmed, "{name} was confirmed and is not there"),
                    Some(content) => assert!(content == expected, "{name} is not what was sent"),
                }
            };
            let file = "user/workflows/a.json";
            is_right(file, there(file), b"{\"a\": 1}", confirmed.file);
            is_right("up.png", there("input/up.png"), &picture, confirmed.upload);
            let setting = settings
                .get("x")
                .map(|value| value.to_string().into_bytes());
            is_right("setting", setting, b"17", confirmed.setting);
            let outputs = place.names("data/output");
            let expected = outputs.iter().all(|name| name == "picture_00001.png");
            assert!(expected && outputs.len() <= 1, "{outputs:?}");
            assert!(
                confirmed.job.is_none() || outputs.len() == 1,
                "the job was accepted and is not done"
            );
            let files = tree(&data);
            assert!(
                !files.keys().any(|name| name.ends_with(".tmp")),
                "{:?}",
                files.keys()
            );
        },
    );
    println!("{tally:?}");
}
