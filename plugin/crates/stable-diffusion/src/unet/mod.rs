//! The denoiser of Stable Diffusion 1.x and 2.x (diffusers' `UNet2DConditionModel`), with cross-attention that
//! can be watched and differentiated.
//!
//! Parameters have diffusers' names. The network is a value: its weights are either frozen tensors, which get
//! no gradients, or variables, which do (see [`WeightMap::trainable`] and [`crate::lora`]).

mod backward;
mod blocks;
mod builder;
mod observation;
mod parts;
mod stem;
mod transformer;

use candle_core::{DType, Device, Tensor};

use self::{
    blocks::{DownLevel, Middle, UpLevel},
    builder::Builder,
    observation::Pass,
    parts::{Blind, Part, Trail, Work, walked},
    stem::n_predictions,
};
use crate::{
    Error, Result,
    config::{DownBlock, UNetConfig, UpBlock},
    layers::{Conv3x3, GroupNorm, Linear},
    lora::LoraAdapter,
    memory::{Memory, bytes_of, foresee, is_much},
    ops::{self, Backend, Precision, on_workers},
    weights::{WeightMap, Weights},
};

pub use backward::Backward;
pub use observation::{CrossAttentionLayer, LayerAttention, Observed, Stage, Watch};
pub use stem::Stem;

/// The network with its weights.
#[derive(Debug)]
pub struct UNet {
    config: UNetConfig,
    weights: WeightMap,
    layers: Vec<CrossAttentionLayer>,
    network: Network,
    lora: Option<LoraAdapter>,
    precision: Precision,
    /// Of what is between the parts: that of `precision` on a device.
    activations: DType,
    memory: Memory,
}

impl UNet {
    /// Builds the network on `weights`; attention projections that `lora` has factors for use them.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] unless `weights` are exactly the network's; [`Error::Argument`] when the adapter has
    /// factors for a layer that the network lacks, or of another shape.
    pub fn new(
        config: &UNetConfig,
        weights: &WeightMap,
        lora: Option<&LoraAdapter>,
    ) -> Result<Self> {
        if let Some(lora) = lora {
            lora.check(weights)?;
        }
        let (network, layers) = weights.build("U-Net", |w| Network::new(config, w, lora))?;
        Ok(Self {
            config: config.clone(),
            weights: weights.clone(),
            layers,
            network,
            lora: lora.cloned(),
            precision: Precision::F32,
            activations: DType::F32,
            memory: Memory::default(),
        })
    }

    /// In this precision, f32 at first: frozen weights are converted, variables are not; what was rounded stays so. Where a CPU
    /// multiplies bf16, weights are kept in the order in which it does.
    ///
    /// # Errors
    /// [`Error::Argument`] for f16 on a CPU, [`Error::Tensor`] when the tensor library fails.
    pub fn with_precision(self, precision: Precision) -> Result<Self> {
        if precision == self.precision {
            return Ok(self);
        }
        let Self {
            config,
            weights,
            lora,
            memory,
            network,
            ..
        } = self;
        // It holds the same tensors: a weight that is converted is freed.
        drop(network);
        let weights = match precision {
            Precision::Bf16 => {
                let factors = WeightMap::factors(|w| Self::build(&config, w))?;
                weights
                    .in_precision(precision)?
                    .in_order_of_tiles(&factors)?
            }
            _ => weights.in_precision(precision)?,
        };
        let rebuilt = Self::new(&config, &weights, lora.as_ref())?;
        Ok(rebuilt.computing_in(precision).with_memory(memory))
    }

    /// Computing as `other` does; the weights stay as they are.
    #[must_use]
    pub fn like(self, other: &Self) -> Self {
        self.computing_in(other.precision).with_memory(other.memory)
    }

    fn computing_in(self, precision: Precision) -> Self {
        let activations = match self.backend() {
            Backend::Device => precision.dtype(),
            Backend::Host => DType::F32,
        };
        Self {
            precision,
            activations,
            ..self
        }
    }

    fn backend(&self) -> Backend {
        let mut weights = self.weights.0.values();
        weights
            .next()
            .map_or(Backend::Host, |w| Backend::of_product(w, w))
    }

    /// Of what its weights and factors are.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// With another answer to what a step of learning keeps, [`Memory::Auto`] at first.
    #[must_use]
    pub fn with_memory(self, memory: Memory) -> Self {
        Self { memory, ..self }
    }

    /// What a step of learning keeps.
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// Asks `w` for every parameter of the network, to generate or check them.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the tensor library fails.
    pub fn build(config: &UNetConfig, w: Weights) -> Result<()> {
        Network::new(config, w, None).map(drop)
    }

