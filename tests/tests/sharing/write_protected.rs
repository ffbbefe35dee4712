//! Inputs in memory that cannot be written: a node that writes to its input dies of it, ours do not.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};

use plugin_api::SharedTensor;

use crate::protected::read_only;
use crate::{call, doors, support, tensor};

const SIDE: usize = 64;

fn picture() -> SharedTensor {
    let pixel = |i: usize| ((i * 7) % 256) as f32 / 255.0;
    let values: Vec<f32> = (0..SIDE * SIDE * 3).map(pixel).collect();
    read_only(&values, &[1, SIDE, SIDE, 3])
}

/// Left and right halves.
fn masks() -> SharedTensor {
    let inside = |i: usize| f32::from((i % SIDE < SIDE / 2) == (i < SIDE * SIDE));
    let values: Vec<f32> = (0..2 * SIDE * SIDE).map(inside).collect();
    read_only(&values, &[2, SIDE, SIDE])
}

/// Runs one of the tests below in a process of its own.
fn in_a_child(test: &str) -> Output {
    // What it needs is built here.
    support::faulty();
    Command::new(std::env::current_exe().unwrap())
        .args([
            &format!("write_protected::{test}"),
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .output()
        .unwrap()
}

#[test]
fn nodes_leave_their_inputs_as_they_are() {
    let done = in_a_child("child_runs_honest_nodes");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success() && said.contains("1 passed"),
        "{done:?}"
    );
}

#[test]
fn a_node_that_writes_to_its_input_dies_of_it() {
    let done = in_a_child("child_runs_a_node_that_scribbles");
    assert_eq!(done.status.signal(), Some(libc::SIGSEGV), "{done:?}");
}

#[test]
#[ignore = "run by nodes_leave_their_inputs_as_they_are"]
fn child_runs_honest_nodes() {
    let images = picture();
    let seen = images.to_f32().unwrap().into_owned();
    let faulty = support::faulty();
    for plugin in [doors::rust(&faulty), doors::c(&faulty)] {
        let passed = tensor(call(plugin, "Passthrough", &[("images", &images)], "{}").unwrap());
        assert_eq!(passed.data_address(), images.data_address());
    }
    let invert = doors::rust(&support::example("invert"));
    let inverted = tensor(call(invert, "Invert", &[("images", &images)], "{}").unwrap());
    let inverted = inverted.to_f32().unwrap();
    assert!(
        seen.iter()
            .zip(&*inverted)
            .all(|(a, b)| (a + b - 1.0).abs() < 1e-6)
    );
    let candle = doors::rust(&support::library("candle_plugin"));
    tensor(call(candle, "CandlePass", &[("tensor", &images)], "{}").unwrap());
    let conceptloom = support::conceptloom();
    for plugin in [doors::rust(&conceptloom), doors::c(&conceptloom)] {
        let inputs = [("images", &images), ("masks", &masks())];
        let refined = tensor(call(plugin, "DenseCrfRefine", &inputs, "{}").unwrap());
        assert_eq!(refined.shape(), [2, SIDE, SIDE]);
    }
    assert_eq!(*images.to_f32().unwrap(), seen);
}

#[test]
#[ignore = "run by a_node_that_writes_to_its_input_dies_of_it"]
fn child_runs_a_node_that_scribbles() {
    let faulty = doors::rust(&support::faulty());
    let _ = call(faulty, "Scribble", &[("images", &picture())], "{}");
    println!("it lives");
}
