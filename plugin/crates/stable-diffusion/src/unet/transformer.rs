//! The transformer of a level: self-attention, cross-attention to the context, gated feed-forward.

use candle_core::Tensor;

use super::{
    builder::{Builder, Place},
    observation::{LayerAttention, Pass, Watch},
};
use crate::{
    Error, Result,
    layers::{GroupNorm, LayerNorm, Linear},
    lora::LoraAdapter,
    ops::{self, Mask},
    weights::Weights,
};

/// Epsilon of the layer norms, and of the group norm in front (diffusers' `Transformer2DModel`).
const LAYER_NORM_EPSILON: f64 = 1e-5;
const GROUP_NORM_EPSILON: f64 = 1e-6;

/// x + out(blocks(in(norm(x)))), the pixels of a plane being tokens in between.
#[derive(Debug)]
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}

impl Transformer {
    pub(super) fn new(b: &mut Builder<'_>, w: &Weights, place: Place) -> Result<Self> {
        let config = b.config;
        let width = config.block_out_channels[place.level];
        let projection = |name: &str| {
            let w = w.pp(name);
            if config.use_linear_projection {
                Linear::new(&w, width, width)
            } else {
                Linear::pointwise(&w, width, width)
            }
        };
        let n_blocks = config.transformer_layers_per_block[place.level];
        let blocks = w.pp("transformer_blocks");
        Ok(Self {
            norm: GroupNorm::new(
                &w.pp("norm"),
                config.norm_num_groups,
                width,
                GROUP_NORM_EPSILON,
            )?,
            proj_in: projection("proj_in")?,
            proj_out: projection("proj_out")?,
            blocks: (0..n_blocks)
                .map(|index| Block::new(b, &blocks.pp(index), place))
                .collect::<Result<_>>()?,
        })
    }

    /// Up to where the context is first looked at; x `[B, C, h, w]`.
    pub(super) fn begin(&self, x: Tensor, watch: Watch<'_>) -> Result<Begun> {
        let tokens = self.proj_in.forward_to_tokens(&self.norm.forward(&x)?)?;
        let (tokens, self_attention) = match self.blocks.first() {
            Some(block) => block.attend_to_itself(&tokens, watch)?,
            None => (tokens, None),
        };
        Ok(Begun {
            x,
            tokens,
            self_attention,
        })
    }

    /// From there on.
    pub(super) fn finish(&self, begun: Begun, pass: &mut Pass<'_>) -> Result<Tensor> {
        let Begun {
            x,
            mut tokens,
            mut self_attention,
        } = begun;
        let (_, _, height, width) = x.dims4()?;
        for (index, block) in self.blocks.iter().enumerate() {
            if index > 0 {
                (tokens, self_attention) = block.attend_to_itself(&tokens, pass.watch)?;
            } else if !pass.watch.sees_self_attention(block.layer) {
                self_attention = None;
            } else if self_attention.is_none() {
                let reason = "the stem did not watch the self-attention that its pass should tell";
                return Err(Error::argument("watch", reason));
            }
            tokens = block.finish(&tokens, [height, width], self_attention.take(), pass)?;
        }
        ops::add(
            &x,
            &self.proj_out.forward_to_plane(&tokens, [height, width])?,
        )
    }
}

/// A transformer before it looks at the context.
#[derive(Debug, Clone)]
pub(super) struct Begun {
    /// Its plane, `[B, C, h, w]`.
    x: Tensor,
    /// The plane's pixels after the first self-attention, `[B, h·w, C]`.
    tokens: Tensor,
    /// See [`LayerAttention::self_attention`].
    self_attention: Option<Tensor>,
}

impl Begun {
    /// For as many samples.
    pub(super) fn for_samples(self, n_samples: usize) -> Result<Self> {
        let repeated = |x: &Tensor| ops::for_samples(x, n_samples);
        Ok(Self {
            x: repeated(&self.x)?,
            tokens: repeated(&self.tokens)?,
            self_attention: self.self_attention.as_ref().map(repeated).transpose()?,
        })
    }
}

/// Three sums: x + attention(norm(x)), + attention to the context, + feed-forward.
#[derive(Debug)]
struct Block {
    norm_1: LayerNorm,
    self_attention: Attention,
    norm_2: LayerNorm,
    cross_attention: Attention,
    /// Index of the cross-attention among the network's.
    layer: usize,
    norm_3: LayerNorm,
    widen: Linear,
    narrow: Linear,
}

