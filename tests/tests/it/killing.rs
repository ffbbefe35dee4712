//! Kills: what was promised is there afterwards, bit for bit and once, and nothing is in anybody's way.
//!
//! `CONCEPTLOOM_TESTS_KILLS` says how many there are of either kind (20), `CONCEPTLOOM_TESTS_SEED` when they come.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::server::Server;
use crate::support::{Done, Place, done, node, tree};

fn kills() -> usize {
    let number = std::env::var("CONCEPTLOOM_TESTS_KILLS");
    number.map_or(20, |number| number.parse().unwrap())
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn new() -> Self {
        let seed = std::env::var("CONCEPTLOOM_TESTS_SEED").map_or_else(
            |_| {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                now.as_nanos() as u64
            },
            |seed| seed.parse().unwrap(),
        );
        Self(seed)
    }

    /// A moment before `end`.
    fn before(&mut self, end: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        end.mul_f64((z ^ (z >> 31)) as f64 / u64::MAX as f64)
    }
}

/// A learner with all of its stages, and pictures.
fn graph(steps: usize, seed: usize, prefix: &str) -> Value {
    json!({
        "1": node("LoadDiffusionModel", json!({"checkpoint": "sprites"})),
        "2": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
        "3": node("EmLoop", json!({
            "model": ["1", 0], "images": ["2", 0], "concept_list": "<bob> man\n<tom> cat\n<desk> table (background)",
            "steps": steps, "steps_per_round": steps / 2, "first_timesteps": 2, "timesteps": 2, "joint_steps": 4, "seed": seed,
        })),
        "4": node("PersonalizedSampler", json!({
            "model": ["3", 1], "concepts": ["3", 0], "steps": 3, "pictures_per_prompt": 2,
            "prompts": "a photo of <bob> on grass\na photo of <tom>",
        })),
        "5": node("SaveImage", json!({"images": ["4", 0], "filename_prefix": prefix})),
        "6": node("SaveConcepts", json!({
            "concepts": ["3", 0], "model": ["3", 1], "filename_prefix": format!("{prefix}/"),
        })),
    })
}

/// With states after every step.
fn command(place: &Place, arguments: &[&str]) -> Command {
    let mut command = place.command(arguments);
    command.env("CONCEPTLOOM_TESTS_PACE", "0");
    command
}

