//! The original layout, written as the original code builds its networks (CompVis' `openaimodel.py`
//! and `model.py`, OpenCLIP's `transformer.py`): an oracle for the translation of names, which was
//! written from diffusers' side.

use stable_diffusion::config::{DownBlock, ModelConfig, UNetConfig, VaeConfig};

/// A tensor of the original layout.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Its name in the file.
    pub(crate) original: String,
    /// Its shape in the file.
    pub(crate) shape: Vec<usize>,
    /// Its name in diffusers' layout; three for a packed query, key and value projection.
    pub(crate) diffusers: Vec<String>,
}

/// Collects a module's tensors under both names.
struct Module<'a> {
    entries: &'a mut Vec<Entry>,
    original: String,
    diffusers: String,
}

impl Module<'_> {
    fn at(&mut self, original: &str, diffusers: &str) -> Module<'_> {
        Module {
            original: format!("{}{original}.", self.original),
            diffusers: format!("{}{diffusers}.", self.diffusers),
            entries: self.entries,
        }
    }

    fn tensor(&mut self, leaf: &str, shape: &[usize]) {
        self.entries.push(Entry {
            original: format!("{}{leaf}", self.original),
            shape: shape.to_vec(),
            diffusers: vec![format!("{}{leaf}", self.diffusers)],
        });
    }

    /// Weight of this shape, and a bias.
    fn layer(&mut self, original: &str, diffusers: &str, shape: &[usize]) {
        let mut layer = self.at(original, diffusers);
        layer.tensor("weight", shape);
        layer.tensor("bias", &shape[..1]);
    }

    fn unet_residual(&mut self, from: usize, to: usize, time: usize) {
        self.layer("in_layers.0", "norm1", &[from]);
        self.layer("in_layers.2", "conv1", &[to, from, 3, 3]);
        self.layer("emb_layers.1", "time_emb_proj", &[to, time]);
        self.layer("out_layers.0", "norm2", &[to]);
        self.layer("out_layers.3", "conv2", &[to, to, 3, 3]);
        if from != to {
            self.layer("skip_connection", "conv_shortcut", &[to, from, 1, 1]);
        }
    }

    fn transformer(&mut self, width: usize, context: usize, linear: bool) {
        let projection: &[usize] = if linear {
            &[width, width]
        } else {
            &[width, width, 1, 1]
        };
        self.layer("norm", "norm", &[width]);
        self.layer("proj_in", "proj_in", projection);
        let mut block = self.at("transformer_blocks.0", "transformer_blocks.0");
        for (attention, keys) in [("attn1", width), ("attn2", context)] {
            let mut attention = block.at(attention, attention);
            attention.tensor("to_q.weight", &[width, width]);
            attention.tensor("to_k.weight", &[width, keys]);
            attention.tensor("to_v.weight", &[width, keys]);
            attention.layer("to_out.0", "to_out.0", &[width, width]);
        }
        block.layer("ff.net.0.proj", "ff.net.0.proj", &[8 * width, width]);
        block.layer("ff.net.2", "ff.net.2", &[width, 4 * width]);
        for norm in ["norm1", "norm2", "norm3"] {
            block.layer(norm, norm, &[width]);
        }
        self.layer("proj_out", "proj_out", projection);
    }

    fn vae_residual(&mut self, from: usize, to: usize) {
        self.layer("norm1", "norm1", &[from]);
        self.layer("conv1", "conv1", &[to, from, 3, 3]);
        self.layer("norm2", "norm2", &[to]);
        self.layer("conv2", "conv2", &[to, to, 3, 3]);
        if from != to {
            self.layer("nin_shortcut", "conv_shortcut", &[to, from, 1, 1]);
        }
    }

    fn vae_middle(&mut self, width: usize) {
        self.at("mid.block_1", "mid_block.resnets.0")
            .vae_residual(width, width);
        let mut attention = self.at("mid.attn_1", "mid_block.attentions.0");
        attention.layer("norm", "group_norm", &[width]);
        for (original, diffusers) in [
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("proj_out", "to_out.0"),
        ] {
            attention.layer(original, diffusers, &[width, width, 1, 1]);
        }
        self.at("mid.block_2", "mid_block.resnets.1")
            .vae_residual(width, width);
    }
}

