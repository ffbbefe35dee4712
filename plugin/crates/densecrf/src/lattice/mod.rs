//! Gaussian filtering in time linear in the pixels: splat to lattice points, blur along the lattice's axes, slice
//! back (Adams, Baek and Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*, 2010).
//!
//! Features are read in bands ([`band`]); what a band's points have gathered is summed over bands, blurred, and handed
//! back to the bands' points.

pub(crate) mod band;
mod points;
mod simplex;

use rayon::prelude::*;

use crate::CrfError;
use crate::simd::vectorize;
use band::{Band, Entry};
use points::PointKey;

/// Rows that one task handles: below this, handing out work costs more than the work.
const ROWS_PER_TASK: usize = 2048;

/// The filter `K ≈ S^T · B_d ⋯ B_0 · S` of one set of features, as sparse matrices.
///
/// | name | shape | meaning |
/// | --- | --- | --- |
/// | S | `[M, N]` | splat: barycentric weights, stored by feature; slicing is the way back, times α = 1/(1 + 2^-d) |
/// | B_j | `[M, M]` | blur along axis j: (½, 1, ½) |
///
/// Approximates `Σ_j exp(-|f_i - f_j|²/2) v_j` up to a factor that depends on the dimension; the normalized filter
/// does not see it. About `8 (d + 1) N + 8 (d + 2) M` bytes for N features on M lattice points.
#[derive(Debug)]
pub struct Lattice {
    /// d + 1: vertices of a simplex, and axes of the blur.
    n_vertices: usize,
    /// `[N, d + 1]`
    entries: Vec<Entry>,
    /// α, and the weight of a normalized filter.
    gain: f32,
    /// Where the points of band 1, 2, … begin among those of all bands, P of them; one more at the end.
    band_starts: Vec<usize>,
    /// The lattice row of each band's points, from 1. `[P]`
    rows: Vec<u32>,
    /// Where the bands' points of lattice row 1, 2, … begin in `shares`; one more at the end. `[M + 1]`
    share_starts: Vec<u32>,
    /// The bands' points by lattice row. `[P]`
    shares: Vec<u32>,
    /// Rows of the neighbors on either side, axis by axis, 0 where there is none. `[d + 1, M]`
    neighbors: Vec<[u32; 2]>,
}

/// Values on their way over the lattice.
#[derive(Debug)]
pub(crate) struct LatticeValues<const LANES: usize> {
    /// Of lattice rows; row 0 stays zero.
    front: Vec<[f32; LANES]>,
    back: Vec<[f32; LANES]>,
    /// Of the bands' points: what features splat, and what they slice. `[P]`
    splat: Vec<[f32; LANES]>,
    blurred: Vec<[f32; LANES]>,
}

impl Lattice {
    /// Builds the filter of features `[N, D]`, each already divided by its standard deviation. D is at most 7.
    ///
    /// # Errors
    /// [`CrfError::FeatureRange`] where a feature is not finite or too far from zero (some 10⁴ standard deviations).
    ///
    /// # Panics
    /// With 2³² simplex vertices or more; [`DenseCrf::new`](crate::DenseCrf::new) refuses such pictures.
    pub fn build<const D: usize>(features: &[[f32; D]]) -> Result<Self, CrfError> {
        let n_vertices = D + 1;
        assert!(
            u32::try_from(features.len() * n_vertices).is_ok(),
            "too many features for 32-bit indices"
        );
        let mut entries = vec![Entry::default(); features.len() * n_vertices];
        let placed: Vec<_> = features
            .par_chunks(band::FEATURES)
            .zip(entries.par_chunks_mut(band::FEATURES * n_vertices))
            .map(|(features, entries)| {
                vectorize(
                    #[inline(always)]
                    || band::place::<D>(features, entries),
                )
            })
            .collect();

        let mut band_starts = vec![0];
        let mut points = Vec::new();
        for (band, keys) in placed.into_iter().enumerate() {
            let keys = keys.map_err(|position| CrfError::FeatureRange {
                index: band * band::FEATURES + position,
            })?;
            points.extend(
                (points.len()..)
                    .zip(keys)
                    .map(|(point, key)| (key, point as u32)),
            );
            band_starts.push(points.len());
        }
        points.par_sort_unstable();
        // Rows are numbered by their first point: what features next to each other touch lies close together.
        let mut keys: Vec<(PointKey, u32)> = Vec::with_capacity(points.len());
        let mut firsts = vec![0_u32; points.len()];
        for &(key, point) in &points {
            if keys.last().is_none_or(|&(last, _)| last != key) {
                keys.push((key, point));
            }
            firsts[point as usize] = keys[keys.len() - 1].1;
        }
        let mut rows = Vec::with_capacity(points.len());
        let mut n_points = 0;
        for (point, &first) in (0..).zip(&firsts) {
            rows.push(if first == point {
                n_points += 1;
                n_points
            } else {
                rows[first as usize]
            });
        }
        for (_, first) in &mut keys {
            *first = rows[*first as usize];
        }
        let (share_starts, shares) = by_row(&rows, keys.len());
        Ok(Self {
            n_vertices,
            entries,
            gain: 1.0 / (1.0 + 0.5_f32.powi(D as i32)),
            band_starts,
            rows,
            share_starts,
            shares,
            neighbors: connect::<D>(&keys),
        })
    }

