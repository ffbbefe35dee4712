//! Events of the method to what a host shows: progress, previews, curves, and a state to resume from.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use candle_core::Tensor;
use machine_memory::{KeepFreed, keep_freed};
use personalization::m_step::{INVERSION, TOKENS};
use personalization::metrics::mask_ious;
use personalization::{
    Checkpoint, Concept, EmState, Event, ImageMasks, Keeper, LearnedConcepts, Observation,
    Observer, Role, SamplePrompts, Scene, Size, checkpoint, overlay, sample,
};
use plugin_api::host::LogLevel;
use plugin_api::{Host, SharedTensor};
use stable_diffusion::generate::preview;
use stable_diffusion::{DiffusionModel, GenerateConfig, Sampler, Schedule, Start, UNet};

/// Time between two signs of life.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// Denoising steps between two previews.
const PREVIEW_EVERY: usize = 5;
/// Largest latent of which samples are painted beside the learning on a CPU, where they take minutes otherwise.
const SMALL_LATENT: usize = 32;
/// Steps of a sample that shows what is learned so far: enough to see what it is of.
const SAMPLE_STEPS: usize = 10;
const SAMPLE_GUIDANCE: f64 = 5.0;

/// Series of the pictures with masks over them.
const MASKS: &str = "masks of every round";

/// Forwards events to a host, and its wish to stop back.
pub(crate) struct HostObserver<'a> {
    host: &'a Host,
    model: &'a DiffusionModel,
    scene: Option<&'a Scene>,
    truth: Option<&'a [ImageMasks]>,
    /// What keeps the states of each kind.
    keepers: BTreeMap<&'static str, Keeper>,
    /// A state could not be kept, which was said.
    cannot_keep: bool,
    /// The stages with optimizer steps and how many each has, in their order.
    stages: Vec<(&'static str, usize)>,
    /// The x of curves: optimizer steps so far over all stages.
    step: usize,
    stage: &'static str,
    last_iou: Option<f32>,
    /// Optimizer steps between two samples; 0 for none.
    sample_every: usize,
    /// What a step frees the next one takes.
    _kept: KeepFreed,
}

/// Does something that may take long on a slow disk. A host takes whoever asks nothing for a node that hangs.
fn while_alive<T>(host: &Host, work: impl FnOnce() -> T) -> T {
    let (working, is_over) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while is_over.recv_timeout(ALIVE_EVERY) == Err(RecvTimeoutError::Timeout) {
                let _ = host.is_canceled();
            }
        });
        let done = work();
        drop(working);
        done
    })
}

impl<'a> HostObserver<'a> {
    pub(crate) fn new(host: &'a Host, model: &'a DiffusionModel) -> Self {
        Self {
            host,
            model,
            scene: None,
            truth: None,
            keepers: BTreeMap::new(),
            cannot_keep: false,
            stages: Vec::new(),
            step: 0,
            stage: "",
            last_iou: None,
            sample_every: 0,
            _kept: keep_freed(),
        }
    }

    /// Shows masks of this scene, and their IoU if the true ones are known.
    pub(crate) fn with_scene(self, scene: &'a Scene, truth: Option<&'a [ImageMasks]>) -> Self {
        Self {
            scene: Some(scene),
            truth,
            ..self
        }
    }

