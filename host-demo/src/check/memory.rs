//! Memory that tells on those who misuse it: pages that cannot be written, and the count of bytes on the heap.
#![expect(
    unsafe_code,
    reason = "mmap, mprotect, mallinfo2, and vouching for the memory that comes of it"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use plugin_api::tensor::{TensorDescription, contiguous_strides};
use plugin_api::{DataType, DeviceId, SharedTensor, TensorError, TensorOwner};

/// How many of the tensors that were made with it somebody still holds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Held(Arc<AtomicUsize>);

impl Held {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// Values that are counted while somebody holds them.
struct Counted {
    _memory: Memory,
    held: Held,
}

impl Counted {
    fn new(memory: Memory, held: &Held) -> Self {
        held.0.fetch_add(1, Ordering::SeqCst);
        Self {
            _memory: memory,
            held: held.clone(),
        }
    }
}

impl TensorOwner for Counted {}

impl Drop for Counted {
    fn drop(&mut self) {
        self.held.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Of `f32`s.
enum Memory {
    Vector(Vec<f32>),
    #[cfg(unix)]
    Pages(pages::Pages),
}

impl Memory {
    fn address(&self) -> u64 {
        match self {
            Self::Vector(values) => values.as_ptr().addr() as u64,
            #[cfg(unix)]
            Self::Pages(pages) => pages.address(),
        }
    }
}

fn shared(
    memory: Memory,
    shape: &[usize],
    is_read_only: bool,
    held: &Held,
) -> Result<SharedTensor, TensorError> {
    let description = TensorDescription {
        address: memory.address(),
        byte_offset: 0,
        allocation_bytes: (shape.iter().product::<usize>() * size_of::<f32>()) as u64,
        device: DeviceId::CPU,
        data_type: DataType::F32,
        shape,
        strides: &contiguous_strides(shape),
        is_read_only,
    };
    // SAFETY: the values move into the owner with their memory, which stays where it is until the owner is dropped; nobody
    // else uses it. Pages are said to be read-only.
    unsafe { SharedTensor::from_raw(&description, Counted::new(memory, held)) }
}

/// A tensor whose holders are counted; the only one may write it.
pub(crate) fn counted(
    values: &[f32],
    shape: &[usize],
    held: &Held,
) -> Result<SharedTensor, TensorError> {
    shared(Memory::Vector(values.to_vec()), shape, false, held)
}

/// A tensor in pages that cannot be written; where the system has none, one that says that it must not be.
pub(crate) fn write_protected(
    values: &[f32],
    shape: &[usize],
    held: &Held,
) -> Result<SharedTensor, TensorError> {
    #[cfg(unix)]
    if let Some(pages) = pages::Pages::new(values) {
        return shared(Memory::Pages(pages), shape, true, held);
    }
    shared(Memory::Vector(values.to_vec()), shape, true, held)
}

#[cfg(unix)]
mod pages {
    /// `f32`s in pages of their own.
    pub(super) struct Pages {
        start: *mut libc::c_void,
        bytes: usize,
    }

    // SAFETY: the pages belong to this value alone and are never written.
    unsafe impl Send for Pages {}
    // SAFETY: as above.
    unsafe impl Sync for Pages {}

    impl Pages {
        /// None if the system gives none.
        pub(super) fn new(values: &[f32]) -> Option<Self> {
            let bytes = size_of_val(values).max(1);
            let (access, kind) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            // SAFETY: new pages, of which nothing is known elsewhere.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
            if start == libc::MAP_FAILED {
                return None;
            }
            let pages = Self { start, bytes };
            // SAFETY: the pages are as long as the values and can be written.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    values.as_ptr(),
                    pages.start.cast::<f32>(),
                    values.len(),
                );
            }
            // SAFETY: the pages are this value's.
            let done = unsafe { libc::mprotect(pages.start, bytes, libc::PROT_READ) };
            (done == 0).then_some(pages)
        }

        pub(super) fn address(&self) -> u64 {
            self.start.addr() as u64
        }
    }

    impl Drop for Pages {
        fn drop(&mut self) {
            // SAFETY: the pages are this value's, and whoever held them is gone.
            let _ = unsafe { libc::munmap(self.start, self.bytes) };
        }
    }
}

/// Bytes that this process, its libraries included, has on the heap; nothing where the system does not count them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn heap_bytes() -> Option<usize> {
    // SAFETY: reads counters of the allocator.
    let info = unsafe { libc::mallinfo2() };
    Some(info.uordblks + info.hblkhd)
}

/// Bytes that this process, its libraries included, has on the heap; nothing where the system does not count them.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn heap_bytes() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_counted_and_the_heap_is_seen_to_grow() {
        let held = Held::default();
        let values = [0.5f32; 12];
        let first = counted(&values, &[1, 4, 3], &held).unwrap();
        let mut second = write_protected(&values, &[12], &held).unwrap();
        assert_eq!(held.count(), 2);
        assert_eq!(first.as_slice::<f32>().unwrap(), values);
        assert_eq!(second.as_slice::<f32>().unwrap(), values);
        assert!(!second.is_writable());
        drop((first.clone(), first, second));
        assert_eq!(held.count(), 0);
        if let Some(before) = heap_bytes() {
            // More than other tests take or free meanwhile; never touched.
            let block = std::hint::black_box(vec![0u8; 1 << 30]);
            assert!(heap_bytes().unwrap() >= before + block.len() / 2);
        }
    }
}
