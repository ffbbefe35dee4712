//! New pictures of what was learned, and how well they show it: tokens and weights after the joint stage, prompts and
//! seeds that are the same for every run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use personalization::{
    JointConfig, JointScope, MStepConfig, Picture, PreparedScene, SamplePrompts, Silent, Size,
    joint_stage, sample,
};
use serde::Serialize;
use stable_diffusion::{DiffusionModel, GenerateConfig, Sampler, Schedule, Start};

use crate::judge::{Judge, Judgment};
use crate::masks::Learned;
use crate::scenes::TrueScene;
use crate::words::prompt;

/// Backgrounds to paint on: the first three that are not the scene's own.
const BACKGROUNDS: [&str; 4] = ["grass", "beach", "city", "snow"];

/// How pictures are painted: 25 steps of DPM-Solver++, guidance 5.
const STEPS: usize = 25;
const GUIDANCE: f64 = 5.0;

/// What is painted after the alternation.
#[derive(clap::Args)]
pub(crate) struct PictureOptions {
    /// Runs the joint stage too, paints every object alone on two backgrounds and all of them together on a third one,
    /// judges these pictures, and puts them into this folder.
    #[arg(long)]
    pictures: Option<PathBuf>,
    /// Steps of the joint stage.
    #[arg(long, default_value_t = 400)]
    joint_steps: usize,
    /// Of the whole U-Net and of the tokens.
    #[arg(long, default_value_t = 1e-4)]
    joint_learning_rate: f64,
}

impl PictureOptions {
    /// The joint stage, if pictures are wanted.
    pub(crate) fn joint(&self) -> Option<JointConfig> {
        self.pictures.as_ref().map(|_| JointConfig {
            steps: self.joint_steps,
            learning_rate: self.joint_learning_rate,
            token_learning_rate: self.joint_learning_rate,
            scope: JointScope::Full,
        })
    }

    /// Where pictures go, and the joint stage before them.
    pub(crate) fn wanted(&self) -> Option<(&Path, JointConfig)> {
        Some((self.pictures.as_deref()?, self.joint()?))
    }
}

/// A painted picture.
#[derive(Serialize)]
pub(crate) struct PaintedReport {
    file: String,
    prompt: String,
    /// Objects of the scene, from 0.
    objects: Vec<usize>,
    seed: u64,
    #[serde(flatten)]
    judgment: Judgment,
}

/// Runs the joint stage on what was learned, paints and judges. `name` begins the names of the files.
pub(crate) fn paint(
    model: &DiffusionModel,
    prepared: &PreparedScene<'_>,
    scene: &TrueScene,
    learned: &Learned,
    m_step: &MStepConfig,
    (folder, joint): (&Path, JointConfig),
    name: &str,
) -> Result<Vec<PaintedReport>> {
    let Learned { outcome, matching } = learned;
    let (tuned, tokens) = joint_stage(
        model,
        prepared,
        &outcome.masks,
        &outcome.learned,
        &joint,
        m_step,
        None,
        &mut Silent,
    )?;
    let judge = Judge::new(model, scene)?;
    let token = |object: usize| {
        let found = matching.iter().position(|&truth| truth == object);
        tokens.concepts[found.unwrap_or(object)].token.as_str()
    };
    std::fs::create_dir_all(folder).context(folder.display().to_string())?;
    let mut painted = Vec::new();
    for (number, (objects, backgrounds)) in plan(scene).into_iter().enumerate() {
        let names: Vec<&str> = objects.iter().map(|&object| token(object)).collect();
        let prompt = prompt(&names, backgrounds[0]);
        let seed = number as u64;
        let config = GenerateConfig {
            steps: STEPS,
            guidance: GUIDANCE,
            sampler: Sampler::DpmPp2m,
            schedule: Schedule::Normal,
            seed,
            n_pictures: 1,
            start: Start::Noise([model.image_size(); 2]),
        };
        let prompts = SamplePrompts {
            prompts: &[&prompt],
            negative: "",
            latents: None,
        };
        let pixels = sample(&tuned, Some(&tokens), &prompts, &config, &mut Silent)?;
        let pixels = pixels.squeeze(0)?.permute((1, 2, 0))?.flatten_all()?;
        let size = Size::square(model.image_size());
        let picture = Picture::from_unit_f32(size, &pixels.to_vec1::<f32>()?, size)?;
        let file = format!("{name}_{number}.png");
        save_rgb(
            picture.rgb8(),
            [size.width, size.height],
            &folder.join(&file),
        )?;
        painted.push(PaintedReport {
            file,
            prompt,
            judgment: judge.judge(&picture, &objects, &backgrounds)?,
            objects,
            seed,
        });
    }
    Ok(painted)
}

/// What is painted: objects, and backgrounds of which the first one is meant and the others are not.
fn plan(scene: &TrueScene) -> Vec<(Vec<usize>, Vec<Option<&'static str>>)> {
    let is_new = |word: &&str| Some(*word) != scene.background();
    let mut new = BACKGROUNDS.into_iter().filter(is_new);
    let [a, b, c] = [new.next(), new.next(), new.next()];
    let n_objects = scene.objects().len();
    let mut plan = Vec::new();
    for object in 0..n_objects {
        plan.push((vec![object], vec![a, b, c]));
        plan.push((vec![object], vec![b, a, c]));
    }
    if n_objects > 1 {
        plan.push(((0..n_objects).collect(), vec![c, a, b]));
    }
    plan
}

/// Saves `[H, W, 3]` bytes as a PNG file.
pub(crate) fn save_rgb(rgb: &[u8], [width, height]: [usize; 2], file: &Path) -> Result<()> {
    let [width, height] = [u32::try_from(width)?, u32::try_from(height)?];
    let color = image::ExtendedColorType::Rgb8;
    image::save_buffer(file, rgb, width, height, color).context(file.display().to_string())
}
