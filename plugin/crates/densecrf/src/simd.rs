//! Code compiled once per instruction set.

/// Runs `work` with the widest vector instructions of this processor. Everything `work` calls must be `#[inline(always)]`
/// to profit. The results are the same bits on all of them.
#[inline(always)]
pub(crate) fn vectorize<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}
