//! Levels of the U-Net: residual blocks, each followed by a transformer where the level has attention.

use candle_core::Tensor;

use super::{
    builder::{Builder, Place},
    observation::{Pass, Stage, Watch},
    parts::{Blind, Part, Work},
    transformer::{Begun, Transformer},
};
use crate::{
    Result,
    config::{DownBlock, UNetConfig, UpBlock},
    layers::{Conv3x3, GroupNorm, Linear},
    ops,
    weights::Weights,
};

/// A residual block, and the transformer behind it if the level has attention.
#[derive(Debug)]
pub(super) struct Step {
    residual: Residual,
    transformer: Option<Transformer>,
}

impl Step {
    fn part(&self) -> Part<'_> {
        Part::new(match &self.transformer {
            None => Work::Blind(Blind::Residual(&self.residual)),
            Some(transformer) => Work::Looking(Looking {
                before: &self.residual,
                transformer,
                after: None,
            }),
        })
    }
}

/// What attends to the context, in two halves: the first does not need it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looking<'a> {
    before: &'a Residual,
    transformer: &'a Transformer,
    after: Option<&'a Residual>,
}

impl Looking<'_> {
    pub(super) fn begin(&self, x: &Tensor, time: &Tensor, watch: Watch<'_>) -> Result<Begun> {
        self.transformer.begin(self.before.forward(x, time)?, watch)
    }

    pub(super) fn finish(
        &self,
        begun: Begun,
        time: &Tensor,
        pass: &mut Pass<'_>,
    ) -> Result<Tensor> {
        let x = self.transformer.finish(begun, pass)?;
        match self.after {
            Some(after) => after.forward(&x, time),
            None => Ok(x),
        }
    }
}

/// One level on the way down.
#[derive(Debug)]
pub(super) struct DownLevel {
    steps: Vec<Step>,
    halve: Option<Conv3x3>,
}

impl DownLevel {
    pub(super) fn new(b: &mut Builder<'_>, level: usize) -> Result<Self> {
        let (config, w) = (b.config, b.weights.pp("down_blocks").pp(level));
        let widths = &config.block_out_channels;
        let (n_in, n_out) = (widths[level.saturating_sub(1)], widths[level]);
        let place = Place {
            stage: Stage::Down,
            level,
        };
        let mut steps = Vec::new();
        for index in 0..config.layers_per_block[level] {
            let n_in = if index == 0 { n_in } else { n_out };
            let residual = Residual::new(config, &w.pp("resnets").pp(index), n_in, n_out)?;
            let transformer = match config.down_block_types[level] {
                DownBlock::Plain => None,
                DownBlock::CrossAttention => {
                    Some(Transformer::new(b, &w.pp("attentions").pp(index), place)?)
                }
            };
            steps.push(Step {
                residual,
                transformer,
            });
        }
        let is_last = level + 1 == widths.len();
        let halve = (!is_last)
            .then(|| {
                Conv3x3::halving(
                    &w.pp("downsamplers.0.conv"),
                    n_out,
                    config.downsample_padding,
                )
            })
            .transpose()?;
        Ok(Self { steps, halve })
    }

    /// Every plane waits for the way up.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        let halve = self.halve.as_ref().map(Blind::Conv).map(Work::Blind);
        let steps = self.steps.iter().map(Step::part);
        steps.chain(halve.map(Part::new)).map(Part::leaving_skip)
    }
}

/// The coarsest level once more.
#[derive(Debug)]
pub(super) struct Middle {
    first: Residual,
    transformer: Transformer,
    second: Residual,
}

impl Middle {
    pub(super) fn new(b: &mut Builder<'_>) -> Result<Self> {
        let (config, w) = (b.config, b.weights.pp("mid_block"));
        let level = config.block_out_channels.len() - 1;
        let width = config.block_out_channels[level];
        let place = Place {
            stage: Stage::Mid,
            level,
        };
        Ok(Self {
            first: Residual::new(config, &w.pp("resnets.0"), width, width)?,
            transformer: Transformer::new(b, &w.pp("attentions.0"), place)?,
            second: Residual::new(config, &w.pp("resnets.1"), width, width)?,
        })
    }

