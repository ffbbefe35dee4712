//! What libFuzzer calls.

use std::path::Path;

use fuzz::{Bench, Target, target};
use libfuzzer_sys::fuzz_target;

const TARGET: &str = "CONCEPTLOOM_FUZZ_TARGET";
const LIBRARY: &str = "CONCEPTLOOM_PLUGIN";

thread_local! {
    static BENCH: (Bench, &'static Target) = bench();
}

fn bench() -> (Bench, &'static Target) {
    let name = std::env::var(TARGET).unwrap_or_default();
    let library = std::env::var_os(LIBRARY).unwrap_or_default();
    match (target(&name), Bench::new(Path::new(&library))) {
        (Some(target), Ok(bench)) => (bench, target),
        (None, _) => panic!("there is no target {name:?}; {TARGET} names one"),
        (_, Err(error)) => panic!("{error}"),
    }
}

// Every panic ends the program, also one that a guard would catch.
fuzz_target!(|bytes: &[u8]| {
    BENCH.with(|(bench, target)| {
        if let Err(broken) = bench.run(target, bytes) {
            panic!("{}: {broken}", target.name);
        }
    });
});