    /// Number of features N.
    pub fn n_features(&self) -> usize {
        self.entries.len() / self.n_vertices
    }

    /// Number of lattice points M that carry values.
    pub fn n_points(&self) -> usize {
        self.share_starts.len() - 1
    }

    /// `K v` for values `[N, LANES]`.
    ///
    /// # Panics
    /// If there are not as many values as features.
    pub fn filter<const LANES: usize>(&self, values: &[[f32; LANES]]) -> Vec<[f32; LANES]> {
        assert_eq!(values.len(), self.n_features(), "one value per feature");
        let mut on_lattice = self.zeros::<LANES>();
        self.bands(&mut on_lattice)
            .into_par_iter()
            .zip(values.par_chunks(band::FEATURES))
            .for_each(|(mut band, values)| {
                vectorize(
                    #[inline(always)]
                    || band.splat(0, values),
                );
            });
        self.blur(&mut on_lattice);
        let mut filtered = vec![[0.0; LANES]; values.len()];
        filtered
            .par_chunks_mut(band::FEATURES)
            .zip(self.bands(&mut on_lattice))
            .for_each(|(sums, mut band)| {
                vectorize(
                    #[inline(always)]
                    || {
                        band.hear();
                        band.slice_onto(0, sums);
                    },
                );
            });
        filtered
    }

    /// The symmetrically normalized filter times `weight`, folded into the stored matrices (`pydensecrf`'s default):
    ///
    /// ```text
    /// w K̃ = w N K N,   N = diag(1 / √(K 1 + 1e-20))
    /// ```
    #[must_use]
    pub fn normalized(mut self, weight: f32) -> Self {
        let ones = vec![[1.0_f32]; self.n_features()];
        let sums = self.filter(&ones);
        self.entries
            .par_chunks_mut(self.n_vertices)
            .zip(&sums)
            .with_min_len(ROWS_PER_TASK)
            .for_each(|(row, [sum])| {
                let norm = 1.0 / (sum + 1e-20).sqrt();
                for entry in row {
                    entry.weight *= norm;
                }
            });
        self.gain *= weight;
        self
    }

    /// Room for values on this lattice.
    pub(crate) fn zeros<const LANES: usize>(&self) -> LatticeValues<LANES> {
        let rows = self.n_points() + 1;
        LatticeValues {
            front: vec![[0.0; LANES]; rows],
            back: vec![[0.0; LANES]; rows],
            splat: vec![[0.0; LANES]; self.rows.len()],
            blurred: vec![[0.0; LANES]; self.rows.len()],
        }
    }

