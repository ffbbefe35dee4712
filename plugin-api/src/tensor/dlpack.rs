//! From and to DLPack 1.x.

use std::ffi::c_void;
use std::ptr::{NonNull, fn_addr_eq, null_mut};

use abi_stable::std_types::RArc;

use super::{
    DataType, DeviceId, MAX_DIMS, SharedTensor, TensorDescription, TensorError, TensorOwner,
    extent, fixed, row_major,
};
use crate::abi::OwnerAdapter;
use crate::c_door::dlpack::{
    DLDataType, DLDevice, DLManagedTensorVersioned, DLPackVersion, DLTensor,
};
use crate::guard::guarded;

/// The version that tensors are exported in; others of this major version are read too.
const VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 1 };

/// DLPack's flags.
const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;

/// What the exported struct points to; shape and strides are those of the handle itself.
struct Exported {
    managed: DLManagedTensorVersioned,
    tensor: SharedTensor,
}

// DLPack's numbers are 64 bits, and none of ours is so large that its sign would change.
const _: () = assert!(size_of::<usize>() == size_of::<i64>());

/// Frees what [`SharedTensor::into_dlpack`] made.
unsafe extern "C" fn delete_exported(managed: *mut DLManagedTensorVersioned) {
    // Owners are guarded where they are; this is for what lies between.
    let _ = guarded("a tensor that is freed", || {
        if let Some(managed) = NonNull::new(managed) {
            // SAFETY: only `into_dlpack` names this deleter, and DLPack lets it be called once.
            drop(unsafe { taken_back(managed) });
        }
        Ok(())
    });
}

/// The tensor that was exported.
///
/// # Safety
/// `managed` is of `into_dlpack`, and used by nobody any more.
unsafe fn taken_back(managed: NonNull<DLManagedTensorVersioned>) -> SharedTensor {
    // SAFETY: `into_dlpack` put the box there, and nobody else will.
    let exported = unsafe { Box::from_raw(managed.as_ref().manager_ctx.cast::<Exported>()) };
    exported.tensor
}

/// Keeps a foreign tensor, until it is handed on; DLPack lets its deleter be called on any thread.
struct DlpackOwner(Option<NonNull<DLManagedTensorVersioned>>);

// SAFETY: the struct is only read, and DLPack's deleters may be called anywhere.
unsafe impl Send for DlpackOwner {}
// SAFETY: as above; there is nothing to change through a shared reference.
unsafe impl Sync for DlpackOwner {}

impl Drop for DlpackOwner {
    fn drop(&mut self) {
        let Some(managed) = self.0.take() else {
            return;
        };
        // SAFETY: `from_dlpack` was handed a valid tensor, which is still here, and calls its deleter here only, once.
        unsafe {
            if let Some(deleter) = managed.as_ref().deleter {
                deleter(managed.as_ptr());
            }
        }
    }
}

/// DLPack does not say who fills and uses memory on a device: what comes from there is ready when it arrives, and a consumer
/// on a device waits for its own stream before it drops the handle.
impl TensorOwner for DlpackOwner {
    fn release_after(&self, _stream: u64) -> Result<(), crate::NodeError> {
        // SAFETY: the tensor is valid until it is dropped.
        let device = self
            .0
            .map(|managed| unsafe { managed.as_ref() }.dl_tensor.device);
        let device = device.map_or(DeviceId::CPU, |device| DeviceId {
            kind: device.device_type,
            index: device.device_id,
        });
        if device.is_host_memory() {
            return Ok(());
        }
        let text = "a DLPack tensor cannot wait for a stream";
        Err(TensorError(text.to_owned()).into())
    }
}

