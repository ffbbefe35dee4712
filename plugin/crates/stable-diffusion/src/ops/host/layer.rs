//! How a kernel with a weight and a bias becomes an operation that gradients go through.

use candle_core::{Result, Shape, Tensor, bail};

use super::{
    memory::{Values, tensor},
    numbers::Numbers,
};
use crate::ops::function::{self, Function, Reads, only};

/// A kernel y = f(x; weight, bias). Absent parameters are empty slices.
pub(crate) trait Layer: Send + Sync + 'static {
    const NAME: &'static str;

    /// Whether dL/dx depends on x; where it does not, an empty slice is given for it.
    const IS_LINEAR: bool;

    fn output_shape(&self) -> Shape;

    fn forward(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32]) -> Vec<f32>;

    /// dL/dx from dL/dy.
    fn input_gradient(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32], dy: &[f32]) -> Vec<f32>;

    /// dL/dweight.
    fn weight_gradient(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32], dy: &[f32])
    -> Vec<f32>;

    fn bias_gradient(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32], dy: &[f32]) -> Vec<f32>;
}

/// Applies a layer.
pub(crate) fn apply<L: Layer>(
    layer: L,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    function::apply(Parameterized(layer), &operands)
}

/// Nothing of what is not read.
fn slice_of<'a>(values: &'a Option<Values<'_>>) -> Result<&'a [f32]> {
    values.as_ref().map_or(Ok(&[]), Values::as_slice)
}

/// Whether the way back reads the numbers of an operand.
fn reads<L: Layer>(operand: usize, wanted: &[bool]) -> bool {
    match operand {
        _ if !L::IS_LINEAR => true,
        0 => wanted[1],
        1 => wanted[0],
        _ => wanted[2],
    }
}

/// Operands x, weight and perhaps bias.
struct Parameterized<L>(L);

impl<L: Layer> Function for Parameterized<L> {
    const NAME: &'static str = L::NAME;

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let contiguous = operands.iter().map(Tensor::contiguous);
        let operands = contiguous.collect::<Result<Vec<_>>>()?;
        let values = operands.iter().map(Values::of);
        let values = values.collect::<Result<Vec<_>>>()?;
        let bias = values.get(2).map(Values::as_slice).transpose()?;
        let y = self.0.forward(
            values[0].as_slice()?,
            values[1].numbers()?,
            bias.unwrap_or_default(),
        );
        tensor(y, self.0.output_shape(), operands[0].device())
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = dy.contiguous()?;
        let read = (0..operands.len()).filter(|&operand| reads::<L>(operand, wanted));
        let mut held: [Option<Tensor>; 3] = [None, None, None];
        for operand in read {
            held[operand] = Some(operands[operand].contiguous()?);
        }
        let [x, weight, bias] = held.each_ref().map(|held| held.as_ref().map(Values::of));
        let (x, weight) = (x.transpose()?, weight.transpose()?);
        let (bias, dy) = (bias.transpose()?, Values::of(&dy)?);
        let (x, bias, dy) = (slice_of(&x)?, slice_of(&bias)?, dy.as_slice()?);
        let weight = match &weight {
            Some(weight) => weight.numbers()?,
            None => Numbers::F32(&[]),
        };
        let layer = &self.0;
        only(wanted, |operand| {
            let of = &operands[operand];
            let values = match operand {
                0 => layer.input_gradient(x, weight, bias, dy),
                1 => layer.weight_gradient(x, weight, bias, dy),
                _ => layer.bias_gradient(x, weight, bias, dy),
            };
            if values.len() != of.elem_count() {
                bail!(
                    "gradient of {} elements for a tensor of shape {:?}",
                    values.len(),
                    of.shape()
                );
            }
            tensor(values, of.shape().clone(), of.device())
        })
    }

    fn reads(&self, operand: usize, wanted: &[bool]) -> Reads {
        Reads::if_so(reads::<L>(operand, wanted))
    }

    // Normalizations: what they give is as large as what they read, and quickly computed.
    fn is_cheap(&self) -> bool {
        !L::IS_LINEAR
    }
}
