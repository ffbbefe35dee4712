//! diffusers' and transformers' `config.json` files, read and checked.

use serde_json::{Map, Value};

use super::{
    Activation, BetaSchedule, DownBlock, Prediction, SchedulerConfig, TextEncoderConfig,
    UNetConfig, UpBlock, VaeConfig,
};
use crate::error::{Error, Result};

/// Sizes beyond this are no model but a damaged file, and would only exhaust the memory.
const MAX_SIZE: u64 = 1 << 24;
/// The same of things one after the other: layers of a level or of a text encoder.
const MAX_DEPTH: u64 = 256;
/// The same of levels, each of half the size of the one before.
const MAX_LEVELS: usize = 16;

/// One file's keys, and every fault found in them so far.
struct Fields<'a> {
    file: &'a str,
    values: Map<String, Value>,
    faults: Vec<String>,
}

impl<'a> Fields<'a> {
    fn new(file: &'a str, json: &[u8]) -> Result<Self> {
        let values: Map<String, Value> = lenient_json::from_slice(json)
            .map_err(|e| Error::config(file, format!("not a JSON object: {e}")))?;
        Ok(Self {
            file,
            values,
            faults: Vec::new(),
        })
    }

    /// The value of `key`; JSON's null counts as absent, as in diffusers.
    fn value(&self, key: &str) -> Option<Value> {
        self.values.get(key).filter(|v| !v.is_null()).cloned()
    }

    fn fault(&mut self, key: &str, value: &Value, wanted: &str) {
        self.faults
            .push(format!("\"{key}\" is {value}, supported is {wanted}"));
    }

    fn size(&mut self, key: &str, default: usize) -> usize {
        self.whole(key, default, MAX_SIZE)
    }

    /// How many there are one after the other.
    fn depth(&mut self, key: &str, default: usize) -> usize {
        self.whole(key, default, MAX_DEPTH)
    }

    fn whole(&mut self, key: &str, default: usize, most: u64) -> usize {
        let Some(value) = self.value(key) else {
            return default;
        };
        match value.as_u64() {
            Some(n) if (1..=most).contains(&n) => n as usize,
            _ => {
                self.fault(key, &value, &format!("a whole number from 1 to {most}"));
                default
            }
        }
    }

    fn count(&mut self, key: &str, default: usize) -> usize {
        if self.value(key).is_some_and(|v| v.as_u64() == Some(0)) {
            0
        } else {
            self.size(key, default)
        }
    }

    fn number(&mut self, key: &str, default: f64) -> f64 {
        let Some(value) = self.value(key) else {
            return default;
        };
        value.as_f64().filter(|x| x.is_finite()).unwrap_or_else(|| {
            self.fault(key, &value, "a number");
            default
        })
    }

    fn flag(&mut self, key: &str, default: bool) -> bool {
        let Some(value) = self.value(key) else {
            return default;
        };
        value.as_bool().unwrap_or_else(|| {
            self.fault(key, &value, "true or false");
            default
        })
    }

    /// The width of every level.
    fn widths(&mut self, key: &str, default: &[usize]) -> Vec<usize> {
        self.wholes(key, default, None, MAX_SIZE)
    }

    /// A list of `len` sizes, or one size for all.
    fn sizes(&mut self, key: &str, default: usize, len: usize) -> Vec<usize> {
        self.wholes(key, &vec![default; len], Some(len), MAX_SIZE)
    }

    /// A list of `len` depths, or one depth for all.
    fn depths(&mut self, key: &str, default: usize, len: usize) -> Vec<usize> {
        self.wholes(key, &vec![default; len], Some(len), MAX_DEPTH)
    }

