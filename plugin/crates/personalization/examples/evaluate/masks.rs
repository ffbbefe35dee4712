//! The alternation on one scene, and the figures of its masks and tokens.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Result;
use personalization::metrics::{
    extraction, leaks, mask_ious, masked_errors, match_concepts, matched_truth,
};
use personalization::{
    Concept, EmConfig, EmOutcome, EmStart, Event, MaskMode, PreparedScene, Role, SceneMasks, em,
};
use stable_diffusion::DiffusionModel;

use crate::report::ConceptReport;
use crate::scenes::TrueScene;

/// How long steps took.
#[derive(Default)]
pub(crate) struct Seconds {
    pub(crate) steps: Vec<f64>,
    pub(crate) e_steps: Vec<f64>,
}

/// What was learned, and which concept's true masks and word every concept is compared with.
pub(crate) struct Learned {
    pub(crate) outcome: EmOutcome,
    /// See [`match_concepts`]; every concept itself where masks were given.
    pub(crate) matching: Vec<usize>,
}

/// Runs the alternation.
pub(crate) fn learn(
    model: &DiffusionModel,
    prepared: &PreparedScene<'_>,
    truth: &SceneMasks,
    config: &EmConfig,
    seed: u64,
    seconds: &mut Seconds,
) -> Result<Learned> {
    let start = match config.masks {
        MaskMode::Given => EmStart::Masks(truth.clone()),
        _ => EmStart::Fresh,
    };
    let mut last = Instant::now();
    let mut observer = |event: &Event<'_>| {
        match event {
            Event::Step { .. } => seconds.steps.push(last.elapsed().as_secs_f64()),
            Event::Masks { round: 1.., .. } => seconds.e_steps.push(last.elapsed().as_secs_f64()),
            Event::Progress { .. } => return ControlFlow::Continue(()),
            _ => {}
        }
        last = Instant::now();
        ControlFlow::Continue(())
    };
    let outcome = em(model, prepared, start, config, seed, &mut observer)?;
    let scene = prepared.scene;
    let matching = match config.masks {
        MaskMode::Given => (0..scene.concepts().len()).collect(),
        _ => match_concepts(scene, config.tokens.init, &outcome.masks, truth),
    };
    Ok(Learned { outcome, matching })
}

/// The figures of every concept in every picture: those of the objects, those of the backgrounds. Those of tokens are 0
/// without a configuration to extract with.
pub(crate) fn figures(
    model: &DiffusionModel,
    prepared: &PreparedScene<'_>,
    TrueScene { scene, truth }: &TrueScene,
    learned: &Learned,
    config: Option<&EmConfig>,
) -> Result<(Vec<ConceptReport>, Vec<ConceptReport>)> {
    let truth = matched_truth(scene, truth, &learned.matching)?;
    let outcome = &learned.outcome;
    let (mut objects, mut backgrounds) = (Vec::new(), Vec::new());
    for (picture, shown) in scene.pictures().iter().enumerate() {
        let truth = &truth[picture];
        let round = |masks: &SceneMasks| mask_ious(&masks[picture], truth);
        let rounds: Vec<Vec<f32>> = outcome.rounds.iter().map(|r| round(&r.masks)).collect();
        let last = round(&outcome.masks);
        let n = shown.concepts.len();
        let (mut extracted, mut leak, mut errors) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        if let Some(config) = config {
            let EmConfig {
                extraction: how,
                crf,
                ..
            } = config;
            let found = extraction(model, prepared, &outcome.learned, how, crf, picture)?;
            extracted = mask_ious(&found.masks, truth);
            leak = leaks(&found.maps, truth);
            errors = masked_errors(model, prepared, &outcome.learned, truth, picture)?;
        }
        for (i, &concept) in shown.concepts.iter().enumerate() {
            let concept = learned.matching[concept];
            let Concept {
                class_word, role, ..
            } = &scene.concepts()[concept];
            let list = match role {
                Role::Object => &mut objects,
                Role::Background => &mut backgrounds,
            };
            list.push(ConceptReport {
                picture,
                concept,
                class_word: class_word.clone(),
                iou_initial: rounds[0][i],
                iou_final: last[i],
                iou_by_round: rounds.iter().map(|round| round[i]).collect(),
                extraction_iou: extracted[i],
                masked_error: errors[i],
                leak: leak[i],
            });
        }
    }
    objects.sort_by_key(|report: &ConceptReport| (report.picture, report.concept));
    Ok((objects, backgrounds))
}
