//! Gaussian filtering in time linear in the pixels: splat to lattice points, blur along the lattice's axes, slice
//! back (Adams, Baek and Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*, 2010).

mod points;
mod simplex;

use rayon::prelude::*;

use crate::CrfError;
use points::PointIndex;
use simplex::{elevation_scale, enclose};

/// Simplices found at a time: small enough for the cache, large enough to share among threads.
const BUILD_CHUNK: usize = 4096;
/// Rows that one task handles: below this, handing out work costs more than the work.
const ROWS_PER_TASK: usize = 2048;

/// One entry of a sparse matrix row.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Lattice row (slice) or pixel (splat).
    at: u32,
    weight: f32,
}

/// The filter `K ≈ S_out · B_d ⋯ B_0 · S_in` of one set of features, as sparse matrices.
///
/// | name | shape | meaning |
/// | --- | --- | --- |
/// | S_in | `[M, N]` | splat: barycentric weights, stored by lattice point so that each gathers its own sum |
/// | B_j | `[M, M]` | blur along axis j: (½, 1, ½) |
/// | S_out | `[N, M]` | slice: the same weights times α = 1/(1 + 2^-d), stored by pixel |
///
/// Approximates `Σ_j exp(-|f_i - f_j|²/2) v_j` up to a factor that depends on the dimension; the normalized filter
/// does not see it. About `16 (d + 1) N + 8 (d + 1) M` bytes for N features on M lattice points.
#[derive(Debug)]
pub struct Lattice {
    /// d + 1: vertices of a simplex, and axes of the blur.
    n_vertices: usize,
    /// Where the splat entries of lattice row 1, 2, … begin; one more at the end. `[M + 1]`
    splat_starts: Vec<u32>,
    /// `[N (d + 1)]`
    splat: Vec<Entry>,
    /// Rows of the neighbors on either side, axis by axis, 0 where there is none. `[d + 1, M]`
    neighbors: Vec<[u32; 2]>,
    /// `[N, d + 1]`
    slice: Vec<Entry>,
}

/// Values on the lattice points, and room to blur them. Row 0 stays zero.
#[derive(Debug)]
pub(crate) struct LatticeValues<const LANES: usize> {
    front: Vec<[f32; LANES]>,
    back: Vec<[f32; LANES]>,
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
        let (index, slice) = place::<D>(features)?;
        let (splat_starts, splat) = transpose(&slice, n_vertices, index.keys().len());
        let neighbors = connect::<D>(&index);
        let mut lattice = Self {
            n_vertices,
            splat_starts,
            splat,
            neighbors,
            slice,
        };
        let alpha = 1.0 / (1.0 + 0.5_f32.powi(D as i32));
        lattice
            .slice
            .par_iter_mut()
            .for_each(|entry| entry.weight *= alpha);
        Ok(lattice)
    }

    /// Number of features N.
    pub fn n_features(&self) -> usize {
        self.slice.len() / self.n_vertices
    }

    /// Number of lattice points M that carry values.
    pub fn n_points(&self) -> usize {
        self.splat_starts.len() - 1
    }

    /// `K v` for values `[N, LANES]`.
    ///
    /// # Panics
    /// If there are not as many values as features.
    pub fn filter<const LANES: usize>(&self, values: &[[f32; LANES]]) -> Vec<[f32; LANES]> {
        assert_eq!(values.len(), self.n_features(), "one value per feature");
        let mut on_lattice = self.zeros();
        self.splat_and_blur(values, &mut on_lattice);
        (0..values.len())
            .into_par_iter()
            .with_min_len(ROWS_PER_TASK)
            .map(|feature| {
                let mut sum = [0.0; LANES];
                self.slice_onto(feature, &on_lattice, &mut sum);
                sum
            })
            .collect()
    }

    /// The symmetrically normalized filter times `weight`, folded into the stored matrices (`pydensecrf`'s default):
    ///
    /// ```text
    /// w K̃ = w N K N,   N = diag(1 / √(K 1 + 1e-20))
    /// ```
    #[must_use]
    pub fn normalized(mut self, weight: f32) -> Self {
        let ones = vec![[1.0_f32]; self.n_features()];
        let norms: Vec<f32> = self
            .filter(&ones)
            .iter()
            .map(|[sum]| 1.0 / (sum + 1e-20).sqrt())
            .collect();
        self.splat
            .par_iter_mut()
            .for_each(|entry| entry.weight *= norms[entry.at as usize]);
        self.slice
            .par_chunks_mut(self.n_vertices)
            .zip(&norms)
            .for_each(|(row, norm)| {
                for entry in row {
                    entry.weight *= norm * weight;
                }
            });
        self
    }

    /// Room for values on this lattice.
    pub(crate) fn zeros<const LANES: usize>(&self) -> LatticeValues<LANES> {
        let rows = self.n_points() + 1;
        LatticeValues {
            front: vec![[0.0; LANES]; rows],
            back: vec![[0.0; LANES]; rows],
        }
    }

    /// `B_d ⋯ B_0 S_in v`; what `on_lattice` held before does not matter.
    pub(crate) fn splat_and_blur<const LANES: usize>(
        &self,
        values: &[[f32; LANES]],
        on_lattice: &mut LatticeValues<LANES>,
    ) {
        let LatticeValues { front, back } = on_lattice;
        let splat_row = |(row, bounds): (&mut [f32; LANES], &[u32])| {
            let mut sum = [0.0; LANES];
            for entry in &self.splat[bounds[0] as usize..bounds[1] as usize] {
                add_scaled(&mut sum, entry.weight, &values[entry.at as usize]);
            }
            *row = sum;
        };
        let bounds = self.splat_starts.par_windows(2);
        front[1..]
            .par_iter_mut()
            .zip(bounds)
            .with_min_len(ROWS_PER_TASK)
            .for_each(splat_row);

        for axis in self.neighbors.chunks(self.n_points().max(1)) {
            let old = &front[..];
            let blur_row =
                |((row, center), pair): ((&mut [f32; LANES], &[f32; LANES]), &[u32; 2])| {
                    let (below, above) = (&old[pair[0] as usize], &old[pair[1] as usize]);
                    for lane in 0..LANES {
                        row[lane] = center[lane] + 0.5 * (below[lane] + above[lane]);
                    }
                };
            let rows = back[1..].par_iter_mut().zip(&old[1..]).zip(axis);
            rows.with_min_len(ROWS_PER_TASK).for_each(blur_row);
            std::mem::swap(front, back);
        }
    }

    /// Adds row `feature` of `S_out · on_lattice` to `sum`.
    pub(crate) fn slice_onto<const LANES: usize>(
        &self,
        feature: usize,
        on_lattice: &LatticeValues<LANES>,
        sum: &mut [f32; LANES],
    ) {
        let first = feature * self.n_vertices;
        for entry in &self.slice[first..first + self.n_vertices] {
            add_scaled(sum, entry.weight, &on_lattice.front[entry.at as usize]);
        }
    }
}

