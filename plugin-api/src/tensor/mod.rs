//! Tensors that pass between nodes without a copy.
//!
//! A handle says where the memory is, on which device, what it holds and how (device, type, shape, strides in elements: as
//! in DLPack 1.1), how large the allocation behind it is, and who owns it. Cloning a handle counts a reference and allocates
//! nothing; the owner is dropped with the last. A program that only passes tensors on never touches the memory and needs no
//! library of the device: it calls the owner.
//!
//! # Order on a device
//! A consumer on a device calls [`SharedTensor::wait_on`] with its own stream, puts its work into that stream, and calls
//! [`SharedTensor::release_after`] with it. The first keeps it from reading what is not there yet, the second keeps the
//! producer from freeing memory that queued work still reads. A consumer on the CPU calls nothing: what gives it values waits
//! for them.
//!
//! # Writing
//! Values on wires do not change. Who wants to write calls [`SharedTensor::make_unique`] and then
//! [`SharedTensor::as_mut_slice`]: the only holder of memory that is not read-only gets that memory, everybody else a copy.
//!
//! # DLPack
//! [`SharedTensor::into_dlpack`] and [`SharedTensor::from_dlpack`], without a copy but for one case that is described there.
#![expect(
    unsafe_code,
    reason = "reads and writes memory that its producer vouched for"
)]

mod data_type;
mod dlpack;
mod owner;

use std::borrow::Cow;

use abi_stable::StableAbi;
use abi_stable::std_types::RArc;
use half::{bf16, f16};
use smallvec::SmallVec;

pub use data_type::{DataType, DeviceId, Element};
pub use owner::TensorOwner;

use crate::NodeError;
use crate::abi::{OwnerAdapter, TensorOwnerBox};

/// Most dimensions that a tensor on a wire can have.
pub const MAX_DIMS: usize = 8;

/// The memory is never written, not even by its only holder (DLPack's bit).
const FLAG_READ_ONLY: u32 = 1;

/// What a consumer cannot do with a tensor, in one sentence.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct TensorError(String);

impl From<NodeError> for TensorError {
    fn from(error: NodeError) -> Self {
        Self(error.message.into_string())
    }
}

/// A tensor whose producer cannot wait for its consumer's stream: the consumer waits for that stream and then drops it.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct NotReleased {
    /// The handle, which still keeps the memory.
    pub tensor: SharedTensor,
    /// Why.
    pub reason: TensorError,
}

/// Says what memory a producer shares.
#[derive(Debug, Clone, Copy)]
pub struct TensorDescription<'a> {
    /// Address of the allocation on its device; 0 where it is not known.
    pub address: u64,
    /// First element, counted from `address`.
    pub byte_offset: u64,
    /// Size of the allocation; lets a host account for memory per wire.
    pub allocation_bytes: u64,
    /// Where it lives.
    pub device: DeviceId,
    /// What it holds.
    pub data_type: DataType,
    /// At most [`MAX_DIMS`] dimensions.
    pub shape: &'a [usize],
    /// In elements; as many as `shape`.
    pub strides: &'a [isize],
    /// Whether the memory must never be written: the producer uses it still, or it cannot be written.
    pub is_read_only: bool,
}

/// An immutable tensor on a wire.
#[repr(C)]
#[derive(StableAbi)]
pub struct SharedTensor {
    address: u64,
    byte_offset: u64,
    allocation_bytes: u64,
    device: DeviceId,
    data_type: DataType,
    n_dims: u32,
    flags: u32,
    shape: [usize; MAX_DIMS],
    strides: [isize; MAX_DIMS],
    owner: TensorOwnerBox,
}

impl Clone for SharedTensor {
    fn clone(&self) -> Self {
        Self {
            owner: self.owner.clone(),
            ..*self
        }
    }
}

