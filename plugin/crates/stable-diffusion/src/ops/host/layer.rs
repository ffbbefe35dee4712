//! How a kernel with a weight and a bias becomes a node of candle's graph.
//!
//! candle computes the gradient of every operand of a product and keeps it until the gradients are dropped,
//! whether anybody wants it or not. Here parameters that nobody trains live inside the operation, where candle
//! does not see them, and only the input is an operand; parameters that are trained are operands too.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use super::memory::{Values, output, slice_of, tracked};
use super::numbers::Numbers;

/// A kernel y = f(x; weight, bias). Absent parameters are empty slices.
pub(crate) trait Layer: Send + Sync + 'static {
    const NAME: &'static str;

    fn output_shape(&self) -> Shape;

    fn forward(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32]) -> Vec<f32>;

    /// dL/dx from dL/dy.
    fn input_gradient(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32], dy: &[f32]) -> Vec<f32>;

    fn weight_gradient(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32], dy: &[f32])
    -> Vec<f32>;

    fn bias_gradient(&self, x: &[f32], weight: Numbers<'_>, bias: &[f32], dy: &[f32]) -> Vec<f32>;
}

/// Applies a layer. Keeps nothing when neither input nor parameters are tracked; computes gradients of exactly
/// the tracked ones.
pub(crate) fn apply<L: Layer>(
    layer: L,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let bias = match bias {
        Some(bias) => bias.contiguous()?,
        None => Tensor::zeros(0, DType::F32, x.device())?,
    };
    if tracked(Some(&weight)) || tracked(Some(&bias)) {
        return x.apply_op3(&weight, &bias, Trained(layer));
    }
    let node = Frozen {
        layer,
        weight,
        bias,
    };
    if tracked(Some(&x)) {
        x.apply_op1(node)
    } else {
        x.apply_op1_no_bwd(&node)
    }
}

struct Frozen<L> {
    layer: L,
    weight: Tensor,
    bias: Tensor,
}

impl<L: Layer> CustomOp1 for Frozen<L> {
    fn name(&self) -> &'static str {
        L::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (weight, bias) = (Values::of(&self.weight)?, Values::of(&self.bias)?);
        let x = slice_of(x, layout)?;
        let y = self.layer.forward(x, weight.numbers()?, bias.as_slice()?);
        Ok(output(y, self.layer.output_shape()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let operands = Operands::of(x, &self.weight, &self.bias, dy)?;
        operands.gradient(x, |x, weight, bias, dy| {
            self.layer.input_gradient(x, weight, bias, dy)
        })
    }
}

struct Trained<L>(L);

impl<L: Layer> CustomOp3 for Trained<L> {
    fn name(&self) -> &'static str {
        L::NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = slice_of(x, x_layout)?;
        let y = self.0.forward(
            x,
            Numbers::F32(slice_of(weight, weight_layout)?),
            slice_of(bias, bias_layout)?,
        );
        Ok(output(y, self.0.output_shape()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let operands = Operands::of(x, weight, bias, dy)?;
        let layer = &self.0;
        Ok((
            operands.gradient(x, |x, w, b, dy| layer.input_gradient(x, w, b, dy))?,
            operands.gradient(weight, |x, w, b, dy| layer.weight_gradient(x, w, b, dy))?,
            operands.gradient(bias, |x, w, b, dy| layer.bias_gradient(x, w, b, dy))?,
        ))
    }
}

/// Everything a backward pass reads.
struct Operands<'a> {
    x: Values<'a>,
    weight: Values<'a>,
    bias: Values<'a>,
    dy: Tensor,
}

impl<'a> Operands<'a> {
    fn of(x: &'a Tensor, weight: &'a Tensor, bias: &'a Tensor, dy: &Tensor) -> Result<Self> {
        Ok(Self {
            x: Values::of(x)?,
            weight: Values::of(weight)?,
            bias: Values::of(bias)?,
            dy: dy.contiguous()?,
        })
    }

    /// The gradient with respect to `of`, or nothing if nobody asked for it.
    fn gradient(
        &self,
        of: &Tensor,
        compute: impl FnOnce(&[f32], Numbers<'_>, &[f32], &[f32]) -> Vec<f32>,
    ) -> Result<Option<Tensor>> {
        if !tracked(Some(of)) {
            return Ok(None);
        }
        let dy = Values::of(&self.dy)?;
        let values = compute(
            self.x.as_slice()?,
            self.weight.numbers()?,
            self.bias.as_slice()?,
            dy.as_slice()?,
        );
        if values.len() != of.elem_count() {
            bail!(
                "gradient of {} elements for a tensor of shape {:?}",
                values.len(),
                of.shape()
            );
        }
        Tensor::from_vec(values, of.shape(), of.device()).map(Some)
    }
}
