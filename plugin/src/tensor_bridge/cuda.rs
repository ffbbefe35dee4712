//! Tensors on NVIDIA cards. All tensors of this library on a card are made and used on its one stream.

use candle_core::backend::BackendStorage as _;
use candle_core::cuda::cudarc::driver::sys::{CUevent_flags, CUevent_wait_flags, CUstream};
use candle_core::cuda::cudarc::driver::{CudaStream, DevicePtr as _, DriverError, result};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Result, Storage, Tensor};
use plugin_api::{DataType, DeviceId, SharedTensor};

/// DLPack's number of CUDA devices.
const KIND: i32 = 2;

/// Where the memory of an `f32` storage begins, how many bytes it has, on which card, and the stream that fills it.
pub(super) fn place(storage: &CudaStorage) -> Result<(u64, u64, DeviceId, u64)> {
    let stream = storage.device().cuda_stream();
    let slice = storage.as_cuda_slice::<f32>()?;
    let (address, _) = slice.device_ptr(&stream);
    let device = DeviceId {
        kind: KIND,
        index: stream.context().ordinal() as i32,
    };
    Ok((
        address,
        slice.num_bytes() as u64,
        device,
        stream.cu_stream() as u64,
    ))
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

/// A foreign tensor that is on this very card, row-major and `f32`, copied on the card; `None` for any other.
pub(super) fn taken_over(shared: &SharedTensor, device: &CudaDevice) -> Option<Result<Tensor>> {
    let stream = device.cuda_stream();
    let here = DeviceId {
        kind: KIND,
        index: stream.context().ordinal() as i32,
    };
    let shape = shared.shape();
    let is_row_major = shared.strides() == plugin_api::tensor::contiguous_strides(&shape);
    let is_known = shared.data_address() != 0;
    let fits = shared.device() == here && shared.data_type() == DataType::F32;
    (fits && is_row_major && is_known).then(|| copied(shared, &shape, device, &stream))
}

fn copied(
    shared: &SharedTensor,
    shape: &[usize],
    device: &CudaDevice,
    stream: &CudaStream,
) -> Result<Tensor> {
    let n = shape.iter().product();
    let own = stream.cu_stream() as u64;
    shared.wait_on(own).map_err(candle_core::Error::wrap)?;
    // SAFETY: every value is written below, before anything on this stream reads it.
    let values = unsafe { device.alloc::<f32>(n) }?;
    {
        let (address, _) = values.device_ptr(stream);
        // SAFETY: the producer vouched for as many `f32` at its address as the shape has; both are on this card, and the
        // stream waits for them above.
        unsafe {
            result::memcpy_dtod_async(
                address,
                shared.data_address(),
                n * size_of::<f32>(),
                stream.cu_stream(),
            )
        }
        .map_err(candle_core::Error::wrap)?;
    }
    shared.clone().release_after(own);
    let storage = CudaStorage::wrap_cuda_slice(values, device.clone());
    Ok(Tensor::from_storage(
        Storage::Cuda(storage),
        shape,
        BackpropOp::none(),
        false,
    ))
}
