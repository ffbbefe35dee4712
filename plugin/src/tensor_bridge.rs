//! Between candle's tensors and the tensors on wires.
//!
//! Going out nothing is copied. Coming in, a tensor that this very library made is the same tensor again, on any
//! device; a foreign one is copied once, because candle owns the memory of its tensors: on the card, if it is on the card
//! where it is needed, else through the CPU.
#![expect(unsafe_code, reason = "vouches for the memory behind a candle tensor")]

#[cfg(feature = "cuda")]
mod cuda;

use abi_stable::std_types::{RResult, RVec};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use plugin_api::tensor::{TensorDescription, TensorOwner, contiguous_strides};
use plugin_api::{DataType, DeviceId, ErrorCode, MemoryBlock, NodeError, SharedTensor};

/// Keeps a candle tensor alive for everybody who holds its memory.
struct CandleOwner(Tensor);

impl TensorOwner for CandleOwner {
    fn wait_on(&self, stream: u64) -> i32 {
        match self.0.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => i32::from(cuda::let_wait(device, stream).is_err()),
            Device::Cpu => 0,
            // Nothing is known of other devices' streams: the data are there when this returns.
            device => {
                let _ = stream;
                i32::from(device.synchronize().is_err())
            }
        }
    }

    fn host_sync(&self) -> i32 {
        i32::from(self.0.device().synchronize().is_err())
    }

    fn release_after(&self, stream: u64) {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = self.0.device() {
            // Without the order the memory could be used again too early: wait here instead.
            if cuda::wait_for(device, stream).is_err() {
                let _ = device.cuda_stream().context().synchronize();
            }
        }
        #[cfg(not(feature = "cuda"))]
        let _ = stream;
    }

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
    let Memory {
        address,
        allocation_bytes,
        byte_offset,
        device,
        stream,
    } = memory(&tensor).map_err(|error| internal(error.to_string()))?;
    let strides = contiguous_strides(&shape);
    let description = TensorDescription {
        address,
        byte_offset,
        allocation_bytes,
        device,
        data_type: DataType::F32,
        shape,
        strides,
        stream,
    };
    // SAFETY: candle's storage lives as long as the tensor, which moves into the owner; nothing in this library writes
    // to a tensor in place.
    unsafe { SharedTensor::from_raw(&description, CandleOwner(tensor)) }
        .map_err(|error| internal(error.to_string()))
}

/// Where a tensor is, as a [`TensorDescription`] says it.
struct Memory {
    address: u64,
    allocation_bytes: u64,
    byte_offset: u64,
    device: DeviceId,
    stream: u64,
}

/// Of a contiguous `f32` tensor. On a device whose addresses candle does not tell it is 0: consumers of this library recover
/// the tensor itself, others ask for a copy.
fn memory(tensor: &Tensor) -> candle_core::Result<Memory> {
    let (storage, layout) = tensor.storage_and_layout();
    let byte_offset = (layout.start_offset() * size_of::<f32>()) as u64;
    let unknown = |device| Memory {
        address: 0,
        allocation_bytes: (tensor.elem_count() * size_of::<f32>()) as u64,
        byte_offset: 0,
        device,
        stream: 0,
    };
    Ok(match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Memory {
            address: values.as_ptr() as u64,
            allocation_bytes: size_of_val(values.as_slice()) as u64,
            byte_offset,
            device: DeviceId::CPU,
            stream: 0,
        },
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => {
            let (address, allocation_bytes, device, stream) = cuda::place(storage)?;
            Memory {
                address,
                allocation_bytes,
                byte_offset,
                device,
                stream,
            }
        }
        #[cfg(not(feature = "cuda"))]
        Storage::Cuda(_) => unknown(DeviceId { kind: 2, index: 0 }),
        Storage::Metal(_) => unknown(DeviceId { kind: 8, index: 0 }),
        Storage::Cpu(_) => unknown(DeviceId::CPU),
    })
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
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device
        && let Some(taken) = cuda::taken_over(shared, device)
    {
        return taken.map_err(|error| unreadable(error.to_string()));
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
    use crate::device::device;

    /// On the device of this process.
    fn counted(n: usize) -> Tensor {
        Tensor::arange(0f32, n as f32, device().unwrap()).unwrap()
    }

    #[test]
    fn a_tensor_comes_back_as_the_very_same_buffer() {
        let there = counted(24).reshape((2, 3, 4)).unwrap();
        let view = there.narrow(0, 1, 1).unwrap();
        let shared = share(&view).unwrap();
        assert_eq!(shared.to_vec().unwrap()[0], 12.0);
        let whole = share(&there).unwrap().data_address();
        assert_eq!(shared.data_address(), whole + 48);
        let back = tensor("x", &shared, device().unwrap()).unwrap();
        assert_eq!(share(&back).unwrap().data_address(), shared.data_address());
    }

    #[test]
    fn a_foreign_tensor_is_copied() {
        let shared = SharedTensor::from_vec(vec![1.0, 2.0], &[2]).unwrap();
        let here = tensor("x", &shared, device().unwrap()).unwrap();
        assert_eq!(here.to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        assert_ne!(share(&here).unwrap().data_address(), shared.data_address());
    }

    /// What another plugin would hand over: the same memory, whose owner this library does not know.
    struct Foreign(CandleOwner);

    impl TensorOwner for Foreign {
        fn wait_on(&self, stream: u64) -> i32 {
            self.0.wait_on(stream)
        }
        fn host_sync(&self) -> i32 {
            self.0.host_sync()
        }
        fn release_after(&self, stream: u64) {
            self.0.release_after(stream);
        }
        fn copy_to_host(&self) -> RResult<RVec<u8>, NodeError> {
            self.0.copy_to_host()
        }
    }

    #[test]
    fn a_foreign_tensor_on_the_device_has_its_values() {
        let there = counted(6);
        let memory = memory(&there).unwrap();
        let description = TensorDescription {
            address: memory.address,
            byte_offset: memory.byte_offset,
            allocation_bytes: memory.allocation_bytes,
            device: memory.device,
            data_type: DataType::F32,
            shape: vec![2, 3],
            strides: vec![3, 1],
            stream: memory.stream,
        };
        // SAFETY: the owner holds the tensor whose memory is described.
        let foreign = unsafe { SharedTensor::from_raw(&description, Foreign(CandleOwner(there))) };
        let foreign = foreign.unwrap();
        let here = tensor("x", &foreign, device().unwrap()).unwrap();
        let rows = here.to_vec2::<f32>().unwrap();
        assert_eq!(rows, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
        assert_ne!(share(&here).unwrap().data_address(), foreign.data_address());
    }

    #[test]
    fn in_memory_there_is_nothing_to_wait_for() {
        let values = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap();
        let shared = share(&values.narrow(0, 2, 3).unwrap()).unwrap();
        assert_eq!(shared.device(), DeviceId::CPU);
        assert_eq!(shared.allocation_bytes(), 24);
        assert_eq!(shared.wait_on(7), Ok(()));
        shared.clone().release_after(7);
        assert_eq!(shared.as_f32(), Ok(&[2.0, 3.0, 4.0][..]));
    }
}
