//! Which device computes, as nodes and hosts ask for it.

use candle_core::Device;
use plugin_api::{DeviceDescriptor, DeviceKind, DeviceMemory, ErrorCode, NodeError};
use stable_diffusion::device::{self, DeviceName};

/// The device of this process.
///
/// # Errors
/// The one that the environment names cannot be used.
pub(crate) fn device() -> Result<&'static Device, NodeError> {
    device::of_environment()
        .map_err(|error| NodeError::new(ErrorCode::InvalidInput, error.to_string()))
}

/// What hosts are told about it.
///
/// # Errors
/// Those of [`device`].
pub(crate) fn described() -> Result<Vec<DeviceDescriptor>, NodeError> {
    let info = device::describe(device()?);
    let (kind, index) = match info.name {
        DeviceName::Cpu => (DeviceKind::Cpu, 0),
        DeviceName::Cuda(number) => (DeviceKind::Cuda, number),
        DeviceName::Metal => (DeviceKind::Metal, 0),
    };
    let memory = info.memory.map(|memory| DeviceMemory {
        total: memory.total,
        free: memory.free,
        held: memory.held,
        used: memory.used,
    });
    Ok(vec![DeviceDescriptor {
        kind,
        index,
        product: info.product,
        memory,
    }])
}
