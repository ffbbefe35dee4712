//! Binary masks to latent masks: one multi-label dense CRF per picture, and what happens when it destroys a mask.
//!
//! The unary energy is the posterior's, or comes from the concepts' binary masks; what no concept covers is a label of its own unless one of the concepts
//! *is* the background. With one concept that is CutLER's two-label CRF.

use densecrf::{DenseCrf, unary_from_planes};

use crate::config::{CrfStage, Guard};
use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::maps::AttentionMaps;
use crate::mask::{ImageMasks, iou};
use crate::scene::Role;

/// Part of a map that stands in for a mask when nothing else is left.
const HOTTEST: f64 = 0.05;

/// Refined masks, and the free energy that the CRF reached.
#[derive(Debug, Clone, PartialEq)]
pub struct Refined {
    /// M_c of every concept.
    pub masks: ImageMasks,
    /// See [`DenseCrf::free_energy`], less the logarithm of the evidence that the labels were concluded from; nats per
    /// pixel. It falls as the tokens explain what they own better than the others do.
    pub energy: f64,
}

/// M_c of every concept of one picture.
///
/// * `labels`: the binary masks B_c; where there is a posterior, it is the unary energy instead of them
/// * `maps`: their attention; only asked when a mask and its predecessor are empty
/// * `previous`: the masks before; kept where the new one is empty
///
/// # Errors
/// Masks, maps and roles that do not fit each other or the picture, or an empty mask without a way out.
pub fn refine(
    crf: &DenseCrf,
    labels: &Labels,
    roles: &[Role],
    maps: Option<&AttentionMaps>,
    previous: Option<&ImageMasks>,
    config: &CrfStage,
) -> Result<Refined> {
    let planes = &labels.masks;
    let n_concepts = planes.planes().len();
    let fits =
        |masks: &ImageMasks| masks.planes().len() == n_concepts && masks.size() == planes.size();
    let size = planes.size();
    if roles.len() != n_concepts || crf.n_pixels() != size.area() || !previous.is_none_or(fits) {
        return Err(Error::MasksDoNotFitPicture {
            masks: n_concepts,
            size,
            concepts: roles.len(),
            pixels: crf.n_pixels(),
        });
    }
    let with_rest = needs_rest(n_concepts, roles);
    let (unary, n_labels) = match &labels.posterior {
        Some(posterior) => posterior.unary(with_rest),
        None => {
            let planes = label_planes(planes, with_rest);
            let n_labels = planes.len() / size.area();
            (unary_from_planes(&planes, n_labels)?, n_labels)
        }
    };
    let marginals = crf.infer(&unary, n_labels, config.crf.iterations)?;
    let log_evidence = labels
        .posterior
        .as_ref()
        .map_or(0.0, |posterior| posterior.log_evidence);
    let energy = crf.free_energy(&unary, &marginals)? - log_evidence / size.area() as f64;
    let first_concept = n_labels - n_concepts;
    let chosen = marginals.labels();
    let refined = (0..n_concepts)
        .map(|c| {
            let plane: Vec<u8> = chosen
                .iter()
                .map(|&label| u8::from(usize::from(label) == c + first_concept))
                .collect();
            let alternatives = Alternatives {
                unrefined: &planes.planes()[c],
                previous: previous.map(|masks| masks.planes()[c].as_slice()),
                map: maps.and_then(|maps| maps.maps.get(c)).map(Vec::as_slice),
            };
            alternatives.guarded(plane, config)
        })
        .collect::<Result<Vec<_>>>()?;
    let masks = ImageMasks::new(size, refined)?;
    Ok(Refined { masks, energy })
}

/// Whether what no concept covers is a label of its own: unless one of several concepts is the background.
fn needs_rest(n_concepts: usize, roles: &[Role]) -> bool {
    n_concepts == 1 || !roles.contains(&Role::Background)
}

/// Planes `[L, n]` of {0, 1}: what no concept covers, if that is a label; then the concepts.
fn label_planes(masks: &ImageMasks, with_rest: bool) -> Vec<f32> {
    let n_concepts = masks.planes().len();
    let mut planes = Vec::new();
    if with_rest {
        let all: Vec<usize> = (0..n_concepts).collect();
        planes.extend(masks.union(&all).iter().map(|&v| f32::from(1 - v)));
    }
    planes.extend(masks.planes().iter().flatten().map(|&v| f32::from(v)));
    planes
}