impl std::fmt::Debug for SharedTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedTensor")
            .field("shape", &self.shape())
            .field("data_type", &self.data_type)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl SharedTensor {
    /// Shares memory that `owner` keeps alive.
    ///
    /// # Errors
    /// Too many dimensions, strides that do not fit the shape, elements that share bytes, or elements outside of the
    /// allocation.
    ///
    /// # Safety
    /// `description` must describe memory that is really on the device that it names, initialized once
    /// [`TensorOwner::host_sync`] returned, and that stays valid and unchanged for as long as `owner` lives. Unless it is
    /// read-only, nothing but the owner's destructor may use the memory: the only holder of a handle may write it.
    pub unsafe fn from_raw<T: TensorOwner>(
        description: &TensorDescription<'_>,
        owner: T,
    ) -> Result<Self, TensorError> {
        let &TensorDescription { shape, strides, .. } = description;
        if shape.len() > MAX_DIMS || shape.len() != strides.len() {
            return Err(TensorError(format!(
                "a shared tensor has at most {MAX_DIMS} dimensions and a stride for each, got {} and {}",
                shape.len(),
                strides.len()
            )));
        }
        check_bounds(description)?;
        Ok(Self {
            address: description.address,
            byte_offset: description.byte_offset,
            allocation_bytes: description.allocation_bytes,
            device: description.device,
            data_type: description.data_type,
            n_dims: shape.len() as u32,
            flags: if description.is_read_only {
                FLAG_READ_ONLY
            } else {
                0
            },
            shape: fixed(shape),
            strides: fixed(strides),
            owner: OwnerAdapter::boxed(owner),
        })
    }

    /// Takes over row-major values in CPU memory; nothing is copied.
    ///
    /// # Errors
    /// The product of `shape` is not the length of `values`, or there are too many dimensions.
    pub fn from_vec<T: Element>(values: Vec<T>, shape: &[usize]) -> Result<Self, TensorError> {
        Self::of_words(values, T::DATA_TYPE, shape)
    }

    /// Takes over a vector whose words are elements of `data_type`.
    fn of_words<W: Copy + Send + Sync + 'static>(
        mut words: Vec<W>,
        data_type: DataType,
        shape: &[usize],
    ) -> Result<Self, TensorError> {
        if shape.iter().product::<usize>() != words.len() {
            return Err(TensorError(format!(
                "{} values do not fill the shape {shape:?}",
                words.len()
            )));
        }
        let description = TensorDescription {
            address: words.as_mut_ptr() as u64,
            byte_offset: 0,
            allocation_bytes: size_of_val(words.as_slice()) as u64,
            device: DeviceId::CPU,
            data_type,
            shape,
            strides: &row_major(shape),
            is_read_only: false,
        };
        // SAFETY: the vector moves into the owner, which never touches it, so its heap block stays where it is and nobody
        // else uses it.
        unsafe { Self::from_raw(&description, VecOwner(words)) }
    }

    /// Sizes of the dimensions.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.n_dims()]
    }

    /// Strides in elements.
    #[must_use]
    pub fn strides(&self) -> &[isize] {
        &self.strides[..self.n_dims()]
    }

    /// How many elements there are.
    #[must_use]
    pub fn n_elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Where the memory is.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// What an element is.
    #[must_use]
    pub fn data_type(&self) -> DataType {
        self.data_type
    }

    /// Address of the first element on its device: equal for two handles to the very same buffer.
    #[must_use]
    pub fn data_address(&self) -> u64 {
        self.address + self.byte_offset
    }

    /// Address of the allocation on its device: equal for all views of it. 0 where the producer does not tell.
    #[must_use]
    pub fn allocation_address(&self) -> u64 {
        self.address
    }

    /// Bytes of the whole allocation behind this view.
    #[must_use]
    pub fn allocation_bytes(&self) -> u64 {
        self.allocation_bytes
    }

    /// Whether the elements lie one behind the other, row by row.
    #[must_use]
    pub fn is_row_major(&self) -> bool {
        let mut expected = 1;
        let mut dims = self.shape().iter().zip(self.strides()).rev();
        self.n_elements() == 0
            || dims.all(|(&n, &stride)| {
                let fits = n == 1 || stride == expected;
                expected *= n as isize;
                fits
            })
    }

    /// The producer's own value, if this library is the producer and `T` is what it shared.
    ///
    /// This is how two nodes of one plugin hand the very same tensor on: no copy, on any device.
    #[must_use]
    pub fn owner_as<T: TensorOwner>(&self) -> Option<&T> {
        // The id of a type holds that of the library: another build of it is another type.
        let adapter = self.owner.obj.downcast_as::<OwnerAdapter<T>>().ok()?;
        adapter.value()
    }

    /// See [`TensorOwner::wait_on`].
    ///
    /// # Errors
    /// The producer's.
    pub fn wait_on(&self, stream: u64) -> Result<(), TensorError> {
        Ok(self.owner.wait_on(stream).into_result()?)
    }

    /// See [`TensorOwner::host_sync`].
    ///
    /// # Errors
    /// The producer's.
    pub fn host_sync(&self) -> Result<(), TensorError> {
        Ok(self.owner.host_sync().into_result()?)
    }

    /// Tells the producer that the last use through this handle was put into `stream`, and drops the handle.
    ///
    /// # Errors
    /// [`NotReleased`], with the handle: the consumer waits for its stream and then drops it.
    pub fn release_after(self, stream: u64) -> Result<(), Box<NotReleased>> {
        match self.owner.release_after(stream).into_result() {
            Ok(()) => Ok(()),
            Err(error) => Err(Box::new(NotReleased {
                tensor: self,
                reason: error.into(),
            })),
        }
    }

    /// The values where they are, if they are row-major, in host memory and of this type.
    ///
    /// # Errors
    /// Another device, element type or layout; [`to_vec`](Self::to_vec) and [`to_f32`](Self::to_f32) copy in those cases.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], TensorError> {
        self.check_type::<T>()?;
        let n = self.readable::<T>()?;
        if n == 0 {
            return Ok(&[]);
        }
        // SAFETY: the producer vouched in `from_raw` for initialized memory that lives as long as the owner, which `self`
        // borrows, and that nobody writes meanwhile; `check_bounds` compared shape and allocation, `readable` looked at
        // place, layout and alignment; every pattern of bits is a `T`.
        Ok(unsafe { std::slice::from_raw_parts(self.data_address() as *const T, n) })
    }

    /// The values where they are, to be written: row-major, in host memory and of this type, held by nobody else and not
    /// read-only. A tensor fresh from [`make_unique`](Self::make_unique) in host memory is.
    ///
    /// # Errors
    /// Any of this is not so.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T], TensorError> {
        self.check_type::<T>()?;
        let n = self.readable::<T>()?;
        if !self.is_writable() {
            let text = "the tensor is held by others too or read-only; make_unique gives one that can be written";
            return Err(TensorError(text.to_owned()));
        }
        if n == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `as_slice`; that nobody else uses the memory was vouched for in `from_raw`, and this is the only
        // handle, which `self` borrows for as long as the slice lives.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data_address() as *mut T, n) })
    }

    /// Whether its holder may write the memory: nobody else holds it, and it is not read-only.
    #[must_use]
    pub fn is_writable(&mut self) -> bool {
        self.flags & FLAG_READ_ONLY == 0 && RArc::get_mut(&mut self.owner).is_some()
    }

    /// A tensor of the same values that its holder may write: this very one if nobody else holds it and it is not read-only,
    /// else a row-major copy on the same device.
    ///
    /// # Errors
    /// The producer cannot copy it.
    pub fn make_unique(mut self) -> Result<Self, TensorError> {
        if self.is_writable() {
            return Ok(self);
        }
        if self.device.is_host_memory() {
            return self.host_copy();
        }
        let mut copy = self.copied_to(self.device)?;
        if copy.is_writable() {
            Ok(copy)
        } else {
            Err(TensorError(
                "the producer of a tensor gave a copy that cannot be written".to_owned(),
            ))
        }
    }

    /// The same values on `device`: this very tensor if it is there, else a copy.
    ///
    /// # Errors
    /// The producer cannot copy it.
    pub fn to_device(&self, device: DeviceId) -> Result<Self, TensorError> {
        if self.device == device {
            Ok(self.clone())
        } else if self.device.is_host_memory() && device == DeviceId::CPU {
            self.host_copy()
        } else {
            self.copied_to(device)
        }
    }

    fn copied_to(&self, device: DeviceId) -> Result<Self, TensorError> {
        let copy = self.owner.copy_to(device).into_result()?;
        let is_same = copy.shape() == self.shape() && copy.data_type == self.data_type;
        if is_same && copy.device == device {
            return Ok(copy);
        }
        Err(TensorError(format!(
            "the producer of a tensor should copy {self:?} to {device:?}, it gave {copy:?}"
        )))
    }

    /// The values in row-major order, copied from wherever they are.
    ///
    /// # Errors
    /// Another element type, or the producer cannot bring them to the CPU.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>, TensorError> {
        self.check_type::<T>()?;
        if let Ok(values) = self.as_slice::<T>() {
            return Ok(values.to_vec());
        }
        let here = self.in_host_memory()?;
        here.host_sync()?;
        here.gathered::<T>()
    }

    /// The values in row-major order as `f32`, from any [`Element`]: where they are if they are row-major `f32` in host
    /// memory, else copied.
    ///
    /// # Errors
    /// Another element type, or the producer cannot bring them to the CPU.
    pub fn to_f32(&self) -> Result<Cow<'_, [f32]>, TensorError> {
        fn converted<T: Element>(tensor: &SharedTensor) -> Result<Vec<f32>, TensorError> {
            let values = tensor.to_vec::<T>()?;
            Ok(values.into_iter().map(T::to_f32).collect())
        }
        if let Ok(values) = self.as_slice::<f32>() {
            return Ok(Cow::Borrowed(values));
        }
        let values = match self.data_type {
            DataType::F32 => self.to_vec::<f32>(),
            DataType::F16 => converted::<f16>(self),
            DataType::BF16 => converted::<bf16>(self),
            DataType::U8 => converted::<u8>(self),
            other => Err(TensorError(format!(
                "the tensor holds {other}; f32, f16, bf16 and u8 can be read"
            ))),
        };
        values.map(Cow::Owned)
    }

    fn in_host_memory(&self) -> Result<Self, TensorError> {
        if self.device.is_host_memory() {
            Ok(self.clone())
        } else {
            self.to_device(DeviceId::CPU)
        }
    }

    /// A row-major copy in ordinary memory of what is in host memory.
    fn host_copy(&self) -> Result<Self, TensorError> {
        self.host_sync()?;
        let (shape, data_type) = (self.shape(), self.data_type);
        match data_type.bytes() {
            Some(1) => Self::of_words(self.gathered::<u8>()?, data_type, shape),
            Some(2) => Self::of_words(self.gathered::<u16>()?, data_type, shape),
            Some(4) => Self::of_words(self.gathered::<u32>()?, data_type, shape),
            Some(8) => Self::of_words(self.gathered::<u64>()?, data_type, shape),
            Some(16) => Self::of_words(self.gathered::<u128>()?, data_type, shape),
            _ => Err(TensorError(format!(
                "a tensor of {data_type} cannot be copied"
            ))),
        }
    }

    fn check_type<T: Element>(&self) -> Result<(), TensorError> {
        if self.data_type == T::DATA_TYPE {
            return Ok(());
        }
        Err(TensorError(format!(
            "the tensor holds {}, expected {}",
            self.data_type,
            T::DATA_TYPE
        )))
    }

    /// Waits for the data and says how many elements lie one behind the other, aligned, in host memory.
    fn readable<T>(&self) -> Result<usize, TensorError> {
        let refuse = |text: &str| Err(TensorError(text.to_owned()));
        if !self.device.is_host_memory() {
            return refuse("the tensor is not in host memory");
        }
        if !self.is_row_major() {
            return refuse("the tensor is a strided view, expected row-major");
        }
        if !self.data_address().is_multiple_of(align_of::<T>() as u64) {
            return refuse("the tensor does not lie at a multiple of its elements' size");
        }
        self.host_sync()?;
        Ok(self.n_elements())
    }

    /// The elements of host memory in row-major order, each as one word of its size.
    fn gathered<W: Copy>(&self) -> Result<Vec<W>, TensorError> {
        let (shape, strides, n) = (self.shape(), self.strides(), self.n_elements());
        if self.data_type.bytes() != Some(size_of::<W>()) || !self.device.is_host_memory() {
            return Err(TensorError(format!("{self:?} cannot be read here")));
        }
        let first = self.data_address() as *const W;
        let mut words = Vec::new();
        let reserved = words.try_reserve_exact(n);
        reserved.map_err(|_| TensorError(format!("there is no memory for a copy of {self:?}")))?;
        let mut index = [0; MAX_DIMS];
        let mut offset = 0;
        for _ in 0..n {
            // SAFETY: the producer vouched for initialized memory in `from_raw`, `check_bounds` showed that every index of
            // the shape lies in it; words are integers or elements, of which every pattern of bits is a value.
            words.push(unsafe { first.offset(offset).read_unaligned() });
            for dim in (0..shape.len()).rev() {
                index[dim] += 1;
                offset += strides[dim];
                if index[dim] < shape[dim] {
                    break;
                }
                offset -= strides[dim] * shape[dim] as isize;
                index[dim] = 0;
            }
        }
        Ok(words)
    }

    fn n_dims(&self) -> usize {
        (self.n_dims as usize).min(MAX_DIMS)
    }
}

