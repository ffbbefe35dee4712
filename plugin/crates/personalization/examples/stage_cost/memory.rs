//! The most memory that some work used.

use std::fs;

use anyhow::{Context, Result};
use candle_core::Device;
use stable_diffusion::device;

/// A peak begins: everything that is there already counts.
pub(crate) fn begin(on: &Device) {
    device::reset_peak(on);
    // The processor's: the kernel's mark of this process. Where it cannot be reset, the peak is that of all work so far.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Bytes at the peak: of the device's memory, or of the process where the processor computes.
///
/// # Errors
/// The system does not tell.
pub(crate) fn peak(on: &Device) -> Result<u64> {
    if let Some(memory) = device::memory(on) {
        return Ok(memory.peak);
    }
    let status = fs::read_to_string("/proc/self/status").context("no figures of memory")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kibibytes.context("no mark of the most memory")? << 10)
}
