//! Masks in picture space, and their way down to latents and attention maps.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};

/// Masks of one picture's concepts, in the order of its concepts: square planes of 0 and 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageMasks {
    size: usize,
    planes: Vec<Vec<u8>>,
}

/// Masks of all pictures.
pub type SceneMasks = Vec<ImageMasks>;

impl ImageMasks {
    /// Masks from planes `[C][size · size]` of 0 and 1.
    ///
    /// # Errors
    /// A plane of another length.
    pub fn new(size: usize, planes: Vec<Vec<u8>>) -> Result<Self> {
        if let Some(plane) = planes.iter().find(|plane| plane.len() != size * size) {
            return Err(Error::MaskSize {
                pixels: plane.len(),
                size,
            });
        }
        Ok(Self { size, planes })
    }

    /// Masks from soft planes `[C][height · width]` in [0, 1]: cropped to a centered square and scaled (nearest) as
    /// pictures are; inside is what exceeds ½.
    ///
    /// # Errors
    /// A mask with nothing inside, or of another length.
    pub fn from_soft_planes(
        width: usize,
        height: usize,
        planes: &[&[f32]],
        size: usize,
    ) -> Result<Self> {
        let side = width.min(height);
        let (left, top) = ((width - side) / 2, (height - side) / 2);
        let shrink = |(index, plane): (usize, &&[f32])| {
            if plane.len() != width * height {
                return Err(Error::SoftMaskSize {
                    mask: index + 1,
                    width,
                    height,
                });
            }
            let source = |i: usize| i * side / size;
            let inside =
                |i: usize| plane[(top + source(i / size)) * width + left + source(i % size)] > 0.5;
            let plane: Vec<u8> = (0..size * size).map(|i| u8::from(inside(i))).collect();
            if plane.iter().all(|&v| v == 0) {
                return Err(Error::EmptyAfterCrop { mask: index + 1 });
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
    pub fn size(&self) -> usize {
        self.size
    }

    /// One plane `[size · size]` per concept.
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
            / (self.size * self.size) as f64
    }

    /// max over `concepts` of their masks, `[size · size]`.
    #[must_use]
    pub fn union(&self, concepts: &[usize]) -> Vec<u8> {
        let any = |i: usize| {
            concepts
                .iter()
                .map(|&c| self.planes[c][i])
                .max()
                .unwrap_or(0)
        };
        (0..self.size * self.size).map(any).collect()
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
/// left to right if `flipped`. `[to · to]` in {0, 1}.
#[must_use]
pub fn at_resolution(plane: &[u8], from: usize, to: usize, flipped: bool) -> Vec<f32> {
    let column = |x: usize| {
        if flipped {
            from - 1 - x * from / to
        } else {
            x * from / to
        }
    };
    (0..to * to)
        .map(|i| f32::from(plane[(i / to) * from / to * from + column(i % to)]))
        .collect()
}

/// [`at_resolution`] as a tensor `[1, 1, to, to]`.
pub(crate) fn plane_tensor(
    plane: &[u8],
    from: usize,
    to: usize,
    flipped: bool,
    device: &Device,
) -> Result<Tensor> {
    Ok(Tensor::from_vec(
        at_resolution(plane, from, to, flipped),
        (1, 1, to, to),
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
        assert_eq!(at_resolution(&plane, 4, 2, false), [0.0, 0.0, 1.0, 0.0]);
        // A mirrored picture has its pixel 0 where pixel 3 was: nearest takes columns 3 and 1 of the original.
        let right: Vec<u8> = (0..16).map(|i| u8::from(i == 3)).collect();
        assert_eq!(at_resolution(&right, 4, 2, true), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn masks_are_cropped_as_pictures_are() {
        // 4 wide, 2 high: the middle 2x2 stays.
        let plane = [0.0, 0.0, 1.0, 1.0, 0.0, 0.9, 0.2, 1.0];
        let masks = ImageMasks::from_soft_planes(4, 2, &[&plane], 2).unwrap();
        assert_eq!(masks.planes()[0], [0, 1, 1, 0]);
        assert!(
            ImageMasks::from_soft_planes(4, 2, &[&[0.0; 8]], 2)
                .unwrap_err()
                .to_string()
                .contains("empty")
        );
    }
}
