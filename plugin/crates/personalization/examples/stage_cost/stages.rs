//! The kinds of work, each done by the method's own functions.

use std::fs;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use personalization::config::{EmConfig, JointConfig, JointScope, MStepConfig};
use personalization::{
    Concept, Event, ImageMasks, LearnedConcepts, Picture, PreparedScene, Role, SamplePrompts,
    Scene, ScenePicture, Size, first_rows, joint_stage, m_step, observe, sample,
};
use stable_diffusion::generate::{GenerateConfig, Start};
use stable_diffusion::{DiffusionModel, Sampler, Schedule};

use crate::memory;

/// Of LoRA.
const RANK: usize = 16;
const SEED: u64 = 0;
/// Most draws that the E-step makes in one pass at these sizes: what is measured is passes.
const DRAWS_OF_A_PASS: usize = 10;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// A step of the M-step: context, U-Net, both losses, backward to the rows, AdamW.
    Tokens,
    /// A draw of the E-step: the prompt of both concepts, observed, and one prompt for each.
    EStep,
    /// A step of the joint stage on LoRA factors of rank 16 and the rows.
    Lora,
    /// A guided sampling step: two predictions in one pass.
    Sampling,
    /// A picture to the moments of its latents.
    Encode,
    /// Latents to a picture.
    Decode,
}

impl Work {
    pub(crate) const ALL: [Self; 6] = [
        Self::Tokens,
        Self::EStep,
        Self::Lora,
        Self::Sampling,
        Self::Encode,
        Self::Decode,
    ];

    pub(crate) fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

/// What a kind of work cost.
pub(crate) struct Cost {
    /// Every time but the first.
    pub(crate) seconds: Vec<f64>,
    /// Of the processor, of all threads.
    pub(crate) cpu_seconds: Vec<f64>,
    pub(crate) peak_bytes: u64,
}

/// A model and what it works on: a picture of two halves, and their masks.
pub(crate) struct Bench {
    pub(crate) model: DiffusionModel,
    pub(crate) side: usize,
    scene: Scene,
    masks: Vec<ImageMasks>,
}

impl Bench {
    pub(crate) fn new(model: DiffusionModel, side: Option<usize>) -> Result<Self> {
        let side = side.unwrap_or(model.image_size());
        let size = Size::square(side);
        let is_left = |i: usize| i % side < side / 2;
        let rgb: Vec<u8> = (0..size.area())
            .flat_map(|i| {
                let shade = (i / side * 255 / side) as u8;
                if is_left(i) {
                    [200, shade, 40]
                } else {
                    [30, shade, 180]
                }
            })
            .collect();
        let concept = |token: &str, word: &str| Concept {
            token: token.to_owned(),
            class_word: word.to_owned(),
            role: Role::Object,
        };
        let picture = ScenePicture {
            picture: Picture::from_rgb8(size, &rgb, size)?,
            concepts: vec![0, 1],
        };
        let concepts = vec![concept("<v1>", "dog"), concept("<v2>", "car")];
        let left: Vec<u8> = (0..size.area()).map(|i| u8::from(is_left(i))).collect();
        let right = left.iter().map(|&v| 1 - v).collect();
        Ok(Self {
            scene: Scene::new(concepts, vec![picture])?,
            masks: vec![ImageMasks::new(size, vec![left, right])?],
            model,
            side,
        })
    }

    /// Does some work `steps` times and once more before.
    pub(crate) fn measure(&self, work: Work, steps: usize) -> Result<Cost> {
        let device = &self.model.device;
        memory::begin(device);
        let mut clock = Clock::new(device);
        match work {
            Work::Tokens => {
                self.tokens(steps + 1, &mut |event| {
                    clock.on(matches!(event, Event::Step { .. }))
                })?;
            }
            Work::EStep => self.e_step((steps + 1) * DRAWS_OF_A_PASS, &mut clock)?,
            Work::Lora => self.lora(steps + 1, &mut clock)?,
            Work::Sampling => self.sampling(steps + 1, &mut clock)?,
            Work::Encode => self.encode(steps + 1, &mut clock)?,
            Work::Decode => self.decode(steps + 1, &mut clock)?,
        }
        clock.cost(steps)
    }

    /// The rows after some steps of the M-step.
    pub(crate) fn tokens(
        &self,
        steps: usize,
        hear: &mut dyn FnMut(&Event<'_>) -> ControlFlow<()>,
    ) -> Result<LearnedConcepts> {
        let (scene, learned) = (self.scene()?, self.learned()?);
        let config = m_step_config();
        let mut hear = |event: &Event<'_>| hear(event);
        Ok(m_step(
            &self.model,
            &scene,
            &self.masks,
            &learned,
            &config,
            steps,
            &mut hear,
        )?)
    }

    fn scene(&self) -> Result<PreparedScene<'_>> {
        Ok(PreparedScene::new(&self.model, &self.scene)?)
    }

    fn learned(&self) -> Result<LearnedConcepts> {
        let config = EmConfig::likelihood();
        Ok(first_rows(
            &self.model,
            &self.scene()?,
            &config.tokens,
            SEED,
        )?)
    }

    fn e_step(&self, draws: usize, clock: &mut Clock<'_>) -> Result<()> {
        let (scene, learned) = (self.scene()?, self.learned()?);
        let config = EmConfig::likelihood().extraction;
        let mut hear = |event: &Event<'_>| match *event {
            Event::Progress { done, .. } => clock.until(done),
            _ => ControlFlow::Continue(()),
        };
        observe(
            &self.model,
            &scene,
            &learned,
            &config,
            draws,
            &[],
            None,
            &mut hear,
        )?;
        Ok(())
    }

