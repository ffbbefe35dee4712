//! How factors and sums lie.
//!
//! A tile register holds 16 rows of 16 words of 32 bits. A word of a factor is two bf16 numbers whose place in the sum
//! over k is next to each other: `[row][k / 2]` on the left, `[k / 2][column]` on the right. `tdpbf16ps` adds the product
//! of 16 rows, 32 k and 16 columns to a tile of f32 sums.

/// Words of a tile.
pub(super) const TILE: usize = 16 * 16;
/// Rows and columns of a block of sums: two tiles each way.
pub(crate) const BLOCK: usize = 32;
/// k of one step.
pub(super) const STEP: usize = 32;

/// Rows of a tall block of sums: three tiles of them, beside two of columns. More tiles of sums leave none to load factors to.
pub(super) const TALL: usize = 3;

/// What of a block is not filled up with zeros. A matrix unit multiplies them all the same.
#[derive(Debug, Clone, Copy)]
pub(super) struct Used {
    /// Rows and columns; the others keep what they have, or get it multiplied too.
    pub(super) dims: [usize; 2],
    /// Words of each row of the last step.
    pub(super) last_words: usize,
}

impl Used {
    /// Everything.
    pub(super) const WHOLE: Self = Self {
        dims: [BLOCK; 2],
        last_words: STEP / 2,
    };
}

/// Sums of one block, row by row.
#[repr(C, align(64))]
#[derive(Debug)]
pub(super) struct Sums(pub(super) [f32; BLOCK * BLOCK]);

/// Sums of one tall block, tile by tile: those of the first 16 columns, then those of the second.
#[repr(C, align(64))]
#[derive(Debug)]
pub(super) struct TallSums(pub(super) [[[f32; TILE]; TALL]; 2]);

/// The left factor of a tall block, which lies as the kernel of a convolution walks over it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) words: &'a [u32],
    /// Where its tiles begin; what a step adds to that is in [`Steps`].
    pub(super) tiles: [usize; TALL],
    /// Words from one part to the next smaller one.
    pub(super) part: usize,
}

/// A step of a product of tall blocks.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// Words from where left tiles begin.
    pub(super) offset: usize,
    /// The same of words that are soon needed: 17 times 16, counted from the first tile. None need be there.
    pub(super) ahead: usize,
}

/// Steps of a product of tall blocks.
#[derive(Debug)]
pub(super) struct Steps {
    steps: Vec<Step>,
    furthest: usize,
}

impl Steps {
    /// At least one.
    pub(super) fn new(steps: Vec<Step>) -> Self {
        assert!(!steps.is_empty(), "a product of no steps");
        let furthest = steps.iter().map(|step| step.offset).fold(0, usize::max);
        Self { steps, furthest }
    }

    pub(super) fn as_slice(&self) -> &[Step] {
        &self.steps
    }

    /// The largest offset.
    pub(super) fn furthest(&self) -> usize {
        self.furthest
    }
}

/// Scores of 32 keys, row by row, and where their softmax goes.
#[derive(Debug)]
pub(crate) struct Strip<'a> {
    /// Products of keys and queries, and dP: `[32, width]`
    pub(crate) scores: &'a [f32],
    pub(crate) d_scores: &'a [f32],
    /// L and D of every query.
    pub(crate) log_sums: &'a [f32],
    pub(crate) means: &'a [f32],
    /// P and dS as left factors, a block of 32 keys by `width` of k.
    pub(crate) p_left: &'a mut [u32],
    pub(crate) d_left: &'a mut [u32],
}
