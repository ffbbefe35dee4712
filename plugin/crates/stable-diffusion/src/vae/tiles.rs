//! Large pictures through the VAE, tile by tile, so that only one tile's planes are in memory.
//!
//! Tiles have the size of the pictures that the model knows and overlap by a quarter. Where they overlap their results are
//! blended, each with a weight that falls linearly towards its edge and is 0 beside it, where it shows that convolutions saw
//! zeros beyond:
//!
//! ```text
//! y(p) = Σ_k w_k(p) y_k(p) / Σ_k w_k(p),   w_k(p) = clamp(2 (d_k(p) + 1/2) / overlap - 1/2, 0, 1) along each side
//! ```
//! with d_k the distance of p from the edge of tile k, the edges of the picture being none. The statistics of group norms
//! and the attention of all pixels are those of a tile, so that the result is not exactly that of the whole.

use candle_core::{Device, Tensor};

use crate::Result;

/// One part in so many of a tile lies in its neighbor too.
const OVERLAP: usize = 4;

/// Cells a side of a tile, and what a cell is in the picture and in the result: factors of the sides.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    pub(super) tile: usize,
    pub(super) given: usize,
    pub(super) made: usize,
}

impl Tiling {
    /// Whether a plane is much more than one tile: half again its area. A picture of the area that the model knows stays
    /// whole, whatever its shape.
    pub(super) fn splits(&self, plane: &Tensor) -> Result<bool> {
        let (_, _, height, width) = plane.dims4()?;
        Ok(is_large(self.tile * self.given, [width, height]))
    }

    /// `f` of the tiles of x `[B, C, H, W]`, blended.
    pub(super) fn apply(
        &self,
        x: &Tensor,
        f: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let [rows, columns] = [height, width].map(|side| self.along(side / self.given));
        let mut whole: Option<Tensor> = None;
        for row in &rows {
            for column in &columns {
                let tile = x.narrow(2, row.start * self.given, row.len * self.given)?;
                let tile = tile.narrow(3, column.start * self.given, column.len * self.given)?;
                let y = f(&tile.contiguous()?)?;
                let y = y.broadcast_mul(&row.weights(x.device())?.unsqueeze(1)?)?;
                let y = y.broadcast_mul(&column.weights(x.device())?)?;
                let y = column.placed(&row.placed(&y, 2)?, 3)?;
                whole = Some(match whole {
                    Some(whole) => (whole + y)?,
                    None => y,
                });
            }
        }
        match whole {
            Some(whole) => Ok(whole),
            None => f(x),
        }
    }

    /// The tiles along a side of so many cells.
    fn along(&self, n_cells: usize) -> Vec<Span> {
        let len = self.tile.min(n_cells);
        let most = (len - len / OVERLAP).max(1);
        let n_gaps = (n_cells - len).div_ceil(most);
        let starts: Vec<usize> = (0..=n_gaps)
            .map(|k| (n_cells - len) * k / n_gaps.max(1))
            .collect();
        let (n_made, ramp) = (len * self.made, (len / OVERLAP).max(1) * self.made);
        let rising = |i: usize| (2.0 * (i as f32 + 0.5) / ramp as f32 - 0.5).clamp(0.0, 1.0);
        let side = n_cells * self.made;
        let mut sums = vec![0.0; side];
        let mut spans: Vec<Span> = starts
            .into_iter()
            .map(|start| {
                let first = start * self.made;
                let weight = |i: usize| {
                    let before = if start == 0 { 1.0 } else { rising(i) };
                    let is_last = first + n_made == side;
                    let after = if is_last { 1.0 } else { rising(n_made - 1 - i) };
                    before.min(after)
                };
                let weights: Vec<f32> = (0..n_made).map(weight).collect();
                for (sum, weight) in sums[first..].iter_mut().zip(&weights) {
                    *sum += weight;
                }
                Span {
                    start,
                    len,
                    first,
                    side,
                    weights,
                }
            })
            .collect();
        for span in &mut spans {
            for (weight, sum) in span.weights.iter_mut().zip(&sums[span.first..]) {
                *weight /= sum;
            }
        }
        spans
    }
}

