//! The first half of a feed-forward layer: value·gelu(gate) of (value, gate) = x·Wᵀ + b.
//!
//! (value, gate) is eight times as wide as the tokens, and would be half of all that a network keeps for its gradients. It is
//! computed once more from x; or kept in bf16 where factors are rounded to that anyway.

use std::{ops::Range, sync::OnceLock};

use candle_core::{D, Result, Tensor};
use half::bf16;

use super::{
    activation::{Geglu, Kept, geglu, with_last},
    gemm::{Matrix, MatrixMut, Tile},
    layer::Layer,
    memory::{Values, tensor, unwritten},
    numbers::{Numbers, round, rounded},
    projection::{Projection, add_to},
    simd::vectorize,
    tiles::{Both, Factors, Means, Tiles, columns_of_both, multiply_both},
};
use crate::ops::{
    function::{Function, Reads, only},
    tape, weight_dims,
};

/// Tokens that are taken at a time, so that what is eight times as wide is never whole in f32 and stays near the processor.
const TOKENS: usize = 1024;

/// Operands x, W and perhaps b.
pub(crate) struct Gated {
    n_in: usize,
    width: usize,
    projection: Projection,
    /// (value, gate) of a pass on record.
    kept: OnceLock<Kept>,
}

impl Gated {
    pub(crate) fn new(x: &Tensor, weight: &Tensor) -> Result<Self> {
        Ok(Self {
            n_in: x.dim(D::Minus1)?,
            width: weight_dims(weight)?.0 / 2,
            projection: Projection::tokens(x, weight)?,
            kept: OnceLock::new(),
        })
    }

    fn geglu(&self) -> Geglu {
        Geglu::new(self.width)
    }

    /// The projection of some tokens, of so many numbers.
    fn part(&self, n_numbers: usize) -> Projection {
        self.projection.of_positions(n_numbers / self.n_in.max(1))
    }

    /// Memory for (value, gate) of all tokens, if they are kept.
    fn to_keep(&self, keeps: bool, n_rows: usize, columns: usize) -> Option<Kept> {
        keeps.then(|| Kept {
            numbers: vec![bf16::ZERO; n_rows * 2 * self.width],
            n_rows,
            width: self.width,
            columns,
        })
    }

    /// y, and what is kept: some columns of all tokens at a time, so that value and gate never leave the cache.
    fn by_tiles(
        &self,
        (tiles, factors): (Tiles, Factors),
        columns: usize,
        [x, bias]: [&[f32]; 2],
        weight: Numbers<'_>,
        y: &mut [f32],
        kept: Option<&mut Kept>,
    ) {
        let (width, n_tokens) = (self.width, y.len() / self.width);
        let weight = weight.matrix([2 * width, self.n_in]);
        let halves = [0..width, width..2 * width].map(|rows| weight.rows(rows).t());
        let mut kept = kept.map_or(&mut [][..], |kept| &mut kept.numbers);
        let parts = MatrixMut::new(y, [n_tokens, width]).tiles([n_tokens, columns]);
        let items = parts.into_iter().map(|y| {
            let len = (2 * n_tokens * y.cols.len()).min(kept.len());
            let (numbers, rest) = std::mem::take(&mut kept).split_at_mut(len);
            kept = rest;
            (y.cols.clone(), (y, numbers))
        });
        let lhs = Matrix::new(x, [n_tokens, self.n_in]).into();
        multiply_both(
            tiles,
            factors,
            lhs,
            halves,
            items.collect(),
            |(y, kept), both| {
                vectorize(
                    #[inline(always)]
                    || self.finish(bias, y, kept, both),
                );
            },
        );
    }

    /// Sums of rows of an item to y, and to what is kept.
    #[inline(always)]
    fn finish(&self, bias: &[f32], y: &mut Tile<'_>, kept: &mut [bf16], both: Both<'_>) {
        let [values, gates] = both.sums;
        let sums = values
            .chunks_mut(both.width)
            .zip(gates.chunks_mut(both.width));
        let n = both.cols.len();
        for (row, (value, gate)) in both.rows.zip(sums) {
            let (value, gate) = (&mut value[..n], &mut gate[..n]);
            if !bias.is_empty() {
                add_to(value, &bias[both.cols.clone()]);
                add_to(gate, &bias[self.width..][both.cols.clone()]);
            }
            geglu(value, gate, y.values.row_mut(row));
            if let Some(kept) = kept.get_mut(2 * row * n..2 * (row + 1) * n) {
                let (kept_value, kept_gate) = kept.split_at_mut(n);
                round(value, kept_value);
                round(gate, kept_gate);
            }
        }
    }

    fn reads_numbers(&self, operand: usize, wanted: &[bool]) -> bool {
        let is_kept = self.kept.get().is_some();
        match operand {
            0 => !is_kept || wanted[1],
            1 => !is_kept || wanted[0],
            _ => true,
        }
    }

