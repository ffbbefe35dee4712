//! y = x·Wᵀ + b: dx = dy·W, dW = dyᵀ·x, db = Σ dy.

use candle_core::{Result, Tensor};

use crate::ops::{
    composed,
    function::{Function, Reads, in_type_of, only},
    weight_dims,
};

/// Operands x, W and perhaps b.
pub(super) struct Linear(pub(super) Arrangement);

/// What x and y are.
#[derive(Clone, Copy)]
pub(super) enum Arrangement {
    /// `[.., channels]` both.
    Tokens,
    /// x is `[B, channels, h, w]`, y is `[B, h·w, channels]`.
    FromChannels,
    /// x is `[B, h·w, channels]`, y is `[B, channels, h, w]`.
    ToChannels([usize; 2]),
}

impl Linear {
    /// x or its gradient as tokens.
    fn tokens(&self, x: &Tensor) -> Result<Tensor> {
        match self.0 {
            Arrangement::FromChannels => x.flatten_from(2)?.transpose(1, 2),
            Arrangement::Tokens | Arrangement::ToChannels(_) => Ok(x.clone()),
        }
    }
}

impl Function for Linear {
    const NAME: &'static str = "linear";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = &self.tokens(&operands[0])?;
        let bias = operands.get(2).map(|bias| in_type_of(x, bias));
        let y = composed::linear(x, &in_type_of(x, &operands[1])?, bias.transpose()?.as_ref())?;
        match self.0 {
            Arrangement::ToChannels([height, width]) => {
                let y = y.transpose(1, 2)?;
                y.reshape((y.dim(0)?, y.dim(1)?, height, width))
            }
            Arrangement::Tokens | Arrangement::FromChannels => Ok(y),
        }
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
        let dy = match self.0 {
            Arrangement::ToChannels(_) => dy.flatten_from(2)?.transpose(1, 2)?,
            Arrangement::Tokens | Arrangement::FromChannels => dy.clone(),
        };
        let dy = dy.contiguous()?.reshape(((), n_out))?;
        let gradient = |operand: usize| match operand {
            0 => {
                let dx = dy.matmul(&in_type_of(x, weight)?.reshape((n_out, n_in))?)?;
                match self.0 {
                    Arrangement::FromChannels => {
                        let (n_samples, _, height, width) = x.dims4()?;
                        let dx = dx.reshape((n_samples, height * width, n_in))?;
                        dx.transpose(1, 2)?.reshape(x.shape())
                    }
                    Arrangement::Tokens | Arrangement::ToChannels(_) => dx.reshape(x.shape()),
                }
            }
            1 => {
                let x = self.tokens(x)?.contiguous()?.reshape(((), n_in))?;
                dy.t()?.matmul(&x)?.reshape(weight.shape())
            }
            _ => dy.sum(0),
        };
        only(wanted, gradient)
    }

    fn reads(&self, operand: usize, wanted: &[bool]) -> Reads {
        Reads::if_so(match operand {
            0 => wanted[1],
            1 => wanted[0],
            _ => false,
        })
    }
}