/// Whether a plane of these sides is much more than a square of this one.
pub(super) fn is_large(side: usize, [width, height]: [usize; 2]) -> bool {
    2 * width * height > 3 * side * side
}

/// A tile along one side.
#[derive(Debug)]
struct Span {
    /// In cells.
    start: usize,
    len: usize,
    /// In pixels of the result, and of how many.
    first: usize,
    side: usize,
    /// Of each of its pixels there; those of all tiles at a pixel sum to 1.
    weights: Vec<f32>,
}

impl Span {
    fn weights(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::new(self.weights.as_slice(), device)?)
    }

    /// With zeros around.
    fn placed(&self, y: &Tensor, dim: usize) -> Result<Tensor> {
        let behind = self.side - self.first - self.weights.len();
        Ok(y.pad_with_zeros(dim, self.first, behind)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_everywhere_and_tiles_cover_all() {
        for n_cells in 1..150 {
            let tiling = Tiling {
                tile: 16,
                given: 1,
                made: 3,
            };
            let spans = tiling.along(n_cells);
            let mut sums = vec![0.0; 3 * n_cells];
            for span in &spans {
                assert!(span.len <= 16 && span.weights.iter().all(|&w| w >= 0.0));
                for (sum, weight) in sums[span.first..].iter_mut().zip(&span.weights) {
                    *sum += weight;
                }
            }
            assert!(sums.iter().all(|sum: &f32| (sum - 1.0).abs() < 1e-6));
            let overlaps = spans
                .windows(2)
                .map(|pair| pair[0].start + 16 - pair[1].start);
            assert!(overlaps.min().is_none_or(|least| least >= 4), "{n_cells}");
        }
    }

    #[test]
    fn what_is_the_same_in_tiles_is_the_same_in_the_whole() {
        let x = Tensor::arange(0f32, 2.0 * 24.0 * 40.0, &Device::Cpu).unwrap();
        let x = x.reshape((1, 2, 24, 40)).unwrap();
        let tiling = Tiling {
            tile: 8,
            given: 2,
            made: 2,
        };
        let y = tiling.apply(&x, |tile| Ok((tile * 2.0)?)).unwrap();
        let difference = (y - (x * 2.0).unwrap()).unwrap().abs().unwrap();
        let most: f32 = difference
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_scalar()
            .unwrap();
        assert!(most < 1e-3, "{most}");
    }

    #[test]
    fn tiles_that_differ_meet_without_a_step() {
        let x = Tensor::zeros((1, 1, 40, 56), candle_core::DType::F32, &Device::Cpu).unwrap();
        let tiling = Tiling {
            tile: 16,
            given: 1,
            made: 4,
        };
        // Every tile is 1 brighter or darker than the one before.
        let n_made = std::cell::Cell::new(0);
        let brighter = |tile: &Tensor| {
            let level = f64::from(n_made.replace(n_made.get() + 1) % 2);
            let (_, _, height, width) = tile.dims4()?;
            Ok((tile.upsample_nearest2d(4 * height, 4 * width)? + level)?)
        };
        let y = tiling.apply(&x, brighter).unwrap();
        assert_eq!(y.dims(), [1, 1, 160, 224]);
        let step = |dim: usize| -> f32 {
            let len = y.dim(dim).unwrap() - 1;
            let [a, b] = [0, 1].map(|start| y.narrow(dim, start, len).unwrap());
            let steps = (b - a).unwrap().abs().unwrap().flatten_all().unwrap();
            steps.max(0).unwrap().to_scalar().unwrap()
        };
        let steps = [step(2), step(3)];
        // Cut, they would be 1; the weight rises within the half of an overlap of 16 pixels.
        assert!(
            steps.iter().all(|&step| step > 0.01 && step < 0.2),
            "{steps:?}"
        );
    }
}