    fn lora(&self, steps: usize, clock: &mut Clock<'_>) -> Result<()> {
        let (scene, learned) = (self.scene()?, self.learned()?);
        let config = JointConfig {
            steps,
            scope: JointScope::Lora { rank: RANK },
            ..JointConfig::break_a_scene()
        };
        let m_step = m_step_config();
        let mut hear = |event: &Event<'_>| clock.on(matches!(event, Event::Step { .. }));
        joint_stage(
            &self.model,
            &scene,
            &self.masks,
            &learned,
            &config,
            &m_step,
            None,
            &mut hear,
        )?;
        Ok(())
    }

    fn sampling(&self, steps: usize, clock: &mut Clock<'_>) -> Result<()> {
        let config = GenerateConfig {
            steps,
            guidance: 7.5,
            sampler: Sampler::Euler,
            schedule: Schedule::Normal,
            seed: SEED,
            n_pictures: 1,
            start: Start::Noise([self.side; 2]),
        };
        let prompts = SamplePrompts {
            prompts: &["a photo of <v1> and <v2>"],
            negative: "",
            latents: None,
        };
        let learned = self.learned()?;
        let mut n_done = 0;
        let mut hear = |event: &Event<'_>| {
            let is_step = matches!(event, Event::Denoised { .. });
            n_done += usize::from(is_step);
            let goes_on = clock.on(is_step);
            // What comes after the last step is decoding, which is measured for itself.
            if n_done == steps {
                ControlFlow::Break(())
            } else {
                goes_on
            }
        };
        match sample(&self.model, Some(&learned), &prompts, &config, &mut hear) {
            Ok(_) | Err(personalization::Error::Canceled) => Ok(()),
            Err(personalization::Error::Model(stable_diffusion::Error::Canceled)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn encode(&self, times: usize, clock: &mut Clock<'_>) -> Result<()> {
        let picture = stable_diffusion::rng::Rng::new(SEED, "encode", 0)
            .normal(&[1, 3, self.side, self.side], &self.model.device)?;
        for _ in 0..times {
            self.model.vae.moments(&picture)?;
            let _ = clock.on(true);
        }
        Ok(())
    }

    fn decode(&self, times: usize, clock: &mut Clock<'_>) -> Result<()> {
        let side = self.side / self.model.config.vae.downsampling();
        let channels = self.model.config.vae.latent_channels;
        let latents = stable_diffusion::rng::Rng::new(SEED, "decode", 0)
            .normal(&[1, channels, side, side], &self.model.device)?;
        for _ in 0..times {
            self.model.vae.decode(&latents)?;
            let _ = clock.on(true);
        }
        Ok(())
    }
}

/// Without mirroring: the mirrored picture is encoded in the first step that sees it.
fn m_step_config() -> MStepConfig {
    MStepConfig {
        flip_probability: 0.0,
        ..EmConfig::likelihood().m_step
    }
}

/// Units done, when, and after how many seconds of the processor.
struct Mark {
    done: usize,
    time: Instant,
    cpu_seconds: f64,
}

/// Moments of the same device work: everything that was asked for before one is done.
struct Clock<'a> {
    device: &'a candle_core::Device,
    marks: Vec<Mark>,
    peak_bytes: u64,
    failed: Option<anyhow::Error>,
}

impl<'a> Clock<'a> {
    fn new(device: &'a candle_core::Device) -> Self {
        Self {
            device,
            marks: Vec::new(),
            peak_bytes: 0,
            failed: None,
        }
    }

    /// One more unit is done, if this is its end.
    fn on(&mut self, is_end: bool) -> ControlFlow<()> {
        if !is_end {
            return ControlFlow::Continue(());
        }
        let done = self.marks.last().map_or(1, |mark| mark.done + 1);
        self.until(done)
    }

    /// So many units are done.
    fn until(&mut self, done: usize) -> ControlFlow<()> {
        // Work tells where it is more often than it gets on.
        if done <= self.marks.last().map_or(0, |mark| mark.done) {
            return ControlFlow::Continue(());
        }
        let read = || -> Result<(u64, f64)> {
            self.device.synchronize()?;
            Ok((memory::peak(self.device)?, cpu_seconds()?))
        };
        match read() {
            Ok((peak, cpu_seconds)) => {
                self.peak_bytes = peak;
                let time = Instant::now();
                self.marks.push(Mark {
                    done,
                    time,
                    cpu_seconds,
                });
                ControlFlow::Continue(())
            }
            Err(error) => {
                self.failed = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    fn cost(self, steps: usize) -> Result<Cost> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let per_unit = |of: &dyn Fn(&[Mark]) -> f64| -> Vec<f64> {
            let pairs = self.marks.windows(2);
            pairs
                .map(|pair| of(pair) / (pair[1].done - pair[0].done) as f64)
                .collect()
        };
        let seconds = per_unit(&|pair| (pair[1].time - pair[0].time).as_secs_f64());
        let cpu_seconds = per_unit(&|pair| pair[1].cpu_seconds - pair[0].cpu_seconds);
        ensure!(
            !seconds.is_empty(),
            "{steps} steps are too few to measure one; name more with --steps"
        );
        Ok(Cost {
            seconds,
            cpu_seconds,
            peak_bytes: self.peak_bytes,
        })
    }
}

/// Of this process so far, as Linux counts them for every thread.
fn cpu_seconds() -> Result<f64> {
    let mut nanoseconds = 0u64;
    for task in fs::read_dir("/proc/self/task")? {
        let path = task?.path().join("schedstat");
        let text = fs::read_to_string(&path)?;
        let first = text.split(' ').next().and_then(|n| n.parse::<u64>().ok());
        nanoseconds += first.with_context(|| format!("{} has no time", path.display()))?;
    }
    Ok(nanoseconds as f64 * 1e-9)
}
