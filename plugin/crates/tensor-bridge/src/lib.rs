//! Between candle's tensors and the tensors on wires: `f32`, `f16`, `bf16` and `u8`, strided views too.
//!
//! Going out nothing is copied. Coming in, a tensor that this very library made is the same tensor again, on any
//! device; a foreign one is copied once, because candle owns the memory of its tensors: on the card, if it is on the card
//! where it is needed, else through the CPU.
#![expect(unsafe_code, reason = "vouches for the memory behind a candle tensor")]

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};
use half::{bf16, f16};
use plugin_api::tensor::TensorDescription;
use plugin_api::{
    DataType, DeviceId, Element, ErrorCode, MemoryBlock, NodeError, SharedTensor, TensorOwner,
};

/// Keeps a candle tensor alive for everybody who holds its memory.
struct CandleOwner(Tensor);

fn failed(error: impl std::fmt::Display) -> NodeError {
    NodeError::new(ErrorCode::Internal, error.to_string())
}

impl TensorOwner for CandleOwner {
    fn wait_on(&self, stream: u64) -> Result<(), NodeError> {
        match self.0.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => cuda::let_wait(device, stream).map_err(failed),
            Device::Cpu => Ok(()),
            // Nothing is known of other devices' streams: the data are there when this returns.
            device => {
                let _ = stream;
                device.synchronize().map_err(failed)
            }
        }
    }

    fn host_sync(&self) -> Result<(), NodeError> {
        self.0.device().synchronize().map_err(failed)
    }

    fn release_after(&self, stream: u64) -> Result<(), NodeError> {
        match self.0.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => cuda::wait_for(device, stream).map_err(failed),
            Device::Cpu => Ok(()),
            _ => {
                let _ = stream;
                Err(failed("the streams of this device cannot be ordered"))
            }
        }
    }

    fn copy_to(&self, device: DeviceId) -> Result<SharedTensor, NodeError> {
        let own = place(&self.0).map_err(failed)?.device;
        let copy = if device == own {
            self.0.force_contiguous()
        } else if device == DeviceId::CPU {
            self.0
                .to_device(&Device::Cpu)
                .and_then(|copy| copy.contiguous())
        } else {
            let text = format!("a tensor of {own:?} can be copied to memory, not to {device:?}");
            return Err(failed(text));
        };
        // Nobody has this one but the handle.
        shared(copy.map_err(failed)?, false)
    }
}

/// Puts a tensor on a wire; its memory is shared.
///
/// # Errors
/// A tensor of other elements, or with more than eight dimensions.
pub fn share(tensor: &Tensor) -> Result<SharedTensor, NodeError> {
    // Other tensors of candle may have the same memory: nobody may write it.
    shared(tensor.clone(), true)
}

fn shared(tensor: Tensor, is_read_only: bool) -> Result<SharedTensor, NodeError> {
    let data_type = data_type(tensor.dtype())?;
    let Place {
        address,
        allocation_bytes,
        byte_offset,
        device,
    } = place(&tensor).map_err(failed)?;
    let shape = tensor.shape().clone();
    let strides: Vec<isize> = tensor.stride().iter().map(|&n| n as isize).collect();
    let description = TensorDescription {
        address,
        byte_offset,
        allocation_bytes,
        device,
        data_type,
        shape: shape.dims(),
        strides: &strides,
        is_read_only,
    };
    // SAFETY: candle's storage lives as long as the tensor, which moves into the owner; nothing in this library writes
    // to a tensor in place, and only a tensor that nobody else has is not read-only.
    Ok(unsafe { SharedTensor::from_raw(&description, CandleOwner(tensor)) }?)
}

fn data_type(dtype: DType) -> Result<DataType, NodeError> {
    match dtype {
        DType::F32 => Ok(DataType::F32),
        DType::F16 => Ok(DataType::F16),
        DType::BF16 => Ok(DataType::BF16),
        DType::U8 => Ok(DataType::U8),
        other => Err(failed(format!("a tensor of {other:?} cannot go on a wire"))),
    }
}

/// Where a tensor is, as a [`TensorDescription`] says it.
struct Place {
    address: u64,
    allocation_bytes: u64,
    byte_offset: u64,
    device: DeviceId,
}

