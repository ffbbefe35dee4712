//! Seconds and memory of one token-learning step: prompt to context, U-Net forward, both losses, backward to
//! two learned rows of the token table; U-Net and text encoder are frozen.
//!
//! `cargo run --release -p stable-diffusion --example step_cost -- [sprites|sd15] [latent width] [steps] [f32|bf16] [fast|lean]`
//! Weights are random: they change nothing about the cost. `tests/reference/step_cost.py` is the same step in
//! PyTorch and diffusers. `RAYON_NUM_THREADS` sets the threads.
#![expect(clippy::print_stdout, reason = "the figures are the program's output")]

use std::{error::Error, time::Instant};

use candle_core::{D, DType, Device, Tensor, Var};
use stable_diffusion::{
    config::{DownBlock, ModelConfig, UpBlock},
    memory::Memory,
    ops::Precision,
    rng::Rng,
    text_encoder::TextEncoder,
    unet::{Backward, Stage, UNet, Watch},
    weights::WeightMap,
};

/// Positions of the two learned tokens in "a photo of <v1> and <v2>".
const POSITIONS: [usize; 2] = [4, 6];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (config, default_size) = match arguments.next().as_deref() {
        None | Some("sprites") => (sprites(), 32),
        Some("sd15") => (ModelConfig::sd_1_5(), 32),
        Some(other) => return Err(format!("sprites or sd15, not {other}").into()),
    };
    let size = arguments
        .next()
        .map_or(Ok(default_size), |size| size.parse())?;
    let n_steps: usize = arguments.next().map_or(Ok(3), |steps| steps.parse())?;
    let precision = match arguments.next().as_deref() {
        None | Some("f32") => Precision::F32,
        Some("bf16") => Precision::Bf16,
        Some(other) => return Err(format!("f32 or bf16, not {other}").into()),
    };
    let memory = match arguments.next().as_deref() {
        None | Some("fast") => Memory::Fast,
        Some("lean") => Memory::Lean,
        Some(other) => return Err(format!("fast or lean, not {other}").into()),
    };

    let weights = WeightMap::random_in(precision, 0, |w| UNet::build(&config.unet, w))?;
    let unet = UNet::new(&config.unet, &weights, None)?
        .with_precision(precision)?
        .with_memory(memory);
    drop(weights);
    let text = WeightMap::random(1, |w| TextEncoder::new(&config.text_encoder, w).map(drop))?
        .build("text encoder", |w| {
            TextEncoder::new(&config.text_encoder, w)
        })?;
    println!(
        "random weights ready, {:.2} GiB so far",
        gibibytes("VmHWM")?
    );

    let step = Step::new(&config, &unet, size)?;
    for index in 0..n_steps {
        let (start, cpu) = (Instant::now(), cpu_seconds()?);
        let (loss, backward) = step.loss(&unet, &text)?;
        let forward = start.elapsed().as_secs_f64();
        let gradients = backward.gradients(&loss, &[&step.rows])?;
        let gradient = gradients[0]
            .as_ref()
            .ok_or("no gradient")?
            .sqr()?
            .sum_all()?
            .sqrt()?;
        println!(
            "step {index}: {:.3} s = forward {forward:.3} + backward {:.3}, CPU {:.2} s; loss {:.4}, \
             |gradient| {:.3e}; peak {:.2} GiB",
            start.elapsed().as_secs_f64(),
            start.elapsed().as_secs_f64() - forward,
            cpu_seconds()? - cpu,
            loss.to_scalar::<f32>()?,
            gradient.to_scalar::<f32>()?,
            gibibytes("VmHWM")?
        );
    }
    let start = Instant::now();
    let context = text.encode(&step.ids, Some(&step.rows.as_detached_tensor()))?;
    unet.forward_observed(&step.noisy, &[421.0], &context, Watch::All(&POSITIONS))?;
    println!("without gradients: {:.3} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// The sizes of the bundled checkpoint.
fn sprites() -> ModelConfig {
    let mut config = ModelConfig::sd_1_5();
    let (unet, text) = (&mut config.unet, &mut config.text_encoder);
    unet.sample_size = 32;
    unet.block_out_channels = vec![64, 128, 192];
    unet.layers_per_block = vec![1; 3];
    unet.down_block_types = vec![
        DownBlock::Plain,
        DownBlock::CrossAttention,
        DownBlock::CrossAttention,
    ];
    unet.up_block_types = vec![
        UpBlock::CrossAttention,
        UpBlock::CrossAttention,
        UpBlock::Plain,
    ];
    unet.cross_attention_dim = 128;
    unet.heads = vec![4; 3];
    unet.transformer_layers_per_block = vec![1; 3];
    text.vocab_size = 930;
    text.hidden_size = 128;
    text.intermediate_size = 512;
    text.num_hidden_layers = 4;
    text.num_attention_heads = 4;
    config
}

/// The data of one step.
struct Step {
    ids: Vec<u32>,
    rows: Var,
    noisy: Tensor,
    noise: Tensor,
    mask: Tensor,
    layers: Vec<usize>,
}

impl Step {
    fn new(config: &ModelConfig, unet: &UNet, size: usize) -> Result<Self, Box<dyn Error>> {
        let vocab = config.text_encoder.vocab_size as u32;
        let mut ids = vec![1; 77];
        for (id, position) in (vocab..).zip(POSITIONS) {
            ids[position] = id;
        }
        let mut rng = Rng::new(0, "step cost", 0);
        let rows = rng.normal(
            &[POSITIONS.len(), config.text_encoder.hidden_size],
            &Device::Cpu,
        )?;
        let latent = [1, config.unet.in_channels, size, size];
        let left = Tensor::arange(0u32, size as u32, &Device::Cpu)?.lt(size as f64 / 2.0)?;
        // Half the latent's side at 128 pixels, a quarter at 512: the layers that the method supervises.
        let resolution = if config.unet.sample_size == 64 {
            16
        } else {
            config.unet.sample_size / 2
        };
        let layers = unet
            .cross_attention_layers()
            .iter()
            .enumerate()
            .filter(|(_, layer)| layer.resolution == resolution && layer.stage != Stage::Mid);
        Ok(Self {
            ids,
            rows: Var::from_tensor(&rows)?,
            noisy: rng.normal(&latent, &Device::Cpu)?,
            noise: rng.normal(&latent, &Device::Cpu)?,
            mask: left.to_dtype(DType::F32)?.reshape((1, 1, 1, size))?,
            layers: layers.map(|(index, _)| index).collect(),
        })
    }

    /// Masked noise prediction and 0.01 x the distance of normalized attention from the mask.
    fn loss<'a>(
        &self,
        unet: &'a UNet,
        text: &TextEncoder,
    ) -> Result<(Tensor, Backward<'a>), Box<dyn Error>> {
        let context = text.encode(&self.ids, Some(&self.rows))?;
        let watch = Watch::Layers(&self.layers, &POSITIONS);
        let (observed, backward) =
            unet.forward_for_gradients(&self.noisy, &[421.0], &context, watch)?;
        let error = (observed.prediction - &self.noise)?.broadcast_mul(&self.mask)?;
        let mut maps = Vec::new();
        for layer in &observed.attention {
            maps.push(layer.probabilities.mean(1)?.squeeze(0)?);
        }
        let maps = Tensor::stack(&maps, 0)?.mean(0)?;
        let maps = maps.broadcast_div(&maps.max_keepdim(0)?)?;
        let side = (maps.dim(0)? as f64).sqrt() as usize;
        let target = Tensor::arange(0u32, side as u32, &Device::Cpu)?.lt(side as f64 / 2.0)?;
        let target = target
            .to_dtype(DType::F32)?
            .broadcast_as((side, side))?
            .reshape((side * side, 1))?;
        let attention = maps
            .broadcast_sub(&target)?
            .sqr()?
            .mean(0)?
            .sum(D::Minus1)?;
        let loss = (error.sqr()?.mean_all()? + (attention * 0.01)?)?;
        Ok((loss, backward))
    }
}

/// Processor time of all threads so far, to 10 ms: what a busy machine does not change.
fn cpu_seconds() -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Fields 14 and 15 of the line, counted behind the program's name, which may hold spaces.
    let (_, fields) = stat.rsplit_once(") ").ok_or("no such field")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

/// A line of this process's status in Linux, in GiB: `VmHWM` is the most memory that was resident.
fn gibibytes(field: &str) -> Result<f64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find(|line| line.starts_with(field))
        .ok_or("no such field")?;
    let kibibytes: f64 = line.split_whitespace().nth(1).ok_or("no figure")?.parse()?;
    Ok(kibibytes / 1024.0 / 1024.0)
}