/// `UNetModel.__init__` of `openaimodel.py`.
pub(crate) fn unet(config: &UNetConfig) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut m = Module {
        entries: &mut entries,
        original: "model.diffusion_model.".to_owned(),
        diffusers: String::new(),
    };
    let (first, context) = (config.block_out_channels[0], config.cross_attention_dim);
    let (time, linear) = (4 * first, config.use_linear_projection);
    m.layer("time_embed.0", "time_embedding.linear_1", &[time, first]);
    m.layer("time_embed.2", "time_embedding.linear_2", &[time, time]);
    let mut skips = input_blocks(&mut m, config);
    let width = skips[skips.len() - 1];
    m.at("middle_block.0", "mid_block.resnets.0")
        .unet_residual(width, width, time);
    m.at("middle_block.1", "mid_block.attentions.0")
        .transformer(width, context, linear);
    m.at("middle_block.2", "mid_block.resnets.1")
        .unet_residual(width, width, time);
    output_blocks(&mut m, config, &mut skips);
    m.layer("out.0", "conv_norm_out", &[first]);
    m.layer("out.2", "conv_out", &[config.out_channels, first, 3, 3]);
    entries
}

/// A residual block, and a transformer if the level has them; the next free part's number.
fn unet_block(
    m: &mut Module<'_>,
    config: &UNetConfig,
    level: usize,
    from: usize,
    names: [String; 3],
) -> usize {
    let [original, resnet, attention] = names;
    let (to, time) = (
        config.block_out_channels[level],
        4 * config.block_out_channels[0],
    );
    m.at(&format!("{original}.0"), &resnet)
        .unet_residual(from, to, time);
    if config.down_block_types[level] == DownBlock::Plain {
        return 1;
    }
    let mut transformer = m.at(&format!("{original}.1"), &attention);
    transformer.transformer(to, config.cross_attention_dim, config.use_linear_projection);
    2
}

/// The width after each input block.
fn input_blocks(m: &mut Module<'_>, config: &UNetConfig) -> Vec<usize> {
    let widths = &config.block_out_channels;
    m.layer(
        "input_blocks.0.0",
        "conv_in",
        &[widths[0], config.in_channels, 3, 3],
    );
    let mut skips = vec![widths[0]];
    for (level, &width) in widths.iter().enumerate() {
        let path = format!("down_blocks.{level}");
        for layer in 0..config.layers_per_block[level] {
            let names = [
                format!("input_blocks.{}", skips.len()),
                format!("{path}.resnets.{layer}"),
                format!("{path}.attentions.{layer}"),
            ];
            unet_block(m, config, level, skips[skips.len() - 1], names);
            skips.push(width);
        }
        if level + 1 < widths.len() {
            let original = format!("input_blocks.{}.0.op", skips.len());
            m.layer(
                &original,
                &format!("{path}.downsamplers.0.conv"),
                &[width, width, 3, 3],
            );
            skips.push(width);
        }
    }
    skips
}

fn output_blocks(m: &mut Module<'_>, config: &UNetConfig, skips: &mut Vec<usize>) {
    let mut width = skips[skips.len() - 1];
    let mut block = 0;
    for (level, &wide) in config.block_out_channels.iter().enumerate().rev() {
        let path = format!("up_blocks.{}", config.block_out_channels.len() - 1 - level);
        for layer in 0..=config.layers_per_block[level] {
            let original = format!("output_blocks.{block}");
            let names = [
                original.clone(),
                format!("{path}.resnets.{layer}"),
                format!("{path}.attentions.{layer}"),
            ];
            let next = unet_block(m, config, level, width + skips.pop().unwrap(), names);
            width = wide;
            if level > 0 && layer == config.layers_per_block[level] {
                let original = format!("{original}.{next}.conv");
                m.layer(
                    &original,
                    &format!("{path}.upsamplers.0.conv"),
                    &[width, width, 3, 3],
                );
            }
            block += 1;
        }
    }
}