/// On a device whose addresses candle does not tell it is 0: consumers of this library recover the tensor itself, others ask
/// for a copy.
fn place(tensor: &Tensor) -> candle_core::Result<Place> {
    let (storage, layout) = tensor.storage_and_layout();
    let byte_offset = (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64;
    let last = layout.shape().dims().iter().zip(layout.stride());
    let last: usize = last.map(|(&n, &stride)| n.saturating_sub(1) * stride).sum();
    let reach = byte_offset + ((last + 1) * tensor.dtype().size_in_bytes()) as u64;
    let known = |(address, allocation_bytes): (u64, usize), device| Place {
        address,
        allocation_bytes: allocation_bytes as u64,
        byte_offset,
        device,
    };
    let unknown = |device| known((0, reach as usize), device);
    Ok(match &*storage {
        Storage::Cpu(storage) => match memory(storage) {
            Some(memory) => known(memory, DeviceId::CPU),
            None => unknown(DeviceId::CPU),
        },
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => {
            let (address, bytes, device) = cuda::place(storage, tensor.dtype())?;
            known((address, bytes), device)
        }
        #[cfg(not(feature = "cuda"))]
        Storage::Cuda(_) => unknown(DeviceId { kind: 2, index: 0 }),
        Storage::Metal(_) => unknown(DeviceId { kind: 8, index: 0 }),
    })
}

/// Address and bytes of a vector of the elements that go on wires.
fn memory(storage: &CpuStorage) -> Option<(u64, usize)> {
    fn of<T>(values: &[T]) -> (u64, usize) {
        (values.as_ptr() as u64, size_of_val(values))
    }
    match storage {
        CpuStorage::F32(values) => Some(of(values)),
        CpuStorage::F16(values) => Some(of(values)),
        CpuStorage::BF16(values) => Some(of(values)),
        CpuStorage::U8(values) => Some(of(values)),
        _ => None,
    }
}

/// The memory behind a tensor; views of one have the same.
#[must_use]
pub fn block(tensor: &Tensor) -> MemoryBlock {
    let (storage, layout) = tensor.storage_and_layout();
    let viewed = layout.shape().elem_count() * tensor.dtype().size_in_bytes();
    let bytes = match &*storage {
        Storage::Cpu(storage) => memory(storage).map_or(viewed, |(_, bytes)| bytes),
        _ => viewed,
    };
    MemoryBlock {
        id: std::ptr::from_ref(&*storage).addr() as u64,
        bytes: bytes as u64,
    }
}

/// The candle tensor behind a wire, on `device`, of the elements that the wire has.
///
/// # Errors
/// Foreign memory that cannot be read, or other elements.
pub fn tensor(input: &str, shared: &SharedTensor, device: &Device) -> Result<Tensor, NodeError> {
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
    let copied = match shared.data_type() {
        DataType::F32 => copied::<f32>(shared, device),
        DataType::F16 => copied::<f16>(shared, device),
        DataType::BF16 => copied::<bf16>(shared, device),
        DataType::U8 => copied::<u8>(shared, device),
        other => Err(format!(
            "it holds {other}; f32, f16, bf16 and u8 can be read"
        )),
    };
    copied.map_err(unreadable)
}

fn copied<T: Element + WithDType>(
    shared: &SharedTensor,
    device: &Device,
) -> Result<Tensor, String> {
    let values = shared.to_vec::<T>().map_err(|error| error.to_string())?;
    Tensor::from_vec(values, shared.shape(), device).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the first card of a build for cards, if there is one.
    fn device() -> Device {
        Device::cuda_if_available(0).unwrap()
    }

    fn counted(n: usize) -> Tensor {
        Tensor::arange(0f32, n as f32, &device()).unwrap()
    }

    #[test]
    fn a_tensor_comes_back_as_the_very_same_buffer() {
        let there = counted(24).reshape((2, 3, 4)).unwrap();
        let view = there.narrow(0, 1, 1).unwrap();
        let shared = share(&view).unwrap();
        assert_eq!(shared.to_vec::<f32>().unwrap()[0], 12.0);
        let whole = share(&there).unwrap().data_address();
        assert_eq!(shared.data_address(), whole + 48);
        let back = tensor("x", &shared, &device()).unwrap();
        assert_eq!(share(&back).unwrap().data_address(), shared.data_address());
    }

    #[test]
    fn views_go_out_as_they_are_and_come_in_with_their_values() {
        let there = counted(24).reshape((4, 6)).unwrap();
        let view = there.narrow(1, 2, 3).unwrap().t().unwrap();
        let shared = share(&view).unwrap();
        assert_eq!(
            (shared.shape(), shared.strides()),
            (&[3, 4][..], &[1, 6][..])
        );
        let whole = share(&there).unwrap();
        assert_eq!(shared.data_address(), whole.data_address() + 8);
        assert_eq!(shared.allocation_address(), whole.allocation_address());
        let here = tensor("x", &foreign(&view), &device()).unwrap();
        let expected = view.contiguous().unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(here.to_vec2::<f32>().unwrap(), expected);
    }

    #[test]
    fn elements_keep_their_type() {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::U8] {
            let there = counted(6).to_dtype(dtype).unwrap();
            for shared in [share(&there).unwrap(), foreign(&there)] {
                let here = tensor("x", &shared, &device()).unwrap();
                assert_eq!(here.dtype(), dtype);
                let values = here.to_dtype(DType::F32).unwrap().to_vec1::<f32>();
                assert_eq!(values.unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
            }
        }
        let there = counted(6).to_dtype(DType::F64).unwrap();
        assert!(share(&there).unwrap_err().message.contains("F64"));
    }

    #[test]
    fn a_tensor_that_is_made_unique_leaves_the_first_as_it_was() {
        let there = counted(4);
        let mut copy = share(&there).unwrap().make_unique().unwrap();
        assert!(copy.is_writable());
        assert_ne!(copy.data_address(), share(&there).unwrap().data_address());
        let mut here = copy.to_device(DeviceId::CPU).unwrap();
        drop(copy);
        here.as_mut_slice::<f32>().unwrap()[0] = 9.0;
        assert_eq!(there.to_vec1::<f32>().unwrap(), [0.0, 1.0, 2.0, 3.0]);
    }

    /// What another plugin would hand over: the same memory, whose owner this library does not know.
    fn foreign(there: &Tensor) -> SharedTensor {
        struct Foreign(CandleOwner);

        impl TensorOwner for Foreign {
            fn wait_on(&self, stream: u64) -> Result<(), NodeError> {
                self.0.wait_on(stream)
            }
            fn host_sync(&self) -> Result<(), NodeError> {
                self.0.host_sync()
            }
            fn release_after(&self, stream: u64) -> Result<(), NodeError> {
                self.0.release_after(stream)
            }
            fn copy_to(&self, device: DeviceId) -> Result<SharedTensor, NodeError> {
                self.0.copy_to(device)
            }
        }

        let own = share(there).unwrap();
        let description = TensorDescription {
            address: own.allocation_address(),
            byte_offset: own.data_address() - own.allocation_address(),
            allocation_bytes: own.allocation_bytes(),
            device: own.device(),
            data_type: own.data_type(),
            shape: own.shape(),
            strides: own.strides(),
            is_read_only: true,
        };
        let owner = Foreign(CandleOwner(there.clone()));
        // SAFETY: the owner holds the tensor whose memory is described.
        unsafe { SharedTensor::from_raw(&description, owner) }.unwrap()
    }

    #[test]
    fn a_foreign_tensor_on_the_device_has_its_values() {
        let there = counted(6).reshape((2, 3)).unwrap();
        let shared = foreign(&there);
        let here = tensor("x", &shared, &device()).unwrap();
        let rows = here.to_vec2::<f32>().unwrap();
        assert_eq!(rows, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
        assert_ne!(share(&here).unwrap().data_address(), shared.data_address());
    }

    #[test]
    fn in_memory_there_is_nothing_to_wait_for() {
        let values = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap();
        let shared = share(&values.narrow(0, 2, 3).unwrap()).unwrap();
        assert_eq!(shared.device(), DeviceId::CPU);
        assert_eq!(shared.allocation_bytes(), 24);
        assert_eq!(shared.wait_on(7), Ok(()));
        assert!(shared.clone().release_after(7).is_ok());
        assert_eq!(shared.as_slice::<f32>(), Ok(&[2.0, 3.0, 4.0][..]));
    }
}
