//! Numbers into the words of tiles, and scores through the softmax into them; see [`super::block`] for how words lie.
#![expect(
    unsafe_code,
    reason = "vector instructions take raw pointers; every function checks the slices that it reads and writes"
)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::{gemm::MatrixMut, numbers::Number, turn::turned};
use super::block::{BLOCK, STEP, Strip, TILE};
use super::kernel::Tiles;
use super::pack::{LINES, TAPS, packed_len, step_words};

impl Tiles {
    /// Words of neighbors: of row i of `values`, `[16, 32]` with this distance of rows, to row i of a tile, or to its column i
    /// if it is `turned`. `words` holds a tile for every part, the largest first, with a distance of `part`.
    pub(super) fn neighbors<const P: usize, T: Number>(
        self,
        values: &[T],
        distance: usize,
        words: &mut [u32],
        part: usize,
        turned: bool,
    ) {
        assert!(values.len() >= 15 * distance + STEP && words.len() >= (P - 1) * part + TILE);
        // SAFETY: `Tiles` proves that the processor has these instructions; every row lies in its slice.
        unsafe { pack::<P, false, T>(values, distance, words, part, turned) }
    }

    /// Words across rows: of rows 2 i and 2 i + 1 of `values`, `[32, 16]` with this distance of rows, to row i or column i;
    /// the rest as in [`Self::neighbors`].
    pub(super) fn across<const P: usize, T: Number>(
        self,
        values: &[T],
        distance: usize,
        words: &mut [u32],
        part: usize,
        turned: bool,
    ) {
        assert!(values.len() >= 31 * distance + LINES && words.len() >= (P - 1) * part + TILE);
        // SAFETY: `Tiles` proves that the processor has these instructions; every row lies in its slice.
        unsafe { pack::<P, true, T>(values, distance, words, part, turned) }
    }

    /// Words of neighbors tap by tap: of row i of `values`, `[16, 32, 9]` with this distance of rows, to column i of a tile for
    /// every tap and part. `words` begin with the first tile, steps of one tap follow one another.
    pub(super) fn neighbors_by_taps<const P: usize, T: Number>(
        self,
        values: &[T],
        distance: usize,
        words: &mut [u32],
    ) {
        assert!(values.len() >= 15 * distance + STEP * TAPS);
        assert!(words.len() >= (TAPS - 1) * step_words(P) + (P - 1) * 2 * TILE + TILE);
        // SAFETY: `Tiles` proves that the processor has these instructions; every row and tile lies in its slice.
        unsafe { neighbors_by_taps::<P, T>(values, distance, words) }
    }

    /// Words across rows tap by tap, from the last to the first: of rows 2 i and 2 i + 1 of `values`, `[32, 16, 9]` with this
    /// distance of rows, to row i; the rest as in [`Self::neighbors_by_taps`]. [`beyond`] says what else has to be there.
    pub(super) fn across_by_taps<const P: usize, T: Number>(
        self,
        values: &[T],
        distance: usize,
        words: &mut [u32],
    ) {
        assert!(values.len() >= 31 * distance + LINES * TAPS + beyond::<T>());
        assert!(words.len() >= (TAPS - 1) * step_words(P) + (P - 1) * 2 * TILE + TILE);
        // SAFETY: `Tiles` proves that the processor has these instructions; every row and tile lies in its slice.
        unsafe { across_by_taps::<P, T>(values, distance, words) }
    }

    /// Columns of sums `[16, 16]`, those of rows from one on, to rows of `dst` `[rows, columns]` that begin `at` a row and a
    /// column: with the `shifts` of the columns, or added to what is there.
    pub(super) fn put_turned(
        self,
        sums: &[f32; TILE],
        first: usize,
        shifts: Option<&[f32; 16]>,
        dst: &mut MatrixMut<'_>,
        at: [usize; 2],
        dims: [usize; 2],
    ) {
        assert!(dims[0] <= 16 && dims[1] > 0 && first + dims[1] <= 16);
        let dst = dst.rectangle_mut(at, dims);
        // SAFETY: `Tiles` proves that the processor has these instructions; the rectangle is borrowed exclusively.
        unsafe { put_turned(sums, first, shifts, dst, dims) }
    }
}

