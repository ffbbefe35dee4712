//! How often the figures of `picture_metrics` are right where the truth is known: every object of every scene, mirrored,
//! at another size and place, on another background, which the model paints. Its identity should be that of the object
//! and of no other of the scene, and its right words should explain it best. So should those of the scenes themselves.
//!
//! ```sh
//! cargo run --release -p personalization --example check_pictures -- \
//!     --model plugin/crates/sprites/model --scenes plugin/crates/sprites/scenes/index.json
//! ```

#![expect(
    clippy::print_stdout,
    reason = "a table on the terminal is what it is for"
)]

#[path = "evaluate/judge.rs"]
mod judge;
#[path = "evaluate/scenes.rs"]
mod scenes;
#[path = "evaluate/words.rs"]
mod words;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::Device;
use clap::Parser;
use image::imageops::{FilterType, flip_horizontal, overlay, resize};
use image::{RgbImage, Rgba, RgbaImage, buffer::ConvertBuffer};
use judge::{Judge, Judgment};
use personalization::{Picture, Role, SamplePrompts, Silent, Size, sample};
use scenes::{Index, TrueScene, Which};
use stable_diffusion::rng::Rng;
use stable_diffusion::{
    CheckpointSource, DiffusionModel, GenerateConfig, Sampler, Schedule, Start,
};
use words::with_article;

/// Backgrounds to paste on.
const BACKGROUNDS: [&str; 4] = ["grass", "beach", "city", "snow"];

#[derive(Parser)]
struct Arguments {
    /// Diffusers directory or single file.
    #[arg(long)]
    model: PathBuf,
    /// Index of scenes.
    #[arg(long)]
    scenes: PathBuf,
    #[command(flatten)]
    which: Which,
}

/// Margins of pictures of which the truth is known; one above 0 is right.
#[derive(Default)]
struct Margins {
    identity: Vec<f64>,
    objects: Vec<f64>,
    background: Vec<f64>,
}

impl Margins {
    fn add(&mut self, judgment: &Judgment) {
        self.identity.extend(judgment.identity_margin);
        self.objects.extend(judgment.objects_margin);
        self.background.extend(judgment.background_margin);
    }

