//! Numbers of either kind that weights have in memory, and views of them.

use half::bf16;

use rayon::prelude::*;

use super::{
    gemm::Matrix,
    memory::{unwritten, with_scratch},
    simd::{CHUNK, vectorize},
    tiles::{Blocks, Ordered},
};

/// What products are computed of.
pub(crate) trait Number: Copy + Send + Sync + 'static {
    /// Whether this is f32, not bf16.
    const IS_F32: bool;

    fn to_f32(self) -> f32;
}

impl Number for f32 {
    const IS_F32: bool = true;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    const IS_F32: bool = false;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// To the nearest bf16, of two as near to the even one.
pub(crate) fn rounded(values: &[f32]) -> Vec<bf16> {
    let mut halves = vec![bf16::ZERO; values.len()];
    let pieces = halves.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
    pieces.for_each(|(halves, values)| {
        vectorize(
            #[inline(always)]
            || round(values, halves),
        );
    });
    halves
}

/// [`rounded`], inside of a vectorized loop.
#[inline(always)]
pub(crate) fn round(values: &[f32], halves: &mut [bf16]) {
    for (half, value) in halves.iter_mut().zip(values) {
        let bits = value.to_bits();
        let near = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // A number that is none stays none.
        let none = (bits >> 16) | 0x40;
        *half = bf16::from_bits(if value.is_nan() { none } else { near } as u16);
    }
}

/// What was [`rounded`].
pub(crate) fn widened(halves: &[bf16]) -> Vec<f32> {
    let mut values = unwritten(halves.len());
    let pieces = values.par_chunks_mut(CHUNK).zip(halves.par_chunks(CHUNK));
    pieces.for_each(|(values, halves)| widen(halves, values));
    values
}

/// The values of a weight.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Numbers<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    /// bf16 in the order of the processor's tiles.
    Ordered(Ordered<'a>),
}

impl<'a> Numbers<'a> {
    /// As f32, which all parameters are but the weights of products.
    pub(crate) fn f32(self) -> &'a [f32] {
        match self {
            Self::F32(values) => values,
            Self::Bf16(_) | Self::Ordered(_) => {
                unreachable!("only factors of products have half precision in memory")
            }
        }
    }

    /// Lends the values as f32.
    pub(crate) fn with_f32<R>(self, work: impl FnOnce(&[f32]) -> R) -> R {
        match self {
            Self::F32(values) => work(values),
            Self::Bf16(values) => with_scratch(values.len(), |widened| {
                widen(values, widened);
                work(widened)
            }),
            Self::Ordered(weight) => {
                weight.with_numbers(|values| Numbers::Bf16(values).with_f32(work))
            }
        }
    }

    /// Lends the values one after the other, whatever their order.
    pub(crate) fn in_rows<R>(self, work: impl FnOnce(Numbers<'_>) -> R) -> R {
        match self {
            Self::Ordered(weight) => weight.with_numbers(|values| work(Numbers::Bf16(values))),
            _ => work(self),
        }
    }

    /// A row-major matrix of them. Panics when they are too few.
    pub(crate) fn matrix(self, dims: [usize; 2]) -> Operand<'a> {
        match self {
            Self::F32(values) => Operand::F32(Matrix::new(values, dims)),
            Self::Bf16(values) => Operand::Bf16(Matrix::new(values, dims)),
            Self::Ordered(weight) => Operand::Ordered(weight.matrix(dims)),
        }
    }
}

/// A factor of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operand<'a> {
    F32(Matrix<'a>),
    Bf16(Matrix<'a, bf16>),
    /// Parts of it are whole blocks.
    Ordered(Blocks<'a>),
}

impl<'a> From<Matrix<'a>> for Operand<'a> {
    fn from(matrix: Matrix<'a>) -> Self {
        Self::F32(matrix)
    }
}

impl Operand<'_> {
    pub(crate) fn dims(&self) -> [usize; 2] {
        match self {
            Self::F32(matrix) => matrix.dims(),
            Self::Bf16(matrix) => matrix.dims(),
            Self::Ordered(matrix) => matrix.dims(),
        }
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        match self {
            Self::F32(matrix) => Self::F32(matrix.t()),
            Self::Bf16(matrix) => Self::Bf16(matrix.t()),
            Self::Ordered(matrix) => Self::Ordered(matrix.t()),
        }
    }

    /// Some of the rows.
    pub(crate) fn rows(self, range: std::ops::Range<usize>) -> Self {
        match self {
            Self::F32(matrix) => Self::F32(matrix.rows(range)),
            Self::Bf16(matrix) => Self::Bf16(matrix.rows(range)),
            Self::Ordered(matrix) => Self::Ordered(matrix.rows(range)),
        }
    }

    /// Some of the columns.
    pub(crate) fn cols(self, range: std::ops::Range<usize>) -> Self {
        self.t().rows(range).t()
    }

    /// Lends it as f32.
    pub(crate) fn with_f32<R>(self, work: impl FnOnce(Matrix<'_>) -> R) -> R {
        match self {
            Self::F32(matrix) => work(matrix),
            Self::Bf16(matrix) => Numbers::Bf16(matrix.used())
                .with_f32(|values| work(Matrix::strided(values, matrix.dims(), matrix.strides()))),
            Self::Ordered(matrix) => {
                matrix.with_numbers(|matrix| Operand::Bf16(matrix).with_f32(work))
            }
        }
    }
}

fn widen(values: &[bf16], widened: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (widened, value) in widened.iter_mut().zip(values) {
                *widened = value.to_f32();
            }
        },
    );
}
