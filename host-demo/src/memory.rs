//! Settings of the allocator: a server that runs for weeks does not show one busy moment for the rest of them. What is large
//! is tensors of plugins, whose memory is theirs.
#![expect(unsafe_code, reason = "mallopt")]

/// All threads share one heap: each of glibc's heaps keeps what its busiest moment took.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn share_heap() {
    // SAFETY: sets a number of the allocator; called before other threads start.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives back what is free, between two jobs.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn give_back() {
    // SAFETY: touches free memory alone.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Whether little of what this process may have is left, after it has given back what it freed.
pub(crate) fn is_scarce() -> bool {
    /// Part of all memory below which what is left is little.
    const LITTLE: u64 = 10;
    let is_little = || {
        let known = machine_memory::total().zip(machine_memory::available());
        known.is_some_and(|(total, available)| available < total / LITTLE)
    };
    is_little() && {
        give_back();
        is_little()
    }
}

/// Other allocators keep and give back as they see fit.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
mod elsewhere {
    pub(crate) fn share_heap() {}
    pub(crate) fn give_back() {}
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) use elsewhere::{give_back, share_heap};
