//! y = x·Wᵀ + b: dx = dy·W, dW = dyᵀ·x, db = Σ dy.

use candle_core::{Result, Tensor};

use super::function::{Function, in_type_of, only};
use crate::ops::{composed, weight_dims};

/// Operands x, W and perhaps b.
pub(super) struct Linear;

impl Function for Linear {
    const NAME: &'static str = "linear";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = &operands[0];
        let bias = operands.get(2).map(|bias| in_type_of(x, bias));
        composed::linear(x, &in_type_of(x, &operands[1])?, bias.transpose()?.as_ref())
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [x, weight, ..] = operands else {
            return Ok(Vec::new());
        };
        let (n_out, n_in) = weight_dims(weight)?;
        let weight = in_type_of(x, weight)?;
        let dy = dy.contiguous()?.reshape(((), n_out))?;
        let gradient = |operand: usize| match operand {
            0 => dy
                .matmul(&weight.reshape((n_out, n_in))?)?
                .reshape(x.shape()),
            1 => {
                let x = x.contiguous()?.reshape(((), n_in))?;
                dy.t()?.matmul(&x)?.reshape(weight.shape())
            }
            _ => dy.sum(0),
        };
        only(wanted, gradient)
    }
}
