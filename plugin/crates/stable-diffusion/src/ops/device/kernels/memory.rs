//! Memory for what kernels write.
#![expect(
    unsafe_code,
    reason = "memory that is not zeroed before a kernel writes it"
)]

use candle_core::{DType, Device, Result, Shape, Tensor};

/// A tensor whose numbers mean nothing until a kernel has written them, all of them.
pub(super) fn output(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: the tensor is given to a launch that writes every element (`Argument::Write`) before anybody reads it: launches
    // and what reads come one after another on the device's one stream. Any bits are a number of these types.
    unsafe { Tensor::empty(shape, dtype, device) }
}
