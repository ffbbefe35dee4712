//! The instructions: multiplying tiles, and bringing f32 into them. The only unsafe code of [`super`]; see
//! [`super::block`] for how tiles lie.
#![expect(
    unsafe_code,
    reason = "the processor's matrix tiles have no safe interface; every function checks the slices that it reads"
)]

use std::arch::{asm, x86_64::*};
use std::sync::OnceLock;

use super::block::{Right, STEP, Sums, TILE};

/// Proof that this processor multiplies tiles of bf16 and that the system lets this process do it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles(());

impl Tiles {
    /// The tiles of this processor, if it has them.
    pub(crate) fn get() -> Option<Self> {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        AVAILABLE.get_or_init(available).then_some(Self(()))
    }

    /// Runs `work` with tiles of the full size.
    pub(super) fn configured<R>(self, work: impl FnOnce(&Configured) -> R) -> R {
        let configured = Configured::new(self);
        work(&configured)
    }
}

fn available() -> bool {
    // Leaf 7: bit 22 of EDX is AMX-BF16, bit 24 AMX-TILE; the vector code below asks for AVX-512 too.
    let leaves = __cpuid(0).eax;
    let has_tiles = leaves >= 7 && {
        let features = __cpuid_count(7, 0).edx;
        features & (1 << 22) != 0 && features & (1 << 24) != 0
    };
    let has_vectors = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    has_tiles && has_vectors && allowed()
}

/// Linux keeps the tiles' state only of processes that asked for it.
fn allowed() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call reads its two numbers and no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// Tiles of 16 rows of 64 bytes, until it is dropped; of this thread.
#[derive(Debug)]
pub(super) struct Configured {
    /// Tiles belong to a thread, raw pointers do not travel.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Configured {
    fn new(_: Tiles) -> Self {
        #[repr(C, align(64))]
        struct Palette {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let first_eight = |i: usize| i < 8;
        let palette = Palette {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: std::array::from_fn(|i| if first_eight(i) { 64 } else { 0 }),
            rows: std::array::from_fn(|i| if first_eight(i) { 16 } else { 0 }),
        };
        // SAFETY: `Tiles` proves that the instruction exists; it reads the 64 bytes of the palette.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const palette, options(nostack, readonly, preserves_flags));
        }
        Self {
            _thread: std::marker::PhantomData,
        }
    }

    /// Σ over steps of left · right, a block of 32 rows and columns, of factors of P parts: 1 or 3. `left` has for every
    /// step, part by part, two tiles.
    pub(super) fn block<const P: usize>(
        &self,
        left: &[u32],
        right: Right<'_>,
        steps: &[usize],
        sums: &mut Sums,
    ) {
        assert!(left.len() >= steps.len() * P * 2 * TILE && !steps.is_empty());
        let reach = right.second + 15 * right.row + 16 + (P - 1) * right.part;
        let last = steps.iter().copied().max().unwrap_or(0);
        assert!(
            last + reach <= right.words.len(),
            "a tile beyond its factor"
        );
        // SAFETY: every tile of the left lies in `left`, and the last word of every tile of the right in `right.words`, as
        // checked; `sums` has the 4 KiB that are read and stored. The tiles are configured.
        unsafe {
            match P {
                1 => rounded(left, right, steps, sums),
                3 => exact(left, right, steps, sums),
                _ => unreachable!("factors of one part or of three"),
            }
        }
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: gives the tiles back; nothing of this thread holds values in them.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
    }
}

