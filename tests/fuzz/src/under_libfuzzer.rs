//! What libFuzzer calls.

use std::path::Path;

use fuzz::{Bench, Target, mutated, target};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

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

// Every second mutation leaves the lengths of what is inside true.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let within = |content: &[u8]| {
        let room = content.len() + max_size.saturating_sub(size);
        let mut buffer = content.to_vec();
        buffer.resize(room, 0);
        let n = fuzzer_mutate(&mut buffer, content.len(), room);
        buffer.truncate(n);
        buffer
    };
    let changed = (seed % 2 == 0)
        .then(|| mutated(&data[..size], seed / 2, within))
        .flatten()
        // The digits of a length may need one byte more.
        .filter(|changed| changed.len() <= max_size);
    match changed {
        Some(changed) => {
            data[..changed.len()].copy_from_slice(&changed);
            changed.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
});
