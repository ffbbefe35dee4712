//! DLPack 1.1, as its specification lays it out. What these fields mean stands there: <https://dmlc.github.io/dlpack/latest/>

use std::ffi::c_void;

/// The version of DLPack that a tensor is laid out in.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DLPackVersion {
    /// Another one is another layout.
    pub major: u32,
    /// Another one adds device and element types.
    pub minor: u32,
}

/// Where memory is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DLDevice {
    /// 1 CPU, 2 CUDA, 3 CUDA pinned host memory, 8 Metal, 12 extension, 13 CUDA managed memory.
    pub device_type: i32,
    /// Which device of this type.
    pub device_id: i32,
}

/// What an element is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DLDataType {
    /// 0 signed, 1 unsigned, 2 float, 4 bfloat, 6 bool.
    pub code: u8,
    /// Bits per element.
    pub bits: u8,
    /// 1.
    pub lanes: u16,
}

/// Memory and its layout.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DLTensor {
    /// On its device.
    pub data: *mut c_void,
    /// Where.
    pub device: DLDevice,
    /// How many dimensions.
    pub ndim: i32,
    /// What.
    pub dtype: DLDataType,
    /// As many as `ndim`.
    pub shape: *mut i64,
    /// As many as `ndim`, in elements; NULL for row-major.
    pub strides: *mut i64,
    /// First element, from `data`.
    pub byte_offset: u64,
}

/// A tensor that whoever holds it lets go by its deleter.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DLManagedTensorVersioned {
    /// What follows is laid out so only if the major version is 1; up to `flags` it is always so.
    pub version: DLPackVersion,
    /// The producer's.
    pub manager_ctx: *mut c_void,
    /// Called once, with this tensor, on any thread; may be NULL.
    pub deleter: Option<unsafe extern "C" fn(tensor: *mut DLManagedTensorVersioned)>,
    /// Bit 0: the memory must not be written. Bit 1: it is a copy that nobody but the holder has.
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: DLTensor,
}