impl SharedTensor {
    /// The tensor as DLPack 1.1, without a copy. The memory is kept until its deleter is called, on any thread.
    ///
    /// The flag `READ_ONLY` is set, unless this handle may write ([`is_writable`](Self::is_writable)): then whoever takes the
    /// DLPack tensor may, and `IS_COPIED` says that nobody else has the memory. On a device the data are there: this waits
    /// for them, because DLPack knows no streams. One that came by [`from_dlpack`](Self::from_dlpack) and that nobody else
    /// holds goes on as it came.
    ///
    /// # Errors
    /// The work that makes the data failed.
    pub fn into_dlpack(mut self) -> Result<NonNull<DLManagedTensorVersioned>, TensorError> {
        self.host_sync()?;
        if let Some(managed) = self.as_it_came() {
            return Ok(managed);
        }
        let flags = if self.is_writable() {
            IS_COPIED
        } else {
            READ_ONLY
        };
        let managed = DLManagedTensorVersioned {
            version: VERSION,
            manager_ctx: null_mut(),
            deleter: Some(delete_exported),
            flags,
            dl_tensor: DLTensor {
                data: self.data_address() as *mut c_void,
                device: DLDevice {
                    device_type: self.device.kind,
                    device_id: self.device.index,
                },
                ndim: self.n_dims as i32,
                dtype: DLDataType {
                    code: self.data_type.code,
                    bits: self.data_type.bits,
                    lanes: self.data_type.lanes,
                },
                shape: null_mut(),
                strides: null_mut(),
                byte_offset: 0,
            },
        };
        let tensor = self;
        let exported = Box::into_raw(Box::new(Exported { managed, tensor }));
        // SAFETY: the box was made above and is nobody else's; the pointers stay in it.
        unsafe {
            (*exported).managed.manager_ctx = exported.cast();
            (*exported).managed.dl_tensor.shape = (&raw mut (*exported).tensor.shape).cast();
            (*exported).managed.dl_tensor.strides = (&raw mut (*exported).tensor.strides).cast();
            Ok(NonNull::new_unchecked(&raw mut (*exported).managed))
        }
    }

    /// The DLPack tensor that this handle alone keeps, which is then its taker's. Otherwise every hop would put another layer
    /// around it.
    fn as_it_came(&mut self) -> Option<NonNull<DLManagedTensorVersioned>> {
        let owner = RArc::get_mut(&mut self.owner)?;
        let adapter = owner.obj.downcast_as_mut::<OwnerAdapter<DlpackOwner>>();
        adapter.ok()?.value_mut()?.0.take()
    }

    /// Takes a DLPack tensor of any 1.x over; its deleter is called when the last handle is dropped, or before this returns
    /// an error.
    ///
    /// With the flag `READ_ONLY` the memory is shared and never written. With `IS_COPIED` alone it is shared and its only
    /// holder may write it. With neither, its exporter may still write it, so it is copied here and let go at once; on a
    /// device, where it cannot be copied, it is refused. The data must be there when it is handed over. One that this library
    /// exported is the tensor that it was.
    ///
    /// # Errors
    /// Another major version, more than [`MAX_DIMS`] dimensions, elements that share bytes, memory without an address, or
    /// the refusal above.
    ///
    /// # Safety
    /// `managed` is valid as DLPack has it, handed over to this function, and its flags are true.
    pub unsafe fn from_dlpack(
        managed: NonNull<DLManagedTensorVersioned>,
    ) -> Result<Self, TensorError> {
        // SAFETY: valid, and the fields up to the flags are there in every version.
        let (version, deleter, flags) = unsafe {
            let managed = managed.as_ptr();
            ((*managed).version, (*managed).deleter, (*managed).flags)
        };
        let own: unsafe extern "C" fn(*mut DLManagedTensorVersioned) = delete_exported;
        if deleter.is_some_and(|deleter| fn_addr_eq(deleter, own)) {
            // SAFETY: this library's own deleter says that this library made it; it was handed over.
            return Ok(unsafe { taken_back(managed) });
        }
        let owner = DlpackOwner(Some(managed));
        if version.major != VERSION.major {
            return Err(TensorError(format!(
                "the tensor is DLPack {}.{}, this reads 1.x",
                version.major, version.minor
            )));
        }
        // SAFETY: valid, and of version 1.
        let tensor = unsafe { managed.as_ref() }.dl_tensor;
        // SAFETY: as above.
        let layout = unsafe { layout(&tensor) }?;
        let (shape, strides) = (
            &layout.shape[..layout.n_dims],
            &layout.strides[..layout.n_dims],
        );
        let mut description = described(&tensor, shape, strides)?;
        description.is_read_only = flags & READ_ONLY != 0;
        let is_shared_for_writing = flags & (READ_ONLY | IS_COPIED) == 0;
        if is_shared_for_writing && !description.device.is_host_memory() {
            return Err(TensorError(
                "the tensor is on a device and may still be written by its maker; hand over one with the flag READ_ONLY \
                 or IS_COPIED"
                    .to_owned(),
            ));
        }
        // SAFETY: the description is that of the tensor, which the owner keeps; that it does not change is what the flags
        // say, and without them it is copied and let go while the caller waits.
        let shared = unsafe { Self::from_raw(&description, owner) }?;
        if is_shared_for_writing {
            shared.host_copy()
        } else {
            Ok(shared)
        }
    }
}

