//! Width and height: of pictures, latents and maps.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Of a plane whose values lie row after row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Size {
    /// Values a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl Size {
    /// From width and height.
    #[must_use]
    pub const fn new(width: usize, height: usize) -> Self {
        Self { width, height }
    }

    /// As high as wide.
    #[must_use]
    pub const fn square(side: usize) -> Self {
        Self::new(side, side)
    }

    /// Values of a plane. A file may claim any size: one that no plane has is the largest.
    #[must_use]
    pub const fn area(self) -> usize {
        self.width.saturating_mul(self.height)
    }

    /// Width and height divided by `n`.
    #[must_use]
    pub const fn divided_by(self, n: usize) -> Self {
        Self::new(self.width / n, self.height / n)
    }

    /// The size at which a picture of this one is learned: its own proportions with sides that are multiples of `unit`,
    /// and about the area of a square of `side`. A square picture gets that square.
    ///
    /// Of all such sizes it is the one with the smallest error, the logarithm of that of the proportions counted three
    /// times as much as that of the area. With 8 units a side, pictures of up to 3 to 1 are stretched by at most 8 %.
    #[must_use]
    pub fn to_learn(self, side: usize, unit: usize) -> Self {
        if self.width == self.height {
            return Self::square(side);
        }
        let wanted = (self.width.max(1) as f64 / self.height.max(1) as f64).ln();
        let area = (side as f64).powi(2);
        let error = |size: Self| {
            let (width, height) = (size.width as f64, size.height as f64);
            3.0 * ((width / height).ln() - wanted).abs() + (width * height / area).ln().abs()
        };
        let most = side.div_ceil(unit).pow(2);
        let sizes = (1..=most).flat_map(|w| (1..=most).map(move |h| Self::new(w * unit, h * unit)));
        sizes
            .min_by(|a, b| error(*a).total_cmp(&error(*b)))
            .unwrap_or(Self::square(side))
    }

    /// Row and column of a value.
    pub(crate) const fn place(self, i: usize) -> (usize, usize) {
        (i / self.width, i % self.width)
    }

    /// The cell of another grid over the same picture in which a value lies.
    pub(crate) const fn cell_in(self, i: usize, grid: Self) -> usize {
        let (y, x) = self.place(i);
        y * grid.height / self.height * grid.width + x * grid.width / self.width
    }

    /// The values above, left, right and below.
    pub(crate) fn neighbors(self, i: usize) -> impl Iterator<Item = usize> {
        let (y, x) = self.place(i);
        [
            (y > 0).then(|| i - self.width),
            (x > 0).then(|| i - 1),
            (x + 1 < self.width).then(|| i + 1),
            (y + 1 < self.height).then(|| i + self.width),
        ]
        .into_iter()
        .flatten()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.width, self.height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_learned_at_its_own_proportions() {
        for (picture, side, unit, expected) in [
            ((1000, 1000), 512, 64, (512, 512)),
            ((768, 512), 512, 64, (576, 384)),
            ((512, 768), 512, 64, (384, 576)),
            ((1920, 1080), 512, 64, (704, 384)),
            ((192, 128), 128, 16, (144, 96)),
            ((501, 500), 512, 64, (512, 512)),
            ((4000, 300), 512, 64, (1728, 128)),
        ] {
            let (width, height) = picture;
            let found = Size::new(width, height).to_learn(side, unit);
            assert_eq!(found, Size::new(expected.0, expected.1), "{picture:?}");
        }
    }

    #[test]
    fn cells_and_neighbors_keep_to_the_plane() {
        let size = Size::new(4, 2);
        assert_eq!(size.place(6), (1, 2));
        assert_eq!(size.cell_in(6, Size::new(2, 1)), 1);
        let around = |i| size.neighbors(i).collect::<Vec<_>>();
        assert_eq!(around(0), [1, 4]);
        assert_eq!(around(6), [2, 5, 7]);
    }
}
