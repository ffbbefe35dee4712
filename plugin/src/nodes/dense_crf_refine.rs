//! DenseCrfRefine: masks along the edges of the picture.

use std::borrow::Cow;

use densecrf::{Appearance, CrfConfig, DenseCrf, Smoothness};
use personalization::{
    AttentionMaps, Concept, CrfStage, Guard, ImageMasks, Labels, Posterior, Role, Scene,
    ScenePicture, Size, refine,
};
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, SharedTensor};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::failure::from_method;
use crate::nodes::common::{check_proportions, masks_value, overlay_value, planes, show_masks};
use crate::nodes::parameters::{self, RECOMMENDED};
use crate::ports;
use crate::scene_input;
use crate::values::EvidenceValue;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct DenseCrfRefine;

/// Parameters of the node. The constants are CutLER's.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// Whether the last mask of every picture is what lies behind all others.
    #[serde(default = "yes")]
    last_is_background: bool,
    /// Iterations of the mean field.
    #[serde(default = "parameters::crf_iterations")]
    #[schemars(range(min = CrfStage::ITERATIONS.least, max = CrfStage::ITERATIONS.most))]
    iterations: usize,
    /// Weight of the kernel that removes specks.
    #[serde(default = "smoothness_weight")]
    #[schemars(range(min = CrfStage::WEIGHT.least, max = CrfStage::WEIGHT.most), extend("x-step" = 0.5))]
    smoothness_weight: f64,
    /// Its reach in pixels.
    #[serde(default = "smoothness_xy")]
    #[schemars(range(min = CrfStage::XY_STD.least, max = CrfStage::XY_STD.most), extend("x-step" = 0.5))]
    smoothness_xy: f64,
    /// Weight of the kernel that follows edges.
    #[serde(default = "appearance_weight")]
    #[schemars(range(min = CrfStage::WEIGHT.least, max = CrfStage::WEIGHT.most), extend("x-step" = 0.5))]
    appearance_weight: f64,
    /// Its reach in pixels.
    #[serde(default = "appearance_xy")]
    #[schemars(range(min = CrfStage::XY_STD.least, max = CrfStage::XY_STD.most), extend("x-step" = 1.0))]
    appearance_xy: f64,
    /// How different colors may be, in steps of 0 to 255.
    #[serde(default = "appearance_rgb")]
    #[schemars(range(min = CrfStage::RGB_STD.least, max = CrfStage::RGB_STD.most), extend("x-step" = 0.5))]
    appearance_rgb: f64,
    /// A refined mask whose IoU with the unrefined one is smaller is refused; 0 refuses none.
    #[serde(default)]
    #[schemars(range(min = CrfStage::GUARD_IOU.least, max = CrfStage::GUARD_IOU.most), extend("x-step" = 0.05))]
    guard: f64,
}

fn yes() -> bool {
    true
}
fn smoothness_weight() -> f64 {
    RECOMMENDED.crf.crf.smoothness.weight.into()
}
fn smoothness_xy() -> f64 {
    RECOMMENDED.crf.crf.smoothness.xy_std.into()
}
fn appearance_weight() -> f64 {
    RECOMMENDED.crf.crf.appearance.weight.into()
}
fn appearance_xy() -> f64 {
    RECOMMENDED.crf.crf.appearance.xy_std.into()
}
fn appearance_rgb() -> f64 {
    RECOMMENDED.crf.crf.appearance.rgb_std.into()
}

impl Parameters {
    fn stage(&self) -> CrfStage {
        let crf = CrfConfig {
            iterations: self.iterations,
            smoothness: Smoothness {
                weight: self.smoothness_weight as f32,
                xy_std: self.smoothness_xy as f32,
            },
            appearance: Appearance {
                weight: self.appearance_weight as f32,
                xy_std: self.appearance_xy as f32,
                rgb_std: self.appearance_rgb as f32,
            },
        };
        let guard = if self.guard > 0.0 {
            Guard::MinIou(self.guard as f32)
        } else {
            Guard::None
        };
        CrfStage {
            crf,
            guard,
            ..RECOMMENDED.crf
        }
    }
}

