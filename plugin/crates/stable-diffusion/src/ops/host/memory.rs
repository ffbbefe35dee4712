//! Between candle tensors and slices in memory: how the kernels get at the values, and
//! buffers to work in.

use std::{cell::RefCell, ops::Deref};

use candle_core::{CpuStorage, Device, Error, Layout, Result, Shape, Storage, Tensor, bail};

use super::numbers::Numbers;
use super::ordered::{dims_of, is_ordered};
use super::tiles::{Factors, Ordered, Tiles};

/// The values of a contiguous tensor in memory, f32 but for some weights, locked for reading.
pub(crate) struct Values<'a> {
    // A guard of the lock that candle uses; naming its type would need candle's version of that crate.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    start: usize,
    len: usize,
    /// As others know it, if it is a weight in the order of tiles.
    weight_dims: Option<Vec<usize>>,
}

impl<'a> Values<'a> {
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (start, end) = contiguous_range(layout)?;
        Ok(Self {
            storage: Box::new(storage),
            start,
            len: end - start,
            weight_dims: is_ordered(tensor).then(|| dims_of(tensor)),
        })
    }

    /// Of a weight.
    pub(crate) fn numbers(&self) -> Result<Numbers<'_>> {
        match &**self.storage {
            Storage::Cpu(CpuStorage::BF16(values)) => {
                Ok(Numbers::Bf16(&values[self.start..self.start + self.len]))
            }
            Storage::Cpu(CpuStorage::U32(words)) => {
                self.ordered(&words[self.start..self.start + self.len])
            }
            _ => Ok(Numbers::F32(self.as_slice()?)),
        }
    }

    fn ordered<'w>(&self, words: &'w [u32]) -> Result<Numbers<'w>> {
        let dims = self.weight_dims.as_deref();
        let (Some([n_rows, n_columns, taps @ ..]), Some(tiles)) =
            (dims, Tiles::get(Factors::Rounded))
        else {
            bail!("a kernel needs numbers in memory, not words");
        };
        let n_taps = taps.iter().product();
        let dims = [*n_rows, *n_columns];
        Ok(Numbers::Ordered(Ordered::new(tiles, dims, n_taps, words)))
    }

    pub(crate) fn as_slice(&self) -> Result<&[f32]> {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(&values[self.start..self.start + self.len]),
            _ => Err(Error::Msg("a kernel needs f32 values in memory".into()).bt()),
        }
    }
}

/// What a kernel computed.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), device)
}

fn contiguous_range(layout: &Layout) -> Result<(usize, usize)> {
    layout.contiguous_offsets().ok_or_else(|| {
        Error::RequiresContiguous {
            op: "stable-diffusion kernel",
        }
        .bt()
    })
}

/// Memory for so many numbers, all of which a kernel writes: until then it may hold any. To fill it with zeros first takes as
/// long as some kernels.
#[expect(unsafe_code, reason = "memory is taken as it comes")]
pub(crate) fn unwritten(len: usize) -> Vec<f32> {
    if cfg!(any(miri, debug_assertions)) {
        // What a kernel leaves out is seen.
        return vec![f32::NAN; len];
    }
    let mut values: Vec<f32> = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`. For the compiler the instruction, of which there is none, may have written all of it: the
    // numbers are some numbers, and stay what they are. Pages of an allocator do not change by themselves.
    unsafe {
        std::arch::asm!("/* {} */", in(reg) values.as_mut_ptr(), options(nostack, preserves_flags));
        values.set_len(len);
    }
    values
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<u32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends a buffer with arbitrary contents that lives as long as its thread and begins at a line of the cache. Who asks
/// while another is lent, as rayon's threads do that take on other work while they wait, gets another one.
pub(crate) fn with_words<R>(len: usize, work: impl FnOnce(&mut [u32]) -> R) -> R {
    /// Words of a line of the cache.
    const LINE: usize = 16;
    let mut scratch = SCRATCH.with_borrow_mut(|kept| {
        // The smallest that is large enough, or the largest.
        let fits = kept.iter().position(|scratch| scratch.len() >= len + LINE);
        let index = fits.or(kept.len().checked_sub(1));
        index.map(|index| kept.remove(index)).unwrap_or_default()
    });
    if scratch.len() < len + LINE {
        scratch = vec![0; len + LINE];
    }
    let start = scratch.as_ptr().align_offset(4 * LINE).min(LINE);
    let result = work(&mut scratch[start..start + len]);
    SCRATCH.with_borrow_mut(|kept| {
        let place = kept.partition_point(|other| other.len() < scratch.len());
        kept.insert(place, scratch);
    });
    result
}

/// [`with_words`] for numbers.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    with_words(len, |words| work(bytemuck::cast_slice_mut(words)))
}
