//! Soft maps to binary masks.

use crate::config::Normalization;
use crate::error::{Error, Result};
use crate::maps::AttentionMaps;
use crate::mask::ImageMasks;
use crate::scene::{Role, competitors};

/// B_c = \[A_c > τ\] of every concept for itself, after scaling.
///
/// # Errors
/// Maps of another size than they say.
pub fn threshold(maps: &AttentionMaps, how: Normalization, tau: f32) -> Result<ImageMasks> {
    let above = |map: &Vec<f32>| {
        let scaled = normalize(map, how);
        scaled.iter().map(|&v| u8::from(v > tau)).collect()
    };
    ImageMasks::new(maps.size, maps.maps.iter().map(above).collect())
}

/// Every foreground pixel belongs to exactly one object; the background concept is the rest. `roles` in the order of
/// the maps.
///
/// # Errors
/// A number of roles that does not fit.
pub fn compete(
    maps: &AttentionMaps,
    roles: &[Role],
    how: Normalization,
    tau: f32,
) -> Result<ImageMasks> {
    if roles.len() != maps.maps.len() {
        return Err(Error::MapsDoNotFit {
            maps: maps.maps.len(),
            concepts: roles.len(),
        });
    }
    let objects = competitors(roles);
    let normalized: Vec<Vec<f32>> = maps.maps.iter().map(|map| normalize(map, how)).collect();
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
    let owners: Vec<Option<usize>> = (0..maps.size.area())
        .map(|i| {
            let inside = objects.iter().any(|&c| normalized[c][i] > tau);
            inside.then(|| winner(i))
        })
        .collect();
    let rest = |c: usize| roles[c] == Role::Background && !objects.contains(&c);
    let plane = |c: usize| {
        owners
            .iter()
            .map(|o| u8::from(if rest(c) { o.is_none() } else { *o == Some(c) }))
            .collect()
    };
    ImageMasks::new(maps.size, (0..roles.len()).map(plane).collect())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Size;

    fn maps(maps: Vec<Vec<f32>>) -> AttentionMaps {
        let size = Size::square(maps[0].len().isqrt());
        AttentionMaps { size, maps }
    }

    #[test]
    fn competing_concepts_share_the_picture_out() {
        let seen = maps(vec![
            vec![4.0, 2.0, 0.0, 0.0],
            vec![1.0, 3.0, 0.0, 0.0],
            vec![1.0, 1.0, 1.0, 1.0],
        ]);
        let roles = [Role::Object, Role::Object, Role::Background];
        let found = compete(&seen, &roles, Normalization::MinMax, 0.4);
        assert_eq!(
            found.unwrap().planes(),
            [vec![1, 0, 0, 0], vec![0, 1, 0, 0], vec![0, 0, 1, 1]]
        );
    }

    #[test]
    fn thresholds_are_taken_one_by_one() {
        let seen = maps(vec![vec![4.0, 2.1, 1.9, 0.0], vec![0.0; 4]]);
        let found = threshold(&seen, Normalization::Max, 0.5).unwrap();
        assert_eq!(found.planes(), [vec![1, 1, 0, 0], vec![0; 4]]);
    }
}