    fn with_operands<R>(
        operands: &[Tensor],
        read: [bool; 2],
        work: impl FnOnce(&[f32], Numbers<'_>, &[f32]) -> Result<R>,
    ) -> Result<R> {
        let held = |operand: usize, is_read: bool| {
            let operand = operands.get(operand).filter(|_| is_read);
            operand.map(Tensor::contiguous).transpose()
        };
        let (x, weight, bias) = (held(0, read[0])?, held(1, read[1])?, held(2, true)?);
        let [x, weight, bias] = [&x, &weight, &bias].map(|held| held.as_ref().map(Values::of));
        let (x, weight, bias) = (x.transpose()?, weight.transpose()?, bias.transpose()?);
        let weight = weight.as_ref().map(Values::numbers).transpose()?;
        let [x, bias] = [&x, &bias].map(|values| values.as_ref().map(Values::as_slice));
        work(
            x.transpose()?.unwrap_or_default(),
            weight.unwrap_or(Numbers::F32(&[])),
            bias.transpose()?.unwrap_or_default(),
        )
    }
}

impl Function for Gated {
    const NAME: &'static str = "gated linear";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let means = Means::current();
        let keeps = tape::is_recording() && means.rounds();
        let x = &operands[0];
        let n_tokens = x.elem_count() / self.n_in.max(1);
        let mut y = unwritten(n_tokens * self.width);
        let kept = Self::with_operands(operands, [true; 2], |x, weight, bias| {
            let dims = [n_tokens, self.width, self.n_in];
            if let Some(means) = means.for_product(dims) {
                let columns = columns_of_both(means.1, [self.width, self.n_in]);
                let mut kept = self.to_keep(keeps, n_tokens, columns);
                self.by_tiles(means, columns, [x, bias], weight, &mut y, kept.as_mut());
                return Ok(kept);
            }
            let mut kept = self.to_keep(keeps, n_tokens, self.width);
            let parts = x
                .chunks(TOKENS * self.n_in.max(1))
                .zip(y.chunks_mut(TOKENS * self.width));
            for (i, (x, y)) in parts.enumerate() {
                let both = self.part(x.len()).forward(x, weight, bias);
                y.copy_from_slice(&self.geglu().values(&both));
                if let Some(kept) = &mut kept {
                    let at = i * TOKENS * 2 * self.width;
                    kept.numbers[at..at + both.len()].copy_from_slice(&rounded(&both));
                }
            }
            Ok(kept)
        })?;
        if let Some(kept) = kept {
            let _ = self.kept.set(kept);
        }
        tensor(y, with_last(x.dims(), self.width), x.device())
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = dy.contiguous()?;
        let dy = Values::of(&dy)?;
        let dy = dy.as_slice()?;
        let read = [0, 1].map(|operand| self.reads_numbers(operand, wanted));
        Self::with_operands(operands, read, |x, weight, bias| {
            let projection = &self.projection;
            let d_both = |tokens: Range<usize>| {
                let of = |width: usize| tokens.start * width..tokens.end * width;
                let dy = &dy[of(self.width)];
                match self.kept.get() {
                    Some(kept) => self.geglu().gradient_of_kept(kept, tokens.clone(), dy),
                    None => {
                        let x = &x[of(self.n_in)];
                        let mut both = self.part(x.len()).forward(x, weight, bias);
                        self.geglu().turn_into_gradient(&mut both, dy);
                        both
                    }
                }
            };
            let n_tokens = dy.len() / self.width.max(1);
            if wanted.iter().skip(1).all(|wanted| !wanted) {
                let mut dx = Vec::with_capacity(n_tokens * self.n_in);
                for start in (0..n_tokens).step_by(TOKENS) {
                    let tokens = start..n_tokens.min(start + TOKENS);
                    let part = self.part(tokens.len() * self.n_in);
                    let d_both = d_both(tokens);
                    dx.extend_from_slice(&part.input_gradient(&[], weight, bias, &d_both));
                }
                let of = &operands[0];
                let dx = tensor(dx, of.shape().clone(), of.device())?;
                return Ok(vec![Some(dx), None, None]);
            }
            let d_both = d_both(0..n_tokens);
            only(wanted, |operand| {
                let values = match operand {
                    0 => projection.input_gradient(x, weight, bias, &d_both),
                    1 => projection.weight_gradient(x, weight, bias, &d_both),
                    _ => projection.bias_gradient(x, weight, bias, &d_both),
                };
                let of = &operands[operand];
                tensor(values, of.shape().clone(), of.device())
            })
        })
    }

    fn reads(&self, operand: usize, wanted: &[bool]) -> Reads {
        Reads::if_so(self.reads_numbers(operand, wanted))
    }
}
