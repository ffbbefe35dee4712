//! Attention maps in picture space, before any threshold.

use crate::size::Size;

/// Maps of one picture's concepts, in its order: `[C][H · W]`, at least 0, not normalized.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionMaps {
    /// Width and height in pixels of the picture.
    pub size: Size,
    /// One map per concept.
    pub maps: Vec<Vec<f32>>,
}

/// Bilinear, pixel centers, edges repeated; of the size `to`.
pub(crate) fn upsample_linear(plane: &[f32], from: Size, to: Size) -> Vec<f32> {
    let places = |from: usize, to: usize| -> Vec<(usize, usize, f32)> {
        let place = |at: usize| {
            let center = (at as f32 + 0.5) * from as f32 / to as f32 - 0.5;
            let low = center.floor();
            let cell = |v: f32| v.clamp(0.0, from as f32 - 1.0) as usize;
            (cell(low), cell(low + 1.0), center - low)
        };
        (0..to).map(place).collect()
    };
    let rows = places(from.height, to.height);
    let columns = places(from.width, to.width);
    (0..to.area())
        .map(|i| {
            let (y, x) = to.place(i);
            let ((y0, y1, v), (x0, x1, u)) = (rows[y], columns[x]);
            let at = |y: usize, x: usize| plane[y * from.width + x];
            let row = |y: usize| at(y, x0) * (1.0 - u) + at(y, x1) * u;
            row(y0) * (1.0 - v) + row(y1) * v
        })
        .collect()
}
