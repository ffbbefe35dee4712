//! The E-step: observation, labels, CRF, for every picture of the scene.

use stable_diffusion::DiffusionModel;

use crate::config::{CrfStage, EmConfig, ExtractionConfig};
use crate::error::Result;
use crate::evidence::{Evidence, Observation};
use crate::labels::label;
use crate::learned::LearnedConcepts;
use crate::mask::ImageMasks;
use crate::observation::{Looked, observe_from};
use crate::observer::Observer;
use crate::prepared::PreparedScene;
use crate::refine::refine;

/// What an E-step finds out about one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// M_c.
    pub masks: ImageMasks,
    /// What they were concluded from.
    pub observation: Observation,
    /// Free energy of the CRF, in nats per pixel.
    pub energy: f64,
}

/// What the rounds before left for an E-step.
#[derive(Debug, Clone, Copy, Default)]
pub struct Earlier<'a> {
    /// Masks by picture; kept where a new one is empty.
    pub masks: Option<&'a [ImageMasks]>,
    /// Evidence by picture, to which is added.
    pub evidence: &'a [Evidence],
}

/// Masks of every picture by the attention that was seen, without the noise.
///
/// # Errors
/// Those of the labels and the CRF.
pub(crate) fn by_attention_alone(
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    observations: &[Observation],
    crf: &CrfStage,
) -> Result<Vec<ImageMasks>> {
    let extraction = EmConfig::attention().extraction;
    let masks = |(picture, seen): (usize, &Observation)| {
        let roles = scene.scene.roles(picture);
        let labels = label(&seen.maps, None, &roles, learned, &extraction)?;
        let lattice = scene.crf(picture, &crf.crf)?;
        Ok(refine(&lattice, &labels, &roles, Some(&seen.maps), None, crf)?.masks)
    };
    observations.iter().enumerate().map(masks).collect()
}

/// New masks of every picture.
///
/// # Errors
/// Those of its three parts, or a stop.
#[expect(
    clippy::too_many_arguments,
    reason = "the parts' own arguments; hand-wired graphs pass the same ones"
)]
pub fn e_step(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    extraction: &ExtractionConfig,
    crf: &CrfStage,
    n_timesteps: usize,
    earlier: Earlier<'_>,
    observer: &mut dyn Observer,
) -> Result<Vec<Estimate>> {
    e_step_from(
        model,
        scene,
        learned,
        extraction,
        crf,
        n_timesteps,
        earlier,
        Looked::default(),
        observer,
    )
}

/// [`e_step`] from where a call with the same arguments was stopped.
///
/// # Errors
/// As [`e_step`].
#[expect(clippy::too_many_arguments, reason = "those of e_step, and one")]
pub(crate) fn e_step_from(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    extraction: &ExtractionConfig,
    crf: &CrfStage,
    n_timesteps: usize,
    earlier: Earlier<'_>,
    looked: Looked,
    observer: &mut dyn Observer,
) -> Result<Vec<Estimate>> {
    let observations = observe_from(
        model,
        scene,
        learned,
        extraction,
        n_timesteps,
        earlier.evidence,
        looked,
        observer,
    )?;
    let estimate = |(picture, observation): (usize, Observation)| {
        let Observation { maps, evidence } = &observation;
        let roles = scene.scene.roles(picture);
        let labels = label(maps, evidence.as_ref(), &roles, learned, extraction)?;
        let lattice = scene.crf(picture, &crf.crf)?;
        let previous = earlier.masks.map(|masks| &masks[picture]);
        let refined = refine(&lattice, &labels, &roles, Some(maps), previous, crf)?;
        Ok(Estimate {
            masks: refined.masks,
            energy: refined.energy,
            observation,
        })
    };
    observations.into_iter().enumerate().map(estimate).collect()
}