    fn wholes(
        &mut self,
        key: &str,
        default: &[usize],
        len: Option<usize>,
        most: u64,
    ) -> Vec<usize> {
        let Some(value) = self.value(key) else {
            return default.to_vec();
        };
        let one = |v: &Value| {
            v.as_u64()
                .filter(|n| (1..=most).contains(n))
                .map(|n| n as usize)
        };
        let list: Option<Vec<usize>> = match (&value, len) {
            (Value::Array(items), _) => items.iter().map(one).collect(),
            (single, Some(len)) => one(single).map(|n| vec![n; len]),
            (_, None) => None,
        };
        let lengths = len.map_or(1..=MAX_LEVELS, |len| len..=len);
        match list {
            Some(list) if lengths.contains(&list.len()) => list,
            _ => {
                let wanted = len.map_or_else(
                    || format!("a list of at most {MAX_LEVELS} numbers from 1 to {most}"),
                    |n| format!("a number from 1 to {most}, or a list of {n}"),
                );
                self.fault(key, &value, &wanted);
                default.to_vec()
            }
        }
    }

    /// One of `choices`.
    fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)], default: T) -> T {
        let Some(value) = self.value(key) else {
            return default;
        };
        self.pick(key, &value, choices).unwrap_or(default)
    }

    fn pick<T: Copy>(&mut self, key: &str, value: &Value, choices: &[(&str, T)]) -> Option<T> {
        let found = choices
            .iter()
            .find(|(name, _)| value.as_str() == Some(name))
            .map(|(_, choice)| *choice);
        if found.is_none() {
            let names: Vec<String> = choices
                .iter()
                .map(|(name, _)| format!("\"{name}\""))
                .collect();
            self.fault(key, value, &names.join(" or "));
        }
        found
    }

    fn choices<T: Copy>(&mut self, key: &str, choices: &[(&str, T)], default: &[T]) -> Vec<T> {
        let Some(value) = self.value(key) else {
            return default.to_vec();
        };
        let Some(items) = value.as_array() else {
            self.fault(key, &value, "a list");
            return default.to_vec();
        };
        items
            .iter()
            .filter_map(|item| self.pick(key, item, choices))
            .collect()
    }

    /// Refuses `key` unless it is absent or has one of the values `supported`.
    fn only(&mut self, key: &str, supported: &[Value]) {
        let Some(value) = self.value(key) else { return };
        // A list of equal values stands for the value.
        let fits = |v: &Value| {
            supported.contains(v)
                || v.as_f64()
                    .is_some_and(|x| supported.iter().any(|s| s.as_f64() == Some(x)))
        };
        let all = value
            .as_array()
            .map_or_else(|| fits(&value), |items| items.iter().all(fits));
        if !all {
            let names: Vec<String> = supported.iter().map(Value::to_string).collect();
            let wanted = if names.is_empty() {
                "null".to_owned()
            } else {
                names.join(" or ")
            };
            self.fault(key, &value, &wanted);
        }
    }

    fn finish<T>(self, config: T) -> Result<T> {
        if self.faults.is_empty() {
            Ok(config)
        } else {
            Err(Error::config(self.file, self.faults.join("; ")))
        }
    }
}

impl UNetConfig {
    /// Reads a U-Net's `config.json`; `file` names it in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with every value that is not supported.
    pub fn from_json(file: &str, json: &[u8]) -> Result<Self> {
        let mut f = Fields::new(file, json)?;
        let block_out_channels = f.widths("block_out_channels", &[320, 640, 1280, 1280]);
        let n = block_out_channels.len();
        let down = [
            ("DownBlock2D", DownBlock::Plain),
            ("CrossAttnDownBlock2D", DownBlock::CrossAttention),
        ];
        let up = [
            ("UpBlock2D", UpBlock::Plain),
            ("CrossAttnUpBlock2D", UpBlock::CrossAttention),
        ];
        let (d, u) = (DownBlock::CrossAttention, UpBlock::CrossAttention);
        let heads_key = if f.value("num_attention_heads").is_some() {
            "num_attention_heads"
        } else {
            "attention_head_dim"
        };
        let config = Self {
            sample_size: f.size("sample_size", 64),
            in_channels: f.size("in_channels", 4),
            out_channels: f.size("out_channels", 4),
            layers_per_block: f.depths("layers_per_block", 2, n),
            down_block_types: f.choices("down_block_types", &down, &[d, d, d, DownBlock::Plain]),
            up_block_types: f.choices("up_block_types", &up, &[UpBlock::Plain, u, u, u]),
            cross_attention_dim: f.size("cross_attention_dim", 1280),
            heads: f.sizes(heads_key, 8, n),
            transformer_layers_per_block: f.depths("transformer_layers_per_block", 1, n),
            norm_num_groups: f.size("norm_num_groups", 32),
            norm_eps: f.number("norm_eps", 1e-5),
            use_linear_projection: f.flag("use_linear_projection", false),
            flip_sin_to_cos: f.flag("flip_sin_to_cos", true),
            freq_shift: f.number("freq_shift", 0.0),
            downsample_padding: f.count("downsample_padding", 1),
            block_out_channels,
        };
        refuse_other_unets(&mut f);
        config.check_shapes(&mut f);
        f.finish(config)
    }

