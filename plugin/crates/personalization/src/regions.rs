//! The parts that a foreground falls into: what is decided as one, whatever it is decided to be.
//!
//! 1. *Basins*. Around every peak of the foreground's map lies a basin, and basins meet at saddles. Two of them are one
//!    unless both peaks rise above their saddle by a share of the lower peak (the persistence of a peak; Edelsbrunner,
//!    Letscher and Zomorodian 2002). That share is lowered until there are as many basins as objects: a shallow saddle
//!    inside an object parts it only where objects would be one otherwise.
//! 2. *Cuts*. Where there are fewer basins than objects, the part that falls apart most easily is cut in two: the
//!    normalized cut (Shi and Malik 2000) of the U-Net's own self-attention among the cells within the part's rim (what
//!    lies beyond is the ground around it, and the easiest cut would be between the two),
//!
//! ```text
//! NCut(a, b) = cut(a, b) / vol(a) + cut(a, b) / vol(b),   cut = Σ_{i∈a, j∈b} W_ij,   vol(a) = Σ_{i∈a} Σ_j W_ij
//! ```
//!
//!    by the second eigenvector of D^-½ W D^-½ at its best threshold.
//!
//! A part is not assumed to be an object: one object may own several.
//!
//! Another hypothesis (`regions_of_words`) parts the basins where another word's share of the attention becomes the highest:
//! it finds things that touch and look at each other, where the words are bound well. Which one explains the picture is
//! for [`mod@crate::posterior`] to say.

use nalgebra::DMatrix;
use serde::Serialize;

use crate::bounds::Bounds;
use crate::evidence::Affinity;
use crate::size::Size;

/// Constants of the parts; shares of the map's range unless they say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RegionConfig {
    /// What lies below is no part; in [0, 1).
    pub floor: f32,
    /// A part whose highest pixel lies below is the background's unevenness; in [0, 1).
    pub peak: f32,
    /// How far both peaks rise above their saddle, as a share of the lower one, in [0, 1]: a saddle as deep as the second
    /// share always parts them, one less deep than the first never; in between, where there are too few parts.
    pub prominence: [f32; 2],
    /// Where a part ends, as a share of its own peak, so that pale objects keep their size; in (0, 1).
    pub rim: f32,
    /// Width of the soft rim, as a share of the peak; above 0.
    pub softness: f32,
    /// Smallest part, as a share of the picture's area; in [0, 1).
    pub speck: f64,
}

impl RegionConfig {
    /// Of everything that is a share.
    pub const SHARE: Bounds<f64> = Bounds::new(0.0, 1.0);
    /// Of the width of the rim.
    pub const SOFTNESS: Bounds<f64> = Bounds::new(1e-3, 1.0);

    /// Measured on the evaluation scenes and on the half of the hard ones that is for tuning.
    #[must_use]
    pub const fn measured() -> Self {
        Self {
            floor: 0.15,
            peak: 0.23,
            prominence: [0.1, 0.3],
            rim: 0.35,
            softness: 0.1,
            speck: 0.003,
        }
    }
}

impl RegionConfig {
    /// Pixels of the smallest part.
    fn least(&self, n_pixels: usize) -> usize {
        ((self.speck * n_pixels as f64).ceil() as usize).max(1)
    }
}

/// Steps in which the prominence is lowered.
const PROMINENCES: usize = 8;

/// One part of the foreground.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Region {
    /// Pixels of the basin, in ascending order.
    pub(crate) pixels: Vec<usize>,
    /// How sure each of them is inside, in [0, 1].
    pub(crate) inside: Vec<f32>,
}

impl Region {
    /// Pixels that are inside rather than not.
    pub(crate) fn core(&self) -> Vec<usize> {
        let pixels = self.pixels.iter().zip(&self.inside);
        let core = pixels.filter(|(_, inside)| **inside > 0.5);
        core.map(|(&pixel, _)| pixel).collect()
    }
}

