//! The devices that a plugin computes on, as it tells its host.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// An NVIDIA card.
    Cuda,
    /// Apple's GPU.
    Metal,
    /// One that this build does not know.
    #[serde(other)]
    Other,
}

impl DeviceKind {
    /// As it is written in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
            Self::Other => "other",
        }
    }
}

/// A device that computes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceDescriptor {
    /// What it is.
    pub kind: DeviceKind,
    /// Which one of its kind, from 0.
    pub index: usize,
    /// What its maker calls it, for a person; may be empty.
    pub product: String,
    /// Its memory, where it has some of its own and tells.
    pub memory: Option<DeviceMemory>,
}

/// Memory of a device when it was asked, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceMemory {
    /// All that it has.
    pub total: u64,
    /// What nobody holds.
    pub free: u64,
    /// What the plugin holds of it, used or kept for later.
    pub held: u64,
    /// What the plugin uses of that.
    pub used: u64,
}

/// `cuda:0: NVIDIA H200, 140 GiB`; `cpu: …`.
impl fmt::Display for DeviceDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        if self.kind != DeviceKind::Cpu {
            write!(f, ":{}", self.index)?;
        }
        let mut separator = ": ";
        if !self.product.is_empty() {
            write!(f, "{separator}{}", self.product)?;
            separator = ", ";
        }
        if let Some(memory) = self.memory {
            let gibibytes = memory.total as f64 / f64::from(1 << 30);
            write!(f, "{separator}{gibibytes:.0} GiB")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_reads_as_one_line_and_as_json() {
        let mut device = DeviceDescriptor {
            kind: DeviceKind::Cuda,
            index: 1,
            product: "Card 3000".to_owned(),
            memory: Some(DeviceMemory {
                total: 24 << 30,
                free: 1 << 30,
                held: 3 << 20,
                used: 1 << 20,
            }),
        };
        assert_eq!(device.to_string(), "cuda:1: Card 3000, 24 GiB");
        let json = serde_json::to_string(&device).unwrap();
        assert_eq!(
            serde_json::from_str::<DeviceDescriptor>(&json).unwrap(),
            device
        );
        let newer = json.replace("cuda", "quantum");
        let newer: DeviceDescriptor = serde_json::from_str(&newer).unwrap();
        assert_eq!(newer.kind, DeviceKind::Other);
        (device.kind, device.memory) = (DeviceKind::Cpu, None);
        assert_eq!(device.to_string(), "cpu: Card 3000");
        device.product.clear();
        assert_eq!(device.to_string(), "cpu");
    }
}