/// What can stand in for a refined mask.
struct Alternatives<'a> {
    unrefined: &'a [u8],
    previous: Option<&'a [u8]>,
    map: Option<&'a [f32]>,
}

impl Alternatives<'_> {
    /// The refined mask, unless it collapsed (CutLER's rule) or is empty: then the previous one, the unrefined one,
    /// or the hottest part of the map, whichever is first to have an area.
    fn guarded(&self, refined: Vec<u8>, config: &CrfStage) -> Result<Vec<u8>> {
        let usable = |plane: &[u8]| {
            let inside = plane.iter().filter(|&&v| v != 0).count();
            inside > 0 && inside as f64 >= config.min_area * plane.len() as f64
        };
        let collapsed = match config.guard {
            Guard::None => false,
            Guard::MinIou(least) => usable(self.unrefined) && iou(&refined, self.unrefined) < least,
        };
        if collapsed {
            return Ok(self.unrefined.to_vec());
        }
        if usable(&refined) {
            return Ok(refined);
        }
        if let Some(plane) = self
            .previous
            .into_iter()
            .chain([self.unrefined])
            .find(|plane| usable(plane))
        {
            return Ok(plane.to_vec());
        }
        let hottest = self.map.map(hottest_part);
        hottest.ok_or(Error::EmptyRefinedMask)
    }
}

/// The pixels of a map at or above its 95th percentile.
fn hottest_part(map: &[f32]) -> Vec<u8> {
    let mut sorted = map.to_vec();
    sorted.sort_by(f32::total_cmp);
    let threshold = sorted[((1.0 - HOTTEST) * (sorted.len() - 1) as f64) as usize];
    map.iter().map(|&v| u8::from(v >= threshold)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::EmConfig;
    use crate::size::Size;

    fn stage(guard: Guard) -> CrfStage {
        CrfStage {
            guard,
            min_area: 0.1,
            ..EmConfig::paper().crf
        }
    }

    #[test]
    fn an_empty_mask_is_replaced_in_the_documented_order() {
        let (full, empty) = (vec![1u8; 20], vec![0u8; 20]);
        let map: Vec<f32> = (0..20).map(|i| i as f32).collect();
        let pick = |unrefined: &[u8], previous: Option<&[u8]>, map: Option<&[f32]>| {
            Alternatives {
                unrefined,
                previous,
                map,
            }
            .guarded(empty.clone(), &stage(Guard::None))
        };
        assert_eq!(pick(&empty, Some(&full), None).unwrap(), full);
        assert_eq!(pick(&full, Some(&empty), None).unwrap(), full);
        assert_eq!(pick(&empty, None, Some(&map)).unwrap()[17..], [0, 1, 1]);
        assert!(
            pick(&empty, None, None)
                .unwrap_err()
                .to_string()
                .contains("empty")
        );
    }

    #[test]
    fn a_collapsed_mask_is_refused_if_asked() {
        let unrefined = [1, 1, 1, 1, 0, 0, 0, 0];
        let refined = vec![1, 0, 0, 0, 0, 0, 0, 0];
        let with = |guard| {
            Alternatives {
                unrefined: &unrefined,
                previous: None,
                map: None,
            }
            .guarded(refined.clone(), &stage(guard))
        };
        assert_eq!(with(Guard::MinIou(0.5)).unwrap(), unrefined);
        assert_eq!(with(Guard::None).unwrap(), refined);
    }

    #[test]
    fn the_background_plane_is_added_only_where_it_is_missing() {
        let masks = ImageMasks::new(Size::square(1), vec![vec![1], vec![0]]).unwrap();
        assert_eq!(
            label_planes(&masks, needs_rest(2, &[Role::Object, Role::Object])),
            [0.0, 1.0, 0.0]
        );
        assert_eq!(
            label_planes(&masks, needs_rest(2, &[Role::Object, Role::Background])),
            [1.0, 0.0]
        );
    }
}
