//! Soft maps to binary masks.

use crate::config::{Binarization, ExtractionConfig, Normalization, PartMatching};
use crate::error::{Error, Result};
use crate::maps::AttentionMaps;
use crate::mask::ImageMasks;
use crate::parts::{best_assignment, connected_parts};
use crate::scene::Role;

/// Bins of Otsu's histogram.
const OTSU_BINS: usize = 128;

/// Most objects that are matched with parts: the search grows with 2ⁿ.
const MAX_MATCHED: usize = 12;

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
        return Err(Error::MapsDoNotFit {
            maps: maps.maps.len(),
            concepts: roles.len(),
        });
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
        Binarization::Compete { tau, parts } => compete(maps, &normalized, roles, tau, parts),
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

/// The concepts that compete: the objects, or all if there is no object.
fn competitors(roles: &[Role]) -> Vec<usize> {
    let objects: Vec<usize> = (0..roles.len())
        .filter(|&c| roles[c] == Role::Object)
        .collect();
    if objects.is_empty() {
        (0..roles.len()).collect()
    } else {
        objects
    }
}

/// Where any of these maps exceeds τ.
fn foreground(normalized: &[Vec<f32>], objects: &[usize], tau: f32) -> Vec<bool> {
    (0..normalized[0].len())
        .map(|i| objects.iter().any(|&c| normalized[c][i] > tau))
        .collect()
}

/// Every foreground pixel belongs to exactly one object; the background concept is the rest.
fn compete(
    maps: &AttentionMaps,
    normalized: &[Vec<f32>],
    roles: &[Role],
    tau: f32,
    matching: Option<PartMatching>,
) -> Vec<Vec<u8>> {
    let objects = competitors(roles);
    let mass: Vec<f32> = maps
        .maps
        .iter()
        .map(|map| map.iter().sum::<f32>().max(1e-12))
        .collect();
    let share = |c: usize, i: usize| maps.maps[c][i] / mass[c];
    let winner = |i: usize| {
        objects[1..].iter().fold(objects[0], |best, &c| {
            if share(c, i) > share(best, i) {
                c
            } else {
                best
            }
        })
    };
    let foreground = foreground(normalized, &objects, tau);
    let mut owners: Vec<Option<usize>> = foreground
        .iter()
        .enumerate()
        .map(|(i, &inside)| inside.then(|| winner(i)))
        .collect();
    if let Some(parts) = whole_parts(&foreground, maps.size, objects.len(), matching) {
        let mean = |c: usize, part: &Vec<usize>| {
            let sum: f64 = part.iter().map(|&i| f64::from(share(c, i))).sum();
            sum / part.len() as f64
        };
        let score: Vec<Vec<f64>> = objects
            .iter()
            .map(|&c| parts.iter().map(|part| mean(c, part)).collect())
            .collect();
        for (&object, part) in objects.iter().zip(best_assignment(&score)) {
            for &i in &parts[part] {
                owners[i] = Some(object);
            }
        }
    }
    let rest = |c: usize| roles[c] == Role::Background && !objects.contains(&c);
    let plane = |c: usize| {
        owners
            .iter()
            .map(|o| u8::from(if rest(c) { o.is_none() } else { *o == Some(c) }))
            .collect()
    };
    (0..roles.len()).map(plane).collect()
}

/// The connected parts of the foreground, if each can be an object.
fn whole_parts(
    foreground: &[bool],
    size: usize,
    n_objects: usize,
    matching: Option<PartMatching>,
) -> Option<Vec<Vec<usize>>> {
    let PartMatching { speck, least_ratio } = matching?;
    if !(2..=MAX_MATCHED).contains(&n_objects) {
        return None;
    }
    let least = (speck * foreground.len() as f32).ceil() as usize;
    let parts = connected_parts(foreground, size, least);
    let areas = || parts.iter().map(Vec::len);
    let (smallest, largest) = (areas().min()?, areas().max()?);
    let all_are_objects = smallest as f32 >= least_ratio * largest as f32;
    (parts.len() == n_objects && all_are_objects).then_some(parts)
}

/// Whether masks from these maps give every object a connected part of its own.
pub(crate) fn gives_whole_parts(
    maps: &AttentionMaps,
    roles: &[Role],
    config: &ExtractionConfig,
) -> bool {
    let Binarization::Compete { tau, parts } = config.binarization else {
        return false;
    };
    let normalized: Vec<Vec<f32>> = maps
        .maps
        .iter()
        .map(|map| normalize(map, config.normalization))
        .collect();
    let objects = competitors(roles);
    let foreground = foreground(&normalized, &objects, tau);
    whole_parts(&foreground, maps.size, objects.len(), parts).is_some()
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
    use crate::config::EmConfig;

    fn maps(maps: Vec<Vec<f32>>) -> AttentionMaps {
        let size = maps[0].len().isqrt();
        AttentionMaps { size, maps }
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

    #[test]
    fn as_many_parts_as_objects_means_one_each() {
        // Two separate objects; the first word also wins half of the second object.
        let (left, right) = ([0, 1, 4, 5], [10, 11, 14, 15]);
        let mut first = vec![0.0; 16];
        let mut second = vec![0.0; 16];
        for i in left {
            (first[i], second[i]) = (0.8, 0.1);
        }
        for i in right {
            (first[i], second[i]) = (0.2, 0.3);
        }
        (first[10], first[11]) = (1.5, 1.5);
        let seen = maps(vec![first, second, vec![1.0; 16]]);
        let roles = [Role::Object, Role::Object, Role::Background];
        let with = |parts| ExtractionConfig {
            binarization: Binarization::Compete { tau: 0.4, parts },
            ..EmConfig::recommended().extraction
        };
        let found = |parts| {
            let masks = binarize(&seen, &roles, &with(parts)).unwrap();
            let inside = |plane: &Vec<u8>| (0..16).filter(|&i| plane[i] == 1).collect::<Vec<_>>();
            [inside(&masks.planes()[0]), inside(&masks.planes()[1])]
        };
        let matching = |speck, least_ratio| Some(PartMatching { speck, least_ratio });
        assert_eq!(found(matching(0.01, 0.25)), [left.to_vec(), right.to_vec()]);
        assert!(gives_whole_parts(
            &seen,
            &roles,
            &with(matching(0.01, 0.25))
        ));
        let by_pixels = [vec![0, 1, 4, 5, 10, 11], vec![14, 15]];
        assert_eq!(found(None), by_pixels);
        // Both are specks, so that no part is left.
        assert_eq!(found(matching(0.3, 0.25)), by_pixels);
        // Parts of too different sizes.
        let mut uneven = seen.clone();
        for i in [0, 1, 4] {
            uneven.maps[0][i] = 0.0;
            uneven.maps[1][i] = 0.0;
        }
        assert!(gives_whole_parts(
            &uneven,
            &roles,
            &with(matching(0.01, 0.25))
        ));
        assert!(!gives_whole_parts(
            &uneven,
            &roles,
            &with(matching(0.01, 0.5))
        ));
    }
}
