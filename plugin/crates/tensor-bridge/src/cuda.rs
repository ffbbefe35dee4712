//! Tensors on NVIDIA cards. All tensors of this library on a card are made and used on its one stream.

use candle_core::backend::BackendStorage as _;
use candle_core::cuda::cudarc::driver::sys::{CUevent_flags, CUevent_wait_flags, CUstream};
use candle_core::cuda::cudarc::driver::{
    CudaStream, DevicePtr as _, DeviceRepr, DriverError, result,
};
use candle_core::cuda_backend::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor};
use half::{bf16, f16};
use plugin_api::{DataType, DeviceId, SharedTensor};

/// DLPack's number of CUDA devices.
const KIND: i32 = 2;

/// Where the memory of a storage begins, how many bytes it has, and on which card.
pub(super) fn place(storage: &CudaStorage, dtype: DType) -> Result<(u64, usize, DeviceId)> {
    let (address, bytes) = match dtype {
        DType::F16 => memory::<f16>(storage),
        DType::BF16 => memory::<bf16>(storage),
        DType::U8 => memory::<u8>(storage),
        _ => memory::<f32>(storage),
    }?;
    let device = DeviceId {
        kind: KIND,
        index: storage.device().cuda_stream().context().ordinal() as i32,
    };
    Ok((address, bytes, device))
}

fn memory<T: CudaDType>(storage: &CudaStorage) -> Result<(u64, usize)> {
    let stream = storage.device().cuda_stream();
    let slice = storage.as_cuda_slice::<T>()?;
    let (address, _) = slice.device_ptr(&stream);
    Ok((address, slice.num_bytes()))
}

/// Lets `stream` wait for what this library's stream was asked for up to now.
pub(super) fn let_wait(device: &CudaDevice, stream: u64) -> Result<()> {
    let own = device.cuda_stream();
    order(&own, own.cu_stream(), stream as CUstream)
}

/// Lets this library's stream, and with it every later free, wait for what `stream` was asked for up to now.
pub(super) fn wait_for(device: &CudaDevice, stream: u64) -> Result<()> {
    let own = device.cuda_stream();
    order(&own, stream as CUstream, own.cu_stream())
}

/// Nothing of `later` begins before what `earlier` has now is done. Returns at once.
fn order(own: &CudaStream, earlier: CUstream, later: CUstream) -> Result<()> {
    if earlier == later {
        return Ok(());
    }
    let ordered = || -> std::result::Result<(), DriverError> {
        own.context().bind_to_thread()?;
        let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: the event was made above; one stream is this library's, the other the caller's, who vouches for it. An
        // event that is destroyed before it happened is kept by the driver until it did.
        unsafe {
            let ordered = result::event::record(event, earlier).and_then(|()| {
                let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                result::stream::wait_event(later, event, flags)
            });
            result::event::destroy(event)?;
            ordered
        }
    };
    ordered().map_err(candle_core::Error::wrap)
}

/// A foreign tensor that is on this very card and row-major, copied on the card; `None` for any other.
pub(super) fn taken_over(shared: &SharedTensor, device: &CudaDevice) -> Option<Result<Tensor>> {
    let here = DeviceId {
        kind: KIND,
        index: device.cuda_stream().context().ordinal() as i32,
    };
    let is_known = shared.data_address() != 0;
    if shared.device() != here || !shared.is_row_major() || !is_known {
        return None;
    }
    match shared.data_type() {
        DataType::F32 => Some(copied::<f32>(shared, device)),
        DataType::F16 => Some(copied::<f16>(shared, device)),
        DataType::BF16 => Some(copied::<bf16>(shared, device)),
        DataType::U8 => Some(copied::<u8>(shared, device)),
        _ => None,
    }
}

fn copied<T: CudaDType + DeviceRepr>(shared: &SharedTensor, device: &CudaDevice) -> Result<Tensor> {
    let (n, stream) = (shared.n_elements(), device.cuda_stream());
    let own = stream.cu_stream() as u64;
    if shared.wait_on(own).is_err() {
        shared.host_sync().map_err(candle_core::Error::wrap)?;
    }
    // SAFETY: every value is written below, before anything on this stream reads it.
    let values = unsafe { device.alloc::<T>(n) }?;
    {
        let (address, _) = values.device_ptr(&stream);
        // SAFETY: the producer vouched for as many elements at its address as the shape has; both are on this card, and the
        // stream waits for them above.
        unsafe {
            result::memcpy_dtod_async(
                address,
                shared.data_address(),
                n * size_of::<T>(),
                stream.cu_stream(),
            )
        }
        .map_err(candle_core::Error::wrap)?;
    }
    if shared.clone().release_after(own).is_err() {
        // Without the order the memory could be used again too early: wait here instead.
        stream.synchronize().map_err(candle_core::Error::wrap)?;
    }
    let storage = CudaStorage::wrap_cuda_slice(values, device.clone());
    Ok(Tensor::from_storage(
        Storage::Cuda(storage),
        shared.shape(),
        BackpropOp::none(),
        false,
    ))
}
