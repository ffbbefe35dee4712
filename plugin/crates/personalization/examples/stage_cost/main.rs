//! Seconds and memory of the method's stages on the device that `CONCEPTLOOM_DEVICE` names: token-learning steps, draws of
//! the E-step, joint LoRA steps, sampling steps, encoding and decoding, of Stable Diffusion 1.5's shapes with random weights.
//!
//! ```sh
//! cargo run --release -p personalization --example stage_cost -- --sprites plugin/crates/sprites/model --shapes sd15
//! ```
//!
//! Every line of the output is a JSON object: the device, then one for every kind of work at every precision, and with
//! `--exhaust` what became of a step on a device without memory left. `tests/reference/step_cost.py` does the same work in
//! PyTorch; `tests/gpu/prove.py` runs both.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the figures are the program's output"
)]

mod exhaust;
mod memory;
mod stages;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use candle_core::Device;
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use stable_diffusion::config::ModelConfig;
use stable_diffusion::device::{self, describe};
use stable_diffusion::memory::Memory;
use stable_diffusion::ops::Precision;
use stable_diffusion::{CheckpointSource, DiffusionModel};

use stages::{Bench, Work};

/// Tensors, and what the kernels work in.
#[global_allocator]
static HEAP: machine_memory::Heap = machine_memory::Heap;

#[derive(Parser)]
struct Arguments {
    /// The bundled checkpoint: its tokenizer, and with `--shapes sprites` all of it.
    #[arg(long)]
    sprites: PathBuf,
    #[arg(long, value_enum, default_value = "sd15")]
    shapes: Shapes,
    /// Width and height of the picture [default: what the model is made for]
    #[arg(long)]
    side: Option<usize>,
    /// How often every kind of work is done; the first time does not count
    #[arg(long, default_value_t = 10)]
    steps: usize,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32")]
    precision: Vec<Factors>,
    /// What a step of learning keeps
    #[arg(long, value_enum, default_value = "fast")]
    memory: Keeps,
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Work::ALL)]
    work: Vec<Work>,
    /// Then takes all memory of the device, tries a step, frees it, and tries again
    #[arg(long)]
    exhaust: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shapes {
    Sprites,
    Sd15,
}

/// Of [`Memory`], by name.
#[derive(Clone, Copy, ValueEnum)]
enum Keeps {
    Fast,
    Lean,
}

impl Keeps {
    fn memory(self) -> Memory {
        match self {
            Self::Fast => Memory::Fast,
            Self::Lean => Memory::Lean,
        }
    }
}

/// The precisions of [`Precision`], by name.
#[derive(Clone, Copy, ValueEnum)]
enum Factors {
    F32,
    Bf16,
    F16,
}

impl Factors {
    fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
            Self::F16 => Precision::F16,
        }
    }

    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Why it is not measured on this device.
    fn missing(self, device: &Device) -> Option<&'static str> {
        (self.precision() == Precision::F16 && device.is_cpu())
            .then_some("this precision is for GPUs")
    }
}

fn main() -> ExitCode {
    match measure(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let device = device::of_environment()?;
    say(&device_json(device));
    for factors in &arguments.precision {
        let name = factors.name();
        if let Some(reason) = factors.missing(device) {
            say(&json!({"precision": name, "not_run": reason}));
            continue;
        }
        // Made anew for each: weights in f32 would count with those in half precision.
        let model = model(arguments, device)?.with_precision(factors.precision())?;
        let model = model.with_memory(arguments.memory.memory())?;
        let bench = Bench::new(model, arguments.side)?;
        // As while a host runs a node; what the making of the model took is given back.
        let _kept = machine_memory::keep_freed();
        for &work in &arguments.work {
            let cost = bench.measure(work, arguments.steps)?;
            say(&json!({
                "precision": name, "work": work.name(), "side": bench.side, "seconds": cost.seconds,
                "cpu_seconds": cost.cpu_seconds, "peak_bytes": cost.peak_bytes,
            }));
        }
    }
    if arguments.exhaust {
        let model = model(arguments, device)?;
        say(&exhaust::exhaust(&Bench::new(model, arguments.side)?)?);
    }
    Ok(())
}

fn say(line: &Value) {
    println!("{line}");
}

fn device_json(device: &Device) -> Value {
    let info = describe(device);
    let memory = info.memory.map(|memory| memory.total);
    json!({"device": info.name.to_string(), "product": info.product, "memory": memory})
}

fn model(arguments: &Arguments, device: &Device) -> Result<DiffusionModel> {
    let source = CheckpointSource::Path(arguments.sprites.clone());
    let sprites = DiffusionModel::load(&source, device)?;
    Ok(match arguments.shapes {
        Shapes::Sprites => sprites,
        Shapes::Sd15 => {
            let config = ModelConfig::sd_1_5();
            DiffusionModel::random(&config, sprites.tokenizer, 0, device)?
        }
    })
}
