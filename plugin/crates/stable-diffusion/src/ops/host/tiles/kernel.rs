//! The instructions that multiply tiles; see [`super::block`] for how these lie.
#![expect(
    unsafe_code,
    reason = "the processor's matrix tiles have no safe interface; what they read and write is checked before"
)]

use std::arch::{
    asm,
    x86_64::{__cpuid, __cpuid_count},
};
use std::sync::OnceLock;

use super::super::gemm::{MatrixMut, Write};
use super::{
    Factors,
    block::{BLOCK, Left, Steps, TILE, TallSums, Used},
    vectors,
};

/// Proof that this processor multiplies tiles of bf16, and that the system lets this process do it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles {
    unit: Unit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// AMX.
    Matrix,
    /// AVX512-BF16.
    Vectors,
}

impl Tiles {
    /// What this processor multiplies such factors with, if that is faster than its vectors of f32.
    pub(crate) fn get(factors: Factors) -> Option<Self> {
        static UNIT: OnceLock<Option<Unit>> = OnceLock::new();
        let unit = (*UNIT.get_or_init(|| {
            let unit = if has_matrix_unit() {
                Unit::Matrix
            } else {
                Unit::Vectors
            };
            has_vectors().then_some(unit)
        }))?;
        // Six products of bf16 vectors take longer than one of f32.
        (unit == Unit::Matrix || factors == Factors::Rounded).then_some(Self { unit })
    }

    /// Whether a matrix unit multiplies, not vectors.
    pub(crate) fn have_matrix_unit(self) -> bool {
        self.unit == Unit::Matrix
    }

    /// Everything that this processor has.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let units = [(Unit::Matrix, has_matrix_unit()), (Unit::Vectors, true)];
        let units = units.into_iter().filter(|(_, is_there)| *is_there);
        let tiles = units.map(|(unit, _)| Self { unit });
        tiles.filter(|_| has_vectors()).collect()
    }

    /// Runs `work` with tiles of the full size.
    pub(crate) fn configured<R>(self, work: impl FnOnce(&Configured) -> R) -> R {
        let configured = Configured::new(self);
        work(&configured)
    }
}

/// What packing asks for too.
fn has_vectors() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

