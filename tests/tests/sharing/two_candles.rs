//! Two libraries with a candle and an allocator of their own each: two copies of one file.

use std::sync::{Mutex, MutexGuard, PoisonError};

use plugin_api::{LoadedPlugin, SharedTensor};
use tempfile::TempDir;

use crate::{MEMORY, call, doors, number, support, tensor};

/// Memory is counted for a whole library.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What nodes need beside tensors.
const SMALL: usize = 64 << 10;

fn two() -> (TempDir, [LoadedPlugin; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let copies = ["a.so", "b.so"].map(|name| {
        let path = folder.path().join(name);
        std::fs::copy(support::library("candle_plugin"), &path).unwrap();
        doors::rust(&path)
    });
    (folder, copies)
}

/// Bytes that a library holds, and the most that it held since the last call.
fn memory(plugin: LoadedPlugin) -> [usize; 2] {
    let extension = plugin.extension("candle-plugin.memory/1").unwrap();
    serde_json::from_str(&extension.text().unwrap()).unwrap()
}

#[test]
fn a_large_tensor_goes_through_five_nodes_of_two_libraries_without_a_copy_and_is_freed_once() {
    let _guard = one_at_a_time();
    let (_folder, [a, b]) = two();
    const BYTES: usize = 256 << 20;
    let [before, _] = memory(a);
    let made = tensor(call(a, "CandleMake", &[], r#"{"rows": 65536}"#).unwrap());
    assert_eq!(made.allocation_bytes() as usize, BYTES);
    let address = made.data_address();
    let ([held, _], [of_b, _]) = (memory(a), memory(b));
    assert!(
        held - before >= BYTES && held - before < BYTES + SMALL,
        "{before} {held}"
    );
    MEMORY.reset_peak_usage();
    let here = MEMORY.current_usage();
    let mut last = made;
    // Its own library knows it again; the other one reads it where it is.
    for (plugin, class) in [
        (a, "CandlePass"),
        (b, "CandleSum"),
        (a, "CandlePass"),
        (b, "CandleSum"),
        (a, "CandleSum"),
    ] {
        let outputs = call(plugin, class, &[("tensor", &last)], "{}").unwrap();
        last = tensor(outputs);
        assert_eq!(last.data_address(), address);
    }
    let (most_here, [_, most_a], [_, most_b]) = (MEMORY.peak_usage(), memory(a), memory(b));
    assert!(most_here - here < SMALL, "{here} {most_here}");
    assert!(most_a - held < SMALL, "{held} {most_a}");
    assert!(most_b - of_b < SMALL, "{of_b} {most_b}");
    // The last handle keeps it alive, and frees it in the library that made it.
    let kept = last.clone();
    drop(last);
    assert!(memory(a)[0] - before >= BYTES);
    drop(kept);
    assert!(memory(a)[0] < before + SMALL);
}

#[test]
fn cloning_a_handle_allocates_nothing() {
    let _guard = one_at_a_time();
    let shared = SharedTensor::from_vec(vec![1f32; 4], &[4]).unwrap();
    // The runner's own threads allocate now and then: never each time that this looks.
    let quiet = (0..20).any(|_| {
        let mut handles = Vec::with_capacity(1000);
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        handles.extend((0..1000).map(|_| shared.clone()));
        (MEMORY.current_usage(), MEMORY.peak_usage()) == (before, before)
    });
    assert!(quiet);
}

#[test]
fn views_and_all_elements_are_read_where_they_are() {
    let _guard = one_at_a_time();
    let (_folder, [a, b]) = two();
    for (elements, sum) in [
        ("f32", 2_096_128.0),
        ("f16", 2_096_128.0),
        ("bf16", 2_096_128.0),
        ("u8", 261_120.0),
    ] {
        for transposed in [false, true] {
            let parameters =
                format!(r#"{{"rows": 2, "elements": "{elements}", "transposed": {transposed}}}"#);
            let made = tensor(call(a, "CandleMake", &[], &parameters).unwrap());
            assert_eq!(made.is_row_major(), !transposed);
            let outputs = call(b, "CandleSum", &[("tensor", &made)], "{}").unwrap();
            // Halves round what they cannot hold; the sum tells that all values were there once.
            let error = (number(&outputs) - sum).abs() / sum;
            assert!(error < 2e-3, "{elements}: {outputs:?}");
            // Another library's candle takes a copy, of the same elements in the same order.
            let taken = tensor(call(b, "CandlePass", &[("tensor", &made)], "{}").unwrap());
            assert_ne!(taken.data_address(), made.data_address());
            assert_eq!(taken.data_type(), made.data_type());
            assert_eq!(taken.to_f32().unwrap(), made.to_f32().unwrap());
            // Its own knows it again, strides and all.
            let same = tensor(call(a, "CandlePass", &[("tensor", &made)], "{}").unwrap());
            assert_eq!(same.data_address(), made.data_address());
            assert_eq!(same.strides(), made.strides());
        }
    }
}
