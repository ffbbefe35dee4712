//! Settings of an NVIDIA card, and what its driver tells.
#![expect(unsafe_code, reason = "settings of the driver's interface")]

use std::ffi::c_void;

use candle_core::cuda::cudarc::driver::{CudaContext, DriverError, result, sys};
use candle_core::cuda::{
    CudaDevice, set_gemm_reduced_precision_bf16, set_gemm_reduced_precision_f16,
    set_gemm_reduced_precision_f32,
};
use candle_core::{Device, Error, Result};

use super::DeviceMemory;
use crate::ops::kernels::Kernels;

/// Card `number`, with one stream for all threads: the per-thread stream of `new_cuda` orders nothing between workers.
pub(super) fn open(number: usize) -> Result<Device> {
    Kernels::of_environment().map_err(Error::Msg)?;
    // f32 is f32: TF32 multiplies 10 bits of every factor, which no parity survives, and who can do with that has the
    // precision bf16, which is faster still. f16 would be summed in f16, which overflows. The switch for bf16 asks for a
    // computation that cuBLAS has for f32 factors only; bf16 ones are multiplied as they are and summed in f32 without it.
    set_gemm_reduced_precision_f32(false);
    set_gemm_reduced_precision_f16(false);
    set_gemm_reduced_precision_bf16(false);
    let device = CudaDevice::new_with_stream(number)?;
    // SAFETY: orders streams among each other, and every tensor of this device lives on its one stream. Nothing was
    // allocated with tracking before.
    unsafe { device.disable_event_tracking() };
    // A card without memory pools (some virtual ones) allocates in the slow way, and works.
    if let Some(pool) = Pool::of(device.cuda_stream().context()) {
        // Else what a step freed goes back to the driver whenever the CPU waits, and the next one asks for it again.
        let _ = pool.set(
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            u64::MAX,
        );
    }
    Ok(Device::Cuda(device))
}

pub(super) fn product(device: &CudaDevice) -> String {
    device.cuda_stream().context().name().unwrap_or_default()
}

pub(super) fn memory(device: &CudaDevice) -> Option<DeviceMemory> {
    use sys::CUmemPool_attribute as Attribute;
    let stream = device.cuda_stream();
    let context = stream.context();
    let (free, total) = context.mem_get_info().ok()?;
    let pool = Pool::of(context)?;
    Some(DeviceMemory {
        total: total as u64,
        free: free as u64,
        held: pool
            .get(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)
            .ok()?,
        used: pool.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT).ok()?,
        peak: pool.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH).ok()?,
    })
}

pub(super) fn reset_peak(device: &CudaDevice) {
    if let Some(pool) = Pool::of(device.cuda_stream().context()) {
        // Zero is the only value that the driver takes here: from now on. Without it a peak is one of more than was asked.
        let _ = pool.set(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0);
    }
}

/// The pool that tensors of a card come from.
struct Pool(sys::CUmemoryPool);

impl Pool {
    /// `None` on a card without pools.
    fn of(context: &CudaContext) -> Option<Self> {
        if !context.has_async_alloc() {
            return None;
        }
        // SAFETY: the device is the context's own.
        unsafe { result::device::get_mem_pool(context.cu_device()) }
            .ok()
            .map(Self)
    }

    fn get(&self, attribute: sys::CUmemPool_attribute) -> std::result::Result<u64, DriverError> {
        let mut value = 0u64;
        // SAFETY: the pool is its device's, which is never destroyed; the attributes that are asked for here are 64 bits.
        unsafe {
            result::mem_pool::get_attribute(self.0, attribute, (&raw mut value).cast::<c_void>())
        }?;
        Ok(value)
    }

    fn set(
        &self,
        attribute: sys::CUmemPool_attribute,
        mut value: u64,
    ) -> std::result::Result<(), DriverError> {
        // SAFETY: as above; the driver reads the value during the call.
        unsafe {
            result::mem_pool::set_attribute(self.0, attribute, (&raw mut value).cast::<c_void>())
        }
    }
}