/// The loop over steps around `$product`, which multiplies the tiles at `left` and at `at`.
macro_rules! kernel {
    ($name:ident, $step_bytes:literal, $($product:literal),+ $(,)?) => {
        /// # Safety
        /// As in [`Configured::block`].
        unsafe fn $name(left: &[u32], right: Right<'_>, steps: &[usize], sums: &mut Sums) {
            // SAFETY: by the caller.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "mov {at}, [{steps}]",
                    "lea {at}, [{right} + {at}*4]",
                    $($product,)+
                    concat!("add {left}, ", $step_bytes),
                    "add {steps}, 8",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{sums} + {sums_row}*1], tmm0",
                    "tilestored [{sums} + {sums_row}*1 + 64], tmm1",
                    "tilestored [{sums} + {sums_row}*1 + 2048], tmm2",
                    "tilestored [{sums} + {sums_row}*1 + 2112], tmm3",
                    at = out(reg) _,
                    steps = inout(reg) steps.as_ptr() => _,
                    n = inout(reg) steps.len() => _,
                    left = inout(reg) left.as_ptr() => _,
                    right = in(reg) right.words.as_ptr(),
                    row = in(reg) 4 * right.row,
                    second = in(reg) 4 * right.second,
                    part = in(reg) 4 * right.part,
                    tile_row = in(reg) 64usize,
                    sums = in(reg) sums.0.as_mut_ptr(),
                    sums_row = in(reg) 128usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

kernel!(
    rounded,
    "2048",
    "# {part}",
    "tileloadd tmm4, [{left} + {tile_row}*1]",
    "tileloadd tmm6, [{at} + {row}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 1024]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "add {at}, {second}",
    "tileloadd tmm7, [{at} + {row}*1]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
);

// The smallest products first: 3·1, 2·1, 1·1, then 2·2, 1·2, then 1·3.
kernel!(
    exact,
    "6144",
    "tileloadd tmm6, [{at} + {row}*1]",
    "tileloadd tmm4, [{left} + {tile_row}*1 + 4096]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 5120]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "add {at}, {second}",
    "tileloadd tmm7, [{at} + {row}*1]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm4, [{left} + {tile_row}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 1024]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm4, [{left} + {tile_row}*1 + 2048]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 3072]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "add {at}, {part}",
    "tileloadd tmm7, [{at} + {row}*1]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "sub {at}, {second}",
    "tileloadd tmm6, [{at} + {row}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tileloadd tmm4, [{left} + {tile_row}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 1024]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "add {at}, {part}",
    "tileloadd tmm6, [{at} + {row}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "add {at}, {second}",
    "tileloadd tmm7, [{at} + {row}*1]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
);

// ---------------------------------------------------------------- f32 into words

impl Tiles {
    /// Words of neighbors: of row i of `values`, `[16, 32]` with this distance of rows, to row i of a tile. `words` holds a
    /// tile for every part, the largest first, with a distance of `part`.
    pub(super) fn neighbors<const P: usize>(
        self,
        values: &[f32],
        distance: usize,
        words: &mut [u32],
        part: usize,
    ) {
        assert!(values.len() >= 15 * distance + STEP && words.len() >= (P - 1) * part + TILE);
        // SAFETY: `Tiles` proves that the processor has these instructions; every row lies in its slice.
        unsafe { neighbors::<P>(values, distance, words, part) }
    }

    /// Words across rows: of rows 2 i and 2 i + 1 of `values`, `[32, 16]` with this distance of rows, to row i; the rest
    /// as in [`Self::neighbors`].
    pub(super) fn across<const P: usize>(
        self,
        values: &[f32],
        distance: usize,
        words: &mut [u32],
        part: usize,
    ) {
        assert!(values.len() >= 31 * distance + 16 && words.len() >= (P - 1) * part + TILE);
        // SAFETY: `Tiles` proves that the processor has these instructions; every row lies in its slice.
        unsafe { across::<P>(values, distance, words, part) }
    }

    /// Words across two rows of any length, each part into a slice of its own.
    pub(super) fn across_rows<const P: usize>(self, rows: [&[f32]; 2], words: [&mut [u32]; P]) {
        let n = rows[0].len();
        assert!(rows[1].len() >= n && words.iter().all(|words| words.len() >= n));
        // SAFETY: `Tiles` proves that the processor has these instructions; n values are read and written.
        unsafe { across_rows(rows, words) }
    }
}

/// # Safety
/// As in [`Tiles::neighbors`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn neighbors<const P: usize>(
    values: &[f32],
    distance: usize,
    words: &mut [u32],
    part: usize,
) {
    for i in 0..16 {
        // SAFETY: by the caller.
        unsafe {
            let row = values.as_ptr().add(i * distance);
            let parts = parts::<P>(_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(16)));
            for (p, numbers) in parts.into_iter().enumerate() {
                let words = words.as_mut_ptr().add(p * part + 16 * i);
                _mm512_storeu_si512(words.cast(), numbers);
            }
        }
    }
}

/// # Safety
/// As in [`Tiles::across`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn across<const P: usize>(values: &[f32], distance: usize, words: &mut [u32], part: usize) {
    for i in 0..16 {
        // SAFETY: by the caller.
        unsafe {
            let row = values.as_ptr().add(2 * i * distance);
            let parts = parts::<P>(_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(distance)));
            for (p, numbers) in parts.into_iter().enumerate() {
                let words = words.as_mut_ptr().add(p * part + 16 * i);
                _mm512_storeu_si512(words.cast(), interleaved(numbers));
            }
        }
    }
}

/// # Safety
/// As in [`Tiles::across_rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn across_rows<const P: usize>([first, second]: [&[f32]; 2], mut words: [&mut [u32]; P]) {
    let n = first.len();
    for start in (0..n).step_by(16) {
        let mask = u16::MAX >> (16 - (n - start).min(16));
        // SAFETY: what the mask names is there, by the caller; nothing else is touched.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask, first.as_ptr().add(start));
            let high = _mm512_maskz_loadu_ps(mask, second.as_ptr().add(start));
            for (words, part) in words.iter_mut().zip(parts::<P>(low, high)) {
                let words = words.as_mut_ptr().add(start).cast();
                _mm512_mask_storeu_epi32(words, mask, interleaved(part));
            }
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
