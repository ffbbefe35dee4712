//! Attention maps of the concepts (P Eq. 2 and §3.2; METHOD of DAAM and DiffuMask).
//!
//! ```text
//! A_c = mean over layers of bicubic( mean over timesteps, heads and positions of softmax(Q Kᵀ / √d) )
//! ```
//! Timesteps may have weights: see [`crate::config::Weighting`].

use std::collections::BTreeMap;

use candle_core::Tensor;
use stable_diffusion::unet::LayerAttention;

use crate::error::Result;
use crate::loss::cross_attention::concept_map;
use crate::maps::AttentionMaps;
use crate::size::Size;

/// Sums of one picture's maps over the passes so far.
#[derive(Debug, Clone)]
pub(crate) struct AttentionSums {
    pub(crate) n_concepts: usize,
    pub(crate) vectors_per_concept: usize,
    /// Of all draws so far.
    pub(crate) weight: f32,
    /// By the layer's number.
    pub(crate) layers: BTreeMap<usize, LayerSum>,
}

impl AttentionSums {
    pub(crate) fn new(n_concepts: usize, vectors_per_concept: usize) -> Self {
        Self {
            n_concepts,
            vectors_per_concept,
            weight: 0.0,
            layers: BTreeMap::new(),
        }
    }

    /// Adds what the watched layers of one pass saw; a weight for every draw in it. All layers are read at once: a device is
    /// waited for once.
    pub(crate) fn add(&mut self, layers: &[LayerAttention], weights: &[f32]) -> Result<()> {
        let sums = layers
            .iter()
            .map(|layer| weighted_sum(layer, self.vectors_per_concept, weights))
            .collect::<Result<Vec<_>>>()?;
        if !sums.is_empty() {
            let values = Tensor::cat(&sums, 0)?.to_vec1::<f32>()?;
            let mut rest = values.as_slice();
            for layer in layers {
                let (own, others) = rest.split_at(layer.height * layer.width * self.n_concepts);
                let sum = self
                    .layers
                    .entry(layer.layer)
                    .or_insert_with(|| LayerSum::empty(layer, self.n_concepts));
                sum.add(own);
                rest = others;
            }
        }
        self.weight += weights.iter().sum::<f32>();
        Ok(())
    }

    /// Weight of all draws.
    pub(crate) fn weight(&self) -> f64 {
        f64::from(self.weight)
    }

    /// The maps at picture size.
    pub(crate) fn maps(self, size: Size) -> AttentionMaps {
        let layers: Vec<LayerSum> = self
            .layers
            .into_values()
            .map(|sum| sum.divided_by(self.weight))
            .collect();
        AttentionMaps {
            size,
            maps: (0..self.n_concepts)
                .map(|c| combine(&layers, c, size))
                .collect(),
        }
    }
}

/// Weighted sum over the draws of a pass of one layer's maps, `[h · w · C]`.
fn weighted_sum(
    layer: &LayerAttention,
    vectors_per_concept: usize,
    weights: &[f32],
) -> Result<Tensor> {
    let maps = concept_map(layer, vectors_per_concept)?;
    let weights = Tensor::new(weights, maps.device())?.reshape(((), 1, 1))?;
    Ok(maps.broadcast_mul(&weights)?.sum(0)?.flatten_all()?)
}

/// Sum over timesteps of one layer's maps.
#[derive(Debug, Clone)]
pub(crate) struct LayerSum {
    pub(crate) size: Size,
    /// `[C][h · w]`.
    pub(crate) maps: Vec<Vec<f32>>,
}

impl LayerSum {
    fn empty(layer: &LayerAttention, n_concepts: usize) -> Self {
        let size = Size::new(layer.width, layer.height);
        let maps = vec![vec![0.0; size.area()]; n_concepts];
        Self { size, maps }
    }

    /// Adds values `[h · w · C]`.
    fn add(&mut self, values: &[f32]) {
        for (pixel, values) in values.chunks_exact(self.maps.len()).enumerate() {
            for (map, value) in self.maps.iter_mut().zip(values) {
                map[pixel] += value;
            }
        }
    }

