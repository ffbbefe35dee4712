//! How much memory work takes: what a step of learning keeps, what cannot fit, and how devices say that theirs ran out.

use candle_core::Device;

use crate::error::{Error, Result};

/// What a step of learning keeps of its pass through the U-Net until it is gone through backward. The gradients are the same
/// bits in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Memory {
    /// [`Self::Fast`] on a CPU where what is kept takes no more than a quarter of the memory that this process may have;
    /// [`Self::Lean`] elsewhere.
    #[default]
    Auto,
    /// Everything.
    Fast,
    /// The planes between the network's parts, which are computed once more: half more work where only tokens are learned, a third
    /// where all weights are. The VAE encodes and
    /// decodes large pictures tile by tile.
    Lean,
}

/// Whether [`Memory::Auto`] keeps less than this.
pub(crate) fn is_much(device: &Device, bytes: u64) -> bool {
    /// Of all memory: weights and everything else have the rest.
    const PART: u64 = 4;
    let is_more = |total: u64| bytes > total / PART;
    !device.is_cpu() || machine_memory::total().is_some_and(is_more)
}

/// What drivers and libraries call it, in the texts by which candle passes it on: the driver of CUDA, cuBLAS, cuDNN and
/// cuRAND; a buffer that Metal does not give, and a command that failed for it.
const NAMES: [&str; 7] = [
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",
    "CURAND_STATUS_ALLOCATION_FAILED",
    "Failed to create metal resource: Buffer",
    "CommandBufferCallbackErrorOutOfMemory",
];

/// Whether this is an allocator's of a device.
///
/// The types that say it belong to builds for the device; their texts are the same in all.
#[must_use]
pub fn is_out_of_memory(error: &candle_core::Error) -> bool {
    let text = error.to_string();
    NAMES.iter().any(|name| text.contains(name))
}

/// Refuses work that takes more of the machine's memory than this process may have in all. `least` is a bound from below:
/// what passes may still not fit, and then the system ends the process, as it does everywhere on a CPU.
pub(crate) fn foresee(device: &Device, least: u64, what: impl FnOnce() -> String) -> Result<()> {
    /// What every machine has, and need not be asked for.
    const LITTLE: u64 = 256 << 20;
    if !device.is_cpu() || least < LITTLE {
        return Ok(());
    }
    within(machine_memory::total(), least, what)
}

fn within(total: Option<u64>, least: u64, what: impl FnOnce() -> String) -> Result<()> {
    match total {
        Some(total) if least > total => Err(Error::NotEnoughMemory {
            what: what(),
            least,
            total,
        }),
        _ => Ok(()),
    }
}

/// Of a number of `f32`; more than there can be counts as that.
pub(crate) fn bytes_of(factors: &[usize]) -> u64 {
    let sizes = factors.iter().map(|&n| n as u64);
    sizes.fold(size_of::<f32>() as u64, u64::saturating_mul)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_are_understood() {
        use candle_core::Error;
        #[derive(Debug, thiserror::Error)]
        #[error("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")")]
        struct OfDriver;
        let cuda = Error::Cuda(Box::new(OfDriver));
        assert!(is_out_of_memory(&cuda));
        assert!(is_out_of_memory(&cuda.context("conv2d")));
        assert!(is_out_of_memory(
            &Error::Msg("Failed to create metal resource: Buffer".to_owned()).bt()
        ));
        #[derive(Debug, thiserror::Error)]
        #[error(
            "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")"
        )]
        struct Other;
        assert!(!is_out_of_memory(&Error::Cuda(Box::new(Other))));
    }

    #[test]
    fn what_cannot_fit_is_refused_with_both_sizes() {
        let what = || "a picture of 65536 x 65536".to_owned();
        let least = bytes_of(&[3, 65536, 65536]);
        assert!(within(Some(least), least, what).is_ok());
        assert!(within(None, least, what).is_ok());
        let error = within(Some(8 << 30), least, what).unwrap_err().to_string();
        assert_eq!(
            error,
            "a picture of 65536 x 65536 takes at least 48.0 GiB of memory, and this process may have 8.0 GiB"
        );
        assert_eq!(bytes_of(&[usize::MAX, 2]), u64::MAX);
    }
}
