//! Settings of the allocator: memory that a step of learning frees is that of the next one, and a server that runs for
//! weeks does not show one busy moment for the rest of them.
#![expect(unsafe_code, reason = "mallopt")]

/// Lets freed memory stay with the process: a step's tensors are as large as the next one's, and asking the system for
/// them anew, page by page, takes up to a quarter of the step. All threads share one heap: each of glibc's heaps keeps what
/// its busiest moment took, and those beside the first one give back what they should keep.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn keep_freed() {
    /// Tensors below are on the heap; the system's own limit would be 32 MiB.
    const LARGEST_ON_HEAP: libc::c_int = 1 << 30;
    // SAFETY: sets numbers of the allocator; called before other threads start.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_ON_HEAP);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
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
    pub(crate) fn keep_freed() {}
    pub(crate) fn give_back() {}
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) use elsewhere::{give_back, keep_freed};
