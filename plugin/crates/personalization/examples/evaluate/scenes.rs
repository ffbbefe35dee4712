//! Scenes with true masks from an index: the bundled ones, and the hard ones that `hard_scenes.py` composes.
//!
//! An index is a file `{"scenes": [{id, kind, image, background, concepts: [{class_word, mask}]}]}`, paths from its own
//! folder. Hard scenes have a `split`; `background` may be null; and instead of one `image`, with a mask in every
//! concept, there may be `pictures: [{image, objects: [{concept, mask}]}]`, `concept` counting from 0.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use personalization::{Concept, ImageMasks, Picture, Role, Scene, SceneMasks, ScenePicture, Size};
use serde::Deserialize;
use stable_diffusion::DiffusionModel;

/// A file of scenes.
#[derive(Deserialize)]
pub(crate) struct Index {
    scenes: Vec<IndexScene>,
}

/// A scene as the index describes it.
#[derive(Deserialize)]
pub(crate) struct IndexScene {
    pub(crate) id: String,
    pub(crate) kind: String,
    pub(crate) split: Option<String>,
    pub(crate) background: Option<String>,
    image: Option<String>,
    concepts: Vec<IndexConcept>,
    #[serde(default)]
    pictures: Vec<IndexPicture>,
}

/// A concept as the index describes it.
#[derive(Deserialize)]
struct IndexConcept {
    class_word: String,
    mask: Option<String>,
}

#[derive(Deserialize)]
struct IndexPicture {
    image: String,
    objects: Vec<IndexObject>,
}

#[derive(Deserialize)]
struct IndexObject {
    concept: usize,
    mask: String,
}

/// Which scenes.
#[derive(clap::Args)]
pub(crate) struct Which {
    /// Scenes of these kinds, or `all`.
    #[arg(long, default_value = "multi", value_delimiter = ',')]
    kind: Vec<String>,
    /// Of those, scenes of one half: `tuning` or `test`.
    #[arg(long)]
    split: Option<String>,
    /// Of those, scenes with these names.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Of those, only the first ones.
    #[arg(long)]
    limit: Option<usize>,
}

impl Which {
    /// The scenes that are asked for, at least one.
    pub(crate) fn of<'a>(&self, index: &'a Index) -> Result<Vec<&'a IndexScene>> {
        let wanted = |scene: &&IndexScene| {
            self.kind
                .iter()
                .any(|kind| kind == "all" || *kind == scene.kind)
                && (self.split.is_none() || self.split == scene.split)
                && (self.only.is_empty() || self.only.contains(&scene.id))
        };
        let limit = self.limit.unwrap_or(usize::MAX);
        let wanted: Vec<_> = index.scenes.iter().filter(wanted).take(limit).collect();
        ensure!(!wanted.is_empty(), "no scene is asked for");
        Ok(wanted)
    }
}

/// Of a picture: concept, mask.
type Objects<'a> = Vec<(usize, &'a str)>;

/// A scene with the true masks of every picture's concepts, in the picture's order: objects, then the background.
pub(crate) struct TrueScene {
    pub(crate) scene: Scene,
    pub(crate) truth: SceneMasks,
}

impl TrueScene {
    /// The class words of the scene's objects, which come first among its concepts.
    pub(crate) fn objects(&self) -> Vec<&str> {
        self.words(Role::Object)
    }

    /// The word of the background, if it has one.
    pub(crate) fn background(&self) -> Option<&str> {
        self.words(Role::Background).first().copied()
    }

    fn words(&self, role: Role) -> Vec<&str> {
        let concepts = self.scene.concepts().iter();
        concepts
            .filter(|concept| concept.role == role)
            .map(|concept| concept.class_word.as_str())
            .collect()
    }
}

impl Index {
    /// Reads the file.
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).context(file.display().to_string())?;
        serde_json::from_str(&text).context(file.display().to_string())
    }
}

impl IndexScene {
    /// Reads pictures and masks at the size at which the model learns them. `root` is the index's folder.
    pub(crate) fn load(&self, root: &Path, model: &DiffusionModel) -> Result<TrueScene> {
        let object = |(i, concept): (usize, &IndexConcept)| Concept {
            token: format!("<v{}>", i + 1),
            class_word: concept.class_word.clone(),
            role: Role::Object,
        };
        let mut concepts: Vec<Concept> = self.concepts.iter().enumerate().map(object).collect();
        let background = concepts.len();
        concepts.extend(self.background.iter().map(|word| Concept {
            token: "<background>".into(),
            class_word: word.clone(),
            role: Role::Background,
        }));
        let (mut pictures, mut truth) = (Vec::new(), Vec::new());
        for (image, objects) in self.pictures()? {
            let (picture, masks) = read_picture(
                root,
                image,
                objects.iter().map(|(_, mask)| *mask),
                self.background.is_some(),
                model,
            )?;
            let mut shown: Vec<usize> = objects.iter().map(|(concept, _)| *concept).collect();
            shown.extend(self.background.is_some().then_some(background));
            pictures.push(ScenePicture {
                picture,
                concepts: shown,
            });
            truth.push(masks);
        }
        let scene = Scene::new(concepts, pictures)?;
        Ok(TrueScene { scene, truth })
    }

    /// Every picture's image and its objects.
    fn pictures(&self) -> Result<Vec<(&str, Objects<'_>)>> {
        let mut pictures = Vec::new();
        if let Some(image) = &self.image {
            let mut objects = Vec::new();
            for (i, concept) in self.concepts.iter().enumerate() {
                let mask = concept.mask.as_deref().context("a concept has no mask")?;
                objects.push((i, mask));
            }
            pictures.push((image.as_str(), objects));
        }
        for picture in &self.pictures {
            let objects = picture.objects.iter();
            let objects = objects.map(|object| (object.concept, object.mask.as_str()));
            pictures.push((picture.image.as_str(), objects.collect()));
        }
        Ok(pictures)
    }
}

/// A picture and its objects' masks; the background's is the rest.
fn read_picture<'a>(
    root: &Path,
    image: &str,
    masks: impl Iterator<Item = &'a str>,
    has_background: bool,
    model: &DiffusionModel,
) -> Result<(Picture, ImageMasks)> {
    let open = |name: &str| {
        image::open(root.join(name)).with_context(|| root.join(name).display().to_string())
    };
    let picture = open(image)?.into_rgb8();
    let from = Size::new(picture.width() as usize, picture.height() as usize);
    let size = Picture::size_for(model, from);
    let mut planes = Vec::new();
    for mask in masks {
        let values = open(mask)?.into_luma8().into_raw();
        planes.push(
            values
                .iter()
                .map(|&v| f32::from(v) / 255.0)
                .collect::<Vec<f32>>(),
        );
    }
    if has_background {
        let rest = |i: usize| f32::from(planes.iter().all(|plane| plane[i] <= 0.5));
        let rest = (0..from.area()).map(rest).collect();
        planes.push(rest);
    }
    let planes: Vec<&[f32]> = planes.iter().map(Vec::as_slice).collect();
    Ok((
        Picture::from_rgb8(from, picture.as_raw(), size)?,
        ImageMasks::from_soft_planes(from, &planes, size)?,
    ))
}