/// `Encoder`, `Decoder` and `AutoencoderKL` of `model.py` and `autoencoder.py`.
pub(crate) fn vae(config: &VaeConfig) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut m = Module {
        entries: &mut entries,
        original: "first_stage_model.".to_owned(),
        diffusers: String::new(),
    };
    let (widths, z) = (&config.block_out_channels, config.latent_channels);
    let (levels, last) = (widths.len(), widths[widths.len() - 1]);
    let mut encoder = m.at("encoder", "encoder");
    encoder.layer("conv_in", "conv_in", &[widths[0], config.in_channels, 3, 3]);
    let mut width = widths[0];
    for (level, &wide) in widths.iter().enumerate() {
        for layer in 0..config.layers_per_block {
            let names = (
                format!("down.{level}.block.{layer}"),
                format!("down_blocks.{level}.resnets.{layer}"),
            );
            encoder.at(&names.0, &names.1).vae_residual(width, wide);
            width = wide;
        }
        if level + 1 < levels {
            let names = (
                format!("down.{level}.downsample.conv"),
                format!("down_blocks.{level}.downsamplers.0.conv"),
            );
            encoder.layer(&names.0, &names.1, &[width, width, 3, 3]);
        }
    }
    encoder.vae_middle(last);
    encoder.layer("norm_out", "conv_norm_out", &[last]);
    encoder.layer("conv_out", "conv_out", &[2 * z, last, 3, 3]);
    let mut decoder = m.at("decoder", "decoder");
    decoder.layer("conv_in", "conv_in", &[last, z, 3, 3]);
    decoder.vae_middle(last);
    for level in (0..levels).rev() {
        let up = levels - 1 - level;
        for layer in 0..=config.layers_per_block {
            let names = (
                format!("up.{level}.block.{layer}"),
                format!("up_blocks.{up}.resnets.{layer}"),
            );
            decoder
                .at(&names.0, &names.1)
                .vae_residual(width, widths[level]);
            width = widths[level];
        }
        if level > 0 {
            let names = (
                format!("up.{level}.upsample.conv"),
                format!("up_blocks.{up}.upsamplers.0.conv"),
            );
            decoder.layer(&names.0, &names.1, &[width, width, 3, 3]);
        }
    }
    decoder.layer("norm_out", "conv_norm_out", &[widths[0]]);
    decoder.layer(
        "conv_out",
        "conv_out",
        &[config.out_channels, widths[0], 3, 3],
    );
    m.layer("quant_conv", "quant_conv", &[2 * z, 2 * z, 1, 1]);
    m.layer("post_quant_conv", "post_quant_conv", &[z, z, 1, 1]);
    entries
}

/// OpenAI's CLIP as SD 1.x ships it: transformers' own names.
pub(crate) fn clip(config: &ModelConfig) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut m = Module {
        entries: &mut entries,
        original: "cond_stage_model.transformer.".to_owned(),
        diffusers: String::new(),
    };
    let mut m = m.at("text_model", "text_model");
    let c = &config.text_encoder;
    let (d, f) = (c.hidden_size, c.intermediate_size);
    m.tensor("embeddings.token_embedding.weight", &[c.vocab_size, d]);
    m.tensor("embeddings.position_embedding.weight", &[77, d]);
    for i in 0..c.num_hidden_layers {
        let path = format!("encoder.layers.{i}");
        let mut layer = m.at(&path, &path);
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            let name = format!("self_attn.{name}");
            layer.layer(&name, &name, &[d, d]);
        }
        layer.layer("layer_norm1", "layer_norm1", &[d]);
        layer.layer("mlp.fc1", "mlp.fc1", &[f, d]);
        layer.layer("mlp.fc2", "mlp.fc2", &[d, f]);
        layer.layer("layer_norm2", "layer_norm2", &[d]);
    }
    m.layer("final_layer_norm", "final_layer_norm", &[d]);
    entries
}

/// OpenCLIP's text tower as SD 2.x ships it, without its unused last layer.
pub(crate) fn open_clip(config: &ModelConfig) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut m = Module {
        entries: &mut entries,
        original: "cond_stage_model.model.".to_owned(),
        diffusers: String::new(),
    };
    let c = &config.text_encoder;
    let (d, f) = (c.hidden_size, c.intermediate_size);
    m.at("token_embedding", "text_model.embeddings.token_embedding")
        .tensor("weight", &[c.vocab_size, d]);
    for i in 0..c.num_hidden_layers {
        let diffusers = format!("text_model.encoder.layers.{i}");
        let mut layer = m.at(&format!("transformer.resblocks.{i}"), &diffusers);
        layer.layer("ln_1", "layer_norm1", &[d]);
        layer.layer("ln_2", "layer_norm2", &[d]);
        layer.layer("attn.out_proj", "self_attn.out_proj", &[d, d]);
        layer.layer("mlp.c_fc", "mlp.fc1", &[f, d]);
        layer.layer("mlp.c_proj", "mlp.fc2", &[d, f]);
        for (leaf, shape) in [("weight", vec![3 * d, d]), ("bias", vec![3 * d])] {
            let parts = ["q_proj", "k_proj", "v_proj"];
            layer.entries.push(Entry {
                original: format!("{}attn.in_proj_{leaf}", layer.original),
                shape,
                diffusers: parts
                    .iter()
                    .map(|part| format!("{diffusers}.self_attn.{part}.{leaf}"))
                    .collect(),
            });
        }
    }
    m.layer("ln_final", "text_model.final_layer_norm", &[d]);
    entries.push(Entry {
        original: "cond_stage_model.model.positional_embedding".to_owned(),
        shape: vec![77, d],
        diffusers: vec!["text_model.embeddings.position_embedding.weight".to_owned()],
    });
    entries
}
