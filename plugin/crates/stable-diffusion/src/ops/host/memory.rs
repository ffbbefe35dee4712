//! Between candle tensors and slices in memory: how the kernels get at the values, and
//! buffers to work in.

use std::{cell::RefCell, ops::Deref};

use candle_core::{CpuStorage, Error, Layout, Result, Shape, Storage, Tensor};

/// Whether a gradient can reach this tensor.
pub(crate) fn tracked(tensor: Option<&Tensor>) -> bool {
    tensor.is_some_and(Tensor::track_op)
}

/// The values of a contiguous f32 tensor in memory, locked for reading.
pub(crate) struct Values<'a> {
    // A guard of the lock that candle uses; naming its type would need candle's version of that crate.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    start: usize,
    len: usize,
}

impl<'a> Values<'a> {
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (start, end) = contiguous_range(layout)?;
        Ok(Self {
            storage: Box::new(storage),
            start,
            len: end - start,
        })
    }

    pub(crate) fn as_slice(&self) -> Result<&[f32]> {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(&values[self.start..self.start + self.len]),
            _ => Err(Error::Msg("a kernel needs f32 values in memory".into()).bt()),
        }
    }
}

/// The slice of a custom operation's argument, which must be contiguous f32.
pub(crate) fn slice_of<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = contiguous_range(layout)?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// The result of a custom operation.
pub(crate) fn output(values: Vec<f32>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (CpuStorage::F32(values), shape.into())
}

fn contiguous_range(layout: &Layout) -> Result<(usize, usize)> {
    layout.contiguous_offsets().ok_or_else(|| {
        Error::RequiresContiguous {
            op: "stable-diffusion kernel",
        }
        .bt()
    })
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends a buffer with arbitrary contents that lives as long as its thread. A thread that takes on other work
/// in between, as rayon's do while they wait, gets another buffer for that.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut scratch = SCRATCH.take();
    if scratch.len() < len {
        scratch = vec![0.0; len];
    }
    let result = work(&mut scratch[..len]);
    SCRATCH.with_borrow_mut(|kept| {
        if kept.len() < scratch.len() {
            *kept = scratch;
        }
    });
    result
}