/// The basins of a foreground cut where another one of `words` `[H · W]` becomes the highest. A piece has at least
/// the area of a part, and a tenth of its basin; smaller ones go to the nearest.
pub(crate) fn regions_of_words(
    basins: Vec<Vec<usize>>,
    map: &[f32],
    size: Size,
    words: &[Vec<f64>],
    config: &RegionConfig,
) -> Vec<Region> {
    let word_of = |i: usize| {
        (1..words.len()).fold(0, |best, k| {
            if words[k][i] > words[best][i] {
                k
            } else {
                best
            }
        })
    };
    let pieces = basins.into_iter().flat_map(|part| {
        let core = core_of(&part, map, config.rim);
        let least = config
            .least(map.len())
            .max((PIECE * core.len() as f64).ceil() as usize);
        let mut pieces = connected(&core, size, word_of);
        pieces.retain(|piece| piece.len() >= least);
        if pieces.len() < 2 {
            return vec![part];
        }
        grown(&part, pieces, size)
    });
    pieces.map(|pixels| with_rim(pixels, map, config)).collect()
}

/// Smallest piece of a basin, as a share of its core.
const PIECE: f64 = 0.1;

/// Connected pixels of one word.
fn connected(pixels: &[usize], size: Size, word_of: impl Fn(usize) -> usize) -> Vec<Vec<usize>> {
    let mut word = vec![None; size.area()];
    pixels.iter().for_each(|&i| word[i] = Some(word_of(i)));
    let mut pieces = Vec::new();
    for &start in pixels {
        let Some(own) = word[start].take() else {
            continue;
        };
        let (mut piece, mut next) = (vec![start], 0);
        while next < piece.len() {
            for i in size.neighbors(piece[next]) {
                if word[i] == Some(own) {
                    word[i] = None;
                    piece.push(i);
                }
            }
            next += 1;
        }
        pieces.push(piece);
    }
    pieces
}

/// Every pixel of a part, with the piece that is nearest within the part.
fn grown(part: &[usize], pieces: Vec<Vec<usize>>, size: Size) -> Vec<Vec<usize>> {
    const OUTSIDE: usize = usize::MAX;
    const FREE: usize = usize::MAX - 1;
    let mut owner = vec![OUTSIDE; size.area()];
    part.iter().for_each(|&i| owner[i] = FREE);
    let mut queue = Vec::with_capacity(part.len());
    for (k, piece) in pieces.iter().enumerate() {
        piece.iter().for_each(|&i| owner[i] = k);
        queue.extend(piece);
    }
    let mut next = 0;
    while next < queue.len() {
        for i in size.neighbors(queue[next]) {
            if owner[i] == FREE {
                owner[i] = owner[queue[next]];
                queue.push(i);
            }
        }
        next += 1;
    }
    let mut grown = vec![Vec::new(); pieces.len()];
    // What no piece reaches is connected to none; basins are connected, so that there is none.
    for &i in part {
        if let Some(pixels) = grown.get_mut(owner[i]) {
            pixels.push(i);
        }
    }
    grown
}

/// Basins that are parts, as many as are wanted if shallower saddles part them so; `map` `[H · W]` in [0, 1] is high
/// in the foreground.
pub(crate) fn basins_for(
    map: &[f32],
    size: Size,
    n_wanted: usize,
    config: &RegionConfig,
) -> Vec<Vec<usize>> {
    let least = config.least(map.len());
    let order = downhill(map, config.floor);
    let is_part =
        |part: &Vec<usize>| part.len() >= least && part.iter().any(|&i| map[i] >= config.peak);
    let [shallow, deep] = config.prominence;
    let mut parts = Vec::new();
    for step in 0..=PROMINENCES {
        let prominence = deep + (shallow - deep) * step as f32 / PROMINENCES as f32;
        parts = basins(map, size, &order, prominence);
        parts.retain(is_part);
        if parts.len() >= n_wanted {
            break;
        }
    }
    parts
}