/// A process that was not waited for: if it has ended it is a zombie.
fn kill(id: u32) {
    let status = Command::new("kill")
        .args(["-KILL", &id.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

/// What a run is for: the same whenever and however often it was stopped.
fn results(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = tree(folder);
    // They tell of the run itself: times, and what was shown on the way.
    files.retain(|name, _| {
        !name.starts_with("previews/") && name != "run.json" && name != "report.html"
    });
    files
}

fn is_complete(place: &Place, out: &str, whole: &BTreeMap<String, Vec<u8>>) {
    let there = results(&place.path().join(out));
    assert!(there.keys().eq(whole.keys()), "{:?}", there.keys());
    assert!(there == *whole, "the bits of {out} differ");
    assert!(place.path().join(out).join("report.html").is_file());
}

/// How a process that was killed or not did end: none says anything but that a result is there already.
fn ended_well(child: Child, is_there: bool) {
    let done: Done = done(child.wait_with_output().unwrap());
    let is_refused = is_there && done.stderr.contains("is not empty");
    let was_killed = done.code.is_none();
    assert!(
        was_killed || done.code == Some(0) || is_refused,
        "{}",
        done.stderr
    );
    assert!(!done.stderr.contains("os error"), "{}", done.stderr);
}

#[test]
fn a_run_that_was_killed_in_its_first_seconds_again_and_again_simply_runs() {
    let place = Place::with_conceptloom();
    let mut random = Random::new();
    println!("CONCEPTLOOM_TESTS_SEED={}", random.0);
    place.write("w.json", graph(40, 5, "picture").to_string());
    let run = |out: &str| command(&place, &["run", "w.json", "--out", out]);
    done(run("whole").output().unwrap()).succeeded();
    let whole = results(&place.path().join("whole"));
    let out = place.path().join("o");
    let mut dying: Option<Child> = None;
    let (mut n_killed, mut n_complete) = (0, 0);
    while n_killed < kills() {
        // The one before is not waited for: it may not have died yet.
        let child = run("o").spawn().unwrap();
        if let Some(before) = dying.take() {
            ended_well(before, true);
        }
        std::thread::sleep(random.before(Duration::from_secs(2)));
        kill(child.id());
        n_killed += 1;
        if out.exists() {
            ended_well(child, true);
            is_complete(&place, "o", &whole);
            std::fs::remove_dir_all(&out).unwrap();
            n_complete += 1;
        } else {
            dying = Some(child);
        }
    }
    let last = done(run("o").output().unwrap());
    if let Some(before) = dying.take() {
        ended_well(before, true);
    }
    if !last.stderr.contains("is not empty") {
        last.succeeded();
    }
    is_complete(&place, "o", &whole);
    assert_eq!(place.names("."), ["o", "w.json", "whole"]);
    println!("{n_killed} kills, {n_complete} of them came too late; the next run simply ran");
}

/// What happened in [`kills_at_random_moments_lose_nothing_and_double_nothing`].
#[derive(Debug, Default)]
struct Tally {
    run: usize,
    batch: usize,
    serve: usize,
    /// Kills that found nothing to kill any more.
    late: usize,
    /// Jobs that a server had accepted when it was killed.
    accepted: usize,
}

#[test]
fn kills_at_random_moments_lose_nothing_and_double_nothing() {
    let place = Place::with_conceptloom();
    let mut random = Random::new();
    println!("CONCEPTLOOM_TESTS_SEED={}", random.0);
    let mut tally = Tally::default();
    let kinds: [&dyn Victim; 3] = [&Run, &Batch, &Serve];
    let wholes = kinds.map(|kind| kind.whole(&place));
    for n in 0..kills() {
        let (kind, (whole, length)) = (kinds[n % 3], &wholes[n % 3]);
        kind.kill_once(&place, random.before(*length), whole, &mut tally);
        if (n + 1).is_multiple_of(20) {
            println!("{} kills: {tally:?}", n + 1);
        }
    }
    println!("{tally:?}");
}

/// A command that is killed.
trait Victim {
    /// What an unbroken one leaves, and how long it takes.
    fn whole(&self, place: &Place) -> (BTreeMap<String, Vec<u8>>, Duration);

    /// Kills one at this moment, goes on, and looks at what is there.
    fn kill_once(
        &self,
        place: &Place,
        at: Duration,
        whole: &BTreeMap<String, Vec<u8>>,
        tally: &mut Tally,
    );
}

struct Run;

impl Victim for Run {
    fn whole(&self, place: &Place) -> (BTreeMap<String, Vec<u8>>, Duration) {
        place.write("w.json", graph(8, 5, "picture").to_string());
        let begun = Instant::now();
        let run = command(place, &["run", "w.json", "--out", "run"]).output();
        done(run.unwrap()).succeeded();
        (results(&place.path().join("run")), begun.elapsed())
    }

    fn kill_once(
        &self,
        place: &Place,
        at: Duration,
        whole: &BTreeMap<String, Vec<u8>>,
        tally: &mut Tally,
    ) {
        let run = || command(place, &["run", "w.json", "--out", "r"]);
        let child = run().spawn().unwrap();
        std::thread::sleep(at);
        kill(child.id());
        tally.run += 1;
        let done = done(child.wait_with_output().unwrap());
        if place.path().join("r").exists() {
            tally.late += 1;
        } else {
            assert_eq!(done.code, None, "{}", done.stderr);
            self::done(run().output().unwrap()).succeeded();
        }
        is_complete(place, "r", whole);
        std::fs::remove_dir_all(place.path().join("r")).unwrap();
    }
}

struct Batch;

impl Victim for Batch {
    fn whole(&self, place: &Place) -> (BTreeMap<String, Vec<u8>>, Duration) {
        place.write("b.json", graph(6, 5, "picture").to_string());
        let lines = [1, 2, 3].map(|seed| {
            let id = format!("entry-{seed}");
            json!({"id": id, "workflow": "b.json", "seed": seed}).to_string()
        });
        place.write("m.jsonl", lines.join("\n"));
        let begun = Instant::now();
        let batch = command(place, &["batch", "m.jsonl", "--out", "batch"]).output();
        done(batch.unwrap()).succeeded();
        (tree(&place.path().join("batch")), begun.elapsed())
    }

    fn kill_once(
        &self,
        place: &Place,
        at: Duration,
        whole: &BTreeMap<String, Vec<u8>>,
        tally: &mut Tally,
    ) {
        let batch = || command(place, &["batch", "m.jsonl", "--out", "b", "--resume"]);
        let mut child = batch().spawn().unwrap();
        std::thread::sleep(at);
        match child.try_wait().unwrap() {
            Some(_) => tally.late += 1,
            None => kill(child.id()),
        }
        tally.batch += 1;
        child.wait().unwrap();
        let again = done(batch().output().unwrap()).succeeded();
        assert!(again.stdout.contains("0 failed"), "{again:?}");
        let there = tree(&place.path().join("b"));
        assert!(there.keys().eq(whole.keys()), "{:?}", there.keys());
        assert!(there == *whole, "the bits of a batch differ");
        std::fs::remove_dir_all(place.path().join("b")).unwrap();
    }
}

struct Serve;

/// Jobs that wait at once.
const JOBS: [&str; 3] = ["one", "two", "three"];

impl Serve {
    fn command(place: &Place, data: &str, more: &[&str]) -> Command {
        let arguments = ["serve", "--port", "0", "--data", data];
        let mut command = command(place, &[&arguments, more].concat());
        command.stderr(std::process::Stdio::null());
        command
    }

    fn wait(server: &Server) {
        let begun = Instant::now();
        while !server.is_idle().unwrap() {
            assert!(
                begun.elapsed() < Duration::from_secs(600),
                "jobs do not end"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Victim for Serve {
    fn whole(&self, place: &Place) -> (BTreeMap<String, Vec<u8>>, Duration) {
        let begun = Instant::now();
        let server = Server::start(&mut Self::command(place, "data", &[]))
            .ok()
            .unwrap();
        for (seed, job) in JOBS.iter().enumerate() {
            assert!(server.submit(&graph(6, seed, job)).unwrap().is_some());
        }
        Self::wait(&server);
        let took = begun.elapsed();
        (tree(&place.path().join("data/output")), took)
    }

    fn kill_once(
        &self,
        place: &Place,
        at: Duration,
        whole: &BTreeMap<String, Vec<u8>>,
        tally: &mut Tally,
    ) {
        tally.serve += 1;
        let mut accepted = Vec::new();
        let child = Self::command(place, "d", &[]).spawn().unwrap();
        let id = child.id();
        let killed = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(at);
                kill(id);
            });
            // The moment may come before it has an address.
            let server = Server::of(child)?;
            for (seed, job) in JOBS.into_iter().enumerate() {
                if let Ok(Some(_)) = server.submit(&graph(6, seed, job)) {
                    accepted.push(job);
                }
            }
            Ok(server)
        });
        // Waits for it, which was killed.
        match killed {
            Ok(server) => drop(server),
            Err::<_, Child>(mut child) => drop(child.wait()),
        }
        tally.accepted += accepted.len();
        let again = Server::start(&mut Self::command(place, "d", &["--resume"]));
        let again = again.ok().unwrap();
        Self::wait(&again);
        drop(again);
        let there = tree(&place.path().join("d/output"));
        for (name, content) in &there {
            // Whatever is there is right, and there is no second one.
            assert!(
                whole.get(name) == Some(content),
                "{name} differs or is one too many"
            );
        }
        let missing = |job: &str| {
            let of_job = whole.keys().filter(|name| name.starts_with(job));
            of_job.filter(|name| !there.contains_key(*name)).count()
        };
        for job in accepted {
            assert_eq!(missing(job), 0, "a job that was accepted is lost: {job}");
        }
        let left: Vec<_> = place.names("d");
        assert!(!left.iter().any(|name| name.ends_with(".tmp")), "{left:?}");
        std::fs::remove_dir_all(place.path().join("d")).unwrap();
    }
}
