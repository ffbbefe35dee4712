//! Runs the method on scenes with true masks and writes its figures: mask IoU by round, extraction IoU, masked
//! reconstruction error, leak; and if asked to, how well it paints what it learned.
//!
//! ```sh
//! cargo run --release -p personalization --example evaluate -- \
//!     --model plugin/crates/sprites/model --scenes plugin/crates/sprites/scenes/index.json --mode em --out em.json
//! ```
//!
//! Means are over all pairs of a picture and a concept that it shows. Concepts that nothing tells apart before they are
//! learned are matched with the true ones by the last masks, once for all figures of the run; given masks are not. They
//! are the objects of one class word or, with the start `random`, all objects, unless they are in different pictures.

#![expect(
    clippy::print_stdout,
    reason = "a table on the terminal is what it is for"
)]

mod judge;
mod masks;
mod overlays;
mod pictures;
mod report;
mod scenes;
mod words;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Device;
use clap::{Parser, ValueEnum};
use masks::{Seconds, figures, learn};
use personalization::config::{TokenConfig, TokenInit};
use personalization::{
    Cue, EmConfig, Foreground, Labeling, MaskMode, Pooling, PosteriorConfig, PreparedScene,
};
use pictures::PictureOptions;
use report::{ConceptReport, Mean, Report, SceneReport};
use scenes::{Index, IndexScene, Which};
use serde::Serialize;
use stable_diffusion::ops::Precision;
use stable_diffusion::{CheckpointSource, DiffusionModel};

/// Tensors, and what the kernels work in.
#[global_allocator]
static HEAP: machine_memory::Heap = machine_memory::Heap;

#[derive(Parser)]
struct Arguments {
    /// Diffusers directory or single file.
    #[arg(long)]
    model: PathBuf,
    /// Index of scenes.
    #[arg(long)]
    scenes: PathBuf,
    #[arg(long, value_enum)]
    mode: Mode,
    #[command(flatten)]
    which: Which,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Optimizer steps on the tokens.
    #[arg(long, default_value_t = 120)]
    steps: usize,
    #[arg(long, value_enum, default_value = "likelihood")]
    config: ConfigName,
    /// How tokens start.
    #[arg(long, value_enum, default_value = "class")]
    start: Start,
    /// Rounds the factors of the U-Net's products to bf16.
    #[arg(long)]
    bf16: bool,
    /// Optimizer steps of the start `inversion`.
    #[arg(long, default_value_t = 400)]
    inversion_steps: usize,
    /// Only the figures of masks, not those of tokens: they are 0 then.
    #[arg(long)]
    masks_only: bool,
    /// Saves masks over their pictures into this folder: the true ones, the first and the last.
    #[arg(long)]
    overlays: Option<PathBuf>,
    #[command(flatten)]
    pictures: PictureOptions,
    /// Where the figures go.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum, Serialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Mode {
    Em,
    Baseline,
    Given,
}

#[derive(Clone, Copy, ValueEnum)]
enum ConfigName {
    /// Attention as prior, the noise as likelihood.
    Likelihood,
    /// Attention alone.
    Attention,
    /// Read literally.
    Paper,
    /// `likelihood` by attention's share alone.
    NoLikelihood,
    /// `likelihood` by the noise alone.
    NoPrior,
    /// `likelihood` whose foreground is where an object's map is high.
    ObjectForeground,
    /// `likelihood` with parts by the foreground's shape alone.
    NoWordParts,
    /// `likelihood` pixel by pixel.
    NoRegions,
    /// `likelihood` that forgets between rounds.
    NoMemory,
    /// `likelihood` without the dense CRF.
    NoCrf,
}

