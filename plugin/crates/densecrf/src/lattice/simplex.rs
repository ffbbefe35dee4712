//! Where a feature lies in the permutohedral lattice (Adams, Baek and Davis 2010, §3.1).
//!
//! The lattice A*_d lives on the hyperplane of R^(d+1) whose coordinates sum to zero. Its cells are congruent
//! simplices, so finding a feature's d + 1 neighbors takes one rounding and one sort instead of 2^d corners.

use super::points::{MAX_VERTICES, PointKey};
use crate::softmax::round_ties_even;

/// The d + 1 vertices around a feature and the feature's barycentric coordinates among them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Simplex {
    /// Vertex r has coordinates ≡ r (mod d + 1). The first d + 1 entries count.
    pub(super) vertices: [PointKey; MAX_VERTICES],
    /// Barycentric coordinates, summing to 1. The first d + 1 entries count.
    pub(super) weights: [f32; MAX_VERTICES],
}

/// Length of the elevated unit vectors: makes the blur's spread (variance 2/3 · (d+1)² after splat, blur and slice)
/// one standard deviation of the feature.
///
/// ```text
/// scale_i = √(2/3) (d + 1) / √((i + 1)(i + 2))
/// ```
pub(super) fn elevation_scale<const D: usize>() -> [f32; D] {
    let spread = ((2.0_f64 / 3.0).sqrt() * (D + 1) as f64) as f32;
    std::array::from_fn(|i| (f64::from(spread) / (((i + 1) * (i + 2)) as f64).sqrt()) as f32)
}

/// Finds the simplex around `feature`; `None` when a key would leave 16 bits or the feature is not finite.
///
/// 1. elevate to the hyperplane Σ = 0;
/// 2. round to the nearest point whose coordinates are multiples of d + 1;
/// 3. sort the remainders: their ranks say which permutation of the canonical simplex holds the feature; where the
///    rounded point left the hyperplane, shift the ranks and the point back;
/// 4. barycentric coordinates are differences of the sorted remainders;
/// 5. vertex r is the rounded point plus the canonical vertex (r, …, r, r-(d+1), …) in that permutation.
#[inline(always)]
pub(super) fn enclose<const D: usize>(feature: &[f32; D], scale: &[f32; D]) -> Option<Simplex> {
    const { assert!(D >= 1 && D < MAX_VERTICES) };
    let period = D as i32 + 1;
    // Leaves room for the vertices (± period) and for their neighbors (± period again).
    let limit = f32::from(i16::MAX) - 4.0 * period as f32;

    let mut elevated = [0.0_f32; MAX_VERTICES];
    let mut sum_above = 0.0;
    for j in (1..=D).rev() {
        let coordinate = feature[j - 1] * scale[j - 1];
        elevated[j] = sum_above - j as f32 * coordinate;
        sum_above += coordinate;
    }
    elevated[0] = sum_above;
    if !elevated[..=D].iter().all(|x| x.abs() < limit) {
        return None;
    }

    let inverse_period = 1.0 / period as f32;
    let mut origin = [0_i32; MAX_VERTICES];
    let mut remainder = [0.0_f32; MAX_VERTICES];
    let mut off_plane = 0;
    for i in 0..=D {
        let quotient = round_ties_even(elevated[i] * inverse_period);
        off_plane += quotient;
        origin[i] = quotient * period;
        remainder[i] = elevated[i] - origin[i] as f32;
    }

    let mut rank = [0_i32; MAX_VERTICES];
    for i in 0..D {
        for j in i + 1..=D {
            let behind = i32::from(remainder[i] < remainder[j]);
            rank[i] += behind;
            rank[j] += 1 - behind;
        }
    }
    let mut coordinate_of_rank = [0_usize; MAX_VERTICES];
    // One slot more than vertices: the differences of sorted remainders wrap around.
    let mut weights = [0.0_f32; MAX_VERTICES + 1];
    for i in 0..=D {
        let shifted = rank[i] + off_plane;
        let wrap = if shifted < 0 {
            period
        } else if shifted >= period {
            -period
        } else {
            0
        };
        origin[i] += wrap;
        let rank = (shifted + wrap) as usize;
        coordinate_of_rank[rank] = i;
        let v = (elevated[i] - origin[i] as f32) * inverse_period;
        weights[D - rank] += v;
        weights[D - rank + 1] -= v;
    }
    weights[0] += 1.0 + weights[D + 1];

    // From vertex r to r + 1 every coordinate grows by one, except that the one of rank d - r falls by d.
    let mut vertices = [PointKey::new::<D>(&origin); MAX_VERTICES];
    for r in 0..D {
        vertices[r + 1] = vertices[r].step::<D>(coordinate_of_rank[D - r]);
    }
    Some(Simplex {
        vertices,
        weights: std::array::from_fn(|r| weights[r]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const D: usize>() {
        let scale = elevation_scale::<D>();
        for n in 0..2000_u32 {
            let feature: [f32; D] = std::array::from_fn(|i| {
                (n.wrapping_mul(2_654_435_761).rotate_left(5 * i as u32) >> 8) as f32 / 3e5
            });
            let simplex = enclose(&feature, &scale).expect("in range");
            let weights = &simplex.weights[..=D];
            assert!(
                (weights.iter().sum::<f32>() - 1.0).abs() < 1e-4,
                "{weights:?}"
            );
            assert!(
                weights.iter().all(|w| (-1e-3..1.001).contains(w)),
                "{weights:?}"
            );
            // Vertices average to the elevated feature, and vertex r is ≡ r in every coordinate.
            let mut mean = [0.0_f32; D];
            for (r, weight) in weights.iter().enumerate() {
                let coordinates = simplex.vertices[r].coordinates::<D>();
                for (mean, &c) in mean.iter_mut().zip(&coordinates) {
                    assert_eq!(c.rem_euclid(D as i32 + 1), r as i32);
                    *mean += weight * c as f32;
                }
            }
            // The first elevated coordinate is the sum of all scaled ones.
            let first: f32 = feature.iter().zip(&scale).map(|(f, scale)| f * scale).sum();
            assert!((mean[0] - first).abs() < 0.02, "{} {first}", mean[0]);
        }
    }

    #[test]
    fn a_feature_is_the_weighted_mean_of_its_vertices() {
        check::<2>();
        check::<3>();
        check::<5>();
        check::<7>();
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let scale = elevation_scale::<2>();
        assert!(enclose(&[1e4, 1e4], &scale).is_some());
        for bad in [
            [1e5, 0.0],
            [f32::NAN, 0.0],
            [0.0, f32::INFINITY],
            [-1e5, 0.0],
        ] {
            assert!(enclose(&bad, &scale).is_none(), "{bad:?}");
        }
    }
}
