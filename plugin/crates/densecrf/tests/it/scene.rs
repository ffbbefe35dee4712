//! A made-up picture: noisy shapes on a shaded ground, and label planes that miss the shapes by some pixels.

#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) width: usize,
    pub(crate) height: usize,
    /// `[H, W, 3]`
    pub(crate) rgb: Vec<u8>,
    /// `[L, H·W]` of {0, 1}
    pub(crate) planes: Vec<f32>,
    pub(crate) n_labels: usize,
}

/// Well-mixed bits of a counter (the finalizer of MurmurHash3).
pub(crate) fn mix(n: u32) -> u32 {
    let n = (n ^ (n >> 16)).wrapping_mul(0x85EB_CA6B);
    let n = (n ^ (n >> 13)).wrapping_mul(0xC2B2_AE35);
    n ^ (n >> 16)
}

/// In [0, 1).
pub(crate) fn unit(n: u32) -> f64 {
    f64::from(mix(n)) / 2_f64.powi(32)
}

impl Scene {
    /// Label 0 is the ground; labels 1.. are discs side by side.
    pub(crate) fn new(width: usize, height: usize, n_labels: usize) -> Self {
        let n_discs = n_labels.max(2) - 1;
        let true_label = |x: f64, y: f64| {
            let column =
                (x / width as f64 * n_discs as f64).clamp(0.0, n_discs as f64 - 1.0) as usize;
            let center_x = (column as f64 + 0.5) * width as f64 / n_discs as f64;
            let radius = 0.42 * (width as f64 / n_discs as f64).min(height as f64);
            let inside = (x - center_x).hypot(y - 0.5 * height as f64) < radius;
            if inside { column + 1 } else { 0 }
        };
        let mut rgb = Vec::new();
        let mut planes = vec![0.0; n_labels * width * height];
        for pixel in 0..width * height {
            let (x, y) = ((pixel % width) as f64, (pixel / width) as f64);
            let label = true_label(x, y);
            for c in 0..3 {
                let base = if label == 0 {
                    60.0 + 80.0 * y / height as f64
                } else {
                    255.0 * unit((label * 3 + c) as u32)
                };
                rgb.push(
                    (base + 8.0 * unit((pixel * 3 + c) as u32 + 1000)).clamp(0.0, 255.0) as u8,
                );
            }
            // Shifted by two pixels, and one pixel in ten says something random.
            let misled = unit(pixel as u32 ^ 0x5555_0000) < 0.1;
            let seen = if misled {
                mix(pixel as u32) as usize % n_labels
            } else {
                true_label(x - 2.0, y - 1.0)
            };
            planes[seen.min(n_labels - 1) * width * height + pixel] = 1.0;
        }
        Self {
            width,
            height,
            rgb,
            planes,
            n_labels,
        }
    }
}

/// Share of equal entries.
pub(crate) fn agreement(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

/// Largest absolute difference.
pub(crate) fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}
