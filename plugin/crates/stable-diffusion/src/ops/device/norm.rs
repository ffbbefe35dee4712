//! Group and layer normalization, their statistics computed again in the backward:
//!
//! ```text
//! x̂ = (x - mean) / sqrt(var + ε),   y = γ·x̂ + β  (or silu of it)
//! d = dL/d(γ·x̂ + β),   dγ = Σ d·x̂,   dβ = Σ d,   dx = (g - mean(g) - x̂·mean(g·x̂)) / sqrt(var + ε),   g = d·γ
//! ```

use candle_core::{D, DType, Result, Tensor};

use super::activation::slope;
use crate::ops::{
    Activation, After, composed,
    function::{Function, only, sum_to},
};

/// Operands x, γ and β.
pub(super) struct Normalization {
    over: Over,
    epsilon: f64,
    after: After,
}

/// What mean and variance are taken over.
enum Over {
    /// Channels and positions of a group, of `[B, C, ..]`.
    Groups(usize),
    /// The last dimension.
    Last,
}

/// In f32.
struct Normalized {
    /// x̂, the statistics' dimension last.
    x: Tensor,
    /// 1 / sqrt(var + ε).
    scale: Tensor,
}

impl Normalization {
    pub(super) fn of_groups(n_groups: usize, epsilon: f64, after: After) -> Self {
        let over = Over::Groups(n_groups);
        Self {
            over,
            epsilon,
            after,
        }
    }

    pub(super) fn of_last(epsilon: f64) -> Self {
        let (over, after) = (Over::Last, After::Nothing);
        Self {
            over,
            epsilon,
            after,
        }
    }

    /// x with the statistics' dimension last.
    fn grouped(&self, x: &Tensor) -> Result<Tensor> {
        match self.over {
            Over::Groups(n_groups) => x.contiguous()?.reshape((x.dim(0)?, n_groups, ())),
            Over::Last => Ok(x.clone()),
        }
    }

    fn normalized(&self, x: &Tensor) -> Result<Normalized> {
        let x = self.grouped(x)?.to_dtype(DType::F32)?;
        let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
        let scale = (variance + self.epsilon)?.sqrt()?.recip()?;
        Ok(Normalized {
            x: centered.broadcast_mul(&scale)?,
            scale,
        })
    }

    /// A parameter `[C]` in f32, so that it meets x in its own shape.
    fn parameter(&self, parameter: &Tensor, rank: usize) -> Result<Tensor> {
        let parameter = parameter.to_dtype(DType::F32)?;
        match self.over {
            Over::Last => Ok(parameter),
            Over::Groups(_) => {
                let mut shape = vec![1; rank];
                shape[1] = parameter.elem_count();
                parameter.reshape(shape)
            }
        }
    }

    fn channel_axis(&self, rank: usize) -> usize {
        match self.over {
            Over::Groups(_) => 1,
            Over::Last => rank - 1,
        }
    }
}

impl Function for Normalization {
    const NAME: &'static str = "normalization";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let [x, weight, bias] = operands else {
            return Err(candle_core::Error::Msg(
                "normalization takes three operands".into(),
            ));
        };
        let normalized = self.normalized(x)?.x.reshape(x.shape())?;
        let y = normalized
            .broadcast_mul(&self.parameter(weight, x.rank())?)?
            .broadcast_add(&self.parameter(bias, x.rank())?)?;
        let y = match self.after {
            After::Nothing => y,
            After::Silu => composed::silu(&y)?,
        };
        y.to_dtype(x.dtype())
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [x, weight, bias] = operands else {
            return Ok(Vec::new());
        };
        let Normalized {
            x: normalized,
            scale,
        } = self.normalized(x)?;
        let plain = normalized.reshape(x.shape())?;
        let gamma = self.parameter(weight, x.rank())?;
        let dy = dy.to_dtype(DType::F32)?;
        let d = match self.after {
            After::Nothing => dy,
            After::Silu => {
                let before = plain
                    .broadcast_mul(&gamma)?
                    .broadcast_add(&self.parameter(bias, x.rank())?)?;
                (slope(&before, Activation::Silu)? * dy)?
            }
        };
        let axis = self.channel_axis(x.rank());
        let gradient = |operand: usize| match operand {
            0 => {
                let g = self.grouped(&d.broadcast_mul(&gamma)?)?;
                let along = (&g * &normalized)?.mean_keepdim(D::Minus1)?;
                let away = g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)?;
                (away - normalized.broadcast_mul(&along)?)?
                    .broadcast_mul(&scale)?
                    .reshape(x.shape())?
                    .to_dtype(x.dtype())
            }
            1 => sum_to(&(&d * &plain)?, axis)?.to_dtype(weight.dtype()),
            _ => sum_to(&d, axis)?.to_dtype(bias.dtype()),
        };
        only(wanted, gradient)
    }
}