impl Tiles {
    /// Exponentials of scores relative to the `largest` of every query, as a right factor: queries are its lines, keys its
    /// k; and their `sums`. `products` are `[keys, width]`, both multiples of 32, and become scores by `scale`.
    pub(crate) fn exponentials<const P: usize>(
        self,
        products: &[f32],
        width: usize,
        scale: f32,
        largest: &[f32],
        sums: &mut [f32],
        right: &mut [u32],
    ) {
        let n_keys = products.len() / width;
        assert!(width.is_multiple_of(BLOCK) && n_keys.is_multiple_of(STEP));
        assert!(products.len() == n_keys * width && largest.len() >= width && sums.len() >= width);
        assert!(right.len() >= packed_len(P, width, n_keys));
        // SAFETY: `Tiles` proves that the processor has these instructions; lengths are checked.
        unsafe { exponentials::<P>(products, width, scale, largest, sums, right) }
    }

    /// P = exp(scale·products - L) and dS = scale·P∘(dP - D) of a strip of 32 keys, packed: on the left in the strip, dS as
    /// step number `step` of `n_steps` of the k of a `right` factor too, queries being its lines.
    pub(crate) fn score_gradients<const P: usize>(
        self,
        strip: Strip<'_>,
        scale: f32,
        right: &mut [u32],
        [step, n_steps]: [usize; 2],
    ) {
        let width = strip.scores.len() / STEP;
        assert!(width.is_multiple_of(BLOCK) && strip.scores.len() == STEP * width);
        assert!(strip.d_scores.len() == strip.scores.len());
        assert!(strip.log_sums.len() >= width && strip.means.len() >= width);
        let left = packed_len(P, BLOCK, width);
        assert!(strip.p_left.len() >= left && strip.d_left.len() >= left);
        assert!(step < n_steps && right.len() >= packed_len(P, width, n_steps * STEP));
        // SAFETY: `Tiles` proves that the processor has these instructions; lengths are checked.
        unsafe { score_gradients::<P>(strip, scale, right, [step, n_steps]) }
    }
}

/// # Safety
/// As in [`Tiles::exponentials`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn exponentials<const P: usize>(
    products: &[f32],
    width: usize,
    scale: f32,
    largest: &[f32],
    sums: &mut [f32],
    right: &mut [u32],
) {
    let n_steps = products.len() / width / STEP;
    let factor = _mm512_set1_ps(scale * std::f32::consts::LOG2_E);
    for query in (0..width).step_by(16) {
        // SAFETY: by the caller.
        unsafe {
            let zero = _mm512_mul_ps(_mm512_loadu_ps(largest.as_ptr().add(query)), factor);
            let mut sum = _mm512_loadu_ps(sums.as_ptr().add(query));
            let block = query / BLOCK * n_steps * step_words(P) + query % BLOCK / 16 * TILE;
            for step in 0..n_steps {
                let words = right.as_mut_ptr().add(block + step * step_words(P));
                for pair in 0..STEP / 2 {
                    let row = products
                        .as_ptr()
                        .add((step * STEP + 2 * pair) * width + query);
                    let [first, second] = [row, row.add(width)]
                        .map(|row| exp2::<P>(_mm512_fmsub_ps(_mm512_loadu_ps(row), factor, zero)));
                    sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
                    for (p, part) in parts::<P>(first, second).into_iter().enumerate() {
                        let words = words.add(p * 2 * TILE + 16 * pair);
                        _mm512_storeu_si512(words.cast(), interleaved(part));
                    }
                }
            }
            _mm512_storeu_ps(sums.as_mut_ptr().add(query), sum);
        }
    }
}

