//! Devices: naming one, opening it with the settings that the networks want, and what is known about it.
//!
//! A device that cannot be used is an error. Nobody who asked for a GPU, or installed a build for one, finds out by waiting
//! that it was the CPU.

#[cfg(feature = "cuda")]
mod cuda;

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use candle_core::{Device, DeviceLocation};

/// The environment variable that names the device of a process.
pub const VARIABLE: &str = "CONCEPTLOOM_DEVICE";

/// Why a device cannot be used, and what to do; worded for a user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(String);

/// A device by its name: `cpu`, `cuda` (the first card), `cuda:N` or `metal`; `auto` and nothing are what this build is made
/// for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// The processor.
    Cpu,
    /// An NVIDIA card, by its number from 0.
    Cuda(usize),
    /// Apple's GPU.
    Metal,
}

impl DeviceName {
    /// What this build is made for.
    pub const BEST: Self = if cfg!(feature = "cuda") {
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

    /// The device. Two that are opened separately are different devices to candle: a process opens one, see
    /// [`of_environment`].
    ///
    /// # Errors
    /// This build or this machine does not have it.
    pub fn open(self) -> Result<Device, DeviceError> {
        if !self.is_in_build() {
            return Err(DeviceError(format!(
                "{VARIABLE} is {self}, which this build is not made for; set it to cpu, or build with \
                 --features plugin/cuda or plugin/metal"
            )));
        }
        let opened = match self {
            Self::Cpu => Ok(Device::Cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda(number) => cuda::open(number),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(number) => Device::new_cuda(number),
            Self::Metal => Device::new_metal(0),
        };
        opened.map_err(|error| {
            // The rest of the text is where in candle it arose.
            let reason = error.to_string();
            let reason = reason.lines().next().unwrap_or_default();
            DeviceError(format!(
                "the device {self} cannot be used: {reason}; set {VARIABLE}=cpu to compute on the processor"
            ))
        })
    }
}

impl FromStr for DeviceName {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let number = |name: &str| name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
        match text.trim().to_lowercase().as_str() {
            "" | "auto" => Ok(Self::BEST),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            other => number(other).map(Self::Cuda).ok_or_else(|| {
                DeviceError(format!(
                    "{VARIABLE} is {text:?}; it can be cpu, cuda, cuda:1 and so on, or metal"
                ))
            }),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

/// The device of this process: the one that [`VARIABLE`] names, or the best that this build is made for.
///
/// # Errors
/// The variable names no device, or one that this build or this machine does not have.
pub fn of_environment() -> Result<&'static Device, DeviceError> {
    static DEVICE: OnceLock<Result<Device, DeviceError>> = OnceLock::new();
    let opened = DEVICE.get_or_init(|| {
        let wanted = std::env::var_os(VARIABLE).unwrap_or_default();
        wanted.to_string_lossy().parse().and_then(DeviceName::open)
    });
    opened.as_ref().map_err(Clone::clone)
}

/// What is known about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What it is called in [`VARIABLE`].
    pub name: DeviceName,
    /// What its maker calls it.
    pub product: String,
    /// Its memory; `None` for a processor, and where it does not tell.
    pub memory: Option<DeviceMemory>,
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All that it has.
    pub total: u64,
    /// What nobody holds now.
    pub free: u64,
    /// What this process holds of it: in use, or kept so that it need not be asked for again.
    pub held: u64,
    /// What this process uses of that.
    pub used: u64,
    /// The most that this process used since [`reset_peak`].
    pub peak: u64,
}

/// What is known about a device now.
#[must_use]
pub fn describe(device: &Device) -> DeviceInfo {
    let name = match device.location() {
        DeviceLocation::Cpu => DeviceName::Cpu,
        DeviceLocation::Cuda { gpu_id } => DeviceName::Cuda(gpu_id),
        DeviceLocation::Metal { .. } => DeviceName::Metal,
    };
    DeviceInfo {
        name,
        product: product(device),
        memory: memory(device),
    }
}

fn product(device: &Device) -> String {
    match device {
        Device::Cpu => processor(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::product(device),
        _ => String::new(),
    }
}

/// Memory of a device now; `None` for a processor, and where it does not tell.
#[must_use]
pub fn memory(device: &Device) -> Option<DeviceMemory> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::memory(device),
        _ => None,
    }
}

/// Begins a new [`DeviceMemory::peak`].
pub fn reset_peak(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        cuda::reset_peak(device);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

/// What the system calls the processor; its architecture, where it does not say.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let name = named.and_then(|line| line.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim())
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (text, expected) in [
            ("cpu", DeviceName::Cpu),
            (" CPU ", DeviceName::Cpu),
            ("cuda", DeviceName::Cuda(0)),
            ("cuda:3", DeviceName::Cuda(3)),
            ("metal", DeviceName::Metal),
            ("", DeviceName::BEST),
            ("auto", DeviceName::BEST),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["gpu", "cuda:", "cuda:-1", "cuda:x", "0"] {
            let error = text.parse::<DeviceName>().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("cuda:1"), "{error}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_a_sentence() {
        assert!(DeviceName::Cpu.open().unwrap().is_cpu());
        // Metal and CUDA are never together, and no test machine has both.
        let missing = if cfg!(feature = "metal") {
            DeviceName::Cuda(7)
        } else {
            DeviceName::Metal
        };
        let error = missing.open().unwrap_err().to_string();
        let name = missing.to_string();
        assert!(error.contains(&name) && error.contains("cpu"), "{error}");
    }

    #[test]
    fn a_processor_has_a_name_and_no_memory_of_its_own() {
        let info = describe(&Device::Cpu);
        assert_eq!((info.name, info.memory), (DeviceName::Cpu, None));
        assert!(!info.product.is_empty());
    }
}
