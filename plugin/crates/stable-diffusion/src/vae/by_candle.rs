//! candle-transformers' `AutoEncoderKL`, made to give its moments: the form for devices.
//!
//! That type hides the posterior's mean and standard deviation, and samples from a generator that
//! cannot be seeded. So it is built with twice the latent channels: what it takes for the mean is
//! our mean and log-variance, and what it takes for the log-variance is the bias -1e4 on zero
//! weights. Its standard deviation is then exp(-5000) = 0 exactly, and its "sample" the moments.
//! The decoder gets the latent with as many channels of zeros, which zero weights ignore.

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};

use crate::Result;
use crate::config::VaeConfig;
use crate::weights::Weights;

/// Log-variance whose standard deviation underflows to 0 in f32.
const NO_VARIANCE: f64 = -1e4;

/// See the module.
#[derive(Debug)]
pub(super) struct ByCandle(AutoEncoderKL);

impl ByCandle {
    pub(super) fn new(config: &VaeConfig, weights: Weights) -> Result<Self> {
        let inner_config = AutoEncoderKLConfig {
            block_out_channels: config.block_out_channels.clone(),
            layers_per_block: config.layers_per_block,
            latent_channels: 2 * config.latent_channels,
            norm_num_groups: config.norm_num_groups,
            use_quant_conv: config.use_quant_conv,
            use_post_quant_conv: config.use_post_quant_conv,
        };
        let device = weights.device();
        let backend = Widened {
            weights,
            config: config.clone(),
        };
        let builder = VarBuilder::from_backend(Box::new(backend), DType::F32, device);
        let (n_in, n_out) = (config.in_channels, config.out_channels);
        Ok(Self(AutoEncoderKL::new(
            builder,
            n_in,
            n_out,
            inner_config,
        )?))
    }

    /// Mean and log-variance of pictures `[B, 3, H, W]`: `[B, 2·latent channels, h, w]`.
    pub(super) fn moments(&self, image: &Tensor) -> Result<Tensor> {
        each(image, |image| self.0.encode(image)?.sample())
    }

    /// Pictures of latents that are not scaled.
    pub(super) fn decode(&self, z: &Tensor) -> Result<Tensor> {
        each(z, |z| {
            self.0.decode(&Tensor::cat(&[z, &z.zeros_like()?], 1)?)
        })
    }
}

/// One sample after another: candle's autoencoder gets every sample of a batch but the first wrong (0.11.1, on a CPU).
fn each(x: &Tensor, of_one: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
    let of = |sample: usize| of_one(&x.narrow(0, sample, 1)?);
    let samples = (0..x.dim(0)?)
        .map(of)
        .collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&samples, 0)?)
}

/// Hands candle's VAE its tensors, the four around the latent widened.
struct Widened {
    weights: Weights,
    config: VaeConfig,
}

impl Widened {
    /// Of the tensor `name` that the inner VAE wants in the shape `wide`: the shape in the file.
    fn true_shape(&self, name: &str, wide: &[usize]) -> Vec<usize> {
        let mut shape = wide.to_vec();
        match name {
            "encoder.conv_out.weight"
            | "encoder.conv_out.bias"
            | "quant_conv.bias"
            | "post_quant_conv.bias" => {
                shape[0] /= 2;
            }
            "quant_conv.weight" | "post_quant_conv.weight" => {
                shape[0] /= 2;
                shape[1] /= 2;
            }
            "decoder.conv_in.weight" => shape[1] /= 2,
            _ => {}
        }
        shape
    }

    /// Which bias carries the log-variance that means "none".
    fn last_encoder_bias(&self) -> &'static str {
        if self.config.use_quant_conv {
            "quant_conv.bias"
        } else {
            "encoder.conv_out.bias"
        }
    }
}

impl SimpleBackend for Widened {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        _: DType,
        _: &Device,
    ) -> candle_core::Result<Tensor> {
        let wide = shape.dims();
        let found = self.true_shape(name, wide);
        let mut tensor = self
            .weights
            .get(name, &found)
            .map_err(candle_core::Error::wrap)?;
        for (dim, (&from, &to)) in found.iter().zip(wide).enumerate() {
            if from == to {
                continue;
            }
            let mut extra = tensor.dims().to_vec();
            extra[dim] = to - from;
            let value = if name == self.last_encoder_bias() {
                NO_VARIANCE
            } else {
                0.0
            };
            let extra =
                Tensor::zeros(extra, tensor.dtype(), tensor.device())?.affine(1.0, value)?;
            tensor = Tensor::cat(&[&tensor, &extra], dim)?;
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name} was asked for without a shape")
    }

    /// Everything asked about has today's name: see [`canonical_names`].
    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}
