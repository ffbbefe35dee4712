//! How exactly a network computes.

use std::cell::Cell;

use candle_core::DType;

use super::backend::within;

/// What the frozen weights of a network are, and the factors of its matrix products and convolutions. Sums, statistics, the
/// softmax and whatever is trained are f32 in any case.
///
/// On a device activations are of this type too. On a CPU they stay f32 in memory, and are rounded where they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// f32: 24 bits.
    #[default]
    F32,
    /// bf16: 8 bits, and the range of f32. Processors multiply it by their matrix tiles (Intel AMX) or by vectors of it
    /// (AVX512-BF16); where they have neither, only weights are rounded.
    Bf16,
    /// f16: 11 bits, and a small range; for devices.
    F16,
}

thread_local! {
    static CHOSEN: Cell<Precision> = const { Cell::new(Precision::F32) };
}

impl Precision {
    /// The type of such numbers.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// What operations of this thread are asked for.
    pub(crate) fn current() -> Self {
        CHOSEN.get()
    }

    /// Does some work on this thread, and the backward passes of what comes out of it on any, with factors of this
    /// precision.
    pub fn within<R>(self, work: impl FnOnce() -> R) -> R {
        within(&CHOSEN, self, work)
    }
}