impl ConfigName {
    fn config(self) -> EmConfig {
        let likelihood = EmConfig::likelihood();
        let with = |change: &dyn Fn(&mut PosteriorConfig)| {
            let mut posterior = PosteriorConfig::likelihood();
            change(&mut posterior);
            let mut config = likelihood;
            config.extraction.labeling = Labeling::Posterior(posterior);
            config
        };
        match self {
            Self::Likelihood => likelihood,
            Self::Attention => EmConfig::attention(),
            Self::Paper => EmConfig::paper(),
            Self::NoLikelihood => with(&|posterior| posterior.cue = Cue::Attention),
            Self::NoPrior => with(&|posterior| posterior.cue = Cue::Noise),
            Self::ObjectForeground => {
                with(&|posterior| posterior.foreground = Foreground::ObjectMaps)
            }
            Self::NoWordParts => with(&|posterior| posterior.pooling = Pooling::Parts),
            Self::NoRegions => with(&|posterior| posterior.pooling = Pooling::Pixels),
            Self::NoMemory => with(&|posterior| posterior.keep = 0.0),
            Self::NoCrf => {
                let mut config = likelihood;
                // Without kernels the marginals are those of the unary energies.
                config.crf.crf.smoothness.weight = 0.0;
                config.crf.crf.appearance.weight = 0.0;
                config
            }
        }
    }
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Start {
    Class,
    Random,
    Inversion,
}

fn main() -> Result<()> {
    let _kept = machine_memory::keep_freed();
    let arguments = Arguments::parse();
    let model = DiffusionModel::load(
        &CheckpointSource::Path(arguments.model.clone()),
        &Device::Cpu,
    )?;
    let model = if arguments.bf16 {
        model.with_precision(Precision::Bf16)?
    } else {
        model
    };
    let index = Index::read(&arguments.scenes)?;
    let wanted = arguments.which.of(&index)?;
    let config = config(&arguments);
    let mut seconds = Seconds::default();
    let mut scenes = Vec::new();
    for scene in wanted {
        let report = evaluate(&model, scene, &config, &arguments, &mut seconds)
            .with_context(|| scene.id.clone())?;
        print_row(&report);
        scenes.push(report);
    }
    let report = Report {
        mode: arguments.mode,
        start: arguments.start,
        model: model.fingerprint.clone(),
        seed: arguments.seed,
        config,
        mean: Mean::of(&scenes.iter().collect::<Vec<_>>()),
        kinds: Mean::by_kind(&scenes),
        scenes,
        seconds_per_step: median(&mut seconds.steps),
        seconds_per_e_step: median(&mut seconds.e_steps),
        peak_memory_bytes: peak_memory_bytes(),
    };
    print_means(&report);
    std::fs::write(&arguments.out, serde_json::to_string_pretty(&report)?)
        .context(arguments.out.display().to_string())
}

fn config(arguments: &Arguments) -> EmConfig {
    let base = arguments.config.config();
    let masks = match arguments.mode {
        Mode::Em => MaskMode::Em,
        Mode::Baseline => MaskMode::Baseline,
        Mode::Given => MaskMode::Given,
    };
    let init = match arguments.start {
        Start::Class => TokenInit::Class,
        Start::Random => TokenInit::Random,
        Start::Inversion => TokenInit::Inversion {
            steps: arguments.inversion_steps,
        },
    };
    EmConfig {
        masks,
        tokens: TokenConfig {
            init,
            ..base.tokens
        },
        steps: arguments.steps,
        ..base
    }
}

fn evaluate(
    model: &DiffusionModel,
    index: &IndexScene,
    config: &EmConfig,
    arguments: &Arguments,
    seconds: &mut Seconds,
) -> Result<SceneReport> {
    let started = Instant::now();
    let root = arguments.scenes.parent().unwrap_or(Path::new("."));
    let scene = index.load(root, model)?;
    let prepared = PreparedScene::new(model, &scene.scene)?;
    let learned = learn(
        model,
        &prepared,
        &scene.truth,
        config,
        arguments.seed,
        seconds,
    )?;
    if let Some(folder) = &arguments.overlays {
        overlays::save_overlays(&scene, &learned, folder, &index.id)?;
    }
    let (concepts, backgrounds) = figures(
        model,
        &prepared,
        &scene,
        &learned,
        (!arguments.masks_only).then_some(config),
    )?;
    let paint = |wanted| {
        let m_step = &config.m_step;
        pictures::paint(
            model, &prepared, &scene, &learned, m_step, wanted, &index.id,
        )
    };
    let pictures = arguments.pictures.wanted().map(paint).transpose()?;
    Ok(SceneReport {
        id: index.id.clone(),
        kind: index.kind.clone(),
        split: index.split.clone(),
        steps_by_round: learned
            .outcome
            .rounds
            .iter()
            .map(|round| round.step)
            .collect(),
        energy_by_round: learned
            .outcome
            .rounds
            .iter()
            .map(|round| round.energies.iter().sum::<f64>() / round.energies.len().max(1) as f64)
            .collect(),
        concepts,
        backgrounds,
        seconds: started.elapsed().as_secs_f64(),
        pictures,
    })
}

fn print_row(report: &SceneReport) {
    let row = |one: &ConceptReport| {
        format!(
            "{} {:.2}->{:.2} (x {:.2})",
            one.class_word, one.iou_initial, one.iou_final, one.extraction_iou
        )
    };
    let all = report.concepts.iter().chain(&report.backgrounds);
    let concepts: Vec<String> = all.map(row).collect();
    let energies: Vec<String> = report
        .energy_by_round
        .iter()
        .map(|energy| format!("{energy:.3}"))
        .collect();
    println!(
        "{:<11} {}   energy {}",
        report.id,
        concepts.join("   "),
        energies.join(" ")
    );
}

fn print_means(report: &Report) {
    let row = |name: &str, mean: &Mean| {
        println!(
            "{name}: objects {:.3} -> {:.3}, background {:.3}, extraction {:.3}, masked error {:.4}, leak {:.3}",
            mean.object_iou_initial,
            mean.object_iou_final,
            mean.background_iou_final.unwrap_or(f64::NAN),
            mean.object_extraction_iou,
            mean.masked_error,
            mean.leak
        );
    };
    for (kind, mean) in report.kinds.iter().filter(|_| report.kinds.len() > 1) {
        row(kind, mean);
    }
    row("mean", &report.mean);
    println!(
        "{:.3} s per step, {:.2} s per E-step, peak memory {} MiB",
        report.seconds_per_step,
        report.seconds_per_e_step,
        report.peak_memory_bytes >> 20
    );
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// High-water mark of resident memory; 0 where the system does not tell.
fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
