//! What crossing the library boundary costs, through the door for Rust and through the one for C: a call of a node that does
//! next to nothing, a tensor of 256 MiB that goes through a node, a service of the host, and loading a library.
//!
//! ```sh
//! cargo build --workspace --release --locked --lib --bins --examples && target/release/examples/boundary_cost
//! ```
//! Times are the least of many rounds: what others do on the machine adds to them and takes nothing away.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program of one's own, at a terminal"
)]

use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use plugin_api::{
    HostContext, LoadedNode, LoadedPlugin, Preview, Progress, RunInfo, SharedTensor, Value,
};

#[path = "../tests/it/doors.rs"]
mod doors;

const ROUNDS: usize = 300;
const CALLS: u32 = 1000;
const LOADS: usize = 20;
const LARGE: usize = 256 << 20;

/// A host that does nothing.
struct Quiet;

impl HostContext for Quiet {
    fn is_canceled(&self) -> bool {
        false
    }
    fn progress(&self, _: Progress) {}
    fn preview(&self, _: Preview) {}
    fn metric(&self, _: &str, _: f64, _: f64) {}
    fn log(&self, _: u32, _: &str) {}
    fn saved(&self, _: &str) {}
    fn run_info(&self) -> RunInfo {
        RunInfo::default()
    }
}

/// Time per call, the least of all rounds.
fn least(mut call: impl FnMut()) -> Duration {
    let round = |_| {
        let started = Instant::now();
        for _ in 0..CALLS {
            call();
        }
        started.elapsed() / CALLS
    };
    (0..ROUNDS).map(round).min().unwrap_or_default()
}

fn library(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let folder = program.parent().unwrap().parent().unwrap();
    folder.join(format!("{DLL_PREFIX}{name}{DLL_SUFFIX}"))
}

fn open(path: &Path, door: &str) -> LoadedPlugin {
    match door {
        "Rust" => doors::rust(path),
        _ => doors::c(path),
    }
}

/// A node's call without inputs.
fn call(node: &mut LoadedNode) -> Duration {
    least(|| {
        let outputs = node.run([], r#"{"value": 7}"#, Quiet);
        black_box(outputs.unwrap());
    })
}

/// A tensor's way through a node that hands it on where it was.
fn hop(node: &mut LoadedNode, bytes: usize) -> Duration {
    let n = bytes / 12;
    let tensor = SharedTensor::from_vec(vec![0f32; n * 3], &[1, 1, n, 3]).unwrap();
    let address = tensor.data_address();
    let given = Value::Tensor(tensor);
    least(|| {
        let inputs = [("images".to_owned(), given.clone())];
        let outputs = node.run(inputs, "{}", Quiet).unwrap();
        assert!(matches!(&outputs[..], [Value::Tensor(same)] if same.data_address() == address));
    })
}

/// Opening a library in a process that does not have it yet, and reading what it says of itself.
fn load(path: &Path, door: &str) -> Duration {
    let once = |_| {
        let done = Command::new(std::env::current_exe().unwrap())
            .args([Path::new("load"), path, Path::new(door)])
            .output()
            .unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        Duration::from_nanos(text.trim().parse().unwrap())
    };
    (0..LOADS).map(once).min().unwrap_or_default()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [_, path, door] = arguments.as_slice() {
        let started = Instant::now();
        let plugin = open(Path::new(path), door);
        black_box(plugin.describe().unwrap());
        println!("{}", started.elapsed().as_nanos());
        return;
    }
    let micro = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "| door | a node's call, µs | with a tensor of 256 MiB, µs | of 12 bytes, µs | a service of the host, µs | loading conceptloom, ms |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for door in ["Rust", "C"] {
        let plugin = open(&library("faulty_plugin"), door);
        let mut relay = plugin.create("Relay").unwrap();
        let quiet = hop(&mut relay, 12);
        // It hands on too, and adds two points to a curve.
        let two = hop(&mut plugin.create("Passthrough").unwrap(), 12).saturating_sub(quiet);
        println!(
            "| {door} | {:.2} | {:.2} | {:.2} | {:.2} | {:.1} |",
            micro(call(&mut plugin.create("Number").unwrap())),
            micro(hop(&mut relay, LARGE)),
            micro(quiet),
            micro(two / 2),
            micro(load(&library("conceptloom"), door)) / 1e3,
        );
    }
}