/// The basins of a map, and more parts of them until there are `n_wanted`, if the affinity lets itself be cut so often.
pub(crate) fn regions(
    basins: Vec<Vec<usize>>,
    map: &[f32],
    size: Size,
    n_wanted: usize,
    affinity: Option<&Affinity>,
    config: &RegionConfig,
) -> Vec<Region> {
    let least = config.least(map.len());
    let mut parts = basins;
    while let Some(affinity) = affinity.filter(|_| parts.len() < n_wanted) {
        let cuts = parts.iter().enumerate().filter_map(|(i, part)| {
            let core = core_of(part, map, config.rim);
            Some((i, normalized_cut(part, &core, size, affinity, least)?))
        });
        let Some((i, cut)) = cuts.min_by(|(_, a), (_, b)| a.value.total_cmp(&b.value)) else {
            break;
        };
        parts[i] = cut.first;
        parts.push(cut.second);
    }
    parts
        .into_iter()
        .map(|pixels| with_rim(pixels, map, config))
        .collect()
}

/// Pixels above this share of the part's peak.
fn core_of(part: &[usize], map: &[f32], rim: f32) -> Vec<usize> {
    let least = rim * peak_of(part, map);
    let core = part.iter().filter(|&&i| map[i] > least);
    core.copied().collect()
}

fn peak_of(part: &[usize], map: &[f32]) -> f32 {
    part.iter().map(|&i| map[i]).fold(1e-12, f32::max)
}

fn with_rim(pixels: Vec<usize>, map: &[f32], config: &RegionConfig) -> Region {
    let peak = peak_of(&pixels, map);
    let inside = pixels
        .iter()
        .map(|&i| sigmoid((map[i] / peak - config.rim) / config.softness))
        .collect();
    Region { pixels, inside }
}

/// 1 / (1 + e^-x).
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Pixels above `floor`, the highest first.
fn downhill(map: &[f32], floor: f32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..map.len()).filter(|&i| map[i] > floor).collect();
    order.sort_by(|&a, &b| map[b].total_cmp(&map[a]).then(a.cmp(&b)));
    order
}

