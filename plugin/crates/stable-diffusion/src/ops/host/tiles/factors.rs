//! What is multiplied, and with what.

use crate::ops::Precision;

use super::Tiles;

/// What a factor of f32 is multiplied as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Factors {
    /// One bf16 number: 8 bits of its significand.
    Rounded,
    /// The sum of two: 16 bits. Of the four products the smallest is left out.
    Paired,
    /// The sum of three: all 24 bits. Of the nine products the three smallest are left out.
    Exact,
}

impl Factors {
    pub(crate) fn n_parts(self) -> usize {
        match self {
            Self::Rounded => 1,
            Self::Paired => 2,
            Self::Exact => 3,
        }
    }

    /// Rows and columns from which on packing both factors is little beside their product (measured).
    fn least_lines(self) -> usize {
        match self {
            Self::Rounded => 48,
            Self::Paired | Self::Exact => 64,
        }
    }

    /// Pixels from which on that holds for a 3x3 convolution.
    fn least_pixels(self) -> usize {
        match self {
            Self::Rounded => 48,
            Self::Paired | Self::Exact => 64,
        }
    }
}

/// How the products of an operation are computed; it is asked for where the operation is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Means {
    tiles: Option<Tiles>,
    factors: Factors,
}

impl Means {
    /// Those of this thread's precision.
    pub(crate) fn current() -> Self {
        let factors = match Precision::current() {
            Precision::F32 | Precision::F16 => Factors::Exact,
            Precision::Bf16 => Factors::Rounded,
        };
        Self {
            tiles: Tiles::get(factors),
            factors,
        }
    }

    /// Whether products round their factors.
    pub(crate) fn rounds(self) -> bool {
        self.tiles.is_some() && self.factors == Factors::Rounded
    }

    /// Tiles for a product of these dimensions, if they take less time than vectors of f32.
    pub(crate) fn for_product(self, [m, n, k]: [usize; 3]) -> Option<(Tiles, Factors)> {
        let is_worth_it = m.min(n) >= self.factors.least_lines() && k >= 32;
        self.tiles
            .filter(|_| is_worth_it)
            .map(|tiles| (tiles, self.factors))
    }

    /// Tiles for a 3x3 convolution of pictures of so many pixels; not of ones that would take much memory when packed, as
    /// the VAE's largest would.
    pub(crate) fn for_convolution(
        self,
        n_pixels: usize,
        [n_in, n_out]: [usize; 2],
    ) -> Option<(Tiles, Factors)> {
        /// Of 32 bits: 64 MiB.
        const MOST_WORDS: usize = 1 << 24;
        let words = n_pixels * n_in.div_ceil(2) * self.factors.n_parts();
        let is_worth_it =
            n_pixels >= self.factors.least_pixels() && n_in.min(n_out) >= 32 && words <= MOST_WORDS;
        self.tiles
            .filter(|_| is_worth_it)
            .map(|tiles| (tiles, self.factors))
    }

    /// Whether products of all numbers take less time than transforms that save three of four.
    pub(crate) fn multiplies_fast(self) -> bool {
        self.tiles.is_some_and(Tiles::have_matrix_unit)
    }

    /// Tiles for attention to so many keys.
    pub(crate) fn for_attention(
        self,
        n_keys: usize,
        head_width: usize,
    ) -> Option<(Tiles, Factors)> {
        let is_worth_it = n_keys >= 256 && head_width >= 16;
        self.tiles
            .filter(|_| is_worth_it)
            .map(|tiles| (tiles, self.factors))
    }
}
