//! The picture's encoder and decoder.
//!
//! On a CPU they are layers of this crate (`network`), elsewhere candle-transformers' (`by_candle`); a test holds one
//! against the other. No gradient: nothing here needs one. Large pictures may go through in tiles (`tiles`).

mod by_candle;
mod network;
mod tiles;

use std::sync::Arc;

use candle_core::{Device, Tensor};

use self::by_candle::ByCandle;
use self::network::{Decoder, Encoder};
use self::tiles::{Tiling, is_large};
use crate::config::VaeConfig;
use crate::error::{Error, Result};
use crate::memory::{bytes_of, foresee};
use crate::ops::on_workers;
use crate::weights::{WeightMap, Weights};

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
#[derive(Debug, Clone)]
pub struct Vae {
    form: Arc<Form>,
    config: VaeConfig,
    /// Cells a side of a tile; larger pictures go through in tiles.
    tile: Option<usize>,
}

#[derive(Debug)]
enum Form {
    Own(Box<(Encoder, Decoder)>),
    ByCandle(Box<ByCandle>),
}

impl Vae {
    /// Builds the VAE. The names must be today's: see [`canonical_names`].
    ///
    /// # Errors
    /// Those of the tensor library; missing tensors are reported by [`WeightMap::build`].
    pub fn new(config: &VaeConfig, weights: Weights) -> Result<Self> {
        let form = if weights.device().is_cpu() {
            let own = (
                Encoder::new(config, &weights)?,
                Decoder::new(config, &weights)?,
            );
            Form::Own(Box::new(own))
        } else {
            Form::ByCandle(Box::new(ByCandle::new(config, weights)?))
        };
        let config = config.clone();
        Ok(Self {
            form: Arc::new(form),
            config,
            tile: None,
        })
    }

    /// The same weights by candle-transformers, on a CPU too: for tests.
    ///
    /// # Errors
    /// As [`Vae::new`].
    pub fn by_candle(config: &VaeConfig, weights: Weights) -> Result<Self> {
        Ok(Self {
            form: Arc::new(Form::ByCandle(Box::new(ByCandle::new(config, weights)?))),
            config: config.clone(),
            tile: None,
        })
    }

    /// The same VAE with tiles of so many latent cells a side for pictures of half again their area, or without.
    #[must_use]
    pub fn with_tile(&self, tile: Option<usize>) -> Self {
        Self {
            tile,
            ..self.clone()
        }
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
        let (n, _, height, width) = image.dims4()?;
        self.foresee(image.device(), n, [width, height])?;
        let image = image.detach();
        let encode = |image: &Tensor| match &*self.form {
            Form::Own(own) => own.0.forward(image),
            Form::ByCandle(inner) => inner.moments(image),
        };
        let moments = self.in_tiles(&image, [factor, 1], encode)?;
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
        let (n, _, height, width) = latents.dims4()?;
        let factor = self.config.downsampling();
        self.foresee(latents.device(), n, [width * factor, height * factor])?;
        let z = self.unscaled(&latents.detach())?;
        let decode = |z: &Tensor| match &*self.form {
            Form::Own(own) => own.1.forward(z),
            Form::ByCandle(inner) => inner.decode(z),
        };
        self.in_tiles(&z, [1, factor], decode)
    }

    /// `f` of x, whose cells have the sides `given` in it and `made` in the result.
    fn in_tiles(
        &self,
        x: &Tensor,
        [given, made]: [usize; 2],
        f: impl Fn(&Tensor) -> Result<Tensor> + Sync,
    ) -> Result<Tensor> {
        let f = |x: &Tensor| on_workers(x.device(), || f(x));
        let tiling = self.tile.map(|tile| Tiling { tile, given, made });
        match tiling {
            Some(tiling) if tiling.splits(x)? => tiling.apply(x, f),
            _ => f(x),
        }
    }

    /// Refuses pictures whose planes at full size do not fit into the memory that this process may have.
    pub(crate) fn foresee(
        &self,
        device: &Device,
        n: usize,
        [width, height]: [usize; 2],
    ) -> Result<()> {
        let tile = self.tile.map(|tile| tile * self.config.downsampling());
        if tile.is_some_and(|tile| is_large(tile, [width, height])) {
            return Ok(());
        }
        // The input and the output of a block.
        let least = bytes_of(&[2, n, self.config.block_out_channels[0], height, width]);
        foresee(device, least, || {
            let pictures = if n == 1 { "a picture" } else { "pictures" };
            format!("{pictures} of {width} x {height} in the VAE")
        })
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