/// `sum += weight · value`. Two roundings, never a fused one, so that all processors agree.
fn add_scaled<const LANES: usize>(sum: &mut [f32; LANES], weight: f32, value: &[f32; LANES]) {
    for (sum, value) in sum.iter_mut().zip(value) {
        *sum += weight * value;
    }
}

/// Finds every feature's simplex and gives each new lattice point the next row. Returns `[N, d + 1]` entries.
fn place<const D: usize>(features: &[[f32; D]]) -> Result<(PointIndex, Vec<Entry>), CrfError> {
    let scale = elevation_scale::<D>();
    let mut index = PointIndex::new();
    let mut entries = Vec::with_capacity(features.len() * (D + 1));
    let mut simplices = Vec::new();
    // Features next to each other mostly share vertices: the last answer for vertex r is tried before the map.
    let mut last = [None; points::MAX_VERTICES];
    for (chunk_idx, chunk) in features.chunks(BUILD_CHUNK).enumerate() {
        chunk
            .par_iter()
            .with_min_len(256)
            .map(|feature| enclose(feature, &scale))
            .collect_into_vec(&mut simplices);
        for (offset, simplex) in simplices.iter().enumerate() {
            let Some(simplex) = simplex else {
                return Err(CrfError::FeatureRange {
                    index: chunk_idx * BUILD_CHUNK + offset,
                });
            };
            for (r, last) in last[..=D].iter_mut().enumerate() {
                let key = simplex.vertices[r];
                let at = match *last {
                    Some((seen, at)) if seen == key => at,
                    _ => index.find_or_insert(key),
                };
                *last = Some((key, at));
                entries.push(Entry {
                    at,
                    weight: simplex.weights[r],
                });
            }
        }
    }
    Ok((index, entries))
}

/// The same entries by lattice point, pixels ascending within each.
fn transpose(slice: &[Entry], n_vertices: usize, n_points: usize) -> (Vec<u32>, Vec<Entry>) {
    let mut starts = vec![0_u32; n_points + 1];
    for entry in slice {
        starts[entry.at as usize] += 1;
    }
    // starts[row] is now the count of row ≥ 1; running sums make it the end of row, i.e. the start of row + 1.
    let mut total = 0;
    for end in &mut starts {
        total += *end;
        *end = total;
    }
    let mut next = starts.clone();
    let mut splat = vec![Entry { at: 0, weight: 0.0 }; slice.len()];
    for (pixel, row) in slice.chunks_exact(n_vertices).enumerate() {
        for entry in row {
            let next = &mut next[entry.at as usize - 1];
            splat[*next as usize] = Entry {
                at: pixel as u32,
                weight: entry.weight,
            };
            *next += 1;
        }
    }
    (starts, splat)
}

/// Rows of both neighbors of every point along every axis. Who is above me has me below.
fn connect<const D: usize>(index: &PointIndex) -> Vec<[u32; 2]> {
    let keys = index.keys();
    let mut neighbors = vec![[0; 2]; (D + 1) * keys.len()];
    neighbors
        .par_chunks_mut(keys.len().max(1))
        .enumerate()
        .for_each(|(axis, pairs)| {
            for (point, key) in keys.iter().enumerate() {
                let above = index.find(key.step::<D>(axis));
                pairs[point][1] = above;
                if above != 0 {
                    pairs[above as usize - 1][0] = point as u32 + 1;
                }
            }
        });
    neighbors
}
