//! The layers that both networks are made of: parameters by name, and the operation that uses them.

use candle_core::Tensor;

use crate::{
    Result,
    lora::{LoraAdapter, LoraFactors},
    ops::{self, Padding, dims_of},
    weights::Weights,
};

/// y = x·Wᵀ + b (+ scale·x·downᵀ·upᵀ).
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    lora: Option<(LoraFactors, f64)>,
}

impl Linear {
    pub(crate) fn new(w: &Weights, n_in: usize, n_out: usize) -> Result<Self> {
        Self::with_bias(w, w.factor("weight", &[n_out, n_in])?)
    }

    /// Of a few rows at a time, as timesteps are.
    pub(crate) fn of_few(w: &Weights, n_in: usize, n_out: usize) -> Result<Self> {
        Self::with_bias(w, w.get("weight", &[n_out, n_in])?)
    }

    pub(crate) fn without_bias(w: &Weights, n_in: usize, n_out: usize) -> Result<Self> {
        Ok(Self {
            weight: w.factor("weight", &[n_out, n_in])?,
            bias: None,
            lora: None,
        })
    }

    /// A 1x1 convolution, used as the linear layer of every pixel that it is.
    pub(crate) fn pointwise(w: &Weights, n_in: usize, n_out: usize) -> Result<Self> {
        Self::with_bias(w, w.factor("weight", &[n_out, n_in, 1, 1])?)
    }

    fn with_bias(w: &Weights, weight: Tensor) -> Result<Self> {
        let n_out = dims_of(&weight)[0];
        Ok(Self {
            weight,
            bias: Some(w.get("bias", &[n_out])?),
            lora: None,
        })
    }

    /// Adds the adapter's product for the path `w`, if it has one.
    pub(crate) fn with_lora(self, lora: Option<&LoraAdapter>, w: &Weights) -> Self {
        let lora = lora.and_then(|lora| Some((lora.factors.get(w.path())?.clone(), lora.scale())));
        Self { lora, ..self }
    }

    /// x `[.., in]` to `[.., out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = ops::linear(x, &self.weight, self.bias.as_ref())?;
        let Some((factors, scale)) = &self.lora else {
            return Ok(y);
        };
        let low = ops::linear(x, &factors.down, None)?;
        ops::add_scaled(&y, &ops::linear(&low, &factors.up, None)?, *scale)
    }

    /// x `[.., in]` to `[.., out / 2]`: value·gelu(gate) of what [`Self::forward`] gives.
    pub(crate) fn forward_gated(&self, x: &Tensor) -> Result<Tensor> {
        match &self.lora {
            None => ops::gated_linear(x, &self.weight, self.bias.as_ref()),
            Some(_) => ops::geglu(&self.forward(x)?),
        }
    }

    /// x `[B, in, h, w]` to `[B, h·w, out]`.
    pub(crate) fn forward_to_tokens(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear_from_channels(x, &self.weight, self.bias.as_ref())
    }

    /// x `[B, h·w, in]` to `[B, out, h, w]`.
    pub(crate) fn forward_to_plane(&self, x: &Tensor, size: [usize; 2]) -> Result<Tensor> {
        ops::linear_to_channels(x, &self.weight, self.bias.as_ref(), size)
    }

    /// x `[B, in, h, w]` to `[B, out, h, w]`.
    pub(crate) fn forward_plane(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, self.bias.as_ref(), 1, Padding::NONE)
    }
}

/// A 3x3 convolution.
#[derive(Debug)]
pub(crate) struct Conv3x3 {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: Padding,
}

impl Conv3x3 {
    pub(crate) fn new(w: &Weights, n_in: usize, n_out: usize) -> Result<Self> {
        let weight = w.factor("weight", &[n_out, n_in, 3, 3])?;
        Ok(Self {
            weight,
            bias: w.get("bias", &[n_out])?,
            stride: 1,
            padding: Padding::around(1),
        })
    }

    pub(crate) fn halving(w: &Weights, n_channels: usize, padding: usize) -> Result<Self> {
        Self::halving_with(w, n_channels, Padding::around(padding))
    }

    /// Halves with zeros below and to the right only, as the VAE's encoder does.
    pub(crate) fn halving_after(w: &Weights, n_channels: usize) -> Result<Self> {
        let padding = Padding {
            before: 0,
            after: 1,
        };
        Self::halving_with(w, n_channels, padding)
    }

    fn halving_with(w: &Weights, n_channels: usize, padding: Padding) -> Result<Self> {
        Ok(Self {
            weight: w.get("weight", &[n_channels, n_channels, 3, 3])?,
            bias: w.get("bias", &[n_channels])?,
            stride: 2,
            padding,
        })
    }

    /// x `[B, in, H, W]` to `[B, out, H, W]`, halved if so made.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, Some(&self.bias), self.stride, self.padding)
    }

    /// As [`Self::forward`], with `shift` `[B, out]` added to every pixel.
    pub(crate) fn forward_shifted(&self, x: &Tensor, shift: &Tensor) -> Result<Tensor> {
        let bias = ops::shift(shift, &self.bias)?;
        ops::conv2d(x, &self.weight, Some(&bias), self.stride, self.padding)
    }
}

/// Group normalization.
#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    n_groups: usize,
    epsilon: f64,
}

impl GroupNorm {
    pub(crate) fn new(
        w: &Weights,
        n_groups: usize,
        n_channels: usize,
        epsilon: f64,
    ) -> Result<Self> {
        let (weight, bias) = (
            w.get("weight", &[n_channels])?,
            w.get("bias", &[n_channels])?,
        );
        Ok(Self {
            weight,
            bias,
            n_groups,
            epsilon,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, self.n_groups, self.epsilon)
    }

    pub(crate) fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm_silu(x, &self.weight, &self.bias, self.n_groups, self.epsilon)
    }
}

/// Layer normalization.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl LayerNorm {
    pub(crate) fn new(w: &Weights, width: usize, epsilon: f64) -> Result<Self> {
        let (weight, bias) = (w.get("weight", &[width])?, w.get("bias", &[width])?);
        Ok(Self {
            weight,
            bias,
            epsilon,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.epsilon)
    }
}