/// # Safety
/// As in [`Tiles::score_gradients`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn score_gradients<const P: usize>(
    strip: Strip<'_>,
    scale: f32,
    right: &mut [u32],
    [step, n_steps]: [usize; 2],
) {
    let width = strip.scores.len() / STEP;
    let to_log2 = _mm512_set1_ps(std::f32::consts::LOG2_E);
    let (scale, factor) = (
        _mm512_set1_ps(scale),
        _mm512_set1_ps(scale * std::f32::consts::LOG2_E),
    );
    for query in (0..width).step_by(BLOCK) {
        // SAFETY: by the caller.
        unsafe {
            let halves = |values: &[f32]| {
                [0, 16].map(|half| _mm512_loadu_ps(values.as_ptr().add(query + half)))
            };
            let log_sums = halves(strip.log_sums).map(|l| _mm512_mul_ps(l, to_log2));
            let means = halves(strip.means);
            let left = query / BLOCK * step_words(P);
            let at = (query / BLOCK * n_steps + step) * step_words(P);
            let right = right.as_mut_ptr().add(at);
            for pair in 0..STEP / 2 {
                let rows = [2 * pair, 2 * pair + 1].map(|key| {
                    let at = [0, 1].map(|half| key * width + query + 16 * half);
                    let value = |half: usize| {
                        let product = _mm512_loadu_ps(strip.scores.as_ptr().add(at[half]));
                        let d = _mm512_loadu_ps(strip.d_scores.as_ptr().add(at[half]));
                        let p = exp2::<P>(_mm512_fmsub_ps(product, factor, log_sums[half]));
                        let d = _mm512_sub_ps(d, means[half]);
                        [p, _mm512_mul_ps(_mm512_mul_ps(p, scale), d)]
                    };
                    let ([p_low, d_low], [p_high, d_high]) = (value(0), value(1));
                    let at = left + key / 16 * TILE + 16 * (key % 16);
                    for (i, part) in parts::<P>(p_low, p_high).into_iter().enumerate() {
                        let words = strip.p_left.as_mut_ptr().add(at + i * 2 * TILE);
                        _mm512_storeu_si512(words.cast(), part);
                    }
                    for (i, part) in parts::<P>(d_low, d_high).into_iter().enumerate() {
                        let words = strip.d_left.as_mut_ptr().add(at + i * 2 * TILE);
                        _mm512_storeu_si512(words.cast(), part);
                    }
                    [d_low, d_high]
                });
                let [first, second] = rows;
                for (half, (first, second)) in first.into_iter().zip(second).enumerate() {
                    let both = parts::<P>(first, second);
                    for (i, part) in both.into_iter().enumerate() {
                        let words = right.add(i * 2 * TILE + half * TILE + 16 * pair);
                        _mm512_storeu_si512(words.cast(), interleaved(part));
                    }
                }
            }
        }
    }
}

/// 2^x, 2^-126 below -126: to about one unit in the last place, or to a twentieth of what a single part is rounded by.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn exp2<const P: usize>(x: __m512) -> __m512 {
    /// ln(2)^k / k!, from the highest power down: what is left of the series is below 2⁻²³ for |r| <= 1/2.
    const SERIES: [f32; 7] = [
        1.540_353e-4,
        1.333_355_8e-3,
        9.618_129e-3,
        5.550_411e-2,
        2.402_265e-1,
        6.931_472e-1,
        1.0,
    ];
    /// The polynomial of the third degree whose largest relative error there, 7.5e-5, is least.
    const SHORT: [f32; 4] = [5.517_167e-2, 2.426_111_2e-1, 6.932_61e-1, 9.999_28e-1];
    let coefficients: &[f32] = if P == 1 { &SHORT } else { &SERIES };
    let x = _mm512_max_ps(x, _mm512_set1_ps(-126.0));
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, n);
    let mut power = _mm512_set1_ps(coefficients[0]);
    for coefficient in &coefficients[1..] {
        power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(*coefficient));
    }
    _mm512_scalef_ps(power, n)
}