    fn print(&self, name: &str) {
        let figure = |margins: &[f64]| {
            let n = margins.len().max(1) as f64;
            let right = margins.iter().filter(|margin| **margin > 0.0).count();
            let mean = margins.iter().sum::<f64>() / n;
            format!(
                "{:.3} of {:3}, margin {mean:+.3}",
                right as f64 / n,
                margins.len()
            )
        };
        println!(
            "{name:<24} identity {}   objects {}   background {}",
            figure(&self.identity),
            figure(&self.objects),
            figure(&self.background)
        );
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let source = CheckpointSource::Path(arguments.model.clone());
    let model = DiffusionModel::load(&source, &Device::Cpu)?;
    let index = Index::read(&arguments.scenes)?;
    let root = arguments.scenes.parent().unwrap_or(Path::new("."));
    let backgrounds: Vec<RgbImage> = BACKGROUNDS
        .iter()
        .map(|word| paint(&model, word))
        .collect::<Result<_>>()?;
    let mut kinds: BTreeMap<String, Margins> = BTreeMap::new();
    for (number, entry) in arguments.which.of(&index)?.into_iter().enumerate() {
        let scene = entry.load(root, &model)?;
        let judge = Judge::new(&model, &scene)?;
        let mut rng = Rng::new(0, "pasted", number as u64);
        for object in 0..scene.objects().len() {
            let place = rng.below(BACKGROUNDS.len());
            let picture = pasted(&mut rng, &scene, object, &backgrounds[place])?;
            let judgment = judge.judge(&picture, &[object], &beside(BACKGROUNDS[place]))?;
            kinds.entry(entry.kind.clone()).or_default().add(&judgment);
            kinds.entry("pasted".into()).or_default().add(&judgment);
        }
        let own = scene.background();
        for shown in scene.scene.pictures() {
            let is_object = |c: &usize| scene.scene.concepts()[*c].role == Role::Object;
            let objects: Vec<usize> = shown.concepts.iter().copied().filter(is_object).collect();
            let places = own.map_or_else(|| vec![None], beside);
            let judgment = judge.judge(&shown.picture, &objects, &places)?;
            kinds
                .entry("the scenes themselves".into())
                .or_default()
                .add(&judgment);
        }
    }
    for (name, margins) in &kinds {
        margins.print(name);
    }
    Ok(())
}

/// A background and two others.
fn beside(word: &str) -> Vec<Option<&str>> {
    let others = BACKGROUNDS.into_iter().filter(|other| *other != word);
    [word].into_iter().chain(others.take(2)).map(Some).collect()
}

fn paint(model: &DiffusionModel, word: &str) -> Result<RgbImage> {
    let prompt = format!("a photo of {}", with_article(word));
    let prompts = SamplePrompts {
        prompts: &[&prompt],
        negative: "",
        latents: None,
    };
    let config = GenerateConfig {
        steps: 25,
        guidance: 5.0,
        sampler: Sampler::DpmPp2m,
        schedule: Schedule::Normal,
        seed: 0,
        n_pictures: 1,
        start: Start::Noise([model.image_size(); 2]),
    };
    let pixels = sample(model, None, &prompts, &config, &mut Silent)?;
    let pixels = pixels.squeeze(0)?.permute((1, 2, 0))?.flatten_all()?;
    let size = Size::square(model.image_size());
    let picture = Picture::from_unit_f32(size, &pixels.to_vec1::<f32>()?, size)?;
    image_of(&picture)
}

fn image_of(picture: &Picture) -> Result<RgbImage> {
    let Size { width, height } = picture.size();
    let [width, height] = [u32::try_from(width)?, u32::try_from(height)?];
    RgbImage::from_raw(width, height, picture.rgb8().to_vec()).context("the picture's size")
}

/// The object of the first picture that shows it, mirrored, 0.8 to 1.3 times as large, somewhere on the background.
fn pasted(
    rng: &mut Rng,
    TrueScene { scene, truth }: &TrueScene,
    object: usize,
    background: &RgbImage,
) -> Result<Picture> {
    let mut pictures = scene.pictures().iter().zip(truth);
    let (place, shown, masks) = pictures
        .find_map(|(shown, masks)| {
            let place = shown.concepts.iter().position(|&c| c == object)?;
            Some((place, shown, masks))
        })
        .context("an object that no picture shows")?;
    let mut cut: RgbaImage = image_of(&shown.picture)?.convert();
    let (mut low, mut high) = ([u32::MAX; 2], [0; 2]);
    for ((x, y, pixel), &inside) in cut.enumerate_pixels_mut().zip(&masks.planes()[place]) {
        if inside == 0 {
            *pixel = Rgba([0; 4]);
            continue;
        }
        low = [low[0].min(x), low[1].min(y)];
        high = [high[0].max(x + 1), high[1].max(y + 1)];
    }
    let [width, height] = [high[0] - low[0], high[1] - low[1]];
    let cut = image::imageops::crop_imm(&cut, low[0], low[1], width, height).to_image();
    let by = 0.8 + 0.5 * rng.uniform();
    let side = background.width();
    let scaled = |n: u32| ((f64::from(n) * by).round() as u32).clamp(1, side);
    let cut = resize(
        &flip_horizontal(&cut),
        scaled(width),
        scaled(height),
        FilterType::Triangle,
    );
    let mut somewhere = |n: u32| rng.below((side - n + 1) as usize) as i64;
    let (x, y) = (somewhere(cut.width()), somewhere(cut.height()));
    let mut canvas: RgbaImage = background.convert();
    overlay(&mut canvas, &cut, x, y);
    let canvas: RgbImage = canvas.convert();
    let size = Size::square(side as usize);
    Ok(Picture::from_rgb8(size, canvas.as_raw(), size)?)
}
