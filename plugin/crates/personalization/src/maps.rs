//! Attention maps in picture space, before any threshold.

/// Maps of one picture's concepts, in its order: `[C][size · size]`, at least 0, not normalized.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionMaps {
    /// Width and height in pixels of the picture.
    pub size: usize,
    /// One map per concept.
    pub maps: Vec<Vec<f32>>,
}

/// Bilinear, pixel centers, edges repeated; `[to · to]`.
pub(crate) fn upsample_linear(plane: &[f32], from: usize, to: usize) -> Vec<f32> {
    let place = |at: usize| {
        let center = (at as f32 + 0.5) * from as f32 / to as f32 - 0.5;
        let low = center.floor();
        let cell = |v: f32| v.clamp(0.0, from as f32 - 1.0) as usize;
        (cell(low), cell(low + 1.0), center - low)
    };
    let places: Vec<(usize, usize, f32)> = (0..to).map(place).collect();
    (0..to * to)
        .map(|i| {
            let ((y0, y1, v), (x0, x1, u)) = (places[i / to], places[i % to]);
            let row = |y: usize| plane[y * from + x0] * (1.0 - u) + plane[y * from + x1] * u;
            row(y0) * (1.0 - v) + row(y1) * v
        })
        .collect()
}
