//! What multiplies tiles where there are vectors of bf16 and no matrix unit (AVX512-BF16: AMD from Zen 4, some Intel).
#![expect(
    unsafe_code,
    reason = "vector instructions take raw pointers, which the caller has checked"
)]

use std::arch::x86_64::*;

use super::block::{BLOCK, Right, TILE};

/// Rows whose sums are in registers at a time, over all columns of a block.
const ROWS: usize = 8;
/// Parts of steps whose factors stay in the first cache while all rows of a block pass.
const AT_ONCE: usize = 8;

/// Σ over steps of left · right to a block, or added to it, of factors of P parts.
///
/// # Safety
/// As in [`super::kernel::Configured::block`], whose checks vouch for `left`, `right` and `steps`; `dst` are 32 rows of 32
/// numbers with this distance, borrowed exclusively. The processor has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn block<const P: usize>(
    left: &[u32],
    right: Right<'_>,
    steps: &[usize],
    is_added: bool,
    (dst, dst_row): (*mut f32, usize),
) {
    let at_once = AT_ONCE / P;
    for (i, steps) in steps.chunks(at_once).enumerate() {
        for first in (0..BLOCK).step_by(ROWS) {
            // SAFETY: by the caller.
            unsafe {
                let left = left.as_ptr().add(i * at_once * P * 2 * TILE);
                let left = left.add(first / 16 * TILE + first % 16 * 16);
                let dst = (dst.add(first * dst_row), dst_row);
                rows::<P>(left, right, steps, is_added || i > 0, dst);
            }
        }
    }
}

/// # Safety
/// As in [`block`]; `left` points to the first of the rows, in the first tile of theirs.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn rows<const P: usize>(
    left: *const u32,
    right: Right<'_>,
    steps: &[usize],
    is_added: bool,
    (dst, dst_row): (*mut f32, usize),
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    // SAFETY: by the caller.
    unsafe {
        if is_added {
            for (row, sums) in sums.iter_mut().enumerate() {
                let dst = dst.add(row * dst_row);
                *sums = [_mm512_loadu_ps(dst), _mm512_loadu_ps(dst.add(16))];
            }
        }
        for (step, &at) in steps.iter().enumerate() {
            // The smallest products first.
            for of_left in (0..P).rev() {
                let left = left.add((step * P + of_left) * 2 * TILE);
                for of_right in 0..P - of_left {
                    let right_words = right.words.as_ptr().add(at + of_right * right.part);
                    for pair in 0..16 {
                        let words = right_words.add(pair * right.row);
                        let columns = [bf16(words), bf16(words.add(right.second))];
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let word = _mm512_set1_epi32(*left.add(row * 16 + pair) as i32);
                            let word: __m512bh = std::mem::transmute(word);
                            sums[0] = _mm512_dpbf16_ps(sums[0], word, columns[0]);
                            sums[1] = _mm512_dpbf16_ps(sums[1], word, columns[1]);
                        }
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let dst = dst.add(row * dst_row);
            _mm512_storeu_ps(dst, sums[0]);
            _mm512_storeu_ps(dst.add(16), sums[1]);
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
