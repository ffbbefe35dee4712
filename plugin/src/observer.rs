//! Events of the method to what a host shows: progress, previews, curves, and a state to resume from.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use personalization::metrics::mask_ious;
use personalization::{AttentionMaps, Event, ImageMasks, Observer, Scene, overlay};
use plugin_api::host::LogLevel;
use plugin_api::{Host, SharedTensor};
use stable_diffusion::DiffusionModel;

/// Denoising steps between two previews.
const PREVIEW_EVERY: usize = 5;

/// Forwards events to a host, and its wish to stop back.
pub(crate) struct HostObserver<'a> {
    host: &'a Host,
    model: &'a DiffusionModel,
    scene: Option<&'a Scene>,
    truth: Option<&'a [ImageMasks]>,
    state_file: Option<PathBuf>,
    /// Optimizer steps so far over all stages: the x of curves.
    step: usize,
    stage: &'static str,
    stage_start: usize,
    last_iou: Option<f32>,
}

impl<'a> HostObserver<'a> {
    pub(crate) fn new(host: &'a Host, model: &'a DiffusionModel) -> Self {
        Self {
            host,
            model,
            scene: None,
            truth: None,
            state_file: None,
            step: 0,
            stage: "",
            stage_start: 0,
            last_iou: None,
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

    /// Keeps the state of the alternation in a file.
    pub(crate) fn with_state_file(self, state_file: Option<PathBuf>) -> Self {
        Self { state_file, ..self }
    }

    fn on_step(
        &mut self,
        stage: &'static str,
        (step, total): (usize, usize),
        masked: f32,
        attention: f32,
    ) {
        if stage != self.stage {
            (self.stage, self.stage_start) = (stage, self.step);
        }
        self.step = self.stage_start.max(self.step + 1);
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
        if stage != "inversion" {
            self.host
                .metric("cross-attention loss", x, attention.into());
        }
    }

    fn on_masks(
        &mut self,
        round: usize,
        picture: usize,
        masks: &ImageMasks,
        maps: Option<&AttentionMaps>,
    ) {
        let Some(scene) = self.scene else { return };
        let shown = &scene.pictures()[picture];
        let size = shown.picture.size();
        let number = if scene.pictures().len() > 1 {
            format!("picture {}, ", picture + 1)
        } else {
            String::new()
        };
        let label = if round == 0 {
            format!("{number}start")
        } else {
            format!("{number}round {round}")
        };
        self.preview(
            &overlay::masks_over(&shown.picture, masks),
            size,
            "masks of every round",
            &label,
        );
        for (index, &concept) in shown.concepts.iter().enumerate() {
            let token = &scene.concepts()[concept].token;
            let cut = overlay::cut_out(&shown.picture, &masks.planes()[index]);
            self.preview(&cut, size, &format!("mask of {token}"), &label);
            if let Some(maps) = maps {
                let heat = overlay::heat_over(&shown.picture, maps, index);
                self.preview(&heat, size, &format!("attention of {token}"), &label);
            }
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

    fn preview(&self, rgb: &[u8], size: usize, series: &str, label: &str) {
        let values = rgb.iter().map(|&v| f32::from(v) / 255.0).collect();
        match SharedTensor::from_vec(values, &[size, size, 3]) {
            Ok(picture) => self.host.preview(picture, series, label),
            Err(error) => self.host.log(
                LogLevel::Warning,
                &format!("no preview of {series}: {error}"),
            ),
        }
    }

    fn on_latents(&self, step: usize, total: usize, latents: &candle_core::Tensor) {
        self.host
            .progress("sampling", step, total, &format!("step {step}/{total}"));
        if !step.is_multiple_of(PREVIEW_EVERY) || self.model.latent_size() > 32 {
            // Decoding a large latent takes longer than the steps between two previews.
            return;
        }
        let decoded = self.model.vae.decode(latents).and_then(|picture| {
            let picture = ((picture + 1.0)? * 0.5)?
                .clamp(0.0, 1.0)?
                .squeeze(0)?
                .permute((1, 2, 0))?;
            Ok((picture.dim(0)?, picture.flatten_all()?.to_vec1::<f32>()?))
        });
        if let Ok((size, values)) = decoded
            && let Ok(picture) = SharedTensor::from_vec(values, &[size, size, 3])
        {
            self.host
                .preview(picture, "sampling", &format!("step {step}"));
        }
    }
}

/// Where the joint stage is kept, beside the state of the alternation.
pub(crate) fn joint_file(state_file: &Path) -> PathBuf {
    state_file.with_file_name("joint-state.safetensors")
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
            Event::Masks {
                round,
                picture,
                masks,
                maps,
            } => self.on_masks(round, picture, masks, maps),
            Event::Latents {
                step,
                total,
                latents,
            } => self.on_latents(step, total, latents),
            Event::JointCheckpoint(state) => {
                if let Some(path) = self.state_file.as_deref().map(joint_file)
                    && let Err(error) = state.save(&path)
                {
                    self.host.log(
                        LogLevel::Warning,
                        &format!("the joint stage cannot be resumed: {error}"),
                    );
                }
            }
            Event::Checkpoint(state) => {
                if let Some(path) = &self.state_file
                    && let Err(error) = state.save(path)
                {
                    self.host.log(
                        LogLevel::Warning,
                        &format!("the run cannot be resumed: {error}"),
                    );
                }
            }
        }
        if self.host.is_canceled() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}
