//! What multiplies tiles where there are vectors of bf16 and no matrix unit (AVX512-BF16: AMD from Zen 4, some Intel).
#![expect(
    unsafe_code,
    reason = "vector instructions take raw pointers, which the caller has checked"
)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::block::{Left, Steps, TILE, TallSums, Used};

/// Rows whose sums are in registers at a time, over all columns of a block.
const ROWS: usize = 8;
/// Parts of steps whose factors stay in the first cache while all rows of a block pass.
const AT_ONCE: usize = 8;

/// Σ over steps of left · right to a block, or added to it, of factors of P parts.
///
/// # Safety
/// As in [`super::kernel::Configured::block`], whose checks vouch for `left`, `right` and `n_steps`; `dst` are 32 rows of 32
/// numbers with this distance, borrowed exclusively. The processor has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn block<const P: usize>(
    left: &[u32],
    right: &[u32],
    n_steps: usize,
    Used { dims, last_words }: Used,
    is_added: bool,
    (dst, dst_row): (*mut f32, usize),
) {
    let at_once = AT_ONCE / P;
    for start in (0..n_steps).step_by(at_once) {
        let steps = start..n_steps.min(start + at_once);
        let last_words = if steps.end == n_steps { last_words } else { 16 };
        for first in (0..dims[0]).step_by(ROWS) {
            let row = first / 16 * TILE + first % 16 * 16;
            let left = |step: usize, part: usize| {
                left.as_ptr()
                    .wrapping_add(row + (step * P + part) * 2 * TILE)
            };
            let is_added = is_added || start > 0;
            // SAFETY: by the caller.
            unsafe {
                let dst = dst.add(first * dst_row);
                let steps = (steps.clone(), last_words);
                if dims[1] <= 16 {
                    rows::<P, 1>(left, right, steps, is_added, [(dst, dst_row)]);
                } else {
                    let dst = [(dst, dst_row), (dst.add(16), dst_row)];
                    rows::<P, 2>(left, right, steps, is_added, dst);
                }
            }
        }
    }
}

/// Σ over steps of left · right to a tall block, of factors of P parts.
///
/// # Safety
/// As in [`super::kernel::Configured::tall_block`], whose checks vouch for the factors. The processor has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn tall_block<const P: usize>(
    left: Left<'_>,
    steps: &Steps,
    right: &[u32],
    sums: &mut TallSums,
) {
    let at_once = AT_ONCE / P;
    let all = steps.as_slice();
    let [low, high] = &mut sums.0;
    for start in (0..all.len()).step_by(at_once) {
        let steps = start..all.len().min(start + at_once);
        for (tile, (low, high)) in left.tiles.into_iter().zip(low.iter_mut().zip(&mut *high)) {
            for first in (0..16).step_by(ROWS) {
                let row = tile + 16 * first;
                let left = |step: usize, part: usize| {
                    left.words
                        .as_ptr()
                        .wrapping_add(row + all[step].offset + part * left.part)
                };
                let dst = [&mut *low, &mut *high].map(|sums| (sums[16 * first..].as_mut_ptr(), 16));
                // SAFETY: by the caller.
                unsafe { rows::<P, 2>(left, right, (steps.clone(), 16), start > 0, dst) }
            }
        }
    }
}

/// Σ over some steps of eight rows, the words of which `left` finds by step and part, times `right`, to where C times 16
/// columns go: rows with a distance. Of the last step so many words are used.
///
/// # Safety
/// 16 words of every row can be read, two tiles of every part of a step of the right, and 16 numbers of every row written.
/// The processor has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn rows<const P: usize, const C: usize>(
    left: impl Fn(usize, usize) -> *const u32,
    right: &[u32],
    (steps, last_words): (Range<usize>, usize),
    is_added: bool,
    dst: [(*mut f32, usize); C],
) {
    let mut sums = [[_mm512_setzero_ps(); C]; ROWS];
    // SAFETY: by the caller.
    unsafe {
        if is_added {
            for (row, sums) in sums.iter_mut().enumerate() {
                *sums = dst.map(|(dst, distance)| _mm512_loadu_ps(dst.add(row * distance)));
            }
        }
        for step in steps.clone() {
            let n_words = if step + 1 == steps.end {
                last_words
            } else {
                16
            };
            // The smallest products first.
            for of_left in (0..P).rev() {
                let left = left(step, of_left);
                for of_right in (0..P - of_left).rev() {
                    let right = right.as_ptr().add((step * P + of_right) * 2 * TILE);
                    for pair in 0..n_words {
                        let mut columns = [bf16(right.add(pair * 16)); C];
                        if C > 1 {
                            columns[1] = bf16(right.add(TILE + pair * 16));
                        }
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let word = _mm512_set1_epi32(*left.add(row * 16 + pair) as i32);
                            let word: __m512bh = std::mem::transmute(word);
                            for (sum, columns) in sums.iter_mut().zip(columns) {
                                *sum = _mm512_dpbf16_ps(*sum, word, columns);
                            }
                        }
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for ((dst, distance), sums) in dst.into_iter().zip(sums) {
                _mm512_storeu_ps(dst.add(row * distance), *sums);
            }
        }
    }
}

/// # Safety
/// 16 words can be read.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16(words: *const u32) -> __m512bh {
    // SAFETY: by the caller; either type is 64 bytes of any contents.
    unsafe { std::mem::transmute(_mm512_loadu_si512(words.cast())) }
}