    /// The bands of features, each with its part of the values.
    pub(crate) fn bands<'v, const LANES: usize>(
        &'v self,
        on_lattice: &'v mut LatticeValues<LANES>,
    ) -> Vec<Band<'v, LANES>> {
        let LatticeValues {
            front,
            splat,
            blurred,
            ..
        } = on_lattice;
        let (mut splat, mut blurred) = (&mut splat[..], &mut blurred[..]);
        let last_axis = self.neighbors.len() - self.n_points();
        self.entries
            .chunks(band::FEATURES * self.n_vertices)
            .zip(self.band_starts.windows(2))
            .map(|(entries, bounds)| {
                let n_points = bounds[1] - bounds[0];
                Band {
                    entries,
                    n_vertices: self.n_vertices,
                    gain: self.gain,
                    rows: &self.rows[bounds[0]..bounds[1]],
                    neighbors: &self.neighbors[last_axis..],
                    on_rows: front,
                    splat: splat.split_off_mut(..n_points).unwrap_or_default(),
                    blurred: blurred.split_off_mut(..n_points).unwrap_or_default(),
                }
            })
            .collect()
    }

    /// Sums what the bands have splat, and blurs along all axes but the last, along which each band does so for itself.
    pub(crate) fn blur<const LANES: usize>(&self, on_lattice: &mut LatticeValues<LANES>) {
        let LatticeValues {
            front, back, splat, ..
        } = on_lattice;
        let shares_of = |row: usize| {
            let [start, end] = [row, row + 1].map(|row| self.share_starts[row] as usize);
            &self.shares[start..end]
        };
        for_rows(&mut front[1..], |row| {
            let mut sum = [0.0; LANES];
            for &point in shares_of(row) {
                for (sum, share) in sum.iter_mut().zip(&splat[point as usize]) {
                    *sum += share;
                }
            }
            sum
        });
        let axes = self.neighbors.chunks(self.n_points().max(1));
        for axis in axes.take(self.n_vertices - 1) {
            let (old, new) = (&front[..], &mut back[1..]);
            for_rows(new, |row| band::blurred(old, row + 1, axis[row]));
            std::mem::swap(front, back);
        }
    }
}

/// `rows[i] = value(i)` over all threads.
fn for_rows<T: Send>(rows: &mut [T], value: impl Fn(usize) -> T + Sync) {
    rows.par_chunks_mut(ROWS_PER_TASK)
        .enumerate()
        .for_each(|(task, rows)| {
            for (i, row) in rows.iter_mut().enumerate() {
                *row = value(task * ROWS_PER_TASK + i);
            }
        });
}

/// Indices into `rows` by the row they name, ascending within each, and where those of row 1, 2, … begin.
fn by_row(rows: &[u32], n_rows: usize) -> (Vec<u32>, Vec<u32>) {
    let mut starts = vec![0_u32; n_rows + 1];
    for &row in rows {
        starts[row as usize] += 1;
    }
    // starts[row] is now the count of row ≥ 1; running sums make it the end of row, i.e. the start of row + 1.
    let mut total = 0;
    for end in &mut starts {
        total += *end;
        *end = total;
    }
    let mut next = starts.clone();
    let mut indices = vec![0; rows.len()];
    for (index, &row) in (0..).zip(rows) {
        let next = &mut next[row as usize - 1];
        indices[*next as usize] = index;
        *next += 1;
    }
    (starts, indices)
}

/// Rows of both neighbors of every point along every axis, from sorted keys with their rows. Who is above me has me below.
fn connect<const D: usize>(keys: &[(PointKey, u32)]) -> Vec<[u32; 2]> {
    let mut neighbors = vec![[0; 2]; (D + 1) * keys.len()];
    neighbors
        .par_chunks_mut(keys.len().max(1))
        .enumerate()
        .for_each(|(axis, pairs)| {
            // One step leads from sorted keys to sorted keys: their places only ever grow.
            let mut place = 0;
            for &(key, row) in keys {
                let wanted = key.step::<D>(axis);
                while keys.get(place).is_some_and(|&(key, _)| key < wanted) {
                    place += 1;
                }
                if let Some(&(_, above)) = keys.get(place).filter(|&&(key, _)| key == wanted) {
                    pairs[row as usize - 1][1] = above;
                    pairs[above as usize - 1][0] = row;
                }
            }
        });
    neighbors
}
