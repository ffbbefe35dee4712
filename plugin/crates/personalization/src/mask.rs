//! Masks in picture space, and their way down to latents and attention maps.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::size::Size;

/// Masks of one picture's concepts, in the order of its concepts: planes of 0 and 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageMasks {
    size: Size,
    planes: Vec<Vec<u8>>,
}

/// Masks of all pictures.
pub type SceneMasks = Vec<ImageMasks>;

impl ImageMasks {
    /// Masks from planes `[C][h · w]` of 0 and 1.
    ///
    /// # Errors
    /// A plane of another length.
    pub fn new(size: Size, planes: Vec<Vec<u8>>) -> Result<Self> {
        if let Some(plane) = planes.iter().find(|plane| plane.len() != size.area()) {
            return Err(Error::MaskSize {
                pixels: plane.len(),
                size,
            });
        }
        Ok(Self { size, planes })
    }

    /// Masks from soft planes `[C][h · w]` in [0, 1] of the size `from`, scaled (nearest) as pictures are; inside is
    /// what exceeds ½.
    ///
    /// # Errors
    /// A mask with nothing inside, or of another length.
    pub fn from_soft_planes(from: Size, planes: &[&[f32]], size: Size) -> Result<Self> {
        let shrink = |(index, plane): (usize, &&[f32])| {
            let mask = index + 1;
            if plane.len() != from.area() {
                return Err(Error::SoftMaskSize { mask, size: from });
            }
            let inside = |i: usize| plane[size.cell_in(i, from)] > 0.5;
            let plane: Vec<u8> = (0..size.area()).map(|i| u8::from(inside(i))).collect();
            if plane.iter().all(|&v| v == 0) {
                return Err(Error::EmptyGivenMask { mask });
            }
            Ok(plane)
        };
        Self::new(
            size,
            planes
                .iter()
                .enumerate()
                .map(shrink)
                .collect::<Result<_>>()?,
        )
    }

    /// Width and height in pixels.
    #[must_use]
    pub fn size(&self) -> Size {
        self.size
    }

    /// One plane `[h · w]` per concept.
    #[must_use]
    pub fn planes(&self) -> &[Vec<u8>] {
        &self.planes
    }

    /// Share of the pixels that are inside, in [0, 1].
    #[must_use]
    pub fn area(&self, concept: usize) -> f64 {
        self.planes[concept]
            .iter()
            .map(|&v| f64::from(v))
            .sum::<f64>()
            / self.size.area() as f64
    }

    /// max over `concepts` of their masks, `[h · w]`.
    #[must_use]
    pub fn union(&self, concepts: &[usize]) -> Vec<u8> {
        let any = |i: usize| {
            concepts
                .iter()
                .map(|&c| self.planes[c][i])
                .max()
                .unwrap_or(0)
        };
        (0..self.size.area()).map(any).collect()
    }
}

/// |a ∩ b| / |a ∪ b| in [0, 1]; 1 for two empty masks.
#[must_use]
pub fn iou(a: &[u8], b: &[u8]) -> f32 {
    let both = a
        .iter()
        .zip(b)
        .filter(|(a, b)| **a != 0 && **b != 0)
        .count();
    let any = a
        .iter()
        .zip(b)
        .filter(|(a, b)| **a != 0 || **b != 0)
        .count();
    if any == 0 {
        1.0
    } else {
        both as f32 / any as f32
    }
}

/// A plane at another resolution by the nearest pixel, with PyTorch's rule source = ⌊i · from / to⌋; mirrored
/// left to right if `flipped`. Of the size `to`, in {0, 1}.
#[must_use]
pub fn at_resolution(plane: &[u8], from: Size, to: Size, flipped: bool) -> Vec<f32> {
    let source = |i: usize| {
        let pixel = to.cell_in(i, from);
        let (y, x) = from.place(pixel);
        if flipped {
            y * from.width + from.width - 1 - x
        } else {
            pixel
        }
    };
    let values = (0..to.area()).map(|i| f32::from(plane[source(i)]));
    values.collect()
}

/// [`at_resolution`] as a tensor `[1, 1, h, w]`.
pub(crate) fn plane_tensor(
    plane: &[u8],
    from: Size,
    to: Size,
    flipped: bool,
    device: &Device,
) -> Result<Tensor> {
    Ok(Tensor::from_vec(
        at_resolution(plane, from, to, flipped),
        (1, 1, to.height, to.width),
        device,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_measured() {
        assert_eq!(iou(&[1, 1, 0, 0], &[0, 1, 1, 0]), 1.0 / 3.0);
        assert_eq!(iou(&[0, 0], &[0, 0]), 1.0);
    }

    #[test]
    fn the_nearest_pixel_is_pytorchs() {
        let plane: Vec<u8> = (0..16)
            .map(|i| u8::from(i % 4 == 0 && i / 4 == 2))
            .collect();
        let (four, two) = (Size::square(4), Size::square(2));
        assert_eq!(
            at_resolution(&plane, four, two, false),
            [0.0, 0.0, 1.0, 0.0]
        );
        // A mirrored picture has its pixel 0 where pixel 3 was: nearest takes columns 3 and 1 of the original.
        let right: Vec<u8> = (0..16).map(|i| u8::from(i == 3)).collect();
        assert_eq!(at_resolution(&right, four, two, true), [1.0, 0.0, 0.0, 0.0]);
        let wide = [0, 0, 0, 1, 1, 0, 0, 0];
        let of = Size::new(4, 2);
        assert_eq!(at_resolution(&wide, of, Size::new(2, 1), true), [1.0, 0.0]);
    }

    #[test]
    fn masks_are_scaled_as_pictures_are() {
        let (wide, small) = (Size::new(4, 2), Size::new(2, 1));
        let plane = [0.0, 0.0, 1.0, 1.0, 0.0, 0.9, 0.2, 1.0];
        let masks = ImageMasks::from_soft_planes(wide, &[&plane], small).unwrap();
        assert_eq!(masks.planes()[0], [0, 1]);
        assert!(
            ImageMasks::from_soft_planes(wide, &[&[0.0; 8]], small)
                .unwrap_err()
                .to_string()
                .contains("empty")
        );
    }
}
