//! The first half of a feed-forward layer: value·gelu(gate) of (value, gate) = x·Wᵀ + b.
//!
//! (value, gate) is eight times as wide as the tokens, and would be half of all that a network keeps for its gradients. It is
//! computed once more from x; or kept in bf16 where factors are rounded to that anyway.

use std::{ops::Range, sync::OnceLock};

use candle_core::{D, Result, Tensor};
use half::bf16;

use super::{
    activation::{Geglu, with_last},
    layer::Layer,
    memory::{Values, tensor},
    numbers::{Numbers, rounded},
    projection::Projection,
    tiles::Means,
};
use crate::ops::{
    function::{Function, Reads, only},
    tape,
};

/// Tokens that are taken at a time, so that what is eight times as wide is never whole in f32 and stays near the processor.
const TOKENS: usize = 1024;

/// Operands x, W and perhaps b.
pub(crate) struct Gated {
    n_in: usize,
    width: usize,
    projection: Projection,
    /// (value, gate) of a pass on record.
    kept: OnceLock<Vec<bf16>>,
}

impl Gated {
    pub(crate) fn new(x: &Tensor, weight: &Tensor) -> Result<Self> {
        Ok(Self {
            n_in: x.dim(D::Minus1)?,
            width: weight.dim(0)? / 2,
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
        let keeps = tape::is_recording() && Means::current().rounds();
        let x = &operands[0];
        let n_tokens = x.elem_count() / self.n_in.max(1);
        let mut kept = Vec::with_capacity(if keeps { n_tokens * 2 * self.width } else { 0 });
        let mut y = Vec::with_capacity(n_tokens * self.width);
        Self::with_operands(operands, [true; 2], |x, weight, bias| {
            for x in x.chunks(TOKENS * self.n_in.max(1)) {
                let both = self.part(x.len()).forward(x, weight, bias);
                y.extend_from_slice(&self.geglu().values(&both));
                if keeps {
                    kept.extend_from_slice(&rounded(&both));
                }
            }
            Ok(())
        })?;
        if keeps {
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
                    Some(both) => self.geglu().gradient(&both[of(2 * self.width)], dy),
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
