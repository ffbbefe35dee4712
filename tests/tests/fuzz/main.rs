//! Every place where strangers' bytes are read: all seeds of `tests/fuzz`, and a fixed number of mutations of them. Found inputs
//! are made small and left in the system's temporary folder; the same targets run for hours under `tests/fuzz/run.sh`.
#![expect(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test"
)]

#[path = "../it/support.rs"]
#[expect(dead_code, reason = "the other tests use all of it")]
mod support;

mod mutation;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use fuzz::{Bench, TARGETS, Target, seeds};
use mutation::{Mutation, mutations};
use peak_alloc::PeakAlloc;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What an input may take: the largest picture, decoded.
const MOST_MIB: f32 = 2048.0;

/// Where and why code panicked since this was looked at, whether or not a guard caught it.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// Whether a target runs: panics of these tests themselves are told as ever.
static IS_RUNNING: AtomicBool = AtomicBool::new(false);
/// One target at a time: panics and memory are counted for the whole process.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IS_RUNNING.load(Ordering::SeqCst) {
                return usual(info);
            }
            let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
            panics.push(info.to_string());
        }));
    });
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is wrong after the target ran on these bytes.
fn found(bench: &Bench, target: &Target, bytes: &[u8]) -> Option<String> {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage_as_mb();
    IS_RUNNING.store(true, Ordering::SeqCst);
    let ran = catch_unwind(AssertUnwindSafe(|| bench.run(target, bytes)));
    IS_RUNNING.store(false, Ordering::SeqCst);
    let panics = std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner));
    let taken = MEMORY.peak_usage_as_mb() - before;
    match ran {
        _ if !panics.is_empty() => Some(panics.join("\n")),
        Ok(Err(broken)) => Some(broken),
        Ok(Ok(())) if taken > MOST_MIB => Some(format!("it took {taken} MiB")),
        Ok(Ok(())) => None,
        Err(_) => Some("a panic without a message".to_owned()),
    }
}

fn seeds_of(target: &Target) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(seeds().join(target.name))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let name = |path: &std::path::Path| path.display().to_string();
    files
        .iter()
        .map(|path| (name(path), fs::read(path).unwrap()))
        .collect()
}

fn try_target(name: &str) {
    let target = fuzz::target(name).unwrap();
    let library = support::conceptloom();
    let _turn = turn();
    let bench = Bench::new(&library).unwrap();
    let seeds = seeds_of(target);
    assert!(!seeds.is_empty(), "{name} has no seeds");
    for (seed, bytes) in &seeds {
        let found = found(&bench, target, bytes);
        assert!(found.is_none(), "{seed}: {}", found.unwrap_or_default());
    }
    let config = Config {
        cases: target.mutations,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let bytes_of = |(seed, within, mutations): &(usize, Option<u32>, Vec<Mutation>)| {
        let changed = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            for mutation in mutations {
                mutation.apply(&mut bytes, &seeds);
            }
            bytes
        };
        let bytes = &seeds[*seed].1;
        let within = within.and_then(|block| fuzz::mutated(bytes, block, changed));
        within.unwrap_or_else(|| changed(bytes))
    };
    let inputs = (0..seeds.len(), any::<Option<u32>>(), mutations());
    let ran = runner.run(&inputs, |input| {
        match found(&bench, target, &bytes_of(&input)) {
            None => Ok(()),
            Some(found) => Err(TestCaseError::fail(found)),
        }
    });
    if let Err(TestError::Fail(reason, input)) = ran {
        let path = std::env::temp_dir().join(format!("fuzz-finding-{name}"));
        fs::write(&path, bytes_of(&input)).unwrap();
        panic!("{}: {}", path.display(), reason.message());
    }
}

macro_rules! targets {
    ($($name:ident),+ $(,)?) => {
        $(#[test]
        fn $name() {
            try_target(stringify!($name));
        })+

        #[test]
        fn every_target_is_tried() {
            assert_eq!(TARGETS.map(|target| target.name), [$(stringify!($name)),+]);
        }
    };
}

targets!(
    workflow,
    names,
    connection,
    socket,
    picture,
    descriptor,
    tensors,
    embedding,
    lora,
    tokenizer,
    single_file,
    model_folder,
    prompt,
    state,
    data_folder,
    batch,
    frames,
);
