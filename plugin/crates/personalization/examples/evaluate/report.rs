//! What is written: figures of every concept of every scene, and their means.

use std::collections::BTreeMap;

use personalization::EmConfig;
use serde::Serialize;

use crate::pictures::PaintedReport;
use crate::{Mode, Start};

/// The file.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) mode: Mode,
    pub(crate) start: Start,
    pub(crate) model: String,
    pub(crate) seed: u64,
    pub(crate) config: EmConfig,
    pub(crate) scenes: Vec<SceneReport>,
    pub(crate) mean: Mean,
    pub(crate) kinds: BTreeMap<String, Mean>,
    pub(crate) seconds_per_step: f64,
    pub(crate) seconds_per_e_step: f64,
    pub(crate) peak_memory_bytes: u64,
}

/// One scene: an entry per picture and concept.
#[derive(Serialize)]
pub(crate) struct SceneReport {
    pub(crate) id: String,
    pub(crate) kind: String,
    pub(crate) split: Option<String>,
    /// Optimizer steps before the masks of every round.
    pub(crate) steps_by_round: Vec<usize>,
    /// Free energy of the CRF at every round, in nats per pixel, the mean over pictures.
    pub(crate) energy_by_round: Vec<f64>,
    pub(crate) concepts: Vec<ConceptReport>,
    /// One per picture; none where the background has no name.
    pub(crate) backgrounds: Vec<ConceptReport>,
    pub(crate) seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pictures: Option<Vec<PaintedReport>>,
}

/// A concept in a picture, by its true class word.
#[derive(Serialize, Clone)]
pub(crate) struct ConceptReport {
    pub(crate) picture: usize,
    pub(crate) concept: usize,
    pub(crate) class_word: String,
    pub(crate) iou_initial: f32,
    pub(crate) iou_final: f32,
    pub(crate) iou_by_round: Vec<f32>,
    pub(crate) extraction_iou: f32,
    pub(crate) masked_error: f64,
    pub(crate) leak: f32,
}

/// Means over pairs of picture and concept. Those of the background leave out scenes without one.
#[derive(Serialize)]
pub(crate) struct Mean {
    pub(crate) n_scenes: usize,
    pub(crate) n_objects: usize,
    pub(crate) object_iou_initial: f64,
    pub(crate) object_iou_final: f64,
    pub(crate) background_iou_final: Option<f64>,
    pub(crate) object_extraction_iou: f64,
    pub(crate) masked_error: f64,
    pub(crate) leak: f64,
}

impl Mean {
    /// The mean over these scenes.
    pub(crate) fn of(scenes: &[&SceneReport]) -> Self {
        let objects: Vec<&ConceptReport> =
            scenes.iter().flat_map(|scene| &scene.concepts).collect();
        let backgrounds: Vec<&ConceptReport> =
            scenes.iter().flat_map(|scene| &scene.backgrounds).collect();
        let over = |reports: &[&ConceptReport], value: &dyn Fn(&ConceptReport) -> f64| {
            reports.iter().map(|report| value(report)).sum::<f64>() / reports.len().max(1) as f64
        };
        Self {
            n_scenes: scenes.len(),
            n_objects: objects.len(),
            object_iou_initial: over(&objects, &|report| report.iou_initial.into()),
            object_iou_final: over(&objects, &|report| report.iou_final.into()),
            background_iou_final: (!backgrounds.is_empty())
                .then(|| over(&backgrounds, &|report| report.iou_final.into())),
            object_extraction_iou: over(&objects, &|report| report.extraction_iou.into()),
            masked_error: over(&objects, &|report| report.masked_error),
            leak: over(&objects, &|report| report.leak.into()),
        }
    }

    /// The mean over the scenes of every kind.
    pub(crate) fn by_kind(scenes: &[SceneReport]) -> BTreeMap<String, Self> {
        let mut kinds: BTreeMap<String, Vec<&SceneReport>> = BTreeMap::new();
        for scene in scenes {
            kinds.entry(scene.kind.clone()).or_default().push(scene);
        }
        let mean = |(kind, scenes): (String, Vec<&SceneReport>)| (kind, Self::of(&scenes));
        kinds.into_iter().map(mean).collect()
    }
}
