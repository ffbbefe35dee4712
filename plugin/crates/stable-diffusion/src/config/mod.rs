//! What a checkpoint's networks look like: the parts of diffusers' `config.json` files that matter here.
//!
//! Unknown keys are ignored; a known key with a value that this crate does not implement is refused
//! by name, so that no model is ever run as something it is not.

mod parse;

/// A level of the down path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownBlock {
    /// `DownBlock2D`: residual blocks only.
    Plain,
    /// `CrossAttnDownBlock2D`: each residual block is followed by a transformer.
    CrossAttention,
}

/// A level of the up path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpBlock {
    /// `UpBlock2D`: residual blocks only.
    Plain,
    /// `CrossAttnUpBlock2D`: each residual block is followed by a transformer.
    CrossAttention,
}

/// `UNet2DConditionModel`. The middle is always a `UNetMidBlock2DCrossAttn`.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Latent width and height the model was trained at.
    pub sample_size: usize,
    /// Channels of the noisy latent.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Width of each level, first (finest) to last.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each level of the down path; the up path has one more.
    pub layers_per_block: Vec<usize>,
    /// Kind of each level of the down path, finest first.
    pub down_block_types: Vec<DownBlock>,
    /// Kind of each level of the up path, **coarsest** first, as diffusers lists them.
    pub up_block_types: Vec<UpBlock>,
    /// Width of the text embeddings.
    pub cross_attention_dim: usize,
    /// Attention heads of each level, finest first. diffusers calls this `attention_head_dim`:
    /// it is a count all the same.
    pub heads: Vec<usize>,
    /// Transformer blocks per transformer of each level, finest first; 1 in SD 1.x and 2.x.
    pub transformer_layers_per_block: Vec<usize>,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Epsilon of the residual blocks' and the output's group norms (a transformer's is always 1e-6).
    pub norm_eps: f64,
    /// Whether a transformer's projections are linear (SD 2.x) or 1×1 convolutions (SD 1.x).
    pub use_linear_projection: bool,
    /// Whether the time embedding is [cos, sin] (Stable Diffusion) or [sin, cos].
    pub flip_sin_to_cos: bool,
    /// Shift in the frequencies' denominator: `half - freq_shift`.
    pub freq_shift: f64,
    /// Padding of the stride 2 convolutions.
    pub downsample_padding: usize,
}

impl UNetConfig {
    /// As diffusers' `config.json`.
    pub fn to_json(&self) -> serde_json::Value {
        let down = |kind: &DownBlock| match kind {
            DownBlock::Plain => "DownBlock2D",
            DownBlock::CrossAttention => "CrossAttnDownBlock2D",
        };
        let up = |kind: &UpBlock| match kind {
            UpBlock::Plain => "UpBlock2D",
            UpBlock::CrossAttention => "CrossAttnUpBlock2D",
        };
        serde_json::json!({
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": self.heads,
            "block_out_channels": self.block_out_channels,
            "center_input_sample": false,
            "cross_attention_dim": self.cross_attention_dim,
            "down_block_types": self.down_block_types.iter().map(down).collect::<Vec<_>>(),
            "downsample_padding": self.downsample_padding,
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "freq_shift": self.freq_shift,
            "in_channels": self.in_channels,
            "layers_per_block": self.layers_per_block,
            "mid_block_scale_factor": 1,
            "norm_eps": self.norm_eps,
            "norm_num_groups": self.norm_num_groups,
            "out_channels": self.out_channels,
            "sample_size": self.sample_size,
            "transformer_layers_per_block": self.transformer_layers_per_block,
            "up_block_types": self.up_block_types.iter().map(up).collect::<Vec<_>>(),
            "use_linear_projection": self.use_linear_projection,
        })
    }
}

/// The text encoder's feed-forward activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(1.702 x): OpenAI's CLIP, SD 1.x.
    QuickGelu,
    /// x · Φ(x), exact: OpenCLIP, SD 2.x.
    Gelu,
}

/// `CLIPTextModel`. The output is the last hidden state after the final layer norm
/// (SD 2.x ships 23 of OpenCLIP's 24 layers for that reason).
#[derive(Debug, Clone, PartialEq)]
pub struct TextEncoderConfig {
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Positions: tokens of a padded prompt.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// Epsilon of every layer norm.
    pub layer_norm_eps: f64,
}

/// `AutoencoderKL` with plain encoder and decoder levels and attention in the middle.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// Width of each level, finest first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each encoder level; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// latents = (z - shift_factor) · scaling_factor.
    pub scaling_factor: f64,
    /// See `scaling_factor`; 0 in SD 1.x and 2.x.
    pub shift_factor: f64,
    /// Whether the moments pass through a 1×1 convolution.
    pub use_quant_conv: bool,
    /// Whether the latent passes through a 1×1 convolution before the decoder.
    pub use_post_quant_conv: bool,
}

impl VaeConfig {
    /// Picture pixels per latent pixel along one side: 8 in SD 1.x and 2.x.
    pub fn downsampling(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// How beta grows with the timestep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BetaSchedule {
    /// beta is linear.
    Linear,
    /// The square root of beta is linear.
    ScaledLinear,
}

/// What the U-Net predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// v = sqrt(abar) eps - sqrt(1 - abar) z (Salimans and Ho 2022, Appendix D).
    Velocity,
}

