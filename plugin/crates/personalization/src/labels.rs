//! What the E-step believes of a picture before the CRF.

use crate::binarize::{compete, threshold};
use crate::config::{ExtractionConfig, Foreground, Labeling, PosteriorConfig};
use crate::discover::discover;
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
/// self-attention what is foreground, and as long as they say nothing what is an object: see [`crate::discover`].
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
            let affinity = evidence
                .map(|evidence| &evidence.affinity)
                .filter(|affinity| !learned.from_words && !affinity.is_empty());
            let mut config: PosteriorConfig = *config;
            if affinity.is_some() {
                config.foreground = Foreground::SelfAttention;
            }
            let posterior = match affinity {
                Some(affinity) if learned.is_blank() => {
                    discover(affinity, maps.size, roles, &config)
                }
                _ => posterior(maps, evidence, roles, &config)?,
            };
            Labels {
                masks: posterior.masks()?,
                posterior: Some(posterior),
            }
        }
    })
}
