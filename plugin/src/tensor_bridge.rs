//! Between candle's tensors and the tensors on wires.
//!
//! Going out nothing is copied. Coming in, a tensor that this very library made is the same tensor again, on any
//! device; a foreign one in CPU memory is copied once, because candle owns the memory of its tensors.
#![expect(unsafe_code, reason = "vouches for the memory behind a candle tensor")]

use abi_stable::std_types::{RResult, RVec};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use plugin_api::tensor::{TensorDescription, TensorOwner, contiguous_strides};
use plugin_api::{DataType, DeviceId, ErrorCode, MemoryBlock, NodeError, SharedTensor};

/// Keeps a candle tensor alive for everybody who holds its memory.
struct CandleOwner(Tensor);

impl TensorOwner for CandleOwner {
    fn wait_on(&self, _stream: u64) -> i32 {
        // One device and one stream per process: whoever can pass a stream here shares it.
        i32::from(self.0.device().synchronize().is_err())
    }

    fn host_sync(&self) -> i32 {
        i32::from(self.0.device().synchronize().is_err())
    }

    fn release_after(&self, _stream: u64) {}

    fn copy_to_host(&self) -> RResult<RVec<u8>, NodeError> {
        self.0
            .flatten_all()
            .and_then(|flat| flat.to_vec1::<f32>())
            .map(|values| {
                values
                    .iter()
                    .flat_map(|v| v.to_le_bytes())
                    .collect::<Vec<u8>>()
                    .into()
            })
            .map_err(|error| NodeError::new(ErrorCode::Internal, error.to_string()))
            .into()
    }
}

/// Puts a tensor on a wire; its memory is shared.
///
/// # Errors
/// A tensor that is not `f32`, or more than eight dimensions.
pub(crate) fn share(tensor: &Tensor) -> Result<SharedTensor, NodeError> {
    let internal = |text: String| NodeError::new(ErrorCode::Internal, text);
    if tensor.dtype() != DType::F32 {
        return Err(internal(format!(
            "a tensor of {:?} cannot go on a wire",
            tensor.dtype()
        )));
    }
    let tensor = tensor
        .contiguous()
        .map_err(|error| internal(error.to_string()))?;
    let shape = tensor.dims().to_vec();
    let (address, allocation_bytes, byte_offset, device) = memory(&tensor);
    let strides = contiguous_strides(&shape);
    let description = TensorDescription {
        address,
        byte_offset,
        allocation_bytes,
        device,
        data_type: DataType::F32,
        shape,
        strides,
        stream: 0,
    };
    // SAFETY: candle's storage lives as long as the tensor, which moves into the owner; nothing in this library writes
    // to a tensor in place.
    unsafe { SharedTensor::from_raw(&description, CandleOwner(tensor)) }
        .map_err(|error| internal(error.to_string()))
}

/// Address, size, offset in bytes and device of a contiguous `f32` tensor. On a GPU the address stays 0: consumers of
/// this library recover the tensor itself, others ask for a copy.
fn memory(tensor: &Tensor) -> (u64, u64, u64, DeviceId) {
    let (storage, layout) = tensor.storage_and_layout();
    let offset = (layout.start_offset() * size_of::<f32>()) as u64;
    let viewed = (tensor.elem_count() * size_of::<f32>()) as u64;
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => (
            values.as_ptr() as u64,
            size_of_val(values.as_slice()) as u64,
            offset,
            DeviceId::CPU,
        ),
        Storage::Cuda(_) => (0, viewed, 0, DeviceId { kind: 2, index: 0 }),
        Storage::Metal(_) => (0, viewed, 0, DeviceId { kind: 8, index: 0 }),
        Storage::Cpu(_) => (0, viewed, 0, DeviceId::CPU),
    }
}

/// The memory behind a tensor; views of one have the same.
pub(crate) fn block(tensor: &Tensor) -> MemoryBlock {
    let (storage, layout) = tensor.storage_and_layout();
    let viewed = layout.shape().elem_count() * tensor.dtype().size_in_bytes();
    let bytes = match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => size_of_val(values.as_slice()),
        _ => viewed,
    };
    MemoryBlock {
        id: std::ptr::from_ref(&*storage).addr() as u64,
        bytes: bytes as u64,
    }
}

/// The candle tensor behind a wire, on `device`.
///
/// # Errors
/// Foreign memory that cannot be read.
pub(crate) fn tensor(
    input: &str,
    shared: &SharedTensor,
    device: &Device,
) -> Result<Tensor, NodeError> {
    let unreadable = |text: String| {
        NodeError::invalid_input(input, format!("the input {input} cannot be read: {text}"))
    };
    if let Some(CandleOwner(tensor)) = shared.owner_as::<CandleOwner>() {
        return tensor
            .to_device(device)
            .map_err(|error| unreadable(error.to_string()));
    }
    let values = shared
        .to_vec()
        .map_err(|error| unreadable(error.to_string()))?;
    Tensor::from_vec(values, shared.shape(), device).map_err(|error| unreadable(error.to_string()))
}

/// The values behind a wire in row-major order, all finite.
///
/// # Errors
/// Memory that cannot be read, NaN or infinity.
pub(crate) fn values(input: &str, shared: &SharedTensor) -> Result<Vec<f32>, NodeError> {
    let values = tensor(input, shared, &Device::Cpu)?
        .flatten_all()
        .and_then(|flat| flat.to_vec1::<f32>())
        .map_err(|error| NodeError::new(ErrorCode::Internal, error.to_string()))?;
    if values.iter().any(|v| !v.is_finite()) {
        let message =
            format!("the input {input} holds NaN or infinite values; check the node that made it");
        return Err(NodeError::invalid_input(input, message));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_comes_back_as_the_very_same_buffer() {
        let there = Tensor::arange(0f32, 24.0, &Device::Cpu)
            .unwrap()
            .reshape((2, 3, 4))
            .unwrap();
        let view = there.narrow(0, 1, 1).unwrap();
        let shared = share(&view).unwrap();
        assert_eq!(shared.as_f32().unwrap()[0], 12.0);
        assert_eq!(
            shared.data_address(),
            share(&there).unwrap().data_address() + 48
        );
        let back = tensor("x", &shared, &Device::Cpu).unwrap();
        assert_eq!(share(&back).unwrap().data_address(), shared.data_address());
    }

    #[test]
    fn a_foreign_tensor_is_copied() {
        let shared = SharedTensor::from_vec(vec![1.0, 2.0], &[2]).unwrap();
        let here = tensor("x", &shared, &Device::Cpu).unwrap();
        assert_eq!(here.to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        assert_ne!(share(&here).unwrap().data_address(), shared.data_address());
    }
}