    /// Draws the curves of these stages one behind the other, wherever a run that is resumed enters them.
    pub(crate) fn with_stages(self, stages: Vec<(&'static str, usize)>) -> Self {
        Self { stages, ..self }
    }

    /// Paints every object concept each time that so many steps are done.
    pub(crate) fn with_samples(self, sample_every: usize) -> Self {
        Self {
            sample_every,
            ..self
        }
    }

    /// Keeps the states of this name from now on, and returns the one that an earlier run with the same inputs left, if it was
    /// stopped and the host keeps anything.
    pub(crate) fn keep<T>(
        &mut self,
        name: &'static str,
        read: impl Fn(&Path) -> personalization::Result<T>,
    ) -> Option<T> {
        let folder = self.host.run_info().work_dir;
        if folder.is_empty() {
            return None;
        }
        let (keeper, state, said) = Keeper::open(Path::new(folder.as_str()), name, read);
        for sentence in said {
            self.host.log(LogLevel::Warning, &sentence);
        }
        self.keepers.insert(name, keeper);
        state
    }

    /// The same of the alternation and of its parts by themselves; who goes on is told so.
    pub(crate) fn keep_learning(
        &mut self,
        check: impl Fn(&EmState) -> personalization::Result<()>,
    ) -> Option<EmState> {
        let model = self.model;
        let state = self.keep(checkpoint::EM, |path| {
            let state = EmState::load(path, &model.device)?;
            check(&state)?;
            Ok(state)
        })?;
        self.host.log(LogLevel::Info, &state.going_on());
        Some(state)
    }

    fn on_checkpoint(&mut self, checkpoint: &Checkpoint<'_>) {
        let keeper = checkpoint
            .name()
            .and_then(|name| self.keepers.get_mut(name));
        let Some(keeper) = keeper else { return };
        if !keeper.is_due(checkpoint) && !self.host.is_canceled() {
            return;
        }
        match while_alive(self.host, || keeper.keep(checkpoint)) {
            Ok(()) => self.cannot_keep = false,
            Err(_) if self.cannot_keep => {}
            Err(error) => {
                self.cannot_keep = true;
                let text = format!("if it is stopped now, the run cannot go on from here: {error}");
                self.host.log(LogLevel::Warning, &text);
            }
        }
    }

    /// One picture of every object concept, side by side.
    fn on_learned(&self, step: usize, learned: &LearnedConcepts, unet: &Arc<UNet>) {
        let is_due = self.sample_every > 0 && step.is_multiple_of(self.sample_every);
        let is_slow = self.model.device.is_cpu() && self.model.latent_size() > SMALL_LATENT;
        if !is_due || is_slow {
            return;
        }
        let objects = learned
            .concepts
            .iter()
            .filter(|concept| concept.role == Role::Object);
        let prompts: Vec<_> = objects
            .map(|concept| format!("a photo of {}", concept.token))
            .collect();
        let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
        let model = DiffusionModel {
            unet: unet.clone(),
            ..self.model.clone()
        };
        let config = GenerateConfig {
            steps: SAMPLE_STEPS,
            guidance: SAMPLE_GUIDANCE,
            sampler: Sampler::DpmPp2m,
            schedule: Schedule::Normal,
            seed: learned.seed,
            n_pictures: 1,
            start: Start::Noise([model.image_size(); 2]),
        };
        let prompts = SamplePrompts {
            prompts: &prompts,
            negative: "",
            latents: None,
        };
        let mut goes_on = |_: &Event<'_>| {
            if self.host.is_canceled() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let painted = sample(&model, Some(learned), &prompts, &config, &mut goes_on);
        match painted
            .map_err(|error| error.to_string())
            .and_then(|pictures| side_by_side(&pictures))
        {
            Ok(picture) => {
                let label = format!("{} step {step}", self.stage);
                self.host.preview(picture, "samples", &label);
            }
            // Canceled; whoever asked for it hears of it from the next step.
            Err(_) if self.host.is_canceled() => {}
            Err(error) => self.host.log(
                LogLevel::Warning,
                &format!("no sample could be painted: {error}"),
            ),
        }
    }

    fn on_step(
        &mut self,
        stage: &'static str,
        (step, total): (usize, usize),
        masked: f32,
        attention: f32,
    ) {
        self.stage = stage;
        self.step = steps_before(&self.stages, stage) + step;
        let iou = self
            .last_iou
            .map(|iou| format!("  mask IoU {iou:.2}"))
            .unwrap_or_default();
        let text = format!(
            "step {step}/{total}  diffusion loss {masked:.4}  attention loss {attention:.3}{iou}"
        );
        self.host.progress(stage, step, total, &text);
        let x = self.step as f64;
        self.host.metric("masked diffusion loss", x, masked.into());
        if stage != INVERSION {
            self.host
                .metric("cross-attention loss", x, attention.into());
        }
    }

    /// The picture before those of the rounds, and level curves beside those of their IoU.
    fn on_attention_alone(&self, picture: usize, masks: &ImageMasks) {
        let Some(scene) = self.scene else { return };
        let shown = &scene.pictures()[picture];
        let number = number_of(scene, picture);
        let over = overlay::masks_over(&shown.picture, masks);
        let label = format!("{number}attention alone");
        self.preview(&over, shown.picture.size(), MASKS, &label);
        let Some(truth) = self.truth.map(|truth| &truth[picture]) else {
            return;
        };
        let steps = self.stages.iter().filter(|(stage, _)| *stage == TOKENS);
        let end = self.step + steps.map(|(_, n)| n).sum::<usize>();
        for (&concept, iou) in shown.concepts.iter().zip(mask_ious(masks, truth)) {
            let token = &scene.concepts()[concept].token;
            let series = format!("mask IoU by attention alone of {number}{token}");
            for x in [self.step, end] {
                self.host.metric(&series, x as f64, iou.into());
            }
        }
    }

    fn on_masks(
        &mut self,
        round: usize,
        picture: usize,
        masks: &ImageMasks,
        observation: Option<&Observation>,
        energy: Option<f64>,
    ) {
        let Some(scene) = self.scene else { return };
        let shown = &scene.pictures()[picture];
        let size = shown.picture.size();
        let number = number_of(scene, picture);
        let label = if round == 0 {
            format!("{number}start")
        } else {
            format!("{number}round {round}")
        };
        let over = overlay::masks_over(&shown.picture, masks);
        self.preview(&over, size, MASKS, &label);
        for (index, &concept) in shown.concepts.iter().enumerate() {
            let token = &scene.concepts()[concept].token;
            let cut = overlay::cut_out(&shown.picture, &masks.planes()[index]);
            self.preview(&cut, size, &format!("mask of {token}"), &label);
        }
        if let Some(seen) = observation {
            self.show_observation(picture, seen, &label);
        }
        if let Some(energy) = energy {
            let series = if number.is_empty() {
                "energy".to_owned()
            } else {
                format!("energy of picture {}", picture + 1)
            };
            self.host.metric(&series, self.step as f64, energy);
        }
        let Some(truth) = self.truth.map(|truth| &truth[picture]) else {
            return;
        };
        let ious = mask_ious(masks, truth);
        for (&concept, iou) in shown.concepts.iter().zip(&ious) {
            let token = &scene.concepts()[concept].token;
            self.host.metric(
                &format!("mask IoU of {number}{token}"),
                self.step as f64,
                (*iou).into(),
            );
        }
        self.last_iou = Some(ious.iter().sum::<f32>() / ious.len() as f32);
    }

    /// What every token stands for, by the picture in which most of it is seen: without a word only its mask says so.
    pub(crate) fn show_found(&self, masks: &[ImageMasks]) {
        let Some(scene) = self.scene else { return };
        for (concept, Concept { token, .. }) in scene.concepts().iter().enumerate() {
            let planes = scene
                .pictures()
                .iter()
                .zip(masks)
                .filter_map(|(shown, masks)| {
                    let index = shown.concepts.iter().position(|&c| c == concept)?;
                    let plane = &masks.planes()[index];
                    Some((shown, plane, plane.iter().filter(|&&v| v != 0).count()))
                });
            if let Some((shown, plane, _)) = planes.max_by_key(|&(_, _, area)| area) {
                let cut = overlay::cut_out(&shown.picture, plane);
                self.preview(&cut, shown.picture.size(), "which token found what", token);
            }
        }
    }

    /// Where the model looks for every concept of a picture and, where it was asked, what the noise says.
    pub(crate) fn show_observation(&self, picture: usize, seen: &Observation, label: &str) {
        let Some(scene) = self.scene else { return };
        let shown = &scene.pictures()[picture];
        let size = shown.picture.size();
        let Observation { maps, evidence } = seen;
        for (index, &concept) in shown.concepts.iter().enumerate() {
            let Concept { token, role, .. } = &scene.concepts()[concept];
            let heat = overlay::heat_over(&shown.picture, &maps.maps[index]);
            self.preview(&heat, size, &format!("attention of {token}"), label);
            if let Some(evidence) = evidence.as_ref().filter(|_| *role == Role::Object) {
                let heat = overlay::heat_over(&shown.picture, &evidence.at_size(index, size));
                self.preview(&heat, size, &format!("evidence of {token}"), label);
            }
        }
    }

    fn preview(&self, rgb: &[u8], size: Size, series: &str, label: &str) {
        let values = rgb.iter().map(|&v| f32::from(v) / 255.0).collect();
        match SharedTensor::from_vec(values, &[size.height, size.width, 3]) {
            Ok(picture) => self.host.preview(picture, series, label),
            Err(error) => self.no_preview(series, &error.to_string()),
        }
    }

    fn on_denoised(&self, step: usize, total: usize, clean: &Tensor) {
        self.host
            .progress("sampling", step, total, &format!("step {step}/{total}"));
        if !step.is_multiple_of(PREVIEW_EVERY) && step < total {
            return;
        }
        match preview(self.model, clean)
            .map_err(|error| error.to_string())
            .and_then(|picture| side_by_side(&picture))
        {
            Ok(picture) => self
                .host
                .preview(picture, "sampling", &format!("step {step}")),
            Err(error) => self.no_preview("sampling", &error),
        }
    }

    fn no_preview(&self, series: &str, error: &str) {
        self.host.log(
            LogLevel::Warning,
            &format!("no preview of {series}: {error}"),
        );
    }
}

/// What names a picture of several.
fn number_of(scene: &Scene, picture: usize) -> String {
    if scene.pictures().len() > 1 {
        format!("picture {}, ", picture + 1)
    } else {
        String::new()
    }
}

/// Steps of all stages before this one; 0 for one that is not among them.
fn steps_before(stages: &[(&str, usize)], stage: &str) -> usize {
    let index = stages.iter().position(|(name, _)| *name == stage);
    stages[..index.unwrap_or(0)].iter().map(|(_, n)| n).sum()
}

/// `[n, 3, H, W]` in [0, 1] as one picture `[H, n W, 3]`.
fn side_by_side(pictures: &Tensor) -> Result<SharedTensor, String> {
    let row = pictures
        .dims4()
        .and_then(|(n, _, height, width)| {
            let row = pictures.permute((2, 0, 3, 1))?.contiguous()?;
            Ok((height, n * width, row.flatten_all()?.to_vec1::<f32>()?))
        })
        .map_err(|error| error.to_string());
    let (height, width, values) = row?;
    SharedTensor::from_vec(values, &[height, width, 3]).map_err(|error| error.to_string())
}

impl Observer for HostObserver<'_> {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        match *event {
            Event::Progress { stage, done, total } => self.host.progress(stage, done, total, ""),
            Event::Step {
                stage,
                step,
                total,
                masked_diffusion,
                cross_attention,
            } => {
                self.on_step(stage, (step, total), masked_diffusion, cross_attention);
            }
            Event::Learned {
                step,
                learned,
                unet,
            } => self.on_learned(step, learned, unet),
            Event::Masks {
                round,
                picture,
                masks,
                observation,
                energy,
            } => self.on_masks(round, picture, masks, observation, energy),
            Event::AttentionAlone { picture, masks } => self.on_attention_alone(picture, masks),
            Event::Denoised { step, total, clean } => self.on_denoised(step, total, clean),
            Event::Checkpoint(ref checkpoint) => self.on_checkpoint(checkpoint),
        }
        if self.host.is_canceled() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

#[cfg(test)]
mod tests {
    use personalization::joint;
    use personalization::m_step::TOKENS;

    use super::*;

    #[test]
    fn a_curve_goes_on_where_a_run_is_resumed() {
        let stages = [(INVERSION, 30), (TOKENS, 400), (joint::STAGE, 100)];
        // The first event of a resumed run may be of any stage.
        assert_eq!(steps_before(&stages, INVERSION), 0);
        assert_eq!(steps_before(&stages, TOKENS), 30);
        assert_eq!(steps_before(&stages, joint::STAGE), 430);
        assert_eq!(steps_before(&[], TOKENS), 0);
    }
}
