//! Element-wise activations, the gated one of the feed-forward layers, and nearest-neighbor enlargement.

use candle_core::{D, DType, Result, Tensor};

use crate::ops::{
    Activation, composed,
    function::{Function, Reads},
};

/// An activation of its one operand.
pub(super) struct Elementwise(pub(super) Activation);

impl Function for Elementwise {
    const NAME: &'static str = "activation";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        match self.0 {
            Activation::Silu => composed::silu(&operands[0]),
            Activation::QuickGelu => composed::quick_gelu(&operands[0]),
            Activation::Gelu => composed::gelu_erf(&operands[0]),
        }
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let slope = slope(&operands[0].to_dtype(DType::F32)?, self.0)?;
        let dx = (slope * dy.to_dtype(DType::F32)?)?;
        Ok(vec![Some(dx.to_dtype(operands[0].dtype())?)])
    }
}

/// Its derivative.
pub(super) fn slope(x: &Tensor, of: Activation) -> Result<Tensor> {
    let sigmoid = |x: &Tensor| (x.neg()?.exp()? + 1.0)?.recip();
    // s + a·x·s·(1 - s) of s = sigmoid(a·x)
    let of_sigmoid = |a: f64| {
        let s = sigmoid(&(x * a)?)?;
        let rest = ((s.neg()? + 1.0)? * (x * a)?)?;
        &s + (&s * rest)?
    };
    match of {
        Activation::Silu => of_sigmoid(1.0),
        Activation::QuickGelu => of_sigmoid(1.702),
        Activation::Gelu => {
            let below = ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? * 0.5)?.affine(1.0, 0.5)?;
            let density = ((x.sqr()? * -0.5)?.exp()? * (0.5 / std::f64::consts::PI).sqrt())?;
            below + (x * density)?
        }
    }
}

/// value·gelu(gate) of its one operand (value, gate).
pub(super) struct Geglu;

impl Function for Geglu {
    const NAME: &'static str = "geglu";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        composed::geglu(&operands[0])
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let x = &operands[0];
        let width = x.dim(D::Minus1)? / 2;
        let half = |from: usize| {
            let half = x.narrow(D::Minus1, from, width)?;
            half.contiguous()?.to_dtype(DType::F32)
        };
        let (value, gate, dy) = (half(0)?, half(width)?, dy.to_dtype(DType::F32)?);
        let d_value = (&dy * composed::gelu_erf(&gate)?)?;
        let d_gate = (dy * (value * slope(&gate, Activation::Gelu)?)?)?;
        let dx = Tensor::cat(&[d_value, d_gate], D::Minus1)?;
        Ok(vec![Some(dx.to_dtype(x.dtype())?)])
    }
}

/// Enlarges its one operand `[B, C, h, w]`.
pub(super) struct Nearest {
    pub(super) height: usize,
    pub(super) width: usize,
}

impl Function for Nearest {
    const NAME: &'static str = "upsample_nearest";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        composed::upsample_nearest(&operands[0], self.height, self.width)
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut dx = dy.contiguous()?;
        for (axis, n_outputs) in [(3, self.width), (2, self.height)] {
            let n_inputs = operands[0].dim(axis)?;
            dx = if n_outputs % n_inputs == 0 {
                let mut dims = dx.dims().to_vec();
                dims[axis] = n_inputs;
                dims.insert(axis + 1, n_outputs / n_inputs);
                dx.reshape(dims)?.sum(axis + 1)?
            } else {
                let sources: Vec<u32> = (0..n_outputs)
                    .map(|i| (i * n_inputs / n_outputs) as u32)
                    .collect();
                let mut dims = dx.dims().to_vec();
                dims[axis] = n_inputs;
                let zeros = Tensor::zeros(dims, dx.dtype(), dx.device())?;
                zeros.index_add(&Tensor::new(sources, dx.device())?, &dx, axis)?
            };
        }
        Ok(vec![Some(dx)])
    }

    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::Shape
    }
}
