//! Folders of libraries.

use std::process::Command;

use crate::support::{Done, Place, conceptloom, done, example, faulty};

/// Lists nodes of our plugin and of those in `plugins`, with a memory of crashers of the place's own.
fn nodes(place: &Place, habit: &str, in_variable: bool) -> Done {
    let plugin = conceptloom();
    let mut command: Command = place.command(&["nodes", "--plugin", plugin.to_str().unwrap()]);
    if in_variable {
        command.env("CONCEPTLOOM_PLUGINS", "plugins");
    } else {
        command.args(["--plugins", "plugins"]);
    }
    command
        .env("FAULTY_HABIT", habit)
        .env("XDG_CACHE_HOME", place.path().join("cache"));
    done(command.output().unwrap())
}

#[test]
fn every_library_of_a_folder_is_loaded_and_those_that_cannot_be_are_left_out() {
    let place = Place::with_conceptloom();
    place.write(
        "plugins/invert.so",
        std::fs::read(example("invert")).unwrap(),
    );
    place.write("plugins/again.so", std::fs::read(conceptloom()).unwrap());
    place.write("plugins/text.so", "not a library");
    place.write("plugins/notes.txt", "not looked at");
    for in_variable in [false, true] {
        let done = nodes(&place, "", in_variable).succeeded();
        assert!(
            done.stdout.contains("Invert: Light becomes dark"),
            "{}",
            done.stdout
        );
        assert!(done.stdout.contains("EmLoop: "), "{}", done.stdout);
        let warnings: Vec<_> = done.stderr.lines().collect();
        let [again, text] = warnings.as_slice() else {
            panic!("{warnings:#?}")
        };
        assert!(
            again.contains("again.so is left out: its node class"),
            "{again}"
        );
        assert!(again.ends_with("is there already"), "{again}");
        assert!(
            text.contains("text.so is left out:") && text.contains("cannot open it"),
            "{text}"
        );
    }
    assert!(!place.path().join("cache").exists(), "none crashed");
}

#[test]
fn a_library_that_crashes_is_remembered_until_it_changes() {
    let place = Place::with_conceptloom();
    let mut bytes = std::fs::read(faulty()).unwrap();
    place.write("plugins/faulty.so", &bytes);
    let first = nodes(&place, "abort-describe", false).succeeded();
    assert!(
        first
            .sentence()
            .ends_with("faulty.so is left out: it took its process down (abort)"),
        "{}",
        first.stderr
    );
    // It would not crash now, but nobody knows before it is tried.
    let second = nodes(&place, "", false).succeeded();
    let told =
        "when it was last tried it took its process down (abort), and it has not changed since";
    assert!(second.sentence().contains(told), "{}", second.stderr);
    assert!(!second.stdout.contains("Hazard"));
    bytes.push(0);
    place.write("plugins/faulty.so", &bytes);
    let third = nodes(&place, "", false).succeeded();
    assert!(third.stdout.contains("Hazard: "), "{}", third.stderr);
}

#[test]
fn a_folder_that_is_not_there_is_an_error() {
    let place = Place::with_conceptloom();
    let done = nodes(&place, "", false);
    done.failed_with(&["there is no folder of plugins plugins; name one"]);
}