    fn check_shapes(&self, f: &mut Fields<'_>) {
        let n = self.block_out_channels.len();
        for (key, len) in [
            ("down_block_types", self.down_block_types.len()),
            ("up_block_types", self.up_block_types.len()),
        ] {
            // A refused name leaves a gap, which has its own message.
            if len != n
                && !f
                    .faults
                    .iter()
                    .any(|fault| fault.starts_with(&format!("\"{key}\"")))
            {
                f.faults.push(format!(
                    "\"{key}\" has {len} levels, \"block_out_channels\" has {n}"
                ));
            }
        }
        for (i, (&width, &heads)) in self.block_out_channels.iter().zip(&self.heads).enumerate() {
            if !width.is_multiple_of(heads) {
                f.faults.push(format!(
                    "level {i} of width {width} cannot be split over {heads} attention heads"
                ));
            }
            if !width.is_multiple_of(self.norm_num_groups) {
                f.faults.push(format!(
                    "level {i} of width {width} cannot be split into {} groups",
                    self.norm_num_groups
                ));
            }
        }
        if !self.sample_size.is_multiple_of(1 << (n - 1)) {
            f.faults.push(format!(
                "\"sample_size\" {} cannot be halved {} times",
                self.sample_size,
                n - 1
            ));
        }
    }
}

