//! Runs the method on scenes with true masks and writes the figures of METHOD: mask IoU by round, extraction IoU, masked
//! reconstruction error, leak.
//!
//! ```sh
//! cargo run --release -p personalization --example evaluate -- \
//!     --model plugin/crates/sprites/model --scenes plugin/crates/sprites/scenes/index.json --mode em --out em.json
//! ```

#![expect(
    clippy::print_stdout,
    reason = "a table on the terminal is what it is for"
)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Device;
use clap::{Parser, ValueEnum};
use personalization::config::EmConfig;
use personalization::metrics::{extraction, leaks, mask_ious, masked_errors};
use personalization::{
    Concept, EmStart, Event, ImageMasks, MaskMode, Picture, PreparedScene, Role, Scene,
    ScenePicture, em,
};
use serde::{Deserialize, Serialize};
use stable_diffusion::{CheckpointSource, DiffusionModel};

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
    /// Only the first scenes.
    #[arg(long)]
    limit: Option<usize>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Optimizer steps on the tokens.
    #[arg(long, default_value_t = 120)]
    steps: usize,
    /// Which scenes.
    #[arg(long, default_value = "multi")]
    kind: String,
    #[arg(long, value_enum, default_value = "recommended")]
    config: ConfigName,
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
    Recommended,
    Paper,
}

#[derive(Deserialize)]
struct Index {
    scenes: Vec<IndexScene>,
}

#[derive(Deserialize)]
struct IndexScene {
    id: String,
    kind: String,
    image: String,
    background: String,
    concepts: Vec<IndexConcept>,
}

#[derive(Deserialize)]
struct IndexConcept {
    class_word: String,
    mask: String,
}

#[derive(Serialize)]
struct Report {
    mode: Mode,
    model: String,
    seed: u64,
    config: EmConfig,
    scenes: Vec<SceneReport>,
    mean: Mean,
    seconds_per_step: f64,
    seconds_per_e_step: f64,
    peak_memory_bytes: u64,
}

#[derive(Serialize)]
struct SceneReport {
    id: String,
    concepts: Vec<ConceptReport>,
    background: ConceptReport,
}

#[derive(Serialize, Clone)]
struct ConceptReport {
    class_word: String,
    iou_initial: f32,
    iou_final: f32,
    iou_by_round: Vec<f32>,
    extraction_iou: f32,
    masked_error: f64,
    leak: f32,
}

#[derive(Serialize)]
struct Mean {
    object_iou_initial: f64,
    object_iou_final: f64,
    background_iou_final: f64,
    object_extraction_iou: f64,
    masked_error: f64,
    leak: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let model = DiffusionModel::load(
        &CheckpointSource::Path(arguments.model.clone()),
        &Device::Cpu,
    )?;
    let text = std::fs::read_to_string(&arguments.scenes)
        .context(arguments.scenes.display().to_string())?;
    let index: Index =
        serde_json::from_str(&text).context(arguments.scenes.display().to_string())?;
    let root = arguments.scenes.parent().unwrap_or(Path::new("."));
    let wanted = |scene: &&IndexScene| arguments.kind == "all" || scene.kind == arguments.kind;
    let config = config(&arguments);
    let mut seconds = Seconds::default();
    let mut scenes = Vec::new();
    for scene in index
        .scenes
        .iter()
        .filter(wanted)
        .take(arguments.limit.unwrap_or(usize::MAX))
    {
        let report = evaluate(&model, root, scene, &config, arguments.seed, &mut seconds)?;
        print_row(&report);
        scenes.push(report);
    }
    let mean = mean(&scenes);
    println!(
        "mean: objects {:.3} -> {:.3}, background {:.3}, extraction {:.3}, masked error {:.4}, leak {:.3}",
        mean.object_iou_initial,
        mean.object_iou_final,
        mean.background_iou_final,
        mean.object_extraction_iou,
        mean.masked_error,
        mean.leak
    );
    let report = Report {
        mode: arguments.mode,
        model: model.fingerprint.clone(),
        seed: arguments.seed,
        config,
        scenes,
        mean,
        seconds_per_step: median(&mut seconds.steps),
        seconds_per_e_step: median(&mut seconds.e_steps),
        peak_memory_bytes: peak_memory_bytes(),
    };
    println!(
        "{:.3} s per step, {:.2} s per E-step, peak memory {} MiB",
        report.seconds_per_step,
        report.seconds_per_e_step,
        report.peak_memory_bytes >> 20
    );
    std::fs::write(&arguments.out, serde_json::to_string_pretty(&report)?)
        .context(arguments.out.display().to_string())
}

fn config(arguments: &Arguments) -> EmConfig {
    let base = match arguments.config {
        ConfigName::Recommended => EmConfig::recommended(),
        ConfigName::Paper => EmConfig::paper(),
    };
    let masks = match arguments.mode {
        Mode::Em => MaskMode::Em,
        Mode::Baseline => MaskMode::Baseline,
        Mode::Given => MaskMode::Given,
    };
    EmConfig {
        masks,
        steps: arguments.steps,
        ..base
    }
}

