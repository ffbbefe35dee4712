//! Giving memory back: a server runs for weeks, and one busy moment must not show for the rest of them.
#![expect(unsafe_code, reason = "mallopt")]

/// Makes all threads share one heap: each of glibc's heaps keeps what its busiest moment took. Large tensors are not
/// in it, and few threads are busy at once.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn share_one_heap() {
    // SAFETY: sets a number of the allocator; called before the server's threads start.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Other allocators give back by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn share_one_heap() {}