    fn divided_by(mut self, weight: f32) -> Self {
        self.maps.iter_mut().flatten().for_each(|v| *v /= weight);
        self
    }
}

/// One concept's map at picture size: every layer up to it, then the plain mean (P, DAAM).
fn combine(layers: &[LayerSum], concept: usize, size: Size) -> Vec<f32> {
    let mut total = vec![0.0f32; size.area()];
    for layer in layers {
        let up = upsample_bicubic(&layer.maps[concept], layer.size, size);
        for (sum, v) in total.iter_mut().zip(up) {
            *sum += v / layers.len() as f32;
        }
    }
    total
}

/// Bicubic interpolation as PyTorch does it (a = -0.75, pixel centers, edges repeated), clamped to at least 0.
#[must_use]
pub fn upsample_bicubic(map: &[f32], from: Size, to: Size) -> Vec<f32> {
    let columns = taps(from.width, to.width);
    let rows = taps(from.height, to.height);
    let narrow: Vec<f32> = (0..from.height)
        .flat_map(|y| {
            let row = &map[y * from.width..(y + 1) * from.width];
            columns
                .iter()
                .map(move |taps| taps.iter().map(|&(x, weight)| row[x] * weight).sum())
        })
        .collect();
    (0..to.area())
        .map(|i| {
            let (y, x) = to.place(i);
            rows[y]
                .iter()
                .map(|&(row, weight)| narrow[row * to.width + x] * weight)
                .sum::<f32>()
                .max(0.0)
        })
        .collect()
}

/// The four source pixels of every target pixel and their weights.
fn taps(from: usize, to: usize) -> Vec<[(usize, f32); 4]> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|i| {
            let center = scale * (i as f32 + 0.5) - 0.5;
            let first = center.floor();
            let t = center - first;
            let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
            std::array::from_fn(|k| {
                let source = (first as isize + k as isize - 1).clamp(0, from as isize - 1);
                (source as usize, weights[k])
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bicubic_is_pytorchs() {
        // torch.nn.functional.interpolate(x, size, mode="bicubic", align_corners=False) of PyTorch 2.15.
        let of_2x2 = [
            -0.305_282_6,
            -0.008_270_264,
            0.480_926_5,
            0.777_938_84,
            0.323_761,
            0.731_018_07,
            1.401_794_4,
            1.809_051_5,
            1.359_832_8,
            1.948_669_4,
            2.918_518,
            3.507_354_7,
            1.988_876_3,
            2.687_958,
            3.839_386,
            4.538_467_4,
        ];
        let of_3x2 = [
            -0.305_915_56,
            -0.058_965_52,
            0.669_250_97,
            2.294_677_7,
            3.465_420_5,
            0.060_128_424,
            0.469_337_17,
            1.246_000_8,
            2.296_984_7,
            2.988_640_5,
            0.856_000_1,
            1.618_000_3,
            2.5,
            2.302,
            1.952_000_4,
            1.651_872_8,
            2.766_664_3,
            3.754_000_4,
            2.307_015_7,
            0.915_359_2,
            2.017_916_7,
            3.294_967_4,
            4.330_751,
            2.309_323_5,
            0.438_580_48,
        ];
        let check = |ours: Vec<f32>, pytorchs: &[f32]| {
            assert_eq!(ours.len(), pytorchs.len());
            for (ours, pytorchs) in ours.iter().zip(pytorchs) {
                // Ours has no values below 0.
                assert!((ours - pytorchs.max(0.0)).abs() < 1e-5, "{ours} {pytorchs}");
            }
        };
        let [two, four] = [2, 4].map(Size::square);
        check(upsample_bicubic(&[0.0, 1.0, 2.0, 4.0], two, four), &of_2x2);
        let wide = [0.0, 1.0, 3.0, 2.0, 4.0, 1.0];
        check(
            upsample_bicubic(&wide, Size::new(3, 2), Size::square(5)),
            &of_3x2,
        );
        let flat = upsample_bicubic(&[3.0; 4], two, Size::new(7, 3));
        assert!(flat.iter().all(|v| (v - 3.0).abs() < 1e-5));
    }
}