/// Pairs of vectors of `values`, sixteen of them: the two halves of rows, or two rows that become `interleaved`. See
/// [`Tiles::neighbors`] and [`Tiles::across`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack<const P: usize, const ACROSS: bool, T: Number>(
    values: &[T],
    distance: usize,
    words: &mut [u32],
    part: usize,
    is_turned: bool,
) {
    let [pair, second] = match ACROSS {
        true => [2 * distance, distance],
        false => [distance, 16],
    };
    for i in 0..16 {
        // SAFETY: by the caller.
        let parts = unsafe {
            let row = values.as_ptr().add(i * pair);
            parts_of::<P, T>(row, row.add(second))
        };
        for (p, row) in parts.into_iter().enumerate() {
            let row = if ACROSS { interleaved(row) } else { row };
            // SAFETY: by the caller.
            unsafe { _mm512_storeu_si512(words.as_mut_ptr().add(p * part + 16 * i).cast(), row) }
        }
    }
    if !is_turned {
        return;
    }
    for p in 0..P {
        // SAFETY: by the caller.
        unsafe {
            let tile = words.as_mut_ptr().add(p * part).cast::<__m512i>();
            let columns = turned(std::array::from_fn(|i| _mm512_loadu_si512(tile.add(i))));
            for (i, column) in columns.into_iter().enumerate() {
                _mm512_storeu_si512(tile.add(i), column);
            }
        }
    }
}

/// # Safety
/// As in [`Tiles::neighbors_by_taps`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn neighbors_by_taps<const P: usize, T: Number>(
    values: &[T],
    distance: usize,
    words: &mut [u32],
) {
    /// The second half of every word.
    const HIGH: u32 = 0xaaaa_aaaa;
    // SAFETY: by the caller.
    let put = |words: &mut [u32], tap: usize, pair: usize, parts: [__m512i; P]| unsafe {
        for (p, part) in parts.into_iter().enumerate() {
            let at = tap * step_words(P) + p * 2 * TILE + 16 * pair;
            _mm512_storeu_si512(words.as_mut_ptr().add(at).cast(), part);
        }
    };
    if !T::IS_F32 && P == 1 {
        // Column c holds numbers 2 c and 2 c + 1 of all rows; a pair of channels has nine columns, its second channel begins in
        // the middle of the fifth.
        let mut columns = [const { MaybeUninit::uninit() }; STEP / 2 * TAPS];
        for (c, columns) in columns.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            // SAFETY: by the caller.
            let row = |i: usize| unsafe {
                _mm512_loadu_si512(values.as_ptr().add(i * distance + 32 * c).cast())
            };
            *columns = turned(std::array::from_fn(row)).map(MaybeUninit::new);
        }
        for (pair, columns) in columns.as_chunks::<TAPS>().0.iter().enumerate() {
            for tap in 0..TAPS {
                // SAFETY: nine times sixteen columns are written.
                let [first, second] =
                    [tap, TAPS + tap].map(|number| unsafe { columns[number / 2].assume_init() });
                let both = match tap % 2 {
                    0 => _mm512_mask_blend_epi16(HIGH, first, second),
                    _ => _mm512_mask_blend_epi16(
                        HIGH,
                        _mm512_srli_epi32::<16>(first),
                        _mm512_slli_epi32::<16>(second),
                    ),
                };
                put(words, tap, pair, [both; P]);
            }
        }
        return;
    }
    // Column c holds number c of all rows.
    let mut columns = [const { MaybeUninit::uninit() }; STEP * TAPS];
    for (c, columns) in columns.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // SAFETY: by the caller.
        let row = |i: usize| unsafe {
            let row = sixteen(values.as_ptr().add(i * distance + 16 * c));
            _mm512_castps_si512(row)
        };
        *columns = turned(std::array::from_fn(row)).map(MaybeUninit::new);
    }
    // SAFETY: eighteen times sixteen columns are written.
    let number =
        |column: &MaybeUninit<__m512i>| unsafe { _mm512_castsi512_ps(column.assume_init()) };
    for (pair, columns) in columns.as_chunks::<{ 2 * TAPS }>().0.iter().enumerate() {
        for tap in 0..TAPS {
            let mut parts = parts::<P>(number(&columns[tap]), number(&columns[TAPS + tap]));
            for part in &mut parts {
                *part = interleaved(*part);
            }
            put(words, tap, pair, parts);
        }
    }
}