    pub(super) fn part(&self) -> Part<'_> {
        Part::new(Work::Looking(Looking {
            before: &self.first,
            transformer: &self.transformer,
            after: Some(&self.second),
        }))
    }
}

/// One level on the way up.
#[derive(Debug)]
pub(super) struct UpLevel {
    steps: Vec<Step>,
    enlarge: Option<Conv3x3>,
}

impl UpLevel {
    /// `index` counts from the coarsest level, as diffusers' names do.
    pub(super) fn new(b: &mut Builder<'_>, index: usize) -> Result<Self> {
        let (config, w) = (b.config, b.weights.pp("up_blocks").pp(index));
        let widths = &config.block_out_channels;
        let level = widths.len() - 1 - index;
        let (n_out, n_before) = (widths[level], widths[(level + 1).min(widths.len() - 1)]);
        // The last skip of a level was its input on the way down.
        let n_last_skip = widths[level.saturating_sub(1)];
        let place = Place {
            stage: Stage::Up,
            level,
        };
        let n_steps = config.layers_per_block[level] + 1;
        let mut steps = Vec::new();
        for step in 0..n_steps {
            let n_skip = if step + 1 == n_steps {
                n_last_skip
            } else {
                n_out
            };
            let n_in = if step == 0 { n_before } else { n_out };
            let residual = Residual::new(config, &w.pp("resnets").pp(step), n_in + n_skip, n_out)?;
            let transformer = match config.up_block_types[index] {
                UpBlock::Plain => None,
                UpBlock::CrossAttention => {
                    Some(Transformer::new(b, &w.pp("attentions").pp(step), place)?)
                }
            };
            steps.push(Step {
                residual,
                transformer,
            });
        }
        let enlarge = (level > 0)
            .then(|| Conv3x3::new(&w.pp("upsamplers.0.conv"), n_out, n_out))
            .transpose()?;
        Ok(Self { steps, enlarge })
    }

    /// Every step sees a plane that waited. The last is enlarged to the size of the one that waits next, not to twice its
    /// own: odd sides were rounded on the way down.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        let enlarge = self.enlarge.as_ref().map(Blind::Enlarge).map(Work::Blind);
        let steps = self.steps.iter().map(|step| step.part().taking_skip());
        steps.chain(enlarge.map(Part::new))
    }
}

/// x + conv(silu(norm(conv(silu(norm(x))) + projection of the time))), the sum's x projected if widths differ.
#[derive(Debug)]
pub(super) struct Residual {
    norm_1: GroupNorm,
    conv_1: Conv3x3,
    time: Linear,
    norm_2: GroupNorm,
    conv_2: Conv3x3,
    shortcut: Option<Linear>,
}

impl Residual {
    fn new(config: &UNetConfig, w: &Weights, n_in: usize, n_out: usize) -> Result<Self> {
        let norm = |name: &str, width: usize| {
            GroupNorm::new(&w.pp(name), config.norm_num_groups, width, config.norm_eps)
        };
        let n_time = 4 * config.block_out_channels[0];
        Ok(Self {
            norm_1: norm("norm1", n_in)?,
            conv_1: Conv3x3::new(&w.pp("conv1"), n_in, n_out)?,
            time: Linear::of_few(&w.pp("time_emb_proj"), n_time, n_out)?,
            norm_2: norm("norm2", n_out)?,
            conv_2: Conv3x3::new(&w.pp("conv2"), n_out, n_out)?,
            shortcut: (n_in != n_out)
                .then(|| Linear::pointwise(&w.pp("conv_shortcut"), n_in, n_out))
                .transpose()?,
        })
    }

    /// x `[B, C, h, w]`; `time` `[B, 4·first width]`, activated.
    pub(super) fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let h = self.norm_1.forward_silu(x)?;
        let h = self.conv_1.forward_shifted(&h, &self.time.forward(time)?)?;
        let h = self.conv_2.forward(&self.norm_2.forward_silu(&h)?)?;
        match &self.shortcut {
            Some(shortcut) => ops::add(&shortcut.forward_plane(x)?, &h),
            None => ops::add(x, &h),
        }
    }
}
