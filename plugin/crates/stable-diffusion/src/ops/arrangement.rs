//! Sums, joints and repetitions of tensors: what lies between the operations of a network. The same for both backends, but
//! for sums, which the host has loops for.

use candle_core::{Result, Tensor};

use super::{
    Backend,
    function::{Function, Reads, only, sum_to},
    host,
};

/// x + scale·y of its operands x and y.
pub(super) struct Sum {
    pub(super) scale: f64,
}

impl Function for Sum {
    const NAME: &'static str = "sum";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let (x, y) = (&operands[0], &operands[1]);
        match Backend::of([x, y]) {
            Backend::Host => host::sum(x, y, self.scale),
            Backend::Device if self.scale == 1.0 => x + y,
            Backend::Device => x + (y * self.scale)?,
        }
    }

    fn backward(
        &self,
        _: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        only(wanted, |operand| match operand {
            1 if self.scale != 1.0 => dy * self.scale,
            _ => Ok(dy.clone()),
        })
    }

    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::Shape
    }

    fn passes_on(&self) -> bool {
        true
    }
}

/// Its operands side by side along dimension 1.
pub(super) struct Joint;

impl Function for Joint {
    const NAME: &'static str = "joint";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        Tensor::cat(operands, 1)
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        only(wanted, |operand| {
            let before = operands[..operand].iter().map(|x| x.dim(1));
            let start = before.sum::<Result<usize>>()?;
            dy.narrow(1, start, operands[operand].dim(1)?)?.contiguous()
        })
    }

    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::Shape
    }

    // The parts are often held by others.
    fn is_cheap(&self) -> bool {
        true
    }

    fn passes_on(&self) -> bool {
        true
    }
}

/// x `[B, C]` + b `[C]` of its operands x and b.
pub(super) struct Shift;

impl Function for Shift {
    const NAME: &'static str = "shift";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        operands[0].broadcast_add(&operands[1].to_dtype(operands[0].dtype())?)
    }

    fn backward(
        &self,
        _: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        only(wanted, |operand| match operand {
            0 => Ok(dy.clone()),
            _ => sum_to(dy, 1),
        })
    }

    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::Shape
    }

    fn passes_on(&self) -> bool {
        true
    }
}

/// Its operand `[1, ..]` for so many samples.
pub(super) struct Repeat {
    pub(super) n_samples: usize,
}

impl Function for Repeat {
    const NAME: &'static str = "repeat";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let mut dims = operands[0].dims().to_vec();
        if let Some(first) = dims.first_mut() {
            *first = self.n_samples;
        }
        operands[0].broadcast_as(dims)?.contiguous()
    }

    fn backward(
        &self,
        _: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(dy.sum_keepdim(0)?)])
    }

    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::Shape
    }
}

/// The mean over dimension 1 of its operand.
pub(super) struct MeanOfHeads;

impl Function for MeanOfHeads {
    const NAME: &'static str = "mean of heads";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        match Backend::of([&operands[0]]) {
            Backend::Host => host::mean_of_heads(&operands[0]),
            Backend::Device => operands[0].mean(1),
        }
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let x = &operands[0];
        let share = (dy * (1.0 / x.dim(1)? as f64))?.unsqueeze(1)?;
        Ok(vec![Some(share.broadcast_as(x.shape())?.contiguous()?)])
    }

    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::Shape
    }
}
