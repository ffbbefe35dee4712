//! A step on a device without memory left: an error, and nothing broken afterwards.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use personalization::Event;
use serde_json::{Value, json};

use crate::stages::Bench;

/// Sizes of the blocks that memory is taken in, in bytes: the last one is what is left over at most.
const BLOCKS: [usize; 3] = [1 << 30, 64 << 20, 4 << 20];

/// What was said, and whether a step before and one after have the same loss.
///
/// # Errors
/// A step that fails with memory, or does not without.
pub(crate) fn exhaust(bench: &Bench) -> Result<Value> {
    let device = &bench.model.device;
    if device.is_cpu() {
        let reason =
            "a processor's memory is the system's: taking all of it would end other programs";
        return Ok(json!({"work": "out-of-memory", "not_run": reason}));
    }
    let before = loss(bench)?;
    let held = take_all(device)?;
    let held_bytes: usize = held.iter().map(|block| 4 * block.elem_count()).sum();
    let said = loss(bench).err().map(|error| error.to_string());
    drop(held);
    device.synchronize()?;
    ensure!(
        said.is_some(),
        "a step ran although all memory of the device was taken"
    );
    let after = loss(bench)?;
    let said = said.unwrap_or_default();
    Ok(json!({
        "work": "out-of-memory", "held_bytes": held_bytes, "said": said.lines().next(), "loss_before": before,
        "loss_after": after, "survived": (after - before).abs() <= 1e-4 * before.abs(),
    }))
}

/// The masked loss of the first step.
fn loss(bench: &Bench) -> Result<f32> {
    let mut first = f32::NAN;
    bench.tokens(1, &mut |event| {
        if let Event::Step {
            masked_diffusion, ..
        } = event
        {
            first = *masked_diffusion;
        }
        ControlFlow::Continue(())
    })?;
    Ok(first)
}

fn take_all(device: &Device) -> Result<Vec<Tensor>> {
    let mut held = Vec::new();
    for bytes in BLOCKS {
        // What cannot be had is what this is about: the error is expected.
        while let Ok(block) = Tensor::zeros(bytes / 4, DType::F32, device) {
            held.push(block);
        }
    }
    Ok(held)
}
