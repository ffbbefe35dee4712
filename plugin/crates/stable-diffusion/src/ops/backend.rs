//! Who computes: the seam below every operation of the networks.

use std::cell::Cell;
use std::thread::LocalKey;

use candle_core::{DType, Tensor};

use super::is_ordered;

/// An implementation of all operations.
///
/// | invariant | tested for both by |
/// |---|---|
/// | a frozen parameter gets no gradient: none is computed, none is kept | `tests/ops` |
/// | without a tracked operand nothing is kept for a backward pass | `tests/ops` |
/// | an attention map is never built whole | `tests/memory.rs` |
/// | no graph outlives its step | `tests/memory.rs` |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Kernels of this crate, for f32 in memory, weights of products in bf16 too; the same bits for any number of threads.
    Host,
    /// candle's operations in nodes of their own, for every device and type, and on CUDA devices some kernels of our own
    /// ([`super::kernels`]). On a CPU it is slow, and tested.
    Device,
}

thread_local! {
    static CHOSEN: Cell<Option<Backend>> = const { Cell::new(None) };
}

impl Backend {
    /// Who computes with these tensors.
    pub(crate) fn of<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Self {
        let on_host = |tensor: &Tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32;
        match CHOSEN.get() {
            Some(chosen) => chosen,
            None if tensors.into_iter().all(on_host) => Self::Host,
            None => Self::Device,
        }
    }

    /// As [`Self::of`]; the weight of a product may be bf16 in memory.
    pub(crate) fn of_product(x: &Tensor, weight: &Tensor) -> Self {
        match Self::of([x]) {
            Self::Host if weight.device().is_cpu() && is_half(weight) => Self::Host,
            Self::Host => Self::of([weight]),
            Self::Device => Self::Device,
        }
    }

    /// Does some work on this thread, and the backward passes of what comes out of it on any, with this implementation
    /// wherever the tensors are: for tests and measurements.
    pub fn within<R>(self, work: impl FnOnce() -> R) -> R {
        Self::choose(Some(self), work)
    }

    /// What [`Self::within`] set on this thread.
    pub(super) fn chosen() -> Option<Self> {
        CHOSEN.get()
    }

    /// As [`Self::within`]; none leaves it to the tensors.
    pub(super) fn choose<R>(backend: Option<Self>, work: impl FnOnce() -> R) -> R {
        within(&CHOSEN, backend, work)
    }
}

fn is_half(weight: &Tensor) -> bool {
    weight.dtype() == DType::BF16 || is_ordered(weight)
}

/// Does some work with another value of this thread's cell, and puts back the one before, after a panic too.
pub(super) fn within<T: Copy + 'static, R>(
    cell: &'static LocalKey<Cell<T>>,
    value: T,
    work: impl FnOnce() -> R,
) -> R {
    struct Restore<T: Copy + 'static>(&'static LocalKey<Cell<T>>, T);
    impl<T: Copy + 'static> Drop for Restore<T> {
        fn drop(&mut self) {
            self.0.set(self.1);
        }
    }
    let _restore = Restore(cell, cell.replace(value));
    work()
}