/// The scene with its true masks: the objects, then the background as the rest.
fn load(root: &Path, scene: &IndexScene, size: usize) -> Result<(Scene, ImageMasks)> {
    let open = |name: &str| {
        image::open(root.join(name)).with_context(|| root.join(name).display().to_string())
    };
    let picture = open(&scene.image)?.into_rgb8();
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let picture = Picture::from_rgb8(width, height, picture.as_raw(), size)?;
    let mut planes = Vec::new();
    for concept in &scene.concepts {
        let mask = open(&concept.mask)?.into_luma8();
        planes.push(
            mask.as_raw()
                .iter()
                .map(|&v| f32::from(v) / 255.0)
                .collect::<Vec<f32>>(),
        );
    }
    let rest = (0..planes[0].len()).map(|i| f32::from(planes.iter().all(|plane| plane[i] <= 0.5)));
    planes.push(rest.collect());
    let planes: Vec<&[f32]> = planes.iter().map(Vec::as_slice).collect();
    let truth = ImageMasks::from_soft_planes(width, height, &planes, size)?;
    let object = |(i, concept): (usize, &IndexConcept)| Concept {
        token: format!("<v{}>", i + 1),
        class_word: concept.class_word.clone(),
        role: Role::Object,
    };
    let mut concepts: Vec<Concept> = scene.concepts.iter().enumerate().map(object).collect();
    let class_word = scene.background.clone();
    concepts.push(Concept {
        token: "<background>".into(),
        class_word,
        role: Role::Background,
    });
    let all = (0..concepts.len()).collect();
    Ok((
        Scene::new(
            concepts,
            vec![ScenePicture {
                picture,
                concepts: all,
            }],
        )?,
        truth,
    ))
}

#[derive(Default)]
struct Seconds {
    steps: Vec<f64>,
    e_steps: Vec<f64>,
}

fn evaluate(
    model: &DiffusionModel,
    root: &Path,
    index: &IndexScene,
    config: &EmConfig,
    seed: u64,
    seconds: &mut Seconds,
) -> Result<SceneReport> {
    let (scene, truth) = load(root, index, model.image_size()).with_context(|| index.id.clone())?;
    let prepared = PreparedScene::new(model, &scene)?;
    let start = match config.masks {
        MaskMode::Given => EmStart::Masks(vec![truth.clone()]),
        _ => EmStart::Fresh,
    };
    let mut last = Instant::now();
    let outcome = em(
        model,
        &prepared,
        start,
        config,
        seed,
        &mut |event: &Event<'_>| {
            match event {
                Event::Step { .. } => seconds.steps.push(last.elapsed().as_secs_f64()),
                Event::Masks { round: 1.., .. } => {
                    seconds.e_steps.push(last.elapsed().as_secs_f64());
                }
                Event::Progress { .. } => return ControlFlow::Continue(()),
                _ => {}
            }
            last = Instant::now();
            ControlFlow::Continue(())
        },
    )?;
    let rounds: Vec<Vec<f32>> = outcome
        .rounds
        .iter()
        .map(|round| mask_ious(&round.masks[0], &truth))
        .collect();
    let last_masks = mask_ious(&outcome.masks[0], &truth);
    let found = extraction(
        model,
        &prepared,
        &outcome.learned,
        &config.extraction,
        &config.crf,
        0,
    )?;
    let extracted = mask_ious(&found.masks, &truth);
    let leak = leaks(&found.maps, &truth);
    let errors = masked_errors(model, &prepared, &outcome.learned, &truth, 0)?;
    let concepts: Vec<ConceptReport> = (0..scene.concepts().len())
        .map(|c| ConceptReport {
            class_word: scene.concepts()[c].class_word.clone(),
            iou_initial: rounds[0][c],
            iou_final: last_masks[c],
            iou_by_round: rounds.iter().map(|round| round[c]).collect(),
            extraction_iou: extracted[c],
            masked_error: errors[c],
            leak: leak[c],
        })
        .collect();
    let (background, objects) = concepts.split_last().context("a scene without concepts")?;
    Ok(SceneReport {
        id: index.id.clone(),
        concepts: objects.to_vec(),
        background: background.clone(),
    })
}

fn print_row(report: &SceneReport) {
    let row = |one: &ConceptReport| {
        format!(
            "{} {:.2}->{:.2} (x {:.2})",
            one.class_word, one.iou_initial, one.iou_final, one.extraction_iou
        )
    };
    let concepts: Vec<String> = report
        .concepts
        .iter()
        .chain([&report.background])
        .map(row)
        .collect();
    println!("{:<11} {}", report.id, concepts.join("   "));
}

fn mean(scenes: &[SceneReport]) -> Mean {
    let objects: Vec<&ConceptReport> = scenes.iter().flat_map(|scene| &scene.concepts).collect();
    let backgrounds: Vec<&ConceptReport> = scenes.iter().map(|scene| &scene.background).collect();
    let over = |reports: &[&ConceptReport], value: &dyn Fn(&ConceptReport) -> f64| {
        reports.iter().map(|report| value(report)).sum::<f64>() / reports.len().max(1) as f64
    };
    Mean {
        object_iou_initial: over(&objects, &|report| report.iou_initial.into()),
        object_iou_final: over(&objects, &|report| report.iou_final.into()),
        background_iou_final: over(&backgrounds, &|report| report.iou_final.into()),
        object_extraction_iou: over(&objects, &|report| report.extraction_iou.into()),
        masked_error: over(&objects, &|report| report.masked_error),
        leak: over(&objects, &|report| report.leak.into()),
    }
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