/// The noise that the model was trained with. Which sampler a checkpoint's file names, and how that one spaces its timesteps,
/// is the caller's choice: see [`crate::sampling`].
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    /// T.
    pub num_train_timesteps: usize,
    /// beta at timestep 0.
    pub beta_start: f64,
    /// beta at timestep T - 1.
    pub beta_end: f64,
    /// beta in between.
    pub beta_schedule: BetaSchedule,
    /// What the U-Net predicts.
    pub prediction: Prediction,
    /// Whether beta is rescaled so that abar ends at 0 (Lin et al. 2024, Algorithm 1).
    pub rescale_betas_zero_snr: bool,
}

/// A whole checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The denoiser.
    pub unet: UNetConfig,
    /// The prompt's encoder.
    pub text_encoder: TextEncoderConfig,
    /// The picture's encoder and decoder.
    pub vae: VaeConfig,
    /// The noise.
    pub scheduler: SchedulerConfig,
}

impl ModelConfig {
    /// Stable Diffusion 1.x at 512 pixels.
    /// Source: the config files of stable-diffusion-v1-5/stable-diffusion-v1-5.
    pub fn sd_1_5() -> Self {
        Self {
            unet: UNetConfig {
                sample_size: 64,
                in_channels: 4,
                out_channels: 4,
                block_out_channels: vec![320, 640, 1280, 1280],
                layers_per_block: vec![2; 4],
                down_block_types: vec![
                    DownBlock::CrossAttention,
                    DownBlock::CrossAttention,
                    DownBlock::CrossAttention,
                    DownBlock::Plain,
                ],
                up_block_types: vec![
                    UpBlock::Plain,
                    UpBlock::CrossAttention,
                    UpBlock::CrossAttention,
                    UpBlock::CrossAttention,
                ],
                cross_attention_dim: 768,
                heads: vec![8; 4],
                transformer_layers_per_block: vec![1; 4],
                norm_num_groups: 32,
                norm_eps: 1e-5,
                use_linear_projection: false,
                flip_sin_to_cos: true,
                freq_shift: 0.0,
                downsample_padding: 1,
            },
            text_encoder: TextEncoderConfig {
                vocab_size: 49408,
                hidden_size: 768,
                intermediate_size: 3072,
                num_hidden_layers: 12,
                num_attention_heads: 12,
                max_position_embeddings: 77,
                activation: Activation::QuickGelu,
                layer_norm_eps: 1e-5,
            },
            vae: VaeConfig {
                in_channels: 3,
                out_channels: 3,
                block_out_channels: vec![128, 256, 512, 512],
                layers_per_block: 2,
                latent_channels: 4,
                norm_num_groups: 32,
                scaling_factor: 0.18215,
                shift_factor: 0.0,
                use_quant_conv: true,
                use_post_quant_conv: true,
            },
            scheduler: SchedulerConfig {
                num_train_timesteps: 1000,
                beta_start: 0.00085,
                beta_end: 0.012,
                beta_schedule: BetaSchedule::ScaledLinear,
                prediction: Prediction::Epsilon,
                rescale_betas_zero_snr: false,
            },
        }
    }

    /// Stable Diffusion 2.x at 512 pixels, predicting noise.
    /// Source: the config files of stabilityai/stable-diffusion-2-1-base.
    pub fn sd_2_1_base() -> Self {
        let mut config = Self::sd_1_5();
        config.unet.cross_attention_dim = 1024;
        config.unet.heads = vec![5, 10, 20, 20];
        config.unet.use_linear_projection = true;
        config.text_encoder = TextEncoderConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 23,
            num_attention_heads: 16,
            activation: Activation::Gelu,
            ..config.text_encoder
        };
        config
    }

    /// Stable Diffusion 2.x at 768 pixels, predicting velocity.
    /// Source: the config files of stabilityai/stable-diffusion-2-1.
    pub fn sd_2_1() -> Self {
        let mut config = Self::sd_2_1_base();
        config.unet.sample_size = 96;
        config.scheduler.prediction = Prediction::Velocity;
        config
    }

    /// Whether the parts fit together. `file` names the checkpoint in the error.
    pub(crate) fn check(&self, file: &str) -> crate::Result<()> {
        let mut faults = Vec::new();
        if self.unet.cross_attention_dim != self.text_encoder.hidden_size {
            faults.push(format!(
                "the U-Net attends to embeddings of width {}, the text encoder's have {}",
                self.unet.cross_attention_dim, self.text_encoder.hidden_size
            ));
        }
        if self.unet.in_channels != self.vae.latent_channels {
            faults.push(format!(
                "the U-Net takes {} channels, the VAE's latents have {} (inpainting and depth models are not supported)",
                self.unet.in_channels, self.vae.latent_channels
            ));
        }
        if self.unet.out_channels != self.unet.in_channels {
            faults.push(format!(
                "the U-Net takes {} channels and gives {}",
                self.unet.in_channels, self.unet.out_channels
            ));
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(crate::Error::config(file, faults.join("; ")))
        }
    }
}

#[cfg(test)]
mod tests;
