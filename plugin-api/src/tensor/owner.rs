//! The producer's side of a shared tensor.

use crate::{DeviceId, ErrorCode, NodeError, SharedTensor};

/// Keeps the memory of a shared tensor alive, and orders work on it. Dropped with the last handle, on any thread; a
/// destructor frees the memory in the order that [`release_after`](Self::release_after) asked for, and does not wait.
///
/// All methods: any thread, several at once, while a handle lives. A panic in one, or in the destructor, becomes an error.
/// The defaults are those of memory that is ready when it is shared and that only the CPU uses.
///
/// A *stream* is the device's own handle of a queue of work (for CUDA a `CUstream`), as a number.
pub trait TensorOwner: Send + Sync + 'static {
    /// Makes work that `stream` gets from now on wait for the data. Allocates nothing that grows; does not wait itself.
    ///
    /// # Errors
    /// The streams cannot be ordered; the consumer then calls [`host_sync`](Self::host_sync).
    fn wait_on(&self, _stream: u64) -> Result<(), NodeError> {
        Ok(())
    }

    /// Waits until the data are there for whoever looks.
    ///
    /// # Errors
    /// The work that makes them failed.
    fn host_sync(&self) -> Result<(), NodeError> {
        Ok(())
    }

    /// A consumer's last use was put into `stream`: the memory is neither freed nor written before that is done. Does not
    /// wait.
    ///
    /// # Errors
    /// The streams cannot be ordered; the consumer then waits for its stream before it drops its handle.
    fn release_after(&self, _stream: u64) -> Result<(), NodeError> {
        Ok(())
    }

    /// A row-major copy on `device` that nobody else holds and that its holder may write. Its own device too.
    ///
    /// # Errors
    /// A device that the producer does not know, or that has no memory left ([`ErrorCode::OutOfMemory`]).
    fn copy_to(&self, device: DeviceId) -> Result<SharedTensor, NodeError> {
        let DeviceId { kind, index } = device;
        let message =
            format!("its producer cannot copy it to device {index} of DLPack's type {kind}");
        Err(NodeError::new(ErrorCode::Internal, message))
    }
}
