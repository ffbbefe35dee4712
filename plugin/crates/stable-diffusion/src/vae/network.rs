//! Encoder and decoder of diffusers' `AutoencoderKL`, of this crate's layers.
//!
//! ```text
//! encoder   conv_in, levels of residual blocks, each but the last halved, middle, norm, conv_out (, quant_conv)
//! decoder   (post_quant_conv,) conv_in, middle, levels of residual blocks, each but the last doubled, norm, conv_out
//! middle    residual block, attention of all pixels with one head, residual block
//! ```

use candle_core::Tensor;

use crate::{
    Result,
    config::VaeConfig,
    layers::{Conv3x3, GroupNorm, Linear},
    ops::{self, Mask},
    weights::Weights,
};

/// Of every group norm.
const EPSILON: f64 = 1e-6;

/// Pictures to mean and log-variance.
#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: Conv3x3,
    levels: Vec<(Vec<Residual>, Option<Conv3x3>)>,
    middle: Middle,
    norm: GroupNorm,
    conv_out: Conv3x3,
    quant: Option<Linear>,
}

impl Encoder {
    pub(super) fn new(config: &VaeConfig, weights: &Weights) -> Result<Self> {
        let (w, widths) = (weights.pp("encoder"), &config.block_out_channels);
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let n_moments = 2 * config.latent_channels;
        let conv_in = Conv3x3::new(&w.pp("conv_in"), config.in_channels, first)?;
        let mut levels = Vec::new();
        for (level, &width) in widths.iter().enumerate() {
            let w = w.pp("down_blocks").pp(level);
            let n_in = widths[level.saturating_sub(1)];
            let blocks = residuals(config, &w, n_in, width, config.layers_per_block)?;
            let halve = (level + 1 < widths.len())
                .then(|| Conv3x3::halving_after(&w.pp("downsamplers.0.conv"), width))
                .transpose()?;
            levels.push((blocks, halve));
        }
        let quant = weights.pp("quant_conv");
        Ok(Self {
            conv_in,
            levels,
            middle: Middle::new(config, &w.pp("mid_block"), last)?,
            norm: norm(config, &w.pp("conv_norm_out"), last)?,
            conv_out: Conv3x3::new(&w.pp("conv_out"), last, n_moments)?,
            quant: config
                .use_quant_conv
                .then(|| Linear::pointwise(&quant, n_moments, n_moments))
                .transpose()?,
        })
    }

    /// `[B, 3, H, W]` to `[B, 2·latent channels, h, w]`.
    pub(super) fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(image)?;
        for (blocks, halve) in &self.levels {
            for block in blocks {
                x = block.forward(&x)?;
            }
            if let Some(halve) = halve {
                x = halve.forward(&x)?;
            }
        }
        let x = self.norm.forward_silu(&self.middle.forward(&x)?)?;
        let x = self.conv_out.forward(&x)?;
        match &self.quant {
            Some(quant) => quant.forward_plane(&x),
            None => Ok(x),
        }
    }
}

/// Latents that are not scaled to pictures.
#[derive(Debug)]
pub(super) struct Decoder {
    post_quant: Option<Linear>,
    conv_in: Conv3x3,
    middle: Middle,
    levels: Vec<(Vec<Residual>, Option<Conv3x3>)>,
    norm: GroupNorm,
    conv_out: Conv3x3,
}

