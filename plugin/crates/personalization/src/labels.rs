//! What the E-step believes of a picture before the CRF.

use crate::binarize::{compete, threshold};
use crate::config::{Cue, ExtractionConfig, Foreground, Labeling, PosteriorConfig};
use crate::error::Result;
use crate::evidence::Evidence;
use crate::learned::LearnedConcepts;
use crate::maps::AttentionMaps;
use crate::mask::ImageMasks;
use crate::posterior::{Posterior, posterior};
use crate::scene::Role;

/// Labels of one picture's pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Labels {
    /// B_c, or what is most probable.
    pub masks: ImageMasks,
    /// How probable, where the labeling says it.
    pub posterior: Option<Posterior>,
}

impl From<ImageMasks> for Labels {
    fn from(masks: ImageMasks) -> Self {
        let posterior = None;
        Self { masks, posterior }
    }
}

/// Labels from what was observed; `roles` in the order of the maps. Tokens that started from no word leave it to the
/// self-attention what is foreground; as long as they say nothing the noise was not asked, and their attention is what
/// [`crate::discover`] found.
///
/// # Errors
/// Roles, maps or evidence that do not fit each other.
pub fn label(
    maps: &AttentionMaps,
    evidence: Option<&Evidence>,
    roles: &[Role],
    learned: &LearnedConcepts,
    config: &ExtractionConfig,
) -> Result<Labels> {
    Ok(match &config.labeling {
        Labeling::Threshold { tau } => threshold(maps, config.normalization, *tau)?.into(),
        Labeling::Compete { tau } => compete(maps, roles, config.normalization, *tau)?.into(),
        Labeling::Posterior(config) => {
            let mut config: PosteriorConfig = *config;
            if !learned.from_words {
                config.foreground = Foreground::SelfAttention;
            }
            if learned.is_blank() {
                config.cue = Cue::Attention;
            }
            let posterior = posterior(maps, evidence, roles, &config)?;
            Labels {
                masks: posterior.masks()?,
                posterior: Some(posterior),
            }
        }
    })
}
