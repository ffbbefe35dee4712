//! Masks before any word: objects are what the U-Net's self-attention holds together (ConceptExpress and ICE start so).
//!
//! ```text
//! B_0     = the cells along the picture's border
//! b_i     = mean_{j in B} W_ij / mean_{j not in B} W_ij,   B ← { i : b_i > 1 }   until it stays the same
//! map     = -ln b, scaled to [0, 1]                                               the foreground
//! parts   = basins of the map, cut until there is one for every object            see [`crate::regions`]
//! ```
//!
//! Too many parts are joined, those first that look at each other most. Assumes that the border shows mostly background.
//! Which token gets which part is arbitrary: the order of the parts, from the strongest down. What is found stands for the
//! attention of the tokens in the first masks, and in the mean over the rounds that is the prior of later ones: a token
//! keeps its part until what it learned says otherwise.

use crate::attention::upsample_bicubic;
use crate::evidence::Affinity;
use crate::maps::AttentionMaps;
use crate::regions::{Region, RegionConfig, basins_for, cells_of, regions};
use crate::scene::{Role, competitors};
use crate::size::Size;

/// More rounds than it ever takes: every one moves a cell, or it ends.
const MOST_ROUNDS: usize = 50;

/// Attention of tokens that say nothing yet, as if each looked at a part of its own, the background at the rest; each
/// map has the mass of the one that it stands for, so that later ones can be added. `None` where nothing was seen.
pub(crate) fn discovered(
    affinity: &Affinity,
    maps: &AttentionMaps,
    roles: &[Role],
    config: &RegionConfig,
) -> Option<AttentionMaps> {
    let (size, objects) = (maps.size, competitors(roles));
    if affinity.is_empty() {
        return None;
    }
    let map = foreground(affinity, size);
    let basins = basins_for(&map, size, objects.len(), config);
    let parts = regions(basins, &map, size, objects.len(), Some(affinity), config);
    let parts = joined(parts, objects.len(), size, affinity);
    let mut planes = vec![vec![0.0f32; size.area()]; roles.len()];
    for (part, &c) in parts.iter().zip(&objects) {
        for (&i, &inside) in part.pixels.iter().zip(&part.inside) {
            planes[c][i] = inside;
        }
    }
    let background = roles.iter().position(|&role| role == Role::Background);
    if let Some(background) = background.filter(|c| !objects.contains(c)) {
        planes[background] = (0..size.area())
            .map(|i| 1.0 - objects.iter().map(|&c| planes[c][i]).sum::<f32>())
            .collect();
    }
    let mass = |map: &[f32]| map.iter().map(|&v| f64::from(v)).sum::<f64>();
    for (plane, map) in planes.iter_mut().zip(&maps.maps) {
        let scale = mass(map) / mass(plane).max(1e-12);
        plane.iter_mut().for_each(|v| *v *= scale as f32);
    }
    Some(AttentionMaps { size, maps: planes })
}

/// `[H · W]` in [0, 1], high where cells do not look at the background.
pub(crate) fn foreground(affinity: &Affinity, size: Size) -> Vec<f32> {
    let grid = affinity.size();
    let n = grid.area();
    let on_border = |i: usize| grid.neighbors(i).count() < 4;
    let mut is_background: Vec<bool> = (0..n).map(on_border).collect();
    let mut ratios = vec![1.0; n];
    for _ in 0..MOST_ROUNDS {
        let n_background = is_background.iter().filter(|&&b| b).count();
        if n_background == 0 || n_background == n {
            break;
        }
        for (i, ratio) in ratios.iter_mut().enumerate() {
            let (mut inside, mut outside) = (0.0, 0.0);
            for (j, &b) in is_background.iter().enumerate() {
                *(if b { &mut inside } else { &mut outside }) += affinity.between(i, j);
            }
            let mean_inside = inside / n_background as f64;
            let mean_outside = outside / (n - n_background) as f64;
            *ratio = mean_inside.max(1e-12) / mean_outside.max(1e-12);
        }
        let next: Vec<bool> = ratios.iter().map(|&ratio| ratio > 1.0).collect();
        if next == is_background {
            break;
        }
        is_background = next;
    }
    let logs: Vec<f64> = ratios.iter().map(|ratio| -ratio.ln()).collect();
    let least = logs.iter().copied().fold(f64::INFINITY, f64::min);
    let shifted: Vec<f32> = logs.iter().map(|log| (log - least) as f32).collect();
    let map = upsample_bicubic(&shifted, grid, size);
    let largest = map.iter().copied().fold(1e-12, f32::max);
    map.into_iter().map(|v| v / largest).collect()
}

