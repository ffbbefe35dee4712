//! Which device computes: the one that the environment names, or the best that this build is made for.
//!
//! A device that cannot be used is an error. Nobody who asked for a GPU, or installed a build for one, finds out by waiting
//! that it was the CPU.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use candle_core::Device;
use plugin_api::{ErrorCode, NodeError};

/// `cpu`, `cuda`, `cuda:N` or `metal`.
const VARIABLE: &str = "CONCEPTLOOM_DEVICE";

/// The device of this process. Two that are made separately are different devices to candle, so there is one.
///
/// # Errors
/// The variable names no device, or one that this build or this machine does not have.
pub(crate) fn device() -> Result<&'static Device, NodeError> {
    static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
    let wanted = || std::env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned());
    let device = DEVICE.get_or_init(|| chosen(wanted().as_deref()));
    device
        .as_ref()
        .map_err(|message| NodeError::new(ErrorCode::InvalidInput, message))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Cpu,
    /// The number of the card.
    Cuda(usize),
    Metal,
}

impl Wanted {
    /// What this build is made for.
    const BEST: Self = if cfg!(feature = "cuda") {
        Self::Cuda(0)
    } else if cfg!(feature = "metal") {
        Self::Metal
    } else {
        Self::Cpu
    };

    fn is_in_build(self) -> bool {
        match self {
            Self::Cpu => true,
            Self::Cuda(_) => cfg!(feature = "cuda"),
            Self::Metal => cfg!(feature = "metal"),
        }
    }

    fn open(self) -> candle_core::Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            // One stream for all threads: the per-thread stream of `new_cuda` orders nothing between workers.
            Self::Cuda(number) => Device::new_cuda_with_stream(number),
            Self::Metal => Device::new_metal(0),
        }
    }
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown =
            || format!("{VARIABLE} is {text:?}; it can be cpu, cuda, cuda:1 and so on, or metal");
        match text.trim().to_lowercase().as_str() {
            "" | "auto" => Ok(Self::BEST),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            other => {
                let number = other.strip_prefix("cuda:").and_then(|n| n.parse().ok());
                number.map(Self::Cuda).ok_or_else(unknown)
            }
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

fn chosen(name: Option<&str>) -> Result<Device, String> {
    let wanted: Wanted = name.unwrap_or_default().parse()?;
    if !wanted.is_in_build() {
        return Err(format!(
            "{VARIABLE} is {wanted}, which this build of the plugin is not made for; set it to cpu, or build with \
             --features plugin/cuda or plugin/metal"
        ));
    }
    wanted.open().map_err(|error| {
        // The rest of the text is where in candle it arose.
        let reason = error.to_string();
        let reason = reason.lines().next().unwrap_or_default();
        format!("the device {wanted} cannot be used: {reason}; set {VARIABLE}=cpu to compute on the processor")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (text, expected) in [
            ("cpu", Wanted::Cpu),
            (" CPU ", Wanted::Cpu),
            ("cuda", Wanted::Cuda(0)),
            ("cuda:3", Wanted::Cuda(3)),
            ("metal", Wanted::Metal),
            ("", Wanted::BEST),
            ("auto", Wanted::BEST),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["gpu", "cuda:", "cuda:-1", "cuda:x", "0"] {
            let error = text.parse::<Wanted>().unwrap_err();
            assert!(error.contains(text) && error.contains("cuda:1"), "{error}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_a_sentence() {
        assert!(chosen(Some("cpu")).unwrap().is_cpu());
        // Metal and CUDA are never together, and no test machine has both.
        let missing = if cfg!(feature = "metal") {
            "cuda:7"
        } else {
            "metal"
        };
        let error = chosen(Some(missing)).unwrap_err();
        assert!(error.contains(missing) && error.contains("cpu"), "{error}");
    }
}
