//! Soft maps to binary masks.

use crate::config::{Binarization, Normalization};
use crate::{AttentionMaps, Error, ExtractionConfig, ImageMasks, Result, Role};

/// Bins of Otsu's histogram.
const OTSU_BINS: usize = 128;

/// B_c of every concept of one picture; `roles` in the order of the maps.
///
/// # Errors
/// A number of roles that does not fit.
pub fn binarize(
    maps: &AttentionMaps,
    roles: &[Role],
    config: &ExtractionConfig,
) -> Result<ImageMasks> {
    if roles.len() != maps.maps.len() {
        return Err(Error::scene(format!(
            "{} maps do not fit {} concepts",
            maps.maps.len(),
            roles.len()
        )));
    }
    let normalized: Vec<Vec<f32>> = maps
        .maps
        .iter()
        .map(|map| normalize(map, config.normalization))
        .collect();
    let above =
        |map: &Vec<f32>, tau: f32| map.iter().map(|&v| u8::from(v > tau)).collect::<Vec<u8>>();
    let planes = match config.binarization {
        Binarization::Threshold { tau } => normalized.iter().map(|map| above(map, tau)).collect(),
        Binarization::Otsu => normalized
            .iter()
            .map(|map| above(map, otsu_threshold(map)))
            .collect(),
        Binarization::Compete { tau } => compete(maps, &normalized, roles, tau),
    };
    ImageMasks::new(maps.size, planes)
}

/// A map in [0, 1].
#[must_use]
pub fn normalize(map: &[f32], how: Normalization) -> Vec<f32> {
    let largest = map.iter().copied().fold(f32::MIN, f32::max);
    let smallest = match how {
        Normalization::Max => 0.0,
        Normalization::MinMax => map.iter().copied().fold(f32::MAX, f32::min),
    };
    let range = (largest - smallest).max(1e-12);
    map.iter().map(|v| (v - smallest) / range).collect()
}

/// Every foreground pixel belongs to exactly one object; the background concept is the rest.
fn compete(
    maps: &AttentionMaps,
    normalized: &[Vec<f32>],
    roles: &[Role],
    tau: f32,
) -> Vec<Vec<u8>> {
    let mut objects: Vec<usize> = (0..roles.len())
        .filter(|&c| roles[c] == Role::Object)
        .collect();
    if objects.is_empty() {
        objects = (0..roles.len()).collect();
    }
    let mass: Vec<f32> = maps
        .maps
        .iter()
        .map(|map| map.iter().sum::<f32>().max(1e-12))
        .collect();
    let owner = |i: usize| -> Option<usize> {
        let foreground = objects.iter().any(|&c| normalized[c][i] > tau);
        let share = |c: usize| maps.maps[c][i] / mass[c];
        foreground.then(|| {
            objects[1..].iter().fold(
                objects[0],
                |best, &c| if share(c) > share(best) { c } else { best },
            )
        })
    };
    let owners: Vec<Option<usize>> = (0..maps.size * maps.size).map(owner).collect();
    let rest = |c: usize| roles[c] == Role::Background && !objects.contains(&c);
    let plane = |c: usize| {
        owners
            .iter()
            .map(|o| u8::from(if rest(c) { o.is_none() } else { *o == Some(c) }))
            .collect()
    };
    (0..roles.len()).map(plane).collect()
}

/// The threshold in [0, 1] that separates two classes best (Otsu 1979).
fn otsu_threshold(map: &[f32]) -> f32 {
    let mut counts = [0.0f64; OTSU_BINS];
    for v in map {
        counts[((v * OTSU_BINS as f32) as usize).min(OTSU_BINS - 1)] += 1.0;
    }
    let center = |bin: usize| (bin as f64 + 0.5) / OTSU_BINS as f64;
    let total: f64 = counts.iter().sum();
    let mean_total: f64 = counts
        .iter()
        .enumerate()
        .map(|(bin, n)| n * center(bin))
        .sum();
    let (mut weight, mut moment) = (0.0, 0.0);
    let (mut best, mut best_variance) = (0.5, -1.0);
    for (bin, n) in counts.iter().enumerate() {
        weight += n;
        moment += n * center(bin);
        if weight > 0.0 && weight < total {
            let variance =
                (mean_total * weight - moment * total).powi(2) / (weight * (total - weight));
            if variance > best_variance {
                (best, best_variance) = (center(bin), variance);
            }
        }
    }
    best as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EmConfig;

    fn maps(maps: Vec<Vec<f32>>) -> AttentionMaps {
        AttentionMaps { size: 2, maps }
    }

    #[test]
    fn competing_concepts_share_the_picture_out() {
        let config = EmConfig::recommended().extraction;
        let found = binarize(
            &maps(vec![
                vec![4.0, 2.0, 0.0, 0.0],
                vec![1.0, 3.0, 0.0, 0.0],
                vec![1.0, 1.0, 1.0, 1.0],
            ]),
            &[Role::Object, Role::Object, Role::Background],
            &config,
        );
        assert_eq!(
            found.unwrap().planes(),
            [vec![1, 0, 0, 0], vec![0, 1, 0, 0], vec![0, 0, 1, 1]]
        );
    }

    #[test]
    fn thresholds_are_taken_one_by_one() {
        let config = EmConfig::paper().extraction;
        let found = binarize(
            &maps(vec![vec![4.0, 2.1, 1.9, 0.0], vec![0.0; 4]]),
            &[Role::Object; 2],
            &config,
        )
        .unwrap();
        assert_eq!(found.planes(), [vec![1, 1, 0, 0], vec![0; 4]]);
    }

    #[test]
    fn otsu_separates_two_heaps() {
        let tau = otsu_threshold(&[0.1, 0.12, 0.15, 0.8, 0.85, 0.9]);
        assert!((0.15..0.8).contains(&tau), "{tau}");
    }
}