/// Basins of these pixels, each as its pixels in ascending order; in the order of their highest pixels.
fn basins(map: &[f32], size: Size, order: &[usize], prominence: f32) -> Vec<Vec<usize>> {
    const NONE: usize = usize::MAX;
    let mut basin_of = vec![NONE; map.len()];
    // Basins that were merged point at the one that took them.
    let (mut taken_by, mut peaks) = (Vec::new(), Vec::new());
    for &pixel in order {
        let mut roots: Vec<usize> = size
            .neighbors(pixel)
            .filter(|&i| basin_of[i] != NONE)
            .map(|i| root(&mut taken_by, basin_of[i]))
            .collect();
        // Basins are numbered from the highest peak down.
        roots.sort_unstable();
        roots.dedup();
        let Some((&highest, others)) = roots.split_first() else {
            basin_of[pixel] = peaks.len();
            taken_by.push(peaks.len());
            peaks.push(map[pixel]);
            continue;
        };
        basin_of[pixel] = highest;
        for &other in others {
            if peaks[other] - map[pixel] < prominence * peaks[other] {
                taken_by[other] = highest;
            }
        }
    }
    let mut parts = vec![Vec::new(); peaks.len()];
    for (pixel, basin) in basin_of.into_iter().enumerate() {
        if basin != NONE {
            parts[root(&mut taken_by, basin)].push(pixel);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn root(taken_by: &mut [usize], mut basin: usize) -> usize {
    while taken_by[basin] != basin {
        taken_by[basin] = taken_by[taken_by[basin]];
        basin = taken_by[basin];
    }
    basin
}

/// A part in two.
struct Cut {
    /// NCut, in [0, 2]; small where the two hardly look at each other.
    value: f64,
    first: Vec<usize>,
    second: Vec<usize>,
}

/// The best cut of a part along its core, into two with at least `least` pixels of the core each.
fn normalized_cut(
    part: &[usize],
    core: &[usize],
    size: Size,
    affinity: &Affinity,
    least: usize,
) -> Option<Cut> {
    let cells = cells_of(core, size, affinity.size());
    let (value, is_first) = cut_cells(&cells, affinity)?;
    let side = CellSides {
        cells: &cells,
        is_first: &is_first,
        grid: affinity.size(),
        size,
    };
    let n_first = core.iter().filter(|&&pixel| side.is_first(pixel)).count();
    let (first, second) = part.iter().partition(|&&pixel| side.is_first(pixel));
    (n_first.min(core.len() - n_first) >= least).then_some(Cut {
        value,
        first,
        second,
    })
}

/// Cells of a grid of which more than 3 in 10 pixels belong to the part.
pub(crate) fn cells_of(part: &[usize], size: Size, grid: Size) -> Vec<usize> {
    let mut covered = vec![0usize; grid.area()];
    for &pixel in part {
        covered[size.cell_in(pixel, grid)] += 1;
    }
    let least = 0.3 * size.area() as f64 / grid.area() as f64;
    (0..covered.len())
        .filter(|&cell| covered[cell] as f64 > least)
        .collect()
}

/// NCut of the best split by the second eigenvector, and which cells are on its first side; at least two on each.
fn cut_cells(cells: &[usize], affinity: &Affinity) -> Option<(f64, Vec<bool>)> {
    let n = cells.len();
    if n < 4 {
        return None;
    }
    let weight = |i: usize, j: usize| affinity.between(cells[i], cells[j]);
    let volume: Vec<f64> = (0..n)
        .map(|i| (0..n).map(|j| weight(i, j)).sum::<f64>().max(1e-12))
        .collect();
    let normalized = DMatrix::from_fn(n, n, |i, j| weight(i, j) / (volume[i] * volume[j]).sqrt());
    let eigen = normalized.symmetric_eigen();
    let mut by_value: Vec<usize> = (0..n).collect();
    by_value.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    let second = eigen.eigenvectors.column(by_value[1]);
    let position: Vec<f64> = (0..n).map(|i| second[i] / volume[i].sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| position[b].total_cmp(&position[a]).then(a.cmp(&b)));
    // Cell after cell moves to the first side.
    let total: f64 = volume.iter().sum();
    let mut is_first = vec![false; n];
    let (mut cut, mut own) = (0.0, 0.0);
    let mut best: Option<(f64, usize)> = None;
    for (moved, &i) in order.iter().enumerate() {
        for j in (0..n).filter(|&j| j != i) {
            cut += if is_first[j] {
                -weight(i, j)
            } else {
                weight(i, j)
            };
        }
        is_first[i] = true;
        own += volume[i];
        let n_first = moved + 1;
        if n_first < 2 || n - n_first < 2 {
            continue;
        }
        let value = cut / own + cut / (total - own);
        if best.is_none_or(|(least, _)| value < least) {
            best = Some((value, n_first));
        }
    }
    let (value, n_first) = best?;
    let mut is_first = vec![false; n];
    order[..n_first].iter().for_each(|&i| is_first[i] = true);
    Some((value, is_first))
}

/// Sides of cells, read between them.
struct CellSides<'a> {
    cells: &'a [usize],
    is_first: &'a [bool],
    grid: Size,
    size: Size,
}

impl CellSides<'_> {
    /// The side on which a pixel lies: that of the four cells around it, by their bilinear weights; of the nearest cell
    /// where none of the four is one of them.
    fn is_first(&self, pixel: usize) -> bool {
        let place = |at: usize, of: usize, n_cells: usize| {
            let center = (at as f32 + 0.5) * (n_cells as f32 / of as f32) - 0.5;
            let low = center.floor();
            let last = n_cells as f32 - 1.0;
            let [low_cell, high_cell] = [low, low + 1.0].map(|v| v.clamp(0.0, last) as usize);
            [(low_cell, 1.0 - (center - low)), (high_cell, center - low)]
        };
        let (row, column) = self.size.place(pixel);
        let mut sum = 0.0f32;
        for (y, weight_y) in place(row, self.size.height, self.grid.height) {
            for (x, weight_x) in place(column, self.size.width, self.grid.width) {
                if let Ok(i) = self.cells.binary_search(&(y * self.grid.width + x)) {
                    let sign = if self.is_first[i] { 1.0 } else { -1.0 };
                    sum += sign * weight_x * weight_y;
                }
            }
        }
        if sum == 0.0 {
            return self.nearest_is_first(pixel);
        }
        sum > 0.0
    }

    fn nearest_is_first(&self, pixel: usize) -> bool {
        let center = |at: usize, of: usize| (at as f32 + 0.5) / of as f32;
        let distance = |cell: usize| {
            let ((row, column), (y, x)) = (self.size.place(pixel), self.grid.place(cell));
            let y = center(row, self.size.height) - center(y, self.grid.height);
            let x = center(column, self.size.width) - center(x, self.grid.width);
            // In rows: what is wide has longer rows than columns.
            let x = x * self.grid.width as f32 / self.grid.height as f32;
            y * y + x * x
        };
        let cells = self.cells.iter().zip(self.is_first);
        let nearest = cells.min_by(|(a, _), (b, _)| distance(**a).total_cmp(&distance(**b)));
        nearest.is_some_and(|(_, is_first)| *is_first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(rows: &[&str]) -> (Vec<f32>, Size) {
        let value = |c: u8| f32::from(c - b'0') / 9.0;
        let map = rows.iter().flat_map(|row| row.bytes()).map(value);
        (map.collect(), Size::new(rows[0].len(), rows.len()))
    }

    fn config() -> RegionConfig {
        RegionConfig {
            floor: 0.15,
            peak: 0.2,
            prominence: [0.2, 0.2],
            rim: 0.35,
            softness: 0.1,
            speck: 0.0,
        }
    }

    fn parts(
        map: &[f32],
        size: Size,
        n_wanted: usize,
        affinity: Option<&Affinity>,
        config: &RegionConfig,
    ) -> Vec<Region> {
        let basins = basins_for(map, size, n_wanted, config);
        regions(basins, map, size, n_wanted, affinity, config)
    }

    #[test]
    fn a_saddle_parts_two_peaks_only_if_both_rise_above_it() {
        let (deep, size) = map(&["00000", "09390", "09390", "00000", "00000"]);
        let parts = basins(&deep, size, &downhill(&deep, 0.15), 0.2);
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0], [6, 7, 11, 12]);
        assert_eq!(parts[1], [8, 13]);
        let (shallow, _) = map(&["00000", "09890", "09890", "00000", "00000"]);
        assert_eq!(
            basins(&shallow, size, &downhill(&shallow, 0.15), 0.2).len(),
            1
        );
        // A pale peak counts by its own height.
        let (pale, _) = map(&["00000", "09230", "09230", "00000", "00000"]);
        assert_eq!(basins(&pale, size, &downhill(&pale, 0.15), 0.2).len(), 2);
    }

    #[test]
    fn what_lies_apart_is_apart_and_specks_do_not_count() {
        let (apart, size) = map(&["90009", "90009", "00000", "00009", "00000"]);
        assert_eq!(basins(&apart, size, &downhill(&apart, 0.15), 0.2).len(), 3);
        let config = RegionConfig {
            speck: 0.06,
            ..config()
        };
        assert_eq!(parts(&apart, size, 3, None, &config).len(), 2);
    }

    #[test]
    fn a_part_is_cut_where_its_cells_do_not_look_at_each_other() {
        // Two halves of one plateau: 4x4 cells, left and right look among themselves.
        let (map, size) = map(&["9999", "9999", "9999", "9999"]);
        let is_left = |cell: usize| cell % 4 < 2;
        let mean: Vec<f32> = (0..256)
            .map(|i| {
                if is_left(i / 16) == is_left(i % 16) {
                    1.0
                } else {
                    0.05
                }
            })
            .collect();
        let affinity = Affinity::from_mean(Size::square(4), mean);
        let found = parts(&map, size, 2, Some(&affinity), &config());
        let mut pixels: Vec<Vec<usize>> = found.into_iter().map(|part| part.pixels).collect();
        pixels.sort();
        let left: Vec<usize> = (0..16).filter(|&i| is_left(i)).collect();
        let right: Vec<usize> = (0..16).filter(|&i| !is_left(i)).collect();
        assert_eq!(pixels, [left, right]);
        // Nothing is cut where there are enough parts.
        assert_eq!(parts(&map, size, 1, Some(&affinity), &config()).len(), 1);
    }

    #[test]
    fn a_cut_is_not_between_a_part_and_the_ground_around_it() {
        // Two objects in the middle, on ground that is high enough to belong to the part: 6x6 cells.
        let (map, size) = map(&["222222", "222222", "299992", "299992", "222222", "222222"]);
        let kind = |cell: usize| match (cell / 6, cell % 6) {
            (2 | 3, 1 | 2) => 0,
            (2 | 3, 3 | 4) => 1,
            _ => 2,
        };
        // The ground looks at itself only; the objects a little at each other.
        let look = |a: usize, b: usize| match (kind(a), kind(b)) {
            (a, b) if a == b => 1.0,
            (2, _) | (_, 2) => 0.01,
            _ => 0.2,
        };
        let mean = (0..36 * 36).map(|i| look(i / 36, i % 36)).collect();
        let affinity = Affinity::from_mean(Size::square(6), mean);
        let found = parts(&map, size, 2, Some(&affinity), &config());
        let mut cores: Vec<Vec<usize>> = found.iter().map(Region::core).collect();
        cores.sort();
        assert_eq!(cores, [[13, 14, 19, 20], [15, 16, 21, 22]]);
        let n_pixels: usize = found.iter().map(|part| part.pixels.len()).sum();
        assert_eq!(n_pixels, 36, "the ground goes to the nearer one");
    }

    #[test]
    fn a_wide_picture_is_cut_as_a_square_one_is() {
        let (map, size) = map(&["99999999", "99999999"]);
        let is_left = |cell: usize| cell % 4 < 2;
        let look = |i: usize| {
            if is_left(i / 8) == is_left(i % 8) {
                1.0
            } else {
                0.05
            }
        };
        let affinity = Affinity::from_mean(Size::new(4, 2), (0..64).map(look).collect());
        let found = parts(&map, size, 2, Some(&affinity), &config());
        let mut pixels: Vec<Vec<usize>> = found.into_iter().map(|part| part.pixels).collect();
        pixels.sort();
        assert_eq!(
            pixels,
            [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
        );
    }

    #[test]
    fn words_part_what_touches() {
        let (map, size) = map(&["00000", "09999", "09999", "02220", "00000"]);
        let left = |i: usize| i % 5 < 3;
        let of_words = |words: &[Vec<f64>]| {
            let basins = basins_for(&map, size, words.len(), &config());
            regions_of_words(basins, &map, size, words, &config())
        };
        let words: [Vec<f64>; 2] = [true, false].map(|side| {
            (0..25)
                .map(|i| if left(i) == side { 0.9 } else { 0.1 })
                .collect()
        });
        let found = of_words(&words);
        let pixels: Vec<_> = found.iter().map(|part| part.pixels.clone()).collect();
        // What is no core goes to the nearest.
        assert_eq!(pixels, [vec![6, 7, 11, 12, 16, 17], vec![8, 9, 13, 14, 18]]);
        // A word that is the highest nowhere parts nothing.
        let same = [vec![0.9; 25], vec![0.1; 25]];
        assert_eq!(of_words(&same).len(), 1);
    }

    #[test]
    fn a_shallow_saddle_parts_only_what_would_be_too_few() {
        let (map, size) = map(&["00000", "09790", "09790", "00000", "00000"]);
        let config = RegionConfig {
            prominence: [0.1, 0.3],
            ..config()
        };
        let n_parts = |n_wanted| parts(&map, size, n_wanted, None, &config).len();
        assert_eq!([n_parts(1), n_parts(2)], [1, 2]);
    }

    #[test]
    fn what_hardly_rises_is_no_part() {
        let (map, size) = map(&["90000", "90000", "00022", "00022", "00000"]);
        let n_parts = |peak| {
            let config = RegionConfig { peak, ..config() };
            parts(&map, size, 2, None, &config).len()
        };
        assert_eq!([n_parts(0.2), n_parts(0.25)], [2, 1]);
    }

    #[test]
    fn the_rim_follows_the_parts_own_peak() {
        let (map, size) = map(&["00000", "09410", "00000", "03200", "00000"]);
        let found = parts(&map, size, 2, None, &config());
        assert_eq!(found.len(), 2);
        let inside = |part: &Region, pixel| {
            let at = part.pixels.iter().position(|&p| p == pixel);
            at.map_or(0.0, |at| part.inside[at])
        };
        assert!(inside(&found[0], 6) > 0.99 && inside(&found[0], 7) > 0.5);
        assert!(
            inside(&found[1], 17) > 0.9,
            "two thirds of a pale peak are inside"
        );
    }
}