/// # Safety
/// As in [`Tiles::across_by_taps`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn across_by_taps<const P: usize, T: Number>(
    values: &[T],
    distance: usize,
    words: &mut [u32],
) {
    for tap in 0..TAPS {
        for pair in 0..16 {
            // SAFETY: by the caller.
            let parts = unsafe {
                let row = values.as_ptr().add(2 * pair * distance + tap);
                parts::<P>(of_taps(row), of_taps(row.add(distance)))
            };
            for (p, part) in parts.into_iter().enumerate() {
                let at = (TAPS - 1 - tap) * step_words(P) + p * 2 * TILE + 16 * pair;
                // SAFETY: by the caller.
                unsafe {
                    _mm512_storeu_si512(words.as_mut_ptr().add(at).cast(), interleaved(part));
                }
            }
        }
    }
}

/// # Safety
/// As in [`Tiles::put_turned`]; `dst` are rows with a distance.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn put_turned(
    sums: &[f32; TILE],
    first: usize,
    shifts: Option<&[f32; 16]>,
    (dst, distance): (*mut f32, usize),
    [n_rows, n_columns]: [usize; 2],
) {
    let mask = u16::MAX >> (16 - n_columns) << first;
    // SAFETY: rows are read whole, and written where the mask says, from the first column on.
    unsafe {
        let row = |i: usize| _mm512_loadu_si512(sums.as_ptr().add(16 * i).cast());
        let columns = turned(std::array::from_fn(row));
        for (i, column) in columns.into_iter().enumerate().take(n_rows) {
            let dst = dst.add(i * distance).wrapping_sub(first);
            let with = match shifts {
                Some(shifts) => _mm512_set1_ps(shifts[i]),
                None => _mm512_maskz_loadu_ps(mask, dst),
            };
            let sum = _mm512_add_ps(_mm512_castsi512_ps(column), with);
            _mm512_mask_storeu_ps(dst, mask, sum);
        }
    }
}

/// How many numbers behind the last one are read with it, where they lie apart.
const fn beyond<T: Number>() -> usize {
    if T::IS_F32 { 0 } else { 1 }
}

/// Numbers of one tap of neighboring channels.
///
/// # Safety
/// All of them are there, and as many more as [`beyond`] says.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn of_taps<T: Number>(from: *const T) -> __m512 {
    let count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let places = _mm512_mullo_epi32(count, _mm512_set1_epi32(TAPS as i32));
    // SAFETY: by the caller; `Number` is f32 or bf16.
    unsafe {
        match T::IS_F32 {
            true => _mm512_i32gather_ps::<4>(places, from.cast()),
            false => {
                // Each with its neighbor, which is shifted out.
                let pairs = _mm512_i32gather_epi32::<2>(places, from.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))
            }
        }
    }
}

/// [`parts`] of sixteen numbers each.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn parts_of<const P: usize, T: Number>(low: *const T, high: *const T) -> [__m512i; P] {
    // SAFETY: by the caller; `Number` is f32 or bf16.
    unsafe {
        if P == 1 && !T::IS_F32 {
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(low.cast()));
            let high = _mm256_loadu_si256(high.cast());
            return [_mm512_inserti64x4::<1>(low, high); P];
        }
        parts(sixteen(low), sixteen(high))
    }
}

/// # Safety
/// Sixteen numbers are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn sixteen<T: Number>(from: *const T) -> __m512 {
    // SAFETY: by the caller; `Number` is f32 or bf16.
    unsafe {
        match T::IS_F32 {
            true => _mm512_loadu_ps(from.cast()),
            false => widened(_mm256_loadu_si256(from.cast())),
        }
    }
}

/// Word i of numbers i and 16 + i.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn interleaved(numbers: __m512i) -> __m512i {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 16 {
            order[2 * i] = i as u16;
            order[2 * i + 1] = 16 + i as u16;
            i += 1;
        }
        order
    };
    // SAFETY: the order has the 64 bytes that are read.
    unsafe { _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), numbers) }
}

/// 32 numbers as sums of bf16 numbers: each part rounds what the ones before it leave.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn parts<const P: usize>(mut low: __m512, mut high: __m512) -> [__m512i; P] {
    let mut parts = [_mm512_setzero_si512(); P];
    for (i, part) in parts.iter_mut().enumerate() {
        *part = rounded_to_bf16(low, high);
        if i + 1 < P {
            low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(*part)));
            high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64::<1>(*part)));
        }
    }
    parts
}

/// bf16 as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn widened(numbers: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(numbers)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn rounded_to_bf16(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes of any value.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}
