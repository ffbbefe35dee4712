//! The E-step: attention, thresholds, CRF, for every picture of the scene.

use stable_diffusion::DiffusionModel;

use crate::attention::extract_attention;
use crate::binarize::binarize;
use crate::config::{CrfStage, ExtractionConfig};
use crate::error::Result;
use crate::learned::LearnedConcepts;
use crate::maps::AttentionMaps;
use crate::mask::{ImageMasks, SceneMasks};
use crate::observer::Observer;
use crate::prepared::PreparedScene;
use crate::refine::refine;

/// New masks of every picture, with the maps that they came from.
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
    previous: Option<&[ImageMasks]>,
    observer: &mut dyn Observer,
) -> Result<(SceneMasks, Vec<AttentionMaps>)> {
    let maps = extract_attention(model, scene, learned, extraction, n_timesteps, observer)?;
    let mut masks = Vec::with_capacity(maps.len());
    for (picture, maps) in maps.iter().enumerate() {
        let roles = scene.scene.roles(picture);
        let planes = binarize(maps, &roles, extraction)?;
        let previous = previous.map(|masks| &masks[picture]);
        masks.push(refine(
            &*scene.crf(picture, &crf.crf)?,
            &planes,
            &roles,
            Some(maps),
            previous,
            crf,
        )?);
    }
    Ok((masks, maps))
}