impl Decoder {
    pub(super) fn new(config: &VaeConfig, weights: &Weights) -> Result<Self> {
        let w = weights.pp("decoder");
        // From the coarsest level, as diffusers' names count.
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last, n) = (widths[0], widths[widths.len() - 1], config.latent_channels);
        let post_quant = weights.pp("post_quant_conv");
        let mut levels = Vec::new();
        for (level, &width) in widths.iter().enumerate() {
            let w = w.pp("up_blocks").pp(level);
            let n_in = widths[level.saturating_sub(1)];
            let blocks = residuals(config, &w, n_in, width, config.layers_per_block + 1)?;
            let enlarge = (level + 1 < widths.len())
                .then(|| Conv3x3::new(&w.pp("upsamplers.0.conv"), width, width))
                .transpose()?;
            levels.push((blocks, enlarge));
        }
        Ok(Self {
            post_quant: config
                .use_post_quant_conv
                .then(|| Linear::pointwise(&post_quant, n, n))
                .transpose()?,
            conv_in: Conv3x3::new(&w.pp("conv_in"), n, first)?,
            middle: Middle::new(config, &w.pp("mid_block"), first)?,
            levels,
            norm: norm(config, &w.pp("conv_norm_out"), last)?,
            conv_out: Conv3x3::new(&w.pp("conv_out"), last, config.out_channels)?,
        })
    }

    /// `[B, latent channels, h, w]` to `[B, 3, H, W]`.
    pub(super) fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let x = match &self.post_quant {
            Some(post_quant) => self.conv_in.forward(&post_quant.forward_plane(z)?)?,
            None => self.conv_in.forward(z)?,
        };
        let mut x = self.middle.forward(&x)?;
        for (blocks, enlarge) in &self.levels {
            for block in blocks {
                x = block.forward(&x)?;
            }
            if let Some(enlarge) = enlarge {
                let (_, _, height, width) = x.dims4()?;
                x = enlarge.forward(&ops::upsample_nearest(&x, 2 * height, 2 * width)?)?;
            }
        }
        self.conv_out.forward(&self.norm.forward_silu(&x)?)
    }
}

fn norm(config: &VaeConfig, w: &Weights, width: usize) -> Result<GroupNorm> {
    GroupNorm::new(w, config.norm_num_groups, width, EPSILON)
}

fn residuals(
    config: &VaeConfig,
    w: &Weights,
    n_in: usize,
    width: usize,
    n: usize,
) -> Result<Vec<Residual>> {
    let block = |index: usize| {
        let n_in = if index == 0 { n_in } else { width };
        Residual::new(config, &w.pp("resnets").pp(index), n_in, width)
    };
    (0..n).map(block).collect()
}

/// x + conv(silu(norm(conv(silu(norm(x)))))), the sum's x projected if widths differ.
#[derive(Debug)]
struct Residual {
    norm_1: GroupNorm,
    conv_1: Conv3x3,
    norm_2: GroupNorm,
    conv_2: Conv3x3,
    shortcut: Option<Linear>,
}

impl Residual {
    fn new(config: &VaeConfig, w: &Weights, n_in: usize, n_out: usize) -> Result<Self> {
        Ok(Self {
            norm_1: norm(config, &w.pp("norm1"), n_in)?,
            conv_1: Conv3x3::new(&w.pp("conv1"), n_in, n_out)?,
            norm_2: norm(config, &w.pp("norm2"), n_out)?,
            conv_2: Conv3x3::new(&w.pp("conv2"), n_out, n_out)?,
            shortcut: (n_in != n_out)
                .then(|| Linear::pointwise(&w.pp("conv_shortcut"), n_in, n_out))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv_1.forward(&self.norm_1.forward_silu(x)?)?;
        let h = self.conv_2.forward(&self.norm_2.forward_silu(&h)?)?;
        match &self.shortcut {
            Some(shortcut) => Ok((shortcut.forward_plane(x)? + h)?),
            None => Ok((x + h)?),
        }
    }
}

/// The coarsest level once more.
#[derive(Debug)]
struct Middle {
    first: Residual,
    attention: Attention,
    second: Residual,
}

impl Middle {
    fn new(config: &VaeConfig, w: &Weights, width: usize) -> Result<Self> {
        let residual = |name: &str| Residual::new(config, &w.pp(name), width, width);
        Ok(Self {
            first: residual("resnets.0")?,
            attention: Attention::new(config, &w.pp("attentions.0"), width)?,
            second: residual("resnets.1")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.first.forward(x)?;
        self.second.forward(&self.attention.forward(&x)?)
    }
}

/// x + projection of what every pixel sees of all others.
#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl Attention {
    fn new(config: &VaeConfig, w: &Weights, width: usize) -> Result<Self> {
        let linear = |name: &str| Linear::new(&w.pp(name), width, width);
        Ok(Self {
            norm: norm(config, &w.pp("group_norm"), width)?,
            query: linear("to_q")?,
            key: linear("to_k")?,
            value: linear("to_v")?,
            out: linear("to_out.0")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let normalized = self.norm.forward(x)?;
        let tokens = |layer: &Linear| layer.forward_to_tokens(&normalized);
        let [q, k, v] = [&self.query, &self.key, &self.value].map(tokens);
        let seen = ops::attention(&q?, &k?, &v?, 1, Mask::None)?;
        Ok((x + self.out.forward_to_plane(&seen, [height, width])?)?)
    }
}