/// At most so many parts: the two that look at each other most become one, again and again.
fn joined(mut parts: Vec<Region>, most: usize, size: Size, affinity: &Affinity) -> Vec<Region> {
    let cells = |part: &Region| cells_of(&part.core(), size, affinity.size());
    let mut cells: Vec<Vec<usize>> = parts.iter().map(cells).collect();
    while parts.len() > most {
        let mut best = (f64::NEG_INFINITY, 0, 1);
        for i in 0..parts.len() {
            for j in i + 1..parts.len() {
                let pairs = cells[i]
                    .iter()
                    .flat_map(|&a| cells[j].iter().map(move |&b| (a, b)));
                let sum: f64 = pairs.map(|(a, b)| affinity.between(a, b)).sum();
                let mean = sum / (cells[i].len() * cells[j].len()).max(1) as f64;
                if mean > best.0 {
                    best = (mean, i, j);
                }
            }
        }
        let (_, i, j) = best;
        let (part, own) = (parts.remove(j), cells.remove(j));
        parts[i].pixels.extend(part.pixels);
        parts[i].inside.extend(part.inside);
        cells[i].extend(own);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 8x8 cells: two things of 2x2, each looking at itself, in front of a background that does.
    fn affinity() -> Affinity {
        let thing = |cell: usize| match (cell / 8, cell % 8) {
            (2..4, 1..3) => 1,
            (4..6, 5..7) => 2,
            _ => 0,
        };
        let mean = (0..64 * 64).map(|i| {
            let (a, b) = (thing(i / 64), thing(i % 64));
            if a == b { 1.0 } else { 0.02 }
        });
        Affinity::from_mean(Size::square(8), mean.collect())
    }

    /// Whose share is largest at the center of a cell of 4x4 pixels.
    fn owner(found: &AttentionMaps, [y, x]: [usize; 2]) -> usize {
        let value = |c: usize| found.maps[c][(4 * y) * 32 + 4 * x];
        (0..found.maps.len())
            .max_by(|&a, &b| value(a).total_cmp(&value(b)))
            .unwrap()
    }

    fn found(roles: &[Role]) -> AttentionMaps {
        let size = Size::square(32);
        let maps = vec![vec![0.25; size.area()]; roles.len()];
        let maps = AttentionMaps { size, maps };
        discovered(&affinity(), &maps, roles, &RegionConfig::measured()).unwrap()
    }

    #[test]
    fn things_are_found_without_a_word() {
        let found = found(&[Role::Object, Role::Object, Role::Background]);
        let (first, second) = (owner(&found, [3, 2]), owner(&found, [5, 6]));
        assert!(
            first < 2 && second < 2 && first != second,
            "{first} {second}"
        );
        assert_eq!(owner(&found, [7, 1]), 2);
        for map in &found.maps {
            let mass = map.iter().sum::<f32>();
            assert!((mass - 256.0).abs() < 0.1, "{mass}");
        }
    }

    #[test]
    fn parts_that_look_at_each_other_are_one_object() {
        let found = found(&[Role::Object, Role::Background]);
        assert_eq!([[3, 2], [5, 6]].map(|cell| owner(&found, cell)), [0, 0]);
    }

    #[test]
    fn nothing_is_found_where_nothing_was_seen() {
        let size = Size::square(4);
        let maps = vec![vec![0.25; size.area()]; 1];
        let maps = AttentionMaps { size, maps };
        let blind = Affinity::empty(Size::square(2));
        let config = RegionConfig::measured();
        assert_eq!(discovered(&blind, &maps, &[Role::Object], &config), None);
    }
}
