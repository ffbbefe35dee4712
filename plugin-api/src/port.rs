//! Types of sockets. Two sockets link when their names are equal.
//!
//! `IMAGE` and `MASK` are laid out as ComfyUI lays them out, so that nodes of other plugins link too.

use crate::{NodeError, SharedTensor};

/// Pictures: `[B, H, W, 3]`, `f32` in [0, 1], sRGB.
pub const IMAGE: &str = "IMAGE";
/// Masks: `[B, H, W]`, `f32` in [0, 1].
pub const MASK: &str = "MASK";
/// A loaded diffusion model, an object of the plugin.
pub const DIFFUSION_MODEL: &str = "DIFFUSION_MODEL";
/// Learned concept tokens with what is needed to learn on, an object of the plugin.
pub const CONCEPTS: &str = "CONCEPTS";
/// Attention maps of the concepts: `[B, H, W]`, `f32` >= 0, not normalized, in the order of the masks.
pub const ATTENTION_MAPS: &str = "ATTENTION_MAPS";

/// Evidence and posterior of every picture, an object of the plugin: what an extraction hands on to the CRF and to the
/// next extraction.
pub const EVIDENCE: &str = "EVIDENCE";

/// Batch, height and width of an `IMAGE`.
///
/// # Errors
/// Not `[B, H, W, 3]` or an empty dimension.
pub fn image_size(input: &str, tensor: &SharedTensor) -> Result<[usize; 3], NodeError> {
    match tensor.shape()[..] {
        [b, h, w, 3] if b * h * w > 0 => Ok([b, h, w]),
        ref other => Err(wrong(input, "pictures as [batch, height, width, 3]", other)),
    }
}

/// Batch, height and width of a `MASK` (or of attention maps).
///
/// # Errors
/// Not `[B, H, W]` or an empty dimension.
pub fn mask_size(input: &str, tensor: &SharedTensor) -> Result<[usize; 3], NodeError> {
    match tensor.shape()[..] {
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
