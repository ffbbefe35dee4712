//! How exactly factors are multiplied.

use std::cell::Cell;

use super::backend::within;

/// Of what the factors of matrix products and convolutions are. Sums, normalizations and the softmax are f32 in any case,
/// and so is everything that is kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// f32: 24 bits.
    #[default]
    F32,
    /// Rounded to bf16, 8 bits, where the processor multiplies tiles of them (Intel AMX); f32 elsewhere.
    Bf16,
}

thread_local! {
    static CHOSEN: Cell<Precision> = const { Cell::new(Precision::F32) };
}

impl Precision {
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
