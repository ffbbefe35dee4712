//! Memory of its own pages, with a protection of one's choice.
#![expect(unsafe_code, reason = "maps memory, and shares it")]

use plugin_api::tensor::{TensorDescription, contiguous_strides};
use plugin_api::{DataType, DeviceId, SharedTensor, TensorOwner};

/// Pages that are unmapped when it is dropped.
pub(crate) struct Pages {
    address: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: an address and a size; whoever uses the memory vouches for how.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Pages that can be read and written.
    fn new(bytes: usize) -> Self {
        // SAFETY: new pages, wherever there is room.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        Self { address, bytes }
    }

    fn protect(&self, protection: i32) {
        // SAFETY: its own pages; nobody uses them yet.
        let status = unsafe { libc::mprotect(self.address, self.bytes, protection) };
        assert_eq!(status, 0);
    }

    /// Pages that nobody can read or write.
    pub(crate) fn forbidden(bytes: usize) -> Self {
        let pages = Self::new(bytes);
        pages.protect(libc::PROT_NONE);
        pages
    }

    pub(crate) fn address(&self) -> u64 {
        self.address as u64
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: its own pages, used no more.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

impl TensorOwner for Pages {}

/// Values in memory that cannot be written.
pub(crate) fn read_only(values: &[f32], shape: &[usize]) -> SharedTensor {
    let pages = Pages::new(size_of_val(values));
    // SAFETY: as many bytes as were mapped.
    unsafe {
        std::ptr::copy_nonoverlapping(values.as_ptr(), pages.address.cast(), values.len());
    }
    pages.protect(libc::PROT_READ);
    let description = TensorDescription {
        address: pages.address(),
        byte_offset: 0,
        allocation_bytes: pages.bytes as u64,
        device: DeviceId::CPU,
        data_type: DataType::F32,
        shape,
        strides: &contiguous_strides(shape),
        is_read_only: true,
    };
    // SAFETY: the pages live as long as their owner and are never written.
    unsafe { SharedTensor::from_raw(&description, pages) }.unwrap()
}
