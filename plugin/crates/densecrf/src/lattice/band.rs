//! Consecutive features that number the lattice points they touch among themselves: few points, that stay in a core's
//! cache while its features are read once, and a sum of their own, so that bands need not wait for each other.

use super::points::{self, PointIndex, PointKey};
use super::simplex::{elevation_scale, enclose};

/// Features of one band. Sums are taken band by band, so results depend on it; never on the number of threads.
pub(crate) const FEATURES: usize = 1 << 15;

/// One vertex of a feature's simplex.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    /// Which of the band's points, from 0.
    pub(super) at: u32,
    /// Barycentric, times the feature's norm where the filter is normalized.
    pub(super) weight: f32,
}

/// One band's matrices, and its part of the values.
#[derive(Debug)]
pub(crate) struct Band<'a, const LANES: usize> {
    /// `[n, d + 1]`
    pub(super) entries: &'a [Entry],
    /// d + 1
    pub(super) n_vertices: usize,
    /// What the sum over a simplex still lacks.
    pub(super) gain: f32,
    /// The lattice row of each of the band's points.
    pub(super) rows: &'a [u32],
    /// Of lattice rows along the last axis.
    pub(super) neighbors: &'a [[u32; 2]],
    /// Values of lattice rows, not yet blurred along the last axis.
    pub(super) on_rows: &'a [[f32; LANES]],
    /// What the band's features have splat onto its points, and what they slice from them.
    pub(super) splat: &'a mut [[f32; LANES]],
    pub(super) blurred: &'a mut [[f32; LANES]],
}

impl<const LANES: usize> Band<'_, LANES> {
    /// Blurs along the last axis what comes from the lattice; what the band has splat begins at zero again.
    #[inline(always)]
    pub(crate) fn hear(&mut self) {
        for (value, &row) in self.blurred.iter_mut().zip(self.rows) {
            *value = blurred(self.on_rows, row as usize, self.neighbors[row as usize - 1]);
        }
        self.splat.fill([0.0; LANES]);
    }

    /// Adds to `sums` what comes from the lattice for the band's features from `first` on.
    #[inline(always)]
    pub(crate) fn slice_onto<const WIDTH: usize>(&self, first: usize, sums: &mut [[f32; WIDTH]]) {
        // The count of a simplex's vertices has to be known where they are gone through.
        match self.n_vertices {
            2 => self.slice_simplices::<2, WIDTH>(first, sums),
            3 => self.slice_simplices::<3, WIDTH>(first, sums),
            4 => self.slice_simplices::<4, WIDTH>(first, sums),
            5 => self.slice_simplices::<5, WIDTH>(first, sums),
            6 => self.slice_simplices::<6, WIDTH>(first, sums),
            7 => self.slice_simplices::<7, WIDTH>(first, sums),
            _ => self.slice_simplices::<8, WIDTH>(first, sums),
        }
    }

    #[inline(always)]
    fn slice_simplices<const VERTICES: usize, const WIDTH: usize>(
        &self,
        first: usize,
        sums: &mut [[f32; WIDTH]],
    ) {
        let (simplices, _) = self.entries.as_chunks::<VERTICES>();
        for (simplex, sum) in simplices[first..].iter().zip(sums) {
            let mut sliced = [0.0; LANES];
            for entry in simplex {
                add_scaled(&mut sliced, entry.weight, &self.blurred[entry.at as usize]);
            }
            add_scaled(sum, self.gain, &sliced);
        }
    }

    /// Adds the values of the band's features from `first` on to its points.
    #[inline(always)]
    pub(crate) fn splat<const WIDTH: usize>(&mut self, first: usize, values: &[[f32; WIDTH]]) {
        match self.n_vertices {
            2 => self.splat_simplices::<2, WIDTH>(first, values),
            3 => self.splat_simplices::<3, WIDTH>(first, values),
            4 => self.splat_simplices::<4, WIDTH>(first, values),
            5 => self.splat_simplices::<5, WIDTH>(first, values),
            6 => self.splat_simplices::<6, WIDTH>(first, values),
            7 => self.splat_simplices::<7, WIDTH>(first, values),
            _ => self.splat_simplices::<8, WIDTH>(first, values),
        }
    }

    #[inline(always)]
    fn splat_simplices<const VERTICES: usize, const WIDTH: usize>(
        &mut self,
        first: usize,
        values: &[[f32; WIDTH]],
    ) {
        let (simplices, _) = self.entries.as_chunks::<VERTICES>();
        for (simplex, value) in simplices[first..].iter().zip(values) {
            for entry in simplex {
                let point = &mut self.splat[entry.at as usize];
                // By value, or the compiler takes it for part of `values` and goes lane by lane.
                let mut sum = *point;
                add_scaled(&mut sum, entry.weight, value);
                *point = sum;
            }
        }
    }
}

/// `(½, 1, ½)` along one axis.
#[inline(always)]
pub(super) fn blurred<const LANES: usize>(
    rows: &[[f32; LANES]],
    row: usize,
    neighbors: [u32; 2],
) -> [f32; LANES] {
    let [below, above] = neighbors.map(|row| rows[row as usize]);
    let mut sum = rows[row];
    for lane in 0..LANES {
        sum[lane] += 0.5 * (below[lane] + above[lane]);
    }
    sum
}

/// `sum += weight · value`, as many lanes as both have. Two roundings, never a fused one, so that all processors agree.
#[inline(always)]
fn add_scaled<const SUMS: usize, const VALUES: usize>(
    sum: &mut [f32; SUMS],
    weight: f32,
    value: &[f32; VALUES],
) {
    for (sum, value) in sum.iter_mut().zip(value) {
        *sum += weight * value;
    }
}

/// Finds the simplices of a band's features and numbers their vertices in order of first appearance.
///
/// # Errors
/// The first feature that is too far away or not finite, counted within the band.
#[inline(always)]
pub(super) fn place<const D: usize>(
    features: &[[f32; D]],
    entries: &mut [Entry],
) -> Result<Vec<PointKey>, usize> {
    let scale = elevation_scale::<D>();
    let mut index = PointIndex::new();
    // Features next to each other often share vertices: the last answer for vertex r is tried before the map.
    let mut last = [None; points::MAX_VERTICES];
    for (position, (feature, row)) in features
        .iter()
        .zip(entries.chunks_exact_mut(D + 1))
        .enumerate()
    {
        let simplex = enclose(feature, &scale).ok_or(position)?;
        for (r, (entry, last)) in row.iter_mut().zip(&mut last).enumerate() {
            let key = simplex.vertices[r];
            let at = match *last {
                Some((seen, at)) if seen == key => at,
                _ => index.number(key) - 1,
            };
            *last = Some((key, at));
            *entry = Entry {
                at,
                weight: simplex.weights[r],
            };
        }
    }
    Ok(index.into_keys())
}
