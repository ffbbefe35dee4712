//! The first half of a feed-forward layer: value·gelu(gate) of (value, gate) = x·Wᵀ + b.
//!
//! (value, gate) is eight times as wide as the tokens, and would be half of all that a network keeps for its gradients. It is
//! computed once more from x; or kept in bf16 where factors are rounded to that anyway.

use std::sync::OnceLock;

use candle_core::{Result, Tensor};
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
    function::{Function, only},
    tape,
};

/// Operands x, W and perhaps b.
pub(crate) struct Gated {
    projection: Projection,
    geglu: Geglu,
    /// (value, gate) of a pass on record.
    kept: OnceLock<Vec<bf16>>,
}

impl Gated {
    pub(crate) fn new(x: &Tensor, weight: &Tensor) -> Result<Self> {
        Ok(Self {
            projection: Projection::tokens(x, weight)?,
            geglu: Geglu::new(weight.dim(0)? / 2),
            kept: OnceLock::new(),
        })
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
        let both = Self::with_operands(operands, [true; 2], |x, weight, bias| {
            Ok(self.projection.forward(x, weight, bias))
        })?;
        let y = self.geglu.values(&both);
        if tape::is_recording() && Means::current().rounds() {
            self.kept.get_or_init(|| rounded(&both));
        }
        let (width, x) = (operands[1].dim(0)? / 2, &operands[0]);
        tensor(y, with_last(x.dims(), width), x.device())
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
        let read = [0, 1].map(|operand| self.reads(operand, wanted));
        Self::with_operands(operands, read, |x, weight, bias| {
            let projection = &self.projection;
            let d_both = match self.kept.get() {
                Some(both) => self.geglu.gradient(both, dy),
                None => {
                    let mut both = projection.forward(x, weight, bias);
                    self.geglu.turn_into_gradient(&mut both, dy);
                    both
                }
            };
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

    fn reads(&self, operand: usize, wanted: &[bool]) -> bool {
        let is_kept = self.kept.get().is_some();
        match operand {
            0 => !is_kept || wanted[1],
            1 => !is_kept || wanted[0],
            _ => true,
        }
    }
}
