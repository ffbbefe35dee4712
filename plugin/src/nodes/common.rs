//! Parameters and conversions that several nodes share.

use std::borrow::Cow;

use personalization::{ImageMasks, Scene, SceneMasks, Size, overlay};
use plugin_api::parameter::MAX_SAFE_INTEGER;
use plugin_api::{ErrorCode, Host, Inputs, NodeError, SharedTensor, Value};
use schemars::Schema;
use serde_json::json;

use crate::ports;

/// Marks a parameter as a seed: editors offer to change it after every run.
pub(crate) fn seed_schema(schema: &mut Schema) {
    schema.insert("minimum".to_owned(), json!(0));
    schema.insert("maximum".to_owned(), json!(MAX_SAFE_INTEGER));
    schema.insert("x-seed".to_owned(), json!(true));
}

/// An error that is nobody's input.
pub(crate) fn internal(error: impl std::fmt::Display) -> NodeError {
    NodeError::new(ErrorCode::Internal, error.to_string())
}

/// Masks of a scene as a `MASK` `[B, H, W]`: picture after picture, concept after concept.
pub(crate) fn masks_value(masks: &[ImageMasks]) -> Result<Value, NodeError> {
    let size = size_of(masks);
    let planes = masks.iter().flat_map(ImageMasks::planes);
    planes_value(
        planes.flatten().map(|&inside| f32::from(inside)).collect(),
        size,
    )
}

/// Planes of one size as one tensor `[B, H, W]`.
pub(crate) fn planes_value(values: Vec<f32>, size: Size) -> Result<Value, NodeError> {
    let n = values.len() / size.area().max(1);
    Ok(Value::Tensor(
        SharedTensor::from_vec(values, &[n, size.height, size.width]).map_err(internal)?,
    ))
}

/// That of the pictures on one wire: they share it.
pub(crate) fn size_of(masks: &[ImageMasks]) -> Size {
    masks.first().map_or(Size::square(0), ImageMasks::size)
}

/// Shows every picture with its masks, and what each of them keeps of it.
pub(crate) fn show_masks(host: &Host, scene: &Scene, masks: &[ImageMasks]) {
    let show = |rgb: &[u8], size: Size, series: &str, label: &str| {
        let values = rgb.iter().map(|&byte| f32::from(byte) / 255.0).collect();
        if let Ok(picture) = SharedTensor::from_vec(values, &[size.height, size.width, 3]) {
            host.preview(picture, series, label);
        }
    };
    for (index, (shown, masks)) in scene.pictures().iter().zip(masks).enumerate() {
        let (size, number) = (shown.picture.size(), index + 1);
        let label = format!("picture {number}");
        let all = overlay::masks_over(&shown.picture, masks);
        show(&all, size, "masks", &label);
        for (plane, &concept) in masks.planes().iter().zip(&shown.concepts) {
            let token = &scene.concepts()[concept].token;
            let cut = overlay::cut_out(&shown.picture, plane);
            show(
                &cut,
                size,
                &format!("mask of {token}, picture {number}"),
                &label,
            );
        }
    }
}

/// Every picture with its masks in color, as an `IMAGE`.
pub(crate) fn overlay_value(scene: &Scene, masks: &[ImageMasks]) -> Result<Value, NodeError> {
    let pictures = scene.pictures().iter().zip(masks);
    let rgb = pictures.flat_map(|(picture, masks)| overlay::masks_over(&picture.picture, masks));
    let values: Vec<f32> = rgb.map(|byte| f32::from(byte) / 255.0).collect();
    let size = size_of(masks);
    let shape = [masks.len(), size.height, size.width, 3];
    Ok(Value::Tensor(
        SharedTensor::from_vec(values, &shape).map_err(internal)?,
    ))
}

/// The masks of an optional input: one per concept and picture of the scene, scaled as the pictures were.
///
/// # Errors
/// A number of masks that does not fit the scene, masks of other proportions, values that are no mask, or an empty one.
pub(crate) fn optional_masks(
    inputs: &Inputs,
    input: &str,
    scene: &Scene,
) -> Result<Option<SceneMasks>, NodeError> {
    let tensor = inputs.optional_tensor(input)?;
    tensor
        .map(|tensor| scene_masks(input, tensor, scene))
        .transpose()
}

fn scene_masks(input: &str, tensor: &SharedTensor, scene: &Scene) -> Result<SceneMasks, NodeError> {
    let (planes, [n, height, width]) = planes(input, tensor)?;
    let expected: usize = scene
        .pictures()
        .iter()
        .map(|picture| picture.concepts.len())
        .sum();
    if n != expected {
        return Err(NodeError::invalid_input(
            input,
            format!(
                "the input {input} has {n} masks, the pictures need {expected}: one per concept, in the order of the \
                 list, picture after picture"
            ),
        ));
    }
    let from = Size::new(width, height);
    for picture in scene.pictures() {
        check_proportions(input, from, picture.picture.size())?;
    }
    let mut planes = planes.chunks_exact(from.area());
    let pictures = scene.pictures().iter().map(|picture| {
        let own: Vec<&[f32]> = planes.by_ref().take(picture.concepts.len()).collect();
        ImageMasks::from_soft_planes(from, &own, picture.picture.size())
            .map_err(|error| NodeError::invalid_input(input, format!("the input {input}: {error}")))
    });
    pictures.collect()
}

/// Whether masks are of the shape of the pictures: what was drawn on a part of a picture is no mask of the whole.
///
/// # Errors
/// Proportions that differ by more than pictures are stretched to the model's units.
pub(crate) fn check_proportions(input: &str, masks: Size, pictures: Size) -> Result<(), NodeError> {
    const MOST: f64 = 0.1;
    let proportions = |size: Size| (size.width as f64 / size.height as f64).ln();
    if (proportions(masks) - proportions(pictures)).abs() <= MOST {
        return Ok(());
    }
    let text = format!(
        "the input {input} has masks of {masks} pixels, which is another shape than that of the pictures ({pictures}); \
         draw them on the whole pictures"
    );
    Err(NodeError::invalid_input(input, text))
}

/// Values of planes `[B, H, W]` with their sizes.
pub(crate) fn planes<'a>(
    input: &str,
    tensor: &'a SharedTensor,
) -> Result<(Cow<'a, [f32]>, [usize; 3]), NodeError> {
    let size = ports::mask_size(input, tensor)?;
    Ok((ports::values(input, tensor)?, size))
}
