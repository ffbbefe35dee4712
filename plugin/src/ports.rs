//! Sockets of this plugin's own, and what comes in through those for pictures.

use std::borrow::Cow;

use candle_core::{DType, Device, Tensor};
use plugin_api::{DataType, NodeError, SharedTensor};

pub(crate) use picture_ports::{ATTENTION_MAPS, IMAGE, MASK, image_size, mask_size};

use crate::nodes::internal;

/// A loaded diffusion model.
pub(crate) const DIFFUSION_MODEL: &str = "DIFFUSION_MODEL";
/// Learned concept tokens with what is needed to learn on.
pub(crate) const CONCEPTS: &str = "CONCEPTS";
/// Evidence and posterior of every picture: what an extraction hands on to the CRF and to the next extraction.
pub(crate) const EVIDENCE: &str = "EVIDENCE";

/// The values behind a wire in row-major order, all finite; not copied if they lie so in memory.
///
/// # Errors
/// Memory that cannot be read, NaN or infinity.
pub(crate) fn values<'a>(
    input: &str,
    shared: &'a SharedTensor,
) -> Result<Cow<'a, [f32]>, NodeError> {
    let values = picture_ports::values(input, shared)?;
    if values.iter().any(|v| !v.is_finite()) {
        let message =
            format!("the input {input} holds NaN or infinite values; check the node that made it");
        return Err(NodeError::invalid_input(input, message));
    }
    Ok(values)
}

/// Pictures on a device, `f32` in [0, 1].
///
/// # Errors
/// Memory that cannot be read.
pub(crate) fn tensor(
    input: &str,
    shared: &SharedTensor,
    device: &Device,
) -> Result<Tensor, NodeError> {
    let tensor = tensor_bridge::tensor(input, shared, device)?;
    let tensor = tensor.to_dtype(DType::F32).map_err(internal)?;
    if shared.data_type() == DataType::U8 {
        let whole = Tensor::new(255f32, device).map_err(internal)?;
        return tensor.broadcast_div(&whole).map_err(internal);
    }
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_halves_become_what_the_model_computes_with() {
        let bytes = SharedTensor::from_vec(vec![0u8, 51, 255], &[3]).unwrap();
        let there = tensor("x", &bytes, &Device::Cpu).unwrap();
        assert_eq!(there.to_vec1::<f32>().unwrap(), [0.0, 0.2, 1.0]);
        let half = Tensor::new(&[0.5f32, 0.25], &Device::Cpu).unwrap();
        let half = tensor_bridge::share(&half.to_dtype(DType::BF16).unwrap()).unwrap();
        assert_eq!(*values("x", &half).unwrap(), [0.5, 0.25]);
        let there = tensor("x", &half, &Device::Cpu).unwrap();
        assert_eq!(there.to_vec1::<f32>().unwrap(), [0.5, 0.25]);
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let shared = SharedTensor::from_vec(vec![0.5, f32::NAN], &[2]).unwrap();
        assert!(values("x", &shared).unwrap_err().message.contains("NaN"));
    }
}
