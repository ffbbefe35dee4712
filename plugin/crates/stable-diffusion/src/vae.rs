//! The picture's encoder and decoder: candle-transformers' `AutoEncoderKL`, made to give its moments.
//!
//! That type hides the posterior's mean and standard deviation, and samples from a generator that
//! cannot be seeded. So it is built with twice the latent channels: what it takes for the mean is
//! our mean and log-variance, and what it takes for the log-variance is the bias -1e4 on zero
//! weights. Its standard deviation is then exp(-5000) = 0 exactly, and its "sample" the moments.
//! The decoder gets the latent with as many channels of zeros, which zero weights ignore.
//!
//! No gradient: candle's group norm and convolutions have one, but nothing here needs it.

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};

use crate::config::VaeConfig;
use crate::error::{Error, Result};
use crate::weights::{WeightMap, Weights};

/// Log-variance whose standard deviation underflows to 0 in f32.
const NO_VARIANCE: f64 = -1e4;

/// Range of the log-variance, as in diffusers' `DiagonalGaussianDistribution`.
const LOG_VARIANCE: (f64, f64) = (-30.0, 20.0);

/// The posterior q(z | picture), not scaled.
#[derive(Debug, Clone)]
pub struct LatentMoments {
    /// [B, 4, h, w]
    pub mean: Tensor,
    /// [B, 4, h, w]
    pub std: Tensor,
}

/// See the module.
#[derive(Debug)]
pub struct Vae {
    inner: AutoEncoderKL,
    config: VaeConfig,
}

impl Vae {
    /// Builds the VAE. The names must be today's: see [`canonical_names`].
    ///
    /// # Errors
    /// Those of the tensor library; missing tensors are reported by [`WeightMap::build`].
    pub fn new(config: &VaeConfig, weights: Weights) -> Result<Self> {
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
        let inner = AutoEncoderKL::new(
            builder,
            config.in_channels,
            config.out_channels,
            inner_config,
        )?;
        Ok(Self {
            inner,
            config: config.clone(),
        })
    }

    /// The posterior of pictures, [B, 3, H, W] in [-1, 1]; H and W must be multiples of
    /// [`VaeConfig::downsampling`].
    ///
    /// # Errors
    /// [`Error::Argument`] for another shape.
    pub fn moments(&self, image: &Tensor) -> Result<LatentMoments> {
        let factor = self.config.downsampling();
        match image.dims() {
            [_, c, h, w]
                if *c == self.config.in_channels
                    && h.is_multiple_of(factor)
                    && w.is_multiple_of(factor) => {}
            dims => {
                let wanted = format!(
                    "[B, {}, H, W] with H and W multiples of {factor}",
                    self.config.in_channels
                );
                return Err(Error::argument(
                    "image",
                    format!("{dims:?} is not {wanted}"),
                ));
            }
        }
        let moments = self.inner.encode(&image.detach())?.sample()?;
        let n = self.config.latent_channels;
        let log_variance = moments
            .narrow(1, n, n)?
            .clamp(LOG_VARIANCE.0, LOG_VARIANCE.1)?;
        Ok(LatentMoments {
            mean: moments.narrow(1, 0, n)?.contiguous()?,
            std: (log_variance * 0.5)?.exp()?,
        })
    }

    /// Pictures [B, 3, H, W] of scaled latents [B, 4, h, w]: about [-1, 1], not clamped.
    ///
    /// # Errors
    /// [`Error::Argument`] for another shape.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let n = self.config.latent_channels;
        if latents.rank() != 4 || latents.dims()[1] != n {
            return Err(Error::argument(
                "latents",
                format!("{:?} is not [B, {n}, h, w]", latents.dims()),
            ));
        }
        let z = self.unscaled(&latents.detach())?;
        let padded = Tensor::cat(&[&z, &z.zeros_like()?], 1)?;
        Ok(self.inner.decode(&padded)?)
    }

    /// What the U-Net sees of z: (z - shift) · scaling.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn scaled(&self, z: &Tensor) -> Result<Tensor> {
        Ok(((z - self.config.shift_factor)? * self.config.scaling_factor)?)
    }

    /// The inverse of [`Vae::scaled`].
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn unscaled(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(((latents * (1.0 / self.config.scaling_factor))? + self.config.shift_factor)?)
    }

    /// The configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }
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

/// Renames the attention of VAEs written by diffusers before 0.18 (`query`, `key`, `value`,
/// `proj_attn`) and gives its 1×1 convolutions the shape of the linear layers they are.
///
/// # Errors
/// Those of the tensor library.
pub fn canonical_names(map: WeightMap) -> Result<WeightMap> {
    const OLD: [(&str, &str); 4] = [
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    ];
    let renamed = map.0.into_iter().map(|(name, tensor)| {
        let Some((path, layer)) = name.split_once(".attentions.0.") else {
            return Ok((name, tensor));
        };
        let (old, leaf) = layer.rsplit_once('.').unwrap_or((layer, ""));
        let layer = OLD
            .iter()
            .find(|(from, _)| *from == old)
            .map_or(old, |(_, to)| to);
        let tensor = match tensor.dims() {
            [o, i, 1, 1] => tensor.reshape((*o, *i))?,
            _ => tensor,
        };
        Ok((format!("{path}.attentions.0.{layer}.{leaf}"), tensor))
    });
    Ok(WeightMap(renamed.collect::<Result<_>>()?))
}
