//! Sixteen rows of sixteen numbers that become columns.
#![expect(
    unsafe_code,
    reason = "vector instructions take raw pointers; what they read is checked before"
)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::numbers::Number;

/// Rows and columns.
pub(crate) const SIDE: usize = 16;

/// A row of numbers.
pub(crate) type Lanes = [f32; SIDE];

/// The columns of sixteen rows of `values`, the beginnings of which lie `distance` apart. Rows that lie `ahead` of these are
/// soon turned too, if there are any.
pub(crate) fn turn<T: Number>(
    values: &[T],
    distance: usize,
    ahead: usize,
    columns: &mut [Lanes; SIDE],
) {
    let values = &values[..(SIDE - 1) * distance + SIDE];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the instructions; the last row ends where `values` do.
        return unsafe { turn_by_vectors(values, distance, ahead, columns) };
    }
    for row in 0..SIDE {
        for (column, value) in columns.iter_mut().zip(&values[row * distance..]) {
            column[row] = value.to_f32();
        }
    }
}

/// # Safety
/// Sixteen rows of `values` can be read. The processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn turn_by_vectors<T: Number>(
    values: &[T],
    distance: usize,
    ahead: usize,
    columns: &mut [Lanes; SIDE],
) {
    let mut rows = [_mm512_setzero_si512(); SIDE];
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: by the caller.
        *row = unsafe {
            let row = values.as_ptr().add(i * distance);
            // Nothing need be there.
            _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(ahead).cast());
            if T::IS_F32 {
                _mm512_loadu_si512(row.cast())
            } else {
                _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(row.cast())))
            }
        };
    }
    for (to, column) in columns.iter_mut().zip(turned(rows)) {
        // SAFETY: a column is as long as a vector.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), column) }
    }
}

/// The columns of rows in registers: pairs of words, pairs of pairs, then quarters of registers change places.
#[inline]
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(crate) fn turned(rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    let mut pairs = rows;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // fours[4 g + c]: in every quarter column c of that quarter, of rows 4 g to 4 g + 3.
    let mut fours = pairs;
    for g in 0..4 {
        fours[4 * g] = _mm512_unpacklo_epi64(pairs[4 * g], pairs[4 * g + 2]);
        fours[4 * g + 1] = _mm512_unpackhi_epi64(pairs[4 * g], pairs[4 * g + 2]);
        fours[4 * g + 2] = _mm512_unpacklo_epi64(pairs[4 * g + 1], pairs[4 * g + 3]);
        fours[4 * g + 3] = _mm512_unpackhi_epi64(pairs[4 * g + 1], pairs[4 * g + 3]);
    }
    let mut columns = fours;
    for c in 0..4 {
        let [a, b, x, y] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
        // Even quarters of both, then odd ones.
        let [even, even_below] = [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(x, y),
        ];
        let [odd, odd_below] = [
            _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(x, y),
        ];
        columns[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even, even_below);
        columns[8 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even, even_below);
        columns[4 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd, odd_below);
        columns[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd, odd_below);
    }
    columns
}