fn has_matrix_unit() -> bool {
    // Leaf 7: bit 22 of EDX is AMX-BF16, bit 24 AMX-TILE.
    let leaves = __cpuid(0).eax;
    let has_tiles = leaves >= 7 && {
        let features = __cpuid_count(7, 0).edx;
        features & (1 << 22) != 0 && features & (1 << 24) != 0
    };
    has_tiles && allowed()
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
pub(crate) struct Configured {
    unit: Unit,
    /// Tiles belong to a thread, raw pointers do not travel.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Configured {
    fn new(Tiles { unit }: Tiles) -> Self {
        if unit == Unit::Matrix {
            configure();
        }
        Self {
            unit,
            _thread: std::marker::PhantomData,
        }
    }

    /// Σ over steps of left · right, of factors of P parts, 1 to 3, to the block of 32 rows and columns of `dst` that begins
    /// `at` a row and a column. Both have for every step, part by part, two tiles.
    pub(super) fn block<const P: usize>(
        &self,
        left: &[u32],
        right: &[u32],
        n_steps: usize,
        used: Used,
        write: Write,
        (dst, at): (&mut MatrixMut<'_>, [usize; 2]),
    ) {
        let n_words = n_steps * P * 2 * TILE;
        assert!(
            n_steps > 0 && left.len() >= n_words && right.len() >= n_words,
            "a tile beyond its factor"
        );
        let dst = dst.rectangle_mut(at, [BLOCK; 2]);
        // SAFETY: all tiles lie in `left` and `right`, as checked; the square is borrowed exclusively. The tiles are
        // configured.
        unsafe {
            match (P, write) {
                _ if self.unit == Unit::Vectors => {
                    vectors::block::<P>(left, right, n_steps, used, write == Write::Add, dst);
                }
                (1, Write::Replace) => rounded(left, right, n_steps, dst),
                (1, Write::Add) => rounded_added(left, right, n_steps, dst),
                (2, Write::Replace) => paired(left, right, n_steps, dst),
                (2, Write::Add) => paired_added(left, right, n_steps, dst),
                (3, Write::Replace) => exact(left, right, n_steps, dst),
                (3, Write::Add) => exact_added(left, right, n_steps, dst),
                _ => unreachable!("factors of one part to three"),
            }
        }
    }

    /// Σ over steps of left · right, of factors of P parts, 1 to 3. `right` has for every step, part by part, two tiles.
    pub(super) fn tall_block<const P: usize>(
        &self,
        left: Left<'_>,
        steps: &Steps,
        right: &[u32],
        sums: &mut TallSums,
    ) {
        let last = left.tiles.into_iter().fold(0, usize::max);
        assert!(
            last + steps.furthest() + (P - 1) * left.part + TILE <= left.words.len()
                && right.len() >= steps.as_slice().len() * P * 2 * TILE,
            "a tile beyond its factor"
        );
        // SAFETY: every tile of the left lies in its words, and all of the right in `right`, as checked; the sums are borrowed
        // exclusively. The tiles are configured.
        unsafe {
            match P {
                _ if self.unit == Unit::Vectors => {
                    vectors::tall_block::<P>(left, steps, right, sums);
                }
                1 => tall_rounded(left, steps, right, sums),
                2 => tall_paired(left, steps, right, sums),
                3 => tall_exact(left, steps, right, sums),
                _ => unreachable!("factors of one part to three"),
            }
        }
    }
}

/// Makes the tiles of this thread's matrix unit of 16 rows of 64 bytes.
fn configure() {
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
    // SAFETY: a matrix unit has the instruction; it reads the 64 bytes of the palette.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const palette, options(nostack, readonly, preserves_flags));
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        if self.unit == Unit::Matrix {
            // SAFETY: gives the tiles back; nothing of this thread holds values in them.
            unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
        }
    }
}

/// The loop over steps around `$product`, which multiplies the tiles at `left` and at `right`: `$name` puts the sums in their
/// place, `$added` adds them to what is there.
macro_rules! kernel {
    ($name:ident, $added:ident, $step_bytes:literal, $($product:literal),+ $(,)?) => {
        kernel!(
            @ $name, $step_bytes,
            ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
            $($product),+
        );
        kernel!(
            @ $added, $step_bytes,
            [
                "mov {at}, {dst_row}",
                "shl {at}, 4",
                "add {at}, {dst}",
                "tileloadd tmm0, [{dst} + {dst_row}*1]",
                "tileloadd tmm1, [{dst} + {dst_row}*1 + 64]",
                "tileloadd tmm2, [{at} + {dst_row}*1]",
                "tileloadd tmm3, [{at} + {dst_row}*1 + 64]",
            ],
            $($product),+
        );
    };
    (@ $name:ident, $step_bytes:literal, [$($start:literal),+ $(,)?], $($product:literal),+) => {
        /// # Safety
        /// As in [`Configured::block`]; `dst` are 32 rows of 32 numbers with this distance.
        unsafe fn $name(
            left: &[u32],
            right: &[u32],
            n_steps: usize,
            (dst, dst_row): (*mut f32, usize),
        ) {
            // SAFETY: by the caller.
            unsafe {
                asm!(
                    $($start,)+
                    "2:",
                    $($product,)+
                    concat!("add {left}, ", $step_bytes),
                    concat!("add {right}, ", $step_bytes),
                    "dec {n}",
                    "jnz 2b",
                    "mov {at}, {dst_row}",
                    "shl {at}, 4",
                    "add {at}, {dst}",
                    "tilestored [{dst} + {dst_row}*1], tmm0",
                    "tilestored [{dst} + {dst_row}*1 + 64], tmm1",
                    "tilestored [{at} + {dst_row}*1], tmm2",
                    "tilestored [{at} + {dst_row}*1 + 64], tmm3",
                    at = out(reg) _,
                    n = inout(reg) n_steps => _,
                    left = inout(reg) left.as_ptr() => _,
                    right = inout(reg) right.as_ptr() => _,
                    tile_row = in(reg) 64usize,
                    dst = in(reg) dst,
                    dst_row = in(reg) 4 * dst_row,
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
    rounded_added,
    "2048",
    "tileloadd tmm4, [{left} + {tile_row}*1]",
    "tileloadd tmm6, [{right} + {tile_row}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 1024]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tileloadd tmm7, [{right} + {tile_row}*1 + 1024]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
);

// The smallest products first: 2·1, then 1·1, then 1·2.
kernel!(
    paired,
    paired_added,
    "4096",
    "tileloadd tmm6, [{right} + {tile_row}*1]",
    "tileloadd tmm4, [{left} + {tile_row}*1 + 2048]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 3072]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tileloadd tmm7, [{right} + {tile_row}*1 + 1024]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm4, [{left} + {tile_row}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 1024]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm7, [{right} + {tile_row}*1 + 3072]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm6, [{right} + {tile_row}*1 + 2048]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm2, tmm5, tmm6",
);

// The smallest products first: 3·1, 2·1, 1·1, then 2·2, 1·2, then 1·3.
kernel!(
    exact,
    exact_added,
    "6144",
    "tileloadd tmm6, [{right} + {tile_row}*1]",
    "tileloadd tmm4, [{left} + {tile_row}*1 + 4096]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 5120]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tileloadd tmm7, [{right} + {tile_row}*1 + 1024]",
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
    "tileloadd tmm7, [{right} + {tile_row}*1 + 3072]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm6, [{right} + {tile_row}*1 + 2048]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tileloadd tmm4, [{left} + {tile_row}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tileloadd tmm5, [{left} + {tile_row}*1 + 1024]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm6, [{right} + {tile_row}*1 + 4096]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tileloadd tmm7, [{right} + {tile_row}*1 + 5120]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm5, tmm7",
);

/// What one part of the left, at `at`, and one part of the right contribute to a tall block.
macro_rules! tall_product {
    ($first:literal, $second:literal) => {
        concat!(
            "tileloadd tmm6, [{right} + {tile_row}*1 + ",
            $first,
            "]\n",
            "tileloadd tmm7, [{at} + {tile_row}*1]\n",
            "tdpbf16ps tmm0, tmm7, tmm6\n",
            "lea {below}, [{at} + {second}]\n",
            "tileloadd tmm7, [{below} + {tile_row}*1]\n",
            "tdpbf16ps tmm1, tmm7, tmm6\n",
            "lea {last}, [{at} + {third}]\n",
            "tileloadd tmm7, [{last} + {tile_row}*1]\n",
            "tdpbf16ps tmm2, tmm7, tmm6\n",
            "tileloadd tmm6, [{right} + {tile_row}*1 + ",
            $second,
            "]\n",
            "tdpbf16ps tmm5, tmm7, tmm6\n",
            "tileloadd tmm7, [{below} + {tile_row}*1]\n",
            "tdpbf16ps tmm4, tmm7, tmm6\n",
            "tileloadd tmm7, [{at} + {tile_row}*1]\n",
            "tdpbf16ps tmm3, tmm7, tmm6",
        )
    };
}

/// Brings what is ahead into the first cache.
macro_rules! fetch {
    ($($line:literal)+) => {
        concat!(
            "mov {last}, [{steps} + 8]\n",
            "lea {last}, [{left} + {last}*4]\n",
            $("prefetcht0 [{last} + ", $line, "]\n"),+
        )
    };
    () => {
        fetch!(
            "0" "64" "128" "192" "256" "320" "384" "448" "512" "576" "640" "704" "768" "832" "896" "960" "1024"
        )
    };
}

/// The loop over steps of a tall block, around `$product`; where loads that miss the first cache take longer than products,
/// they are begun before.
macro_rules! tall_kernel {
    ($name:ident, $step_bytes:literal, [$($fetch:expr)?], $($product:expr),+ $(,)?) => {
        /// # Safety
        /// As in [`Configured::tall_block`].
        unsafe fn $name(left: Left<'_>, steps: &Steps, right: &[u32], sums: &mut TallSums) {
            let [first, second, third] = left.tiles;
            let steps = steps.as_slice();
            // SAFETY: by the caller; distances of tiles may be negative and wrap around.
            unsafe {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2",
                    "tilezero tmm3", "tilezero tmm4", "tilezero tmm5",
                    "2:",
                    $($fetch,)?
                    "mov {at}, [{steps}]",
                    "lea {at}, [{left} + {at}*4]",
                    $($product,)+
                    concat!("add {right}, ", $step_bytes),
                    "add {steps}, 16",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{sums} + {tile_row}*1], tmm0",
                    "tilestored [{sums} + {tile_row}*1 + 1024], tmm1",
                    "tilestored [{sums} + {tile_row}*1 + 2048], tmm2",
                    "tilestored [{sums} + {tile_row}*1 + 3072], tmm3",
                    "tilestored [{sums} + {tile_row}*1 + 4096], tmm4",
                    "tilestored [{sums} + {tile_row}*1 + 5120], tmm5",
                    "# {part}",
                    at = out(reg) _,
                    below = out(reg) _,
                    last = out(reg) _,
                    steps = inout(reg) steps.as_ptr() => _,
                    n = inout(reg) steps.len() => _,
                    left = in(reg) left.words.as_ptr().add(first),
                    second = in(reg) 4 * second.wrapping_sub(first) as isize,
                    third = in(reg) 4 * third.wrapping_sub(first) as isize,
                    part = in(reg) 4 * left.part,
                    right = inout(reg) right.as_ptr() => _,
                    tile_row = in(reg) 64usize,
                    sums = in(reg) sums.0.as_mut_ptr(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

tall_kernel!(tall_rounded, "2048", [fetch!()], tall_product!("0", "1024"));

// The smallest products first: of the left's second part, then 1·2, 1·1.
tall_kernel!(
    tall_paired,
    "4096",
    [],
    "add {at}, {part}",
    tall_product!("0", "1024"),
    "sub {at}, {part}",
    tall_product!("2048", "3072"),
    tall_product!("0", "1024"),
);

// The smallest products first: 3·1, of the left's second part 2·2, 2·1, then 1·3, 1·2, 1·1.
tall_kernel!(
    tall_exact,
    "6144",
    [],
    "lea {at}, [{at} + {part}*2]",
    tall_product!("0", "1024"),
    "sub {at}, {part}",
    tall_product!("2048", "3072"),
    tall_product!("0", "1024"),
    "sub {at}, {part}",
    tall_product!("4096", "5120"),
    tall_product!("2048", "3072"),
    tall_product!("0", "1024"),
);