/// Strides of a row-major tensor, in elements.
#[must_use]
pub fn contiguous_strides(shape: &[usize]) -> Vec<isize> {
    row_major(shape).into_vec()
}

fn row_major(shape: &[usize]) -> SmallVec<[isize; MAX_DIMS]> {
    let mut strides = SmallVec::from_elem(1, shape.len());
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i] as isize;
    }
    strides
}

fn fixed<T: Copy + Default>(values: &[T]) -> [T; MAX_DIMS] {
    let mut all = [T::default(); MAX_DIMS];
    for (slot, &value) in all.iter_mut().zip(values) {
        *slot = value;
    }
    all
}

/// The lowest and the highest element, counted from the first; `None` where that overflows.
fn extent(shape: &[usize], strides: &[isize]) -> Option<(i64, i64)> {
    let mut ends = (0i64, 0i64);
    for (&n, &stride) in shape.iter().zip(strides) {
        let reach = i64::try_from(n)
            .ok()?
            .checked_sub(1)?
            .checked_mul(stride as i64)?;
        let end = if reach < 0 { &mut ends.0 } else { &mut ends.1 };
        *end = end.checked_add(reach)?;
    }
    Some(ends)
}

fn check_bounds(description: &TensorDescription<'_>) -> Result<(), TensorError> {
    let &TensorDescription {
        shape,
        strides,
        byte_offset,
        allocation_bytes,
        data_type,
        ..
    } = description;
    let Some(bytes) = data_type.bytes() else {
        return Err(TensorError(format!(
            "a shared tensor has elements of whole bytes, got {data_type}"
        )));
    };
    if description.address.checked_add(byte_offset).is_none() {
        return Err(TensorError(
            "a shared tensor lies behind the last address".to_owned(),
        ));
    }
    if shape.contains(&0) {
        return Ok(());
    }
    let n_bytes = shape.iter().try_fold(bytes, |n, &size| n.checked_mul(size));
    if n_bytes.is_none_or(|n| isize::try_from(n).is_err()) {
        return Err(TensorError(format!(
            "shape {shape:?} has too many elements"
        )));
    }
    let place = |element: i64| {
        let offset = element.checked_mul(bytes as i64)?;
        offset.checked_add(i64::try_from(byte_offset).ok()?)
    };
    let ends = extent(shape, strides).and_then(|(lowest, highest)| {
        Some((
            place(lowest)?,
            u64::try_from(place(highest.checked_add(1)?)?).ok()?,
        ))
    });
    match ends {
        Some((first, end)) if first >= 0 && end <= allocation_bytes => Ok(()),
        _ => Err(TensorError(format!(
            "shape {shape:?} with strides {strides:?} lies outside of an allocation of {allocation_bytes} bytes"
        ))),
    }
}

/// Owner of a plain vector.
struct VecOwner<W>(#[expect(dead_code, reason = "it is kept and freed")] Vec<W>);

impl<W: Send + Sync + 'static> TensorOwner for VecOwner<W> {}

#[cfg(test)]
mod tests;
