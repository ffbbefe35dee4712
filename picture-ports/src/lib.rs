//! Sockets that carry pictures and planes: what their tensors look like, for those who make them and those who show them.
//!
//! `IMAGE` and `MASK` are laid out as ComfyUI lays them out, so that nodes of other plugins link too. Values are in [0, 1] as
//! `f32`, `f16` or `bf16`; bytes stand for themselves over 255. The contract knows none of this: it is agreed here.

use std::borrow::Cow;

use plugin_api::{DataType, NodeError, SharedTensor};

/// Pictures: `[B, H, W, 3]`, sRGB.
pub const IMAGE: &str = "IMAGE";
/// Masks: `[B, H, W]`.
pub const MASK: &str = "MASK";
/// Attention maps of concepts: `[B, H, W]`, at least 0, not normalized, in the order of the masks. No bytes.
pub const ATTENTION_MAPS: &str = "ATTENTION_MAPS";

/// Batch, height and width of an `IMAGE`.
///
/// # Errors
/// Not `[B, H, W, 3]` or an empty dimension.
pub fn image_size(input: &str, tensor: &SharedTensor) -> Result<[usize; 3], NodeError> {
    match *tensor.shape() {
        [b, h, w, 3] if b * h * w > 0 => Ok([b, h, w]),
        ref other => Err(wrong(input, "pictures as [batch, height, width, 3]", other)),
    }
}

/// Batch, height and width of a `MASK` (or of attention maps).
///
/// # Errors
/// Not `[B, H, W]` or an empty dimension.
pub fn mask_size(input: &str, tensor: &SharedTensor) -> Result<[usize; 3], NodeError> {
    match *tensor.shape() {
        [b, h, w] if b * h * w > 0 => Ok([b, h, w]),
        ref other => Err(wrong(input, "masks as [batch, height, width]", other)),
    }
}

fn wrong(input: &str, expected: &str, got: &[usize]) -> NodeError {
    NodeError::invalid_input(
        input,
        format!("the input {input} takes {expected}, got the shape {got:?}"),
    )
}

/// The values in row-major order: where they are if they are row-major `f32` in host memory, else copied. Not checked: they
/// may be outside of their range, NaN or infinite.
///
/// # Errors
/// Another element type, or memory that cannot be read.
pub fn values<'a>(input: &str, tensor: &'a SharedTensor) -> Result<Cow<'a, [f32]>, NodeError> {
    let values = tensor.to_f32().map_err(|error| {
        NodeError::invalid_input(input, format!("the input {input} cannot be read: {error}"))
    })?;
    if tensor.data_type() != DataType::U8 {
        return Ok(values);
    }
    Ok(values.iter().map(|byte| byte / 255.0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_themselves_over_255() {
        let bytes = SharedTensor::from_vec(vec![0u8, 51, 255], &[1, 1, 1, 3]).unwrap();
        assert_eq!(image_size("x", &bytes).unwrap(), [1, 1, 1]);
        assert_eq!(*values("x", &bytes).unwrap(), [0.0, 0.2, 1.0]);
        let floats = SharedTensor::from_vec(vec![0f32, 51.0], &[1, 1, 2]).unwrap();
        assert!(matches!(
            values("x", &floats).unwrap(),
            Cow::Borrowed([_, 51.0])
        ));
        let error = mask_size("masks", &bytes).unwrap_err();
        assert!(
            error.message.contains("got the shape [1, 1, 1, 3]"),
            "{error}"
        );
    }
}
