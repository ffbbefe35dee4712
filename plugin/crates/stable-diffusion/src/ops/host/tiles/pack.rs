//! Factors of f32 as tiles of bf16.
//!
//! A packed factor lies as the kernel reads it: block by block of 32 rows (or columns), in it step by step of 32 k, in it
//! part by part, the largest first, two tiles.

use rayon::prelude::*;

use super::super::gemm::Matrix;
use super::super::numbers::Number;
use super::block::{BLOCK, STEP, TILE};
use super::kernel::Tiles;
use super::order::Blocks;

/// Rows, or columns, of a tile; also words of its rows.
pub(super) const LINES: usize = 16;

/// Of a 3x3 kernel.
pub(super) const TAPS: usize = 9;

/// Blocks of lines that lie across, packed by one thread: so much of a row of memory is read at a time.
const ACROSS: usize = 8;

/// How the words of a tile lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// `[row][k / 2]`
    Left,
    /// `[k / 2][column]`
    Right,
}

/// Words of one step of a block of P parts.
pub(super) const fn step_words(n_parts: usize) -> usize {
    n_parts * 2 * TILE
}

/// Words of a packed factor of so many rows or columns.
pub(super) fn packed_len(n_parts: usize, n_lines: usize, k: usize) -> usize {
    n_lines.div_ceil(BLOCK) * k.div_ceil(STEP) * step_words(n_parts)
}

/// Packs a factor `[rows or columns, k]`; what is missing to whole blocks is zero.
pub(super) fn pack<const P: usize, T: Number>(
    tiles: Tiles,
    side: Side,
    lines: Matrix<'_, T>,
    words: &mut [u32],
) {
    let [_, k] = lines.dims();
    let block_words = k.div_ceil(STEP) * step_words(P);
    let n_together = if lie_across(lines) { ACROSS } else { 1 };
    let groups = words.par_chunks_mut(n_together * block_words).enumerate();
    groups.for_each(|(group, words)| {
        pack_blocks::<P, T>(tiles, side, lines, group * n_together, words);
    });
}

/// [`pack`] on the calling thread.
pub(super) fn pack_alone<const P: usize, T: Number>(
    tiles: Tiles,
    side: Side,
    lines: Matrix<'_, T>,
    words: &mut [u32],
) {
    pack_blocks::<P, T>(tiles, side, lines, 0, words);
}

/// [`pack`] of a weight in the order of tiles.
pub(super) fn pack_ordered<const P: usize>(side: Side, lines: Blocks<'_>, words: &mut [u32]) {
    let block_words = lines.dims()[1] / STEP * step_words(P);
    let blocks = words.par_chunks_mut(block_words).enumerate();
    blocks.for_each(|(block, words)| {
        let lines = lines.rows(block * BLOCK..(block + 1) * BLOCK);
        pack_ordered_alone::<P>(side, lines, words);
    });
}

/// [`pack_ordered`] on the calling thread.
pub(super) fn pack_ordered_alone<const P: usize>(side: Side, lines: Blocks<'_>, words: &mut [u32]) {
    let n_steps = lines.dims()[1] / STEP;
    for (i, words) in words.chunks_exact_mut(step_words(P)).enumerate() {
        lines.pack::<P>(side, [i / n_steps, i % n_steps], words);
    }
}

/// Whether neighbors in memory are of different lines.
fn lie_across<T: Number>(lines: Matrix<'_, T>) -> bool {
    lines.strides()[0] == 1 && lines.strides()[1] != 1
}

/// Blocks from one on, as they are read from one end of the memory to the other.
fn pack_blocks<const P: usize, T: Number>(
    tiles: Tiles,
    side: Side,
    lines: Matrix<'_, T>,
    first: usize,
    words: &mut [u32],
) {
    let [_, k] = lines.dims();
    let n_steps = k.div_ceil(STEP);
    let n_blocks = words.len() / (n_steps * step_words(P));
    let mut pack = |block: usize, step: usize| {
        let words = &mut words[(block * n_steps + step) * step_words(P)..][..step_words(P)];
        for half in 0..2 {
            let at = [(first + block) * BLOCK + half * LINES, step * STEP];
            pack_tile::<P, T>(tiles, side, lines, at, &mut words[half * TILE..]);
        }
    };
    if lie_across(lines) {
        (0..n_steps).for_each(|step| (0..n_blocks).for_each(|block| pack(block, step)));
    } else {
        (0..n_blocks).for_each(|block| (0..n_steps).for_each(|step| pack(block, step)));
    }
}

/// A tile of 16 lines and 32 k for every part; `words` begin with the first of them.
fn pack_tile<const P: usize, T: Number>(
    tiles: Tiles,
    side: Side,
    lines: Matrix<'_, T>,
    [line, k]: [usize; 2],
    words: &mut [u32],
) {
    let ([n_lines, n_k], [line_stride, k_stride]) = (lines.dims(), lines.strides());
    let n_lines = n_lines.saturating_sub(line).min(LINES);
    let n_k = n_k.saturating_sub(k).min(STEP);
    let at = |i: usize, j: usize| (line + i) * line_stride + (k + j) * k_stride;
    if [n_lines, n_k] == [LINES, STEP] {
        if k_stride == 1 {
            let values = &lines.data()[at(0, 0)..];
            return pack_lines::<P, T>(tiles, side, values, line_stride, words);
        }
        if line_stride == 1 {
            let values = &lines.data()[at(0, 0)..];
            return tiles.across::<P, T>(values, k_stride, words, 2 * TILE, side == Side::Left);
        }
    }
    let mut copy = [0.0; LINES * STEP];
    for (i, copy) in copy.chunks_exact_mut(STEP).enumerate().take(n_lines) {
        for (j, copy) in copy.iter_mut().enumerate().take(n_k) {
            *copy = lines.data()[at(i, j)].to_f32();
        }
    }
    pack_lines::<P, f32>(tiles, side, &copy, STEP, words);
}

/// [`pack_tile`] of lines of neighboring numbers with this distance.
pub(super) fn pack_lines<const P: usize, T: Number>(
    tiles: Tiles,
    side: Side,
    lines: &[T],
    distance: usize,
    words: &mut [u32],
) {
    tiles.neighbors::<P, T>(lines, distance, words, 2 * TILE, side == Side::Right);
}