impl Block {
    fn new(b: &mut Builder<'_>, w: &Weights, place: Place) -> Result<Self> {
        let (config, lora) = (b.config, b.lora);
        let width = config.block_out_channels[place.level];
        let norm = |name: &str| LayerNorm::new(&w.pp(name), width, LAYER_NORM_EPSILON);
        let n_heads = config.heads[place.level];
        let attention = |name: &str, context: usize| {
            Attention::new(&w.pp(name), lora, [width, context], n_heads)
        };
        Ok(Self {
            norm_1: norm("norm1")?,
            self_attention: attention("attn1", width)?,
            norm_2: norm("norm2")?,
            cross_attention: attention("attn2", config.cross_attention_dim)?,
            layer: b.register(w.pp("attn2").path(), place),
            norm_3: norm("norm3")?,
            widen: Linear::new(&w.pp("ff.net.0.proj"), width, 8 * width)?,
            narrow: Linear::new(&w.pp("ff.net.2"), 4 * width, width)?,
        })
    }

    /// The first of the sums, and what was watched in it; x `[B, h·w, C]`.
    fn attend_to_itself(&self, x: &Tensor, watch: Watch<'_>) -> Result<(Tensor, Option<Tensor>)> {
        let h = self.norm_1.forward(x)?;
        let [q, k, v] = self.self_attention.project(&h, &h)?;
        let n_heads = self.self_attention.n_heads;
        let (attended, self_attention) = if watch.sees_self_attention(self.layer) {
            let all: Vec<usize> = (0..x.dim(1)?).collect();
            let (attended, seen) = ops::observed_attention(&q, &k, &v, n_heads, &all)?;
            (attended, Some(ops::mean_of_heads(&seen)?))
        } else {
            (ops::attention(&q, &k, &v, n_heads, Mask::None)?, None)
        };
        let x = ops::add(x, &self.self_attention.out.forward(&attended)?)?;
        Ok((x, self_attention))
    }

    /// The others.
    fn finish(
        &self,
        x: &Tensor,
        [height, width]: [usize; 2],
        self_attention: Option<Tensor>,
        pass: &mut Pass<'_>,
    ) -> Result<Tensor> {
        let h = self.norm_2.forward(x)?;
        let attended = self.attend_to_context(&h, [height, width], self_attention, pass)?;
        let x = ops::add(x, &attended)?;

        let h = self.widen.forward_gated(&self.norm_3.forward(&x)?)?;
        ops::add(&x, &self.narrow.forward(&h)?)
    }

    fn attend_to_context(
        &self,
        x: &Tensor,
        [height, width]: [usize; 2],
        self_attention: Option<Tensor>,
        pass: &mut Pass<'_>,
    ) -> Result<Tensor> {
        let attention = &self.cross_attention;
        let [q, k, v] = attention.project(x, pass.context)?;
        let attended = match pass.watch.positions(self.layer) {
            None => ops::attention(&q, &k, &v, attention.n_heads, Mask::None)?,
            Some(positions) => {
                let (attended, probabilities) =
                    ops::observed_attention(&q, &k, &v, attention.n_heads, positions)?;
                let layer = self.layer;
                pass.attention.push(LayerAttention {
                    layer,
                    height,
                    width,
                    probabilities,
                    self_attention,
                });
                attended
            }
        };
        attention.out.forward(&attended)
    }
}

/// The projections of one attention.
#[derive(Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    out: Linear,
    n_heads: usize,
}

impl Attention {
    fn new(
        w: &Weights,
        lora: Option<&LoraAdapter>,
        [width, context]: [usize; 2],
        n_heads: usize,
    ) -> Result<Self> {
        let projection = |name: &str, n_in: usize| -> Result<Linear> {
            let w = w.pp(name);
            Ok(Linear::without_bias(&w, n_in, width)?.with_lora(lora, &w))
        };
        let out = w.pp("to_out.0");
        Ok(Self {
            to_q: projection("to_q", width)?,
            to_k: projection("to_k", context)?,
            to_v: projection("to_v", context)?,
            out: Linear::new(&out, width, width)?.with_lora(lora, &out),
            n_heads,
        })
    }

    /// Queries of x `[B, N, C]`; keys and values of the context `[B or 1, M, D]`, for every sample.
    fn project(&self, x: &Tensor, context: &Tensor) -> Result<[Tensor; 3]> {
        let n_samples = x.dim(0)?;
        Ok([
            self.to_q.forward(x)?,
            ops::for_samples(&self.to_k.forward(context)?, n_samples)?,
            ops::for_samples(&self.to_v.forward(context)?, n_samples)?,
        ])
    }
}
