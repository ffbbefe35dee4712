//! `host-demo check`: good plugins pass, and every bad habit is named.

use std::path::Path;

use serde_json::Value;

use crate::languages::in_c;
use crate::support::{Done, Place, conceptloom, example, faulty};

/// A result: `case`, `node`, `status`, `detail`.
fn results(done: &Done) -> Vec<Value> {
    let report: Value = serde_json::from_str(&done.stdout)
        .unwrap_or_else(|error| panic!("{error}\n{}\n{}", done.stdout, done.stderr));
    report["results"].as_array().unwrap().clone()
}

#[track_caller]
fn passes(path: &Path) -> Vec<Value> {
    let place = Place::with_faulty();
    // Other tests run meanwhile.
    let limits = ["--cancel-limit", "5000", "--time-limit", "300"];
    let mut arguments = vec!["check", path.to_str().unwrap(), "--json"];
    arguments.extend(limits);
    let done = place.host(&arguments);
    let results = results(&done);
    let bad =
        |result: &&Value| !["passed", "skipped"].contains(&result["status"].as_str().unwrap());
    let bad: Vec<_> = results.iter().filter(bad).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(place.names("."), [] as [&str; 0]);
    results
}

fn status<'a>(results: &'a [Value], case: &str, node: &str) -> &'a str {
    let found = results
        .iter()
        .find(|result| result["case"] == case && result["node"] == node);
    found.unwrap_or_else(|| panic!("{case}:{node}"))["status"]
        .as_str()
        .unwrap()
}

#[test]
fn the_example_of_one_node_passes_every_case() {
    let results = passes(&example("invert"));
    assert_eq!(results.len(), 17);
    let skipped = results
        .iter()
        .filter(|result| result["status"] == "skipped");
    assert_eq!(skipped.count(), 0, "{results:#?}");
}

#[test]
fn the_plugin_in_c_passes() {
    let Some(path) = in_c() else { return };
    let results = passes(&path);
    assert_eq!(status(&results, "outputs", "Threshold"), "passed");
    assert_eq!(status(&results, "inputs-unchanged", "Threshold"), "passed");
}

#[test]
fn our_plugin_passes_and_its_nodes_feed_each_other() {
    let results = passes(&conceptloom());
    for class in [
        "LoadDiffusionModel",
        "ConceptTokenLearner",
        "AttentionMaskExtractor",
        "DenseCrfRefine",
        "EmLoop",
        "PersonalizedSampler",
        "SaveConcepts",
    ] {
        for case in [
            "outputs",
            "repeatable",
            "two-threads",
            "cancel",
            "references",
        ] {
            assert_eq!(status(&results, case, class), "passed", "{case}:{class}");
        }
    }
    let loader = results
        .iter()
        .find(|result| result["node"] == "LoadConcepts" && result["case"] == "outputs");
    let detail = loader.unwrap()["detail"].as_str().unwrap();
    assert!(
        detail.starts_with("it does not run on generated inputs: "),
        "{detail}"
    );
}

/// The habit is found by this case, with this status and these words.
#[track_caller]
fn names(habit: &str, case: &str, status: &str, words: &[&str]) {
    let place = Place::with_faulty();
    let path = faulty();
    // Names of cases of the library have no colon.
    let of_node = format!("{case}:Hazard");
    let only = if ["loads", "load-time", "descriptor", "unknown-names"].contains(&case) {
        case
    } else {
        &of_node
    };
    let mut command = place.command(&["check", path.to_str().unwrap(), "--json", "--only", only]);
    command.args(["--time-limit", "20"]);
    command.env("FAULTY_HABIT", habit);
    let done = crate::support::done(command.output().unwrap());
    let results = results(&done);
    let result = &results[0];
    assert_eq!(
        (result["case"].as_str(), result["status"].as_str()),
        (Some(case), Some(status)),
        "{habit}: {results:#?}"
    );
    let detail = result["detail"].as_str().unwrap();
    for part in words {
        assert!(detail.contains(part), "{habit}: no {part:?} in {detail}");
    }
    assert_eq!(done.code, Some(1), "{habit}");
}

#[test]
fn without_a_habit_the_faulty_node_passes() {
    let place = Place::with_faulty();
    let path = faulty();
    place
        .host(&["check", path.to_str().unwrap(), "--only", ":Hazard"])
        .succeeded();
}

#[test]
fn faults_of_a_library_are_named() {
    for (habit, case, status, words) in [
        (
            "panic-describe",
            "loads",
            "failed",
            &["panicked", "the habit"][..],
        ),
        (
            "abort-describe",
            "loads",
            "crashed",
            &["abort when it was loaded"],
        ),
        (
            "slow-describe",
            "load-time",
            "failed",
            &["at most 5 s are good"],
        ),
        (
            "another-descriptor",
            "descriptor",
            "failed",
            &["another than its first"],
        ),
        (
            "bad-descriptor",
            "descriptor",
            "failed",
            &[
                "Hazard: the input or parameter images is there twice",
                "the explanation of the input images is empty",
                "its default does not fit: size is 11, the largest value is 10",
            ],
        ),
        (
            "loose-extension",
            "unknown-names",
            "failed",
            &["Hazard has an extension \"\""],
        ),
    ] {
        names(habit, case, status, words);
    }
}

