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

/// Sums of one block, row by row.
#[repr(C, align(64))]
#[derive(Debug)]
pub(super) struct Sums(pub(super) [f32; BLOCK * BLOCK]);

/// The right factor of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Right<'a> {
    pub(super) words: &'a [u32],
    /// Words from a row of a tile to the next.
    pub(super) row: usize,
    /// Words from the first tile to the one beside it.
    pub(super) second: usize,
    /// Words from one part to the next smaller one.
    pub(super) part: usize,
}

impl<'a> Right<'a> {
    /// Words of a block of a packed factor.
    pub(super) fn packed(words: &'a [u32]) -> Self {
        Self {
            words,
            row: 16,
            second: TILE,
            part: 2 * TILE,
        }
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