/// Refuses what sets other U-Nets of diffusers apart from Stable Diffusion's.
fn refuse_other_unets(f: &mut Fields<'_>) {
    for key in [
        "addition_embed_type",
        "class_embed_type",
        "num_class_embeds",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
        "timestep_post_act",
        "time_embedding_act_fn",
        "cross_attention_norm",
        "reverse_transformer_layers_per_block",
        "time_embedding_dim",
    ] {
        f.only(key, &[]);
    }
    for key in [
        "center_input_sample",
        "dual_cross_attention",
        "only_cross_attention",
        "resnet_skip_time_act",
    ] {
        f.only(key, &[Value::Bool(false)]);
    }
    f.only("mid_block_only_cross_attention", &[Value::Bool(false)]);
    for key in ["mid_block_scale_factor", "resnet_out_scale_factor"] {
        f.only(key, &[1.into()]);
    }
    for key in ["conv_in_kernel", "conv_out_kernel"] {
        f.only(key, &[3.into()]);
    }
    for (key, value) in [
        ("act_fn", "silu"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("time_embedding_type", "positional"),
        ("resnet_time_scale_shift", "default"),
        ("attention_type", "default"),
    ] {
        f.only(key, &[value.into()]);
    }
}

impl TextEncoderConfig {
    /// Reads a text encoder's `config.json`; `file` names it in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with every value that is not supported.
    pub fn from_json(file: &str, json: &[u8]) -> Result<Self> {
        let mut f = Fields::new(file, json)?;
        let activations = [
            ("quick_gelu", Activation::QuickGelu),
            ("gelu", Activation::Gelu),
        ];
        // The defaults are those of transformers' CLIPTextConfig.
        let config = Self {
            vocab_size: f.size("vocab_size", 49408),
            hidden_size: f.size("hidden_size", 512),
            intermediate_size: f.size("intermediate_size", 2048),
            num_hidden_layers: f.depth("num_hidden_layers", 12),
            num_attention_heads: f.size("num_attention_heads", 8),
            max_position_embeddings: f.size("max_position_embeddings", 77),
            activation: f.choice("hidden_act", &activations, Activation::QuickGelu),
            layer_norm_eps: f.number("layer_norm_eps", 1e-5),
        };
        f.only("model_type", &["clip_text_model".into()]);
        if !config
            .hidden_size
            .is_multiple_of(config.num_attention_heads)
        {
            let (width, heads) = (config.hidden_size, config.num_attention_heads);
            f.faults.push(format!(
                "a width of {width} cannot be split over {heads} attention heads"
            ));
        }
        f.finish(config)
    }
}

impl VaeConfig {
    /// Reads a VAE's `config.json`; `file` names it in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with every value that is not supported.
    pub fn from_json(file: &str, json: &[u8]) -> Result<Self> {
        let mut f = Fields::new(file, json)?;
        let config = Self {
            in_channels: f.size("in_channels", 3),
            out_channels: f.size("out_channels", 3),
            block_out_channels: f.widths("block_out_channels", &[64]),
            layers_per_block: f.depth("layers_per_block", 1),
            latent_channels: f.size("latent_channels", 4),
            norm_num_groups: f.size("norm_num_groups", 32),
            scaling_factor: f.number("scaling_factor", 0.18215),
            shift_factor: f.number("shift_factor", 0.0),
            use_quant_conv: f.flag("use_quant_conv", true),
            use_post_quant_conv: f.flag("use_post_quant_conv", true),
        };
        f.only("act_fn", &["silu".into()]);
        f.only("mid_block_add_attention", &[Value::Bool(true)]);
        f.only("down_block_types", &["DownEncoderBlock2D".into()]);
        f.only("up_block_types", &["UpDecoderBlock2D".into()]);
        f.only("latents_mean", &[]);
        f.only("latents_std", &[]);
        if config
            .block_out_channels
            .iter()
            .any(|width| !width.is_multiple_of(config.norm_num_groups))
        {
            f.faults.push(format!(
                "the levels' widths cannot be split into {} groups",
                config.norm_num_groups
            ));
        }
        f.finish(config)
    }
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json` of any of diffusers' schedulers: only the noise and the
    /// timesteps are taken from it, the sampler is the caller's choice. `file` names it in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with every value that is not supported.
    pub fn from_json(file: &str, json: &[u8]) -> Result<Self> {
        let mut f = Fields::new(file, json)?;
        let betas = [
            ("linear", BetaSchedule::Linear),
            ("scaled_linear", BetaSchedule::ScaledLinear),
        ];
        let predictions = [
            ("epsilon", Prediction::Epsilon),
            ("v_prediction", Prediction::Velocity),
        ];
        let config = Self {
            num_train_timesteps: f.size("num_train_timesteps", 1000),
            beta_start: f.number("beta_start", 0.0001),
            beta_end: f.number("beta_end", 0.02),
            beta_schedule: f.choice("beta_schedule", &betas, BetaSchedule::Linear),
            prediction: f.choice("prediction_type", &predictions, Prediction::Epsilon),
            rescale_betas_zero_snr: f.flag("rescale_betas_zero_snr", false),
        };
        if config.rescale_betas_zero_snr && config.prediction == Prediction::Epsilon {
            f.faults.push("\"rescale_betas_zero_snr\" needs \"v_prediction\": pure noise says nothing of the picture".to_owned());
        }
        f.only("trained_betas", &[]);
        f.only("thresholding", &[Value::Bool(false)]);
        let rises = 0.0 < config.beta_start
            && config.beta_start <= config.beta_end
            && config.beta_end < 1.0;
        if !rises {
            let (start, end) = (config.beta_start, config.beta_end);
            f.faults.push(format!(
                "beta from {start} to {end} is not a rise within (0, 1)"
            ));
        }
        f.finish(config)
    }
}
