//! From label planes to unary energies.

use rayon::prelude::*;

use crate::CrfError;

/// Probabilities are clipped to at least this before the logarithm (`pydensecrf.utils.unary_from_softmax`).
const SMALLEST_PROBABILITY: f32 = 1e-5;

/// ```text
/// U_l = -ln(clip(softmax_l(planes), 1e-5, 1))
/// ```
///
/// CutLER `maskcut/crf.py`. With {0, 1} planes of L labels the chosen label gets p = e/(e + L - 1), 0.73 for two: a
/// weak opinion on purpose, which the picture may overrule.
///
/// | name | meaning |
/// | --- | --- |
/// | `planes` | `[L, H·W]`, any finite values; {0, 1} for masks |
/// | returns | `[L, H·W]` energies, in 0..=11.52 |
///
/// # Errors
/// [`CrfError::NoLabels`], [`CrfError::UnevenPlanes`], [`CrfError::NotFinite`].
pub fn unary_from_planes(planes: &[f32], n_labels: usize) -> Result<Vec<f32>, CrfError> {
    if n_labels == 0 {
        return Err(CrfError::NoLabels);
    }
    if !planes.len().is_multiple_of(n_labels) {
        return Err(CrfError::UnevenPlanes {
            n_labels,
            actual: planes.len(),
        });
    }
    let n_pixels = planes.len() / n_labels;
    check_finite(planes, n_pixels)?;
    let log_normalizers: Vec<f32> = (0..n_pixels)
        .into_par_iter()
        .map(|pixel| {
            let column = || (0..n_labels).map(|label| planes[label * n_pixels + pixel]);
            let max = column().fold(f32::NEG_INFINITY, f32::max);
            max + column().map(|x| (x - max).exp()).sum::<f32>().ln()
        })
        .collect();
    let largest_energy = -SMALLEST_PROBABILITY.ln();
    let mut unary = vec![0.0; planes.len()];
    for (unary, plane) in unary
        .chunks_mut(n_pixels.max(1))
        .zip(planes.chunks(n_pixels.max(1)))
    {
        for ((unary, &x), &log_normalizer) in unary.iter_mut().zip(plane).zip(&log_normalizers) {
            *unary = (log_normalizer - x).clamp(0.0, largest_energy);
        }
    }
    Ok(unary)
}

/// Names the first value that is no number.
pub(crate) fn check_finite(planes: &[f32], n_pixels: usize) -> Result<(), CrfError> {
    match planes.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(CrfError::NotFinite {
            label: at / n_pixels,
            pixel: at % n_pixels,
            value: planes[at],
        }),
    }
}