impl Node for DenseCrfRefine {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "DenseCrfRefine",
            "Dense CRF Refine",
            "Conceptloom/masks",
            "Refines the masks of every picture together with a dense CRF; no diffusion model needed",
        )
        .input("images", ports::IMAGE, "The pictures, of the shape of the masks")
        .input("masks", ports::MASK, "As many masks for every picture, picture after picture")
        .optional_input("attention", ports::ATTENTION_MAPS, "Stands in where a mask and its predecessor are empty")
        .optional_input("evidence", ports::EVIDENCE, "Of the extraction: how sure it is of every pixel, instead of the masks")
        .optional_input("previous", ports::MASK, "Masks before these; kept where a refined one is empty")
        .output("masks", ports::MASK, "Refined masks")
        .output("overlay", ports::IMAGE, "The pictures with their masks in color")
        .aliases(&["crf", "segment", "refine mask"])
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let _kept = machine_memory::keep_freed();
        let (values, [n_masks, height, width]) = planes("masks", inputs.tensor("masks")?)?;
        let size = Size::new(width, height);
        let images = inputs.tensor("images")?;
        check_proportions("masks", size, scene_input::size_of(images)?)?;
        let pictures = scene_input::pictures(images, size)?;
        let per_picture = n_masks / pictures.len();
        if per_picture * pictures.len() != n_masks {
            return Err(NodeError::invalid_input(
                "masks",
                format!(
                    "{n_masks} masks do not share out over {} pictures",
                    pictures.len()
                ),
            ));
        }
        let all = ImageSet {
            values,
            size,
            per_picture,
        };
        let attention = optional_planes(inputs, "attention", n_masks, size)?;
        let previous = optional_planes(inputs, "previous", n_masks, size)?.map(|values| ImageSet {
            values,
            size,
            per_picture,
        });
        let mut roles = vec![Role::Object; per_picture];
        if let Some(last) = roles
            .last_mut()
            .filter(|_| parameters.last_is_background && per_picture > 1)
        {
            *last = Role::Background;
        }
        let posteriors = posteriors(inputs, pictures.len(), per_picture, size)?;
        let stage = parameters.stage();
        let failed = |error: personalization::Error| from_method("masks", &error);
        let mut refined = Vec::with_capacity(pictures.len());
        for (i, picture) in pictures.iter().enumerate() {
            if host.is_canceled() {
                return Err(NodeError::canceled());
            }
            let maps = attention.as_ref().map(|values| AttentionMaps {
                size,
                maps: values
                    .chunks_exact(size.area())
                    .skip(i * per_picture)
                    .take(per_picture)
                    .map(<[f32]>::to_vec)
                    .collect(),
            });
            let previous = previous
                .as_ref()
                .map(|set| set.masks(i))
                .transpose()
                .map_err(failed)?;
            let crf = DenseCrf::new(width, height, picture.rgb8(), &stage.crf)
                .map_err(|error| failed(error.into()))?;
            let labels = Labels {
                masks: all.masks(i).map_err(failed)?,
                posterior: posteriors.get(i).cloned(),
            };
            let found = refine(
                &crf,
                &labels,
                &roles,
                maps.as_ref(),
                previous.as_ref(),
                &stage,
            )
            .map_err(failed)?;
            host.metric("energy", i as f64, found.energy);
            refined.push(found.masks);
            host.progress("crf", i + 1, pictures.len(), "");
        }
        let concept = |(i, role): (usize, &Role)| Concept {
            token: format!("<{i}>"),
            class_word: String::new(),
            role: *role,
        };
        let concepts: Vec<Concept> = roles.iter().enumerate().map(concept).collect();
        let shown = |picture| ScenePicture {
            picture,
            concepts: (0..per_picture).collect(),
        };
        let scene =
            Scene::new(concepts, pictures.into_iter().map(shown).collect()).map_err(failed)?;
        show_masks(host, &scene, &refined);
        Ok(vec![
            masks_value(&refined)?,
            overlay_value(&scene, &refined)?,
        ])
    }
}

/// Posteriors of an optional input, one per picture, or none.
fn posteriors(
    inputs: &Inputs,
    n_pictures: usize,
    per_picture: usize,
    size: Size,
) -> Result<Vec<Posterior>, NodeError> {
    let value = inputs.optional_object::<EvidenceValue>("evidence")?;
    let posteriors = value.map_or(&[][..], |value| &value.posteriors);
    let fits = |one: &Posterior| one.size == size && one.planes.len() == per_picture;
    if !posteriors.is_empty() && (posteriors.len() != n_pictures || !posteriors.iter().all(fits)) {
        return Err(NodeError::invalid_input(
            "evidence",
            format!(
                "the evidence is of {} pictures, the masks are {per_picture} of {size} pixels for each of \
                 {n_pictures}; link both from one extraction",
                posteriors.len()
            ),
        ));
    }
    Ok(posteriors.to_vec())
}

/// Planes of all pictures.
struct ImageSet<'a> {
    values: Cow<'a, [f32]>,
    size: Size,
    per_picture: usize,
}

impl ImageSet<'_> {
    /// Masks of one picture; inside is what exceeds ½. Empty ones are allowed: the guards deal with them.
    fn masks(&self, picture: usize) -> personalization::Result<ImageMasks> {
        let planes = self
            .values
            .chunks_exact(self.size.area())
            .skip(picture * self.per_picture);
        let binary = |plane: &[f32]| plane.iter().map(|&v| u8::from(v > 0.5)).collect();
        ImageMasks::new(
            self.size,
            planes.take(self.per_picture).map(binary).collect(),
        )
    }
}

/// Values of an optional input of the same shape as the masks.
fn optional_planes<'a>(
    inputs: &'a Inputs,
    name: &str,
    n: usize,
    size: Size,
) -> Result<Option<Cow<'a, [f32]>>, NodeError> {
    let read = |tensor: &'a SharedTensor| {
        let (values, shape) = planes(name, tensor)?;
        let wanted = [n, size.height, size.width];
        if shape != wanted {
            let message = format!("the input {name} is {shape:?}, the masks are {wanted:?}");
            return Err(NodeError::invalid_input(name, message));
        }
        Ok(values)
    };
    inputs.optional_tensor(name)?.map(read).transpose()
}