#[test]
fn panics_are_named_wherever_they_are() {
    for (habit, case, words) in [
        (
            "panic-create",
            "lifecycle",
            &["cannot be made", "the habit panic-create"][..],
        ),
        (
            "panic-drop",
            "lifecycle",
            &["a destructor", "hazard.rs", "the habit panic-drop"],
        ),
        (
            "panic-validate",
            "lifecycle",
            &["validates its defaults", "panicked"],
        ),
        (
            "panic-fingerprint",
            "lifecycle",
            &["fingerprint", "panicked"],
        ),
        ("panic-run", "outputs", &["the habit panic-run"]),
        ("deep", "parameter-fuzz", &["with --seed", "is deep"]),
    ] {
        names(habit, case, "failed", words);
    }
}

#[test]
fn crashes_and_hangs_are_named_and_hide_nothing() {
    for (habit, status, words) in [
        ("abort", "crashed", "abort when it ran on generated inputs"),
        (
            "segfault",
            "crashed",
            "segmentation fault when it ran on generated inputs",
        ),
        (
            "exit",
            "crashed",
            "exit code 0 when it ran on generated inputs",
        ),
        (
            "hang",
            "failed",
            "it hangs: no end within 20 s when it ran on generated inputs",
        ),
    ] {
        names(habit, "outputs", status, &[words]);
    }
}

#[test]
fn lies_about_inputs_outputs_and_progress_are_named() {
    for (habit, case, status, words) in [
        (
            "too-few",
            "outputs",
            "failed",
            "promised 1 outputs and returned 0",
        ),
        (
            "wrong-type",
            "outputs",
            "failed",
            "promised IMAGE on its output images and returned the value 7",
        ),
        (
            "wrong-shape",
            "outputs",
            "failed",
            "returned a tensor of shape [4, 4]",
        ),
        (
            "not-finite",
            "outputs",
            "failed",
            "its output images has the value NaN",
        ),
        (
            "random",
            "repeatable",
            "failed",
            "give another images the second time",
        ),
        (
            "one-for-all",
            "two-threads",
            "failed",
            "beside another it gives something else than alone",
        ),
        (
            "ignore-missing",
            "missing-inputs",
            "failed",
            "without its input images it returns outputs",
        ),
        (
            "ignore-type",
            "wrong-inputs",
            "failed",
            "on its input images it returns outputs",
        ),
        (
            "scribble",
            "inputs-unchanged",
            "failed",
            "it changed a tensor that others hold too",
        ),
        (
            "keep-input",
            "references",
            "failed",
            "1 of 1 inputs are still held",
        ),
        ("leak", "lifecycle", "failed", "it leaks"),
        ("flood", "progress", "failed", "200000 times"),
        (
            "beyond",
            "progress",
            "failed",
            "its progress in beyond is 7 of 3",
        ),
        ("ignore-cancel", "cancel", "failed", "it went on for"),
    ] {
        names(habit, case, status, &[words]);
    }
}

#[test]
fn a_seed_plays_its_round_again() {
    let place = Place::with_faulty();
    let path = faulty();
    let fuzz = |seed: &str| {
        let arguments = [
            "check",
            path.to_str().unwrap(),
            "--only",
            "parameter-fuzz:Hazard",
            "--seed",
            seed,
        ];
        let mut command = place.command(&arguments);
        command.env("FAULTY_HABIT", "deep");
        crate::support::done(command.output().unwrap()).stdout
    };
    let first = fuzz("0");
    let seed = first.split("--seed ").nth(1).unwrap();
    let seed = seed.split(' ').next().unwrap();
    assert_ne!(seed, "0", "another seed is to be tried");
    let again = fuzz(seed);
    assert_eq!(again, first);
}

#[test]
fn a_file_that_is_no_plugin_fails_in_one_sentence_and_skips_the_rest() {
    let place = Place::with_faulty();
    place.write("text.so", "not a library");
    let done = place.host(&["check", "text.so", "--json"]);
    let results = results(&done);
    assert_eq!(results[0]["status"], "failed");
    let detail = results[0]["detail"].as_str().unwrap();
    assert!(detail.contains("cannot open it as a library"), "{detail}");
    let rest = &results[1..];
    assert!(
        rest.iter()
            .all(|result| result["status"] == "skipped" && result["detail"] == "it does not load")
    );
    assert_eq!(done.code, Some(1));
}

#[test]
fn cases_are_listed_in_a_sentence_each_and_run_in_one_process_too() {
    let place = Place::with_faulty();
    let list = place.host(&["check", "--list"]).succeeded().stdout;
    assert_eq!(list.lines().count(), 17, "{list}");
    assert!(list.lines().all(|line| line.ends_with('.')), "{list}");
    let path = example("invert");
    let done = place.host(&["check", path.to_str().unwrap(), "--in-process"]);
    assert!(
        done.succeeded()
            .stdout
            .ends_with("17 passed, 0 failed, 0 crashed, 0 skipped\n")
    );
}
