//! Sums of two tensors, and other forms of one, over all threads.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;

use super::{
    memory::{Values, tensor},
    numbers::{self, Numbers},
    projection::add_to as add_slice,
    simd::{CHUNK, vectorize, zip_map},
};

/// x + scale·y of two tensors of one shape.
pub(in crate::ops) fn sum(x: &Tensor, y: &Tensor, scale: f64) -> Result<Tensor> {
    if x.shape() != y.shape() {
        return x + (y * scale)?;
    }
    let (x, y, scale) = (x.contiguous()?, y.contiguous()?, scale as f32);
    let (x_values, y_values) = (Values::of(&x)?, Values::of(&y)?);
    let sums = zip_map(
        x_values.as_slice()?,
        y_values.as_slice()?,
        #[inline(always)]
        |x, y| x + scale * y,
    );
    tensor(sums, x.shape(), x.device())
}

/// The mean of x `[B, heads, ..]` over its heads, `[B, ..]`.
pub(in crate::ops) fn mean_of_heads(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let [n_samples, n_heads, rest @ ..] = x.dims() else {
        candle_core::bail!("heads are the second dimension, not {:?}", x.shape())
    };
    let (shape, n) = (
        [&[*n_samples], rest].concat(),
        rest.iter().product::<usize>(),
    );
    let (values, share) = (Values::of(&x)?, 1.0 / *n_heads as f32);
    let values = values.as_slice()?;
    let mut means = vec![0.0; n_samples * n];
    let samples = means
        .chunks_mut(n.max(1))
        .zip(values.chunks((n_heads * n).max(1)));
    let pieces: Vec<_> = samples
        .flat_map(|(means, heads)| {
            let pieces = means.chunks_mut(CHUNK).enumerate();
            pieces.map(move |(piece, means)| (piece * CHUNK, means, heads))
        })
        .collect();
    pieces.into_par_iter().for_each(|(start, means, heads)| {
        for head in heads.chunks(n) {
            add_slice(means, &head[start..][..means.len()]);
        }
        vectorize(
            #[inline(always)]
            || means.iter_mut().for_each(|mean| *mean *= share),
        );
    });
    tensor(means, shape, x.device())
}

/// Adds to the numbers of a tensor where they are; false, and nothing is done, unless both are f32 in memory and of one shape.
pub(in crate::ops) fn add_to(x: &Tensor, more: &Tensor) -> Result<bool> {
    let is_fit = |tensor: &Tensor| {
        tensor.device().is_cpu() && tensor.dtype() == DType::F32 && tensor.is_contiguous()
    };
    if !is_fit(x) || !is_fit(more) || x.shape() != more.shape() {
        return Ok(false);
    }
    x.inplace_op2(more, &AddTo)?;
    Ok(true)
}

/// f32 numbers to the nearest bf16.
pub(in crate::ops) fn rounded(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let halves = numbers::rounded(Values::of(&x)?.as_slice()?);
    Tensor::from_vec(halves, x.shape(), x.device())
}

/// And back.
pub(in crate::ops) fn widened(x: &Tensor) -> Result<Tensor> {
    let values = match Values::of(x)?.numbers()? {
        Numbers::Bf16(halves) => numbers::widened(halves),
        Numbers::F32(values) => values.to_vec(),
        Numbers::Ordered(_) => {
            candle_core::bail!("numbers of the order of tiles are those of a weight")
        }
    };
    tensor(values, x.shape(), x.device())
}

struct AddTo;

impl InplaceOp2 for AddTo {
    fn name(&self) -> &'static str {
        "add to"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        x_layout: &Layout,
        more: &CpuStorage,
        more_layout: &Layout,
    ) -> Result<()> {
        let (CpuStorage::F32(x), CpuStorage::F32(more)) = (x, more) else {
            candle_core::bail!("f32 numbers are added to f32 numbers")
        };
        let range = |layout: &Layout| {
            let start = layout.start_offset();
            start..start + layout.shape().elem_count()
        };
        let (x, more) = (&mut x[range(x_layout)], &more[range(more_layout)]);
        let pieces = x.par_chunks_mut(CHUNK).zip(more.par_chunks(CHUNK));
        pieces.for_each(|(x, more)| add_slice(x, more));
        Ok(())
    }
}