/// Shape and strides, of as many dimensions as the tensor has.
struct Layout {
    n_dims: usize,
    shape: [usize; MAX_DIMS],
    strides: [isize; MAX_DIMS],
}

/// # Safety
/// Shape and strides are as long as the tensor says.
unsafe fn layout(tensor: &DLTensor) -> Result<Layout, TensorError> {
    let n_dims = usize::try_from(tensor.ndim).ok().filter(|&n| n <= MAX_DIMS);
    let n_dims = n_dims.ok_or_else(|| {
        let n = tensor.ndim;
        TensorError(format!(
            "the tensor has {n} dimensions, at most {MAX_DIMS} can be read"
        ))
    })?;
    let list = |numbers: *const i64| match numbers.is_null() {
        true => None,
        // SAFETY: the caller vouched for it.
        false => Some(unsafe { std::slice::from_raw_parts(numbers, n_dims) }),
    };
    let no_shape = || TensorError("the tensor has no shape".to_owned());
    let mut shape = [0; MAX_DIMS];
    match list(tensor.shape) {
        Some(given) => {
            for (size, &given) in shape.iter_mut().zip(given) {
                *size = usize::try_from(given).map_err(|_| no_shape())?;
            }
        }
        None if n_dims == 0 => {}
        None => return Err(no_shape()),
    }
    let strides = match list(tensor.strides) {
        Some(given) => fixed(given).map(|stride| stride as isize),
        None => fixed(&row_major(&shape[..n_dims])),
    };
    Ok(Layout {
        n_dims,
        shape,
        strides,
    })
}

fn described<'a>(
    tensor: &DLTensor,
    shape: &'a [usize],
    strides: &'a [isize],
) -> Result<TensorDescription<'a>, TensorError> {
    let DLDataType { code, bits, lanes } = tensor.dtype;
    let data_type = DataType { code, bits, lanes };
    let bytes = data_type.bytes().unwrap_or(0) as i64;
    let is_empty = shape.contains(&0);
    if tensor.data.is_null() && !is_empty {
        return Err(TensorError("the tensor has no address".to_owned()));
    }
    // DLPack does not tell the allocation: what the tensor reaches of it is what is known.
    let (lowest, highest) = match extent(shape, strides) {
        _ if is_empty => (0, -1),
        Some(ends) => ends,
        None => return Err(TensorError("the tensor's strides are too large".to_owned())),
    };
    let too_large = || TensorError("the tensor's strides are too large".to_owned());
    let before = lowest.checked_mul(-bytes).ok_or_else(too_large)?;
    let reach = highest.checked_sub(lowest).and_then(|n| n.checked_add(1));
    let reach = reach
        .and_then(|n| n.checked_mul(bytes))
        .ok_or_else(too_large)?;
    let first = (tensor.data as u64).checked_add(tensor.byte_offset);
    let address = first.and_then(|first| first.checked_sub(before as u64));
    Ok(TensorDescription {
        address: address.ok_or_else(too_large)?,
        byte_offset: before as u64,
        allocation_bytes: reach as u64,
        device: DeviceId {
            kind: tensor.device.device_type,
            index: tensor.device.device_id,
        },
        data_type,
        shape,
        strides,
        is_read_only: true,
    })
}