    /// The cross-attention layers that a network of this configuration has, in the order in which they run; no weight
    /// is needed.
    ///
    /// # Errors
    /// [`Error::Argument`] when the configuration contradicts itself.
    pub fn layers_of(config: &UNetConfig) -> Result<Vec<CrossAttentionLayer>> {
        let found = std::cell::RefCell::new(Vec::new());
        WeightMap::shapes(|w| {
            let (_, layers) = Network::new(config, w, None)?;
            *found.borrow_mut() = layers;
            Ok(())
        })?;
        Ok(found.into_inner())
    }

    /// The parameters by diffusers' names.
    pub fn weights(&self) -> &WeightMap {
        &self.weights
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// All cross-attention layers, in the order in which they run.
    pub fn cross_attention_layers(&self) -> &[CrossAttentionLayer] {
        &self.layers
    }

    /// The prediction `[B, 4, h, w]`.
    ///
    /// # Shapes
    /// latents `[B, 4, h, w]`; one timestep per sample, in [0, T); context `[B, N, D]`, or `[1, N, D]` for all. Of one latent
    /// there may be M contexts, `[M, N, D]`, and then M predictions: what they share is computed once.
    ///
    /// # Errors
    /// [`Error::Argument`] when the sizes do not fit.
    pub fn forward(&self, latents: &Tensor, timesteps: &[f32], context: &Tensor) -> Result<Tensor> {
        Ok(self
            .forward_observed(latents, timesteps, context, Watch::NOTHING)?
            .prediction)
    }

    /// [`Self::forward`], and the attention to watched positions of the prompt.
    ///
    /// # Errors
    /// As [`Self::forward`], and when a watched layer or position does not exist.
    pub fn forward_observed(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Tensor,
        watch: Watch<'_>,
    ) -> Result<Observed> {
        // Before anything is computed.
        let size = self.check_latents(latents, timesteps)?;
        let n_samples = n_predictions(timesteps.len(), context)?;
        self.check_context(n_samples, context, watch)?;
        self.foresee_pass(latents.device(), n_samples, size)?;
        self.go_on(self.begin(latents, timesteps, watch)?, context, watch)
    }

    /// [`Self::forward_observed`], and the way to the gradients of what is computed from it. They are the same bits, whatever
    /// is kept until then; see [`Memory`].
    ///
    /// # Errors
    /// As [`Self::forward_observed`].
    pub fn forward_for_gradients(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Tensor,
        watch: Watch<'_>,
    ) -> Result<(Observed, Backward<'_>)> {
        let size = self.check_latents(latents, timesteps)?;
        self.check_context(timesteps.len(), context, watch)?;
        self.foresee_pass(latents.device(), timesteps.len(), size)?;
        let is_again = self.computes_again(latents)?;
        let [latents, context] = self.as_activations([latents, context])?;
        let (observed, backward) = self.compute(latents.device(), || {
            let time = self.network.time(&self.config, &latents, timesteps)?;
            backward::forward(self, &latents, time, &context, watch, is_again)
        })?;
        let observed = Observed {
            prediction: observed.prediction.to_dtype(DType::F32)?,
            ..observed
        };
        Ok((observed, backward))
    }

    /// The plane that the `n_up`-th up level gives, `[B, C, h', w']`: what the network sees in the picture, coarse for
    /// the first levels. Later levels are not computed; `n_up` is at least 1 and at most the number of levels.
    ///
    /// # Errors
    /// As [`Self::forward`], and when there is no such level.
    pub fn features(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Tensor,
        n_up: usize,
    ) -> Result<Tensor> {
        let watch = Watch::NOTHING;
        let size = self.check_latents(latents, timesteps)?;
        self.check_context(timesteps.len(), context, watch)?;
        self.foresee_pass(latents.device(), timesteps.len(), size)?;
        let n_levels = self.network.up.len();
        if n_up == 0 || n_up > n_levels {
            return Err(Error::argument(
                "n_up",
                format!("{n_up} of {n_levels} levels"),
            ));
        }
        let [latents, context] = self.as_activations([latents, context])?;
        let mut pass = Pass {
            context: &context,
            watch,
            attention: Vec::new(),
        };
        let rise = || {
            let parts = self.network.parts_up_to(n_up);
            let time = self.network.time(&self.config, &latents, timesteps)?;
            walked(&parts, Trail::new(latents.clone()), &time, &mut pass)
        };
        Ok(self
            .compute(latents.device(), rise)?
            .x
            .to_dtype(DType::F32)?)
    }

    /// A part of a pass, at the precision of this network.
    fn compute<R: Send>(&self, device: &Device, work: impl FnOnce() -> R + Send) -> R {
        on_workers(device, || self.precision.within(work))
    }

    fn as_activations(&self, inputs: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        let [latents, context] = inputs.map(|input| input.to_dtype(self.activations));
        Ok([latents?, context?])
    }

    /// About what a step that keeps everything holds of its pass, in bytes; a test counts them.
    pub fn kept_bytes(&self, n_samples: usize, latent: [usize; 2]) -> u64 {
        /// Planes of a residual block that its backward reads: what either norm is given.
        const RESIDUAL: usize = 2;
        /// Around the blocks of a transformer: what the norm is given.
        const TRANSFORMER: usize = 1;
        /// Of one of its blocks: what three norms are given, q, k, v and the output of one attention, q and the output of
        /// the other.
        const BLOCK: usize = 9;
        // The wide half of the feed-forward: computed again, kept in bf16, or kept.
        let n_wide = match (self.backend(), self.precision) {
            (Backend::Host, Precision::F32 | Precision::F16) => 0,
            (Backend::Host, Precision::Bf16) => 4,
            (Backend::Device, _) => 8,
        };
        let config = &self.config;
        let from_coarsest = config.up_block_types.iter().rev();
        let levels = config.down_block_types.iter().zip(from_coarsest);
        let of_level = |(level, (down, up)): (usize, (&DownBlock, &UpBlock))| {
            let halved = |side, _| observation::halved(side, config.downsample_padding);
            let [height, width] = latent.map(|side| (0..level).fold(side, halved));
            let n_down = config.layers_per_block[level];
            let n_transformers = n_down * usize::from(*down == DownBlock::CrossAttention)
                + (n_down + 1) * usize::from(*up == UpBlock::CrossAttention);
            let n_blocks = config.transformer_layers_per_block[level];
            let n_planes = RESIDUAL * (2 * n_down + 1)
                + (TRANSFORMER + (BLOCK + n_wide) * n_blocks) * n_transformers;
            let n_channels = config.block_out_channels[level];
            bytes_of(&[n_planes, n_samples, n_channels, height, width])
        };
        levels
            .enumerate()
            .map(of_level)
            .fold(0, u64::saturating_add)
            / (DType::F32.size_in_bytes() / self.activations.size_in_bytes()) as u64
    }

    /// Whether parts are computed once more on the way back.
    fn computes_again(&self, latents: &Tensor) -> Result<bool> {
        let (n_samples, _, height, width) = latents.dims4()?;
        let kept = || self.kept_bytes(n_samples, [height, width]);
        Ok(match self.memory {
            Memory::Fast => false,
            Memory::Lean => true,
            Memory::Auto => is_much(latents.device(), kept()),
        })
    }

    /// Height and width of latents that fit.
    fn check_latents(&self, latents: &Tensor, timesteps: &[f32]) -> Result<[usize; 2]> {
        let (n_samples, n_channels, height, width) = latents.dims4()?;
        if n_channels != self.config.in_channels || height == 0 || width == 0 {
            let reason = format!(
                "[B, {}, h, w], not {:?}",
                self.config.in_channels,
                latents.shape()
            );
            return Err(Error::argument("latents", reason));
        }
        if timesteps.len() != n_samples {
            let reason = format!("{} for {n_samples} samples", timesteps.len());
            return Err(Error::argument("timesteps", reason));
        }
        Ok([height, width])
    }

    fn foresee_pass(
        &self,
        device: &Device,
        n_samples: usize,
        [height, width]: [usize; 2],
    ) -> Result<()> {
        // The planes of the finest level that wait for the way up, and two at work.
        let widths = &self.config.block_out_channels;
        let n_planes = 2 + self.config.layers_per_block.first().unwrap_or(&0);
        let plane = bytes_of(&[n_samples, widths[0], height, width]);
        let least = plane.saturating_mul(n_planes as u64);
        foresee(device, least, || {
            format!("a pass through the U-Net with {n_samples} latents of {width} x {height}")
        })
    }

    /// A context of `n_samples` latents.
    fn check_context(&self, n_samples: usize, context: &Tensor, watch: Watch<'_>) -> Result<()> {
        let (n_contexts, n_tokens, width) = context.dims3()?;
        let expected = self.config.cross_attention_dim;
        if width != expected || (n_contexts != 1 && n_contexts != n_samples) {
            let reason = format!(
                "[1 or {n_samples}, N, {expected}], not {:?}",
                context.shape()
            );
            return Err(Error::argument("context", reason));
        }
        if let Some(position) = watch
            .all_positions()
            .iter()
            .find(|&&position| position >= n_tokens)
        {
            return Err(Error::argument(
                "position",
                format!("{position} of {n_tokens} tokens"),
            ));
        }
        if let Some(layers) = watch.layers()
            && let Some(layer) = layers.iter().find(|&&layer| layer >= self.layers.len())
        {
            return Err(Error::argument(
                "layer",
                format!("{layer} of {}", self.layers.len()),
            ));
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Network {
    conv_in: Conv3x3,
    time_1: Linear,
    time_2: Linear,
    down: Vec<DownLevel>,
    middle: Middle,
    up: Vec<UpLevel>,
    norm_out: GroupNorm,
    conv_out: Conv3x3,
}

impl Network {
    fn new(
        config: &UNetConfig,
        w: Weights,
        lora: Option<&LoraAdapter>,
    ) -> Result<(Self, Vec<CrossAttentionLayer>)> {
        let widths = &config.block_out_channels;
        let (Some(&first), n_levels) = (widths.first(), widths.len()) else {
            return Err(Error::argument("block_out_channels", "at least one level"));
        };
        for (name, len) in [
            ("layers_per_block", config.layers_per_block.len()),
            ("down_block_types", config.down_block_types.len()),
            ("up_block_types", config.up_block_types.len()),
            ("heads", config.heads.len()),
            (
                "transformer_layers_per_block",
                config.transformer_layers_per_block.len(),
            ),
        ] {
            if len != n_levels {
                return Err(Error::argument(
                    name,
                    format!("{len} entries for {n_levels} levels"),
                ));
            }
        }
        let time = w.pp("time_embedding");
        let mut b = Builder::new(config, w.clone(), lora);
        let network = Self {
            conv_in: Conv3x3::new(&w.pp("conv_in"), config.in_channels, first)?,
            time_1: Linear::of_few(&time.pp("linear_1"), first, 4 * first)?,
            time_2: Linear::of_few(&time.pp("linear_2"), 4 * first, 4 * first)?,
            down: (0..n_levels)
                .map(|level| DownLevel::new(&mut b, level))
                .collect::<Result<_>>()?,
            middle: Middle::new(&mut b)?,
            up: (0..n_levels)
                .map(|index| UpLevel::new(&mut b, index))
                .collect::<Result<_>>()?,
            norm_out: GroupNorm::new(
                &w.pp("conv_norm_out"),
                config.norm_num_groups,
                first,
                config.norm_eps,
            )?,
            conv_out: Conv3x3::new(&w.pp("conv_out"), first, config.out_channels)?,
        };
        Ok((network, b.into_layers()))
    }

    /// From the latents to the prediction.
    fn parts(&self) -> Vec<Part<'_>> {
        let out = Part::new(Work::Blind(Blind::Out(&self.norm_out, &self.conv_out)));
        let mut parts = self.parts_up_to(self.up.len());
        parts.push(out);
        parts
    }

    /// From the latents through all levels down, the middle and `n_up` levels up.
    fn parts_up_to(&self, n_up: usize) -> Vec<Part<'_>> {
        let first = Part::new(Work::Blind(Blind::Conv(&self.conv_in))).leaving_skip();
        let down = self.down.iter().flat_map(DownLevel::parts);
        let up = self.up[..n_up].iter().flat_map(UpLevel::parts);
        std::iter::once(first)
            .chain(down)
            .chain([self.middle.part()])
            .chain(up)
            .collect()
    }

    /// What every residual block is told of the timesteps, `[B, 4·first width]`, activated.
    fn time(&self, config: &UNetConfig, latents: &Tensor, timesteps: &[f32]) -> Result<Tensor> {
        let time = timestep_embedding(config, timesteps)?.to_device(latents.device())?;
        let time = ops::silu(&self.time_1.forward(&time.to_dtype(latents.dtype())?)?)?;
        // Every residual block starts from the same activation.
        ops::silu(&self.time_2.forward(&time)?)
    }
}

/// Sinusoids of the timesteps, `[B, width of the first level]` (Vaswani et al. 2017, as in diffusers).
///
/// With h half the width: frequency i is exp(-ln(10⁴)·i / (h - freq_shift)); the halves are sin and cos of
/// t·frequency, or cos and sin if flipped. Computed in f32 so that checkpoints see what they were trained with.
fn timestep_embedding(config: &UNetConfig, timesteps: &[f32]) -> Result<Tensor> {
    let width = config.block_out_channels.first().copied().unwrap_or(0);
    let half = width / 2;
    let denominator = half as f32 - config.freq_shift as f32;
    let mut values = Vec::with_capacity(timesteps.len() * width);
    for &t in timesteps {
        let angles = (0..half).map(|i| t * (-(1e4_f32.ln()) * i as f32 / denominator).exp());
        let (sines, cosines): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
        let [first, second] = if config.flip_sin_to_cos {
            [cosines, sines]
        } else {
            [sines, cosines]
        };
        values.extend(first);
        values.extend(second);
        values.extend(std::iter::repeat_n(0.0, width % 2));
    }
    Ok(Tensor::from_vec(
        values,
        (timesteps.len(), width),
        &candle_core::Device::Cpu,
    )?)
}
