//! How well a picture shows the concepts of a scene: whether it is these very things, and whether it is what was asked
//! for, among what else the scene could have been asked for.

use anyhow::Result;
use personalization::Picture;
use personalization::picture_metrics::{
    ConceptFeatures, PictureFeatures, identity, picture_features, prompt_errors,
};
use serde::Serialize;
use stable_diffusion::DiffusionModel;

use crate::scenes::TrueScene;
use crate::words::{prompt, with_article};

/// The figures of one picture.
#[derive(Serialize)]
pub(crate) struct Judgment {
    /// Mean over the objects of the picture, in [-1, 1].
    pub(crate) identity: f64,
    /// Of a single object: how far it is ahead of the scene's other objects.
    pub(crate) identity_margin: Option<f64>,
    /// Of words of other objects, or with one of several left out: how much larger the least error is than that of the
    /// right words, over the latter.
    pub(crate) objects_margin: Option<f64>,
    /// Of other backgrounds, likewise.
    pub(crate) background_margin: Option<f64>,
}

/// What pictures of a scene are compared with.
pub(crate) struct Judge<'a> {
    model: &'a DiffusionModel,
    words: Vec<&'a str>,
    /// What the scene's objects look like.
    looks: Vec<ConceptFeatures>,
}

impl<'a> Judge<'a> {
    /// `model` is the one that nothing was tuned of.
    pub(crate) fn new(model: &'a DiffusionModel, scene: &'a TrueScene) -> Result<Self> {
        let pictures = scene.scene.pictures();
        let features = pictures
            .iter()
            .map(|shown| Ok(picture_features(model, &shown.picture)?))
            .collect::<Result<Vec<PictureFeatures>>>()?;
        let words = scene.objects();
        let look = |object: usize| {
            let mut shown = Vec::new();
            for (picture, features) in features.iter().enumerate() {
                let mut concepts = pictures[picture].concepts.iter();
                let place = concepts.position(|&c| c == object);
                let plane = place.map(|place| scene.truth[picture].planes()[place].as_slice());
                shown.extend(plane.map(|plane| (features, plane)));
            }
            Ok(ConceptFeatures::new(&shown)?)
        };
        let looks = (0..words.len()).map(look).collect::<Result<_>>()?;
        Ok(Self {
            model,
            words,
            looks,
        })
    }

    /// Judges a picture of these objects (of the scene, from 0) on the first of these backgrounds.
    pub(crate) fn judge(
        &self,
        picture: &Picture,
        objects: &[usize],
        backgrounds: &[Option<&str>],
    ) -> Result<Judgment> {
        let features = picture_features(self.model, picture)?;
        let similarity = |c: usize| identity(&features, &self.looks[c]);
        let own: f64 = objects
            .iter()
            .map(|&c| similarity(c))
            .sum::<Result<f64, _>>()?;
        let identity = own / objects.len().max(1) as f64;
        let mut others = Vec::new();
        if let [single] = objects {
            for other in (0..self.looks.len()).filter(|other| other != single) {
                others.push(similarity(other)?);
            }
        }
        let right = self.prompt(objects, backgrounds[0]);
        let places = backgrounds[1..].iter();
        let elsewhere: Vec<String> = places.map(|&b| self.prompt(objects, b)).collect();
        let instead = self.other_objects(objects, backgrounds[0]);
        let prompts: Vec<String> = [vec![right], instead.clone(), elsewhere].concat();
        let errors = prompt_errors(self.model, picture, &prompts)?;
        let (instead, elsewhere) = errors[1..].split_at(instead.len());
        Ok(Judgment {
            identity,
            identity_margin: largest(&others).map(|other| identity - other),
            objects_margin: least(instead).map(|error| error / errors[0] - 1.0),
            background_margin: least(elsewhere).map(|error| error / errors[0] - 1.0),
        })
    }

    /// The prompt with the word of another object in place of a single one, or with one of several left out.
    fn other_objects(&self, objects: &[usize], background: Option<&str>) -> Vec<String> {
        let right = self.prompt(objects, background);
        let all = 0..self.words.len();
        let mut prompts: Vec<String> = match objects {
            [_] => all.map(|other| self.prompt(&[other], background)).collect(),
            _ => {
                let without = |left_out: &usize| -> Vec<usize> {
                    objects.iter().copied().filter(|c| c != left_out).collect()
                };
                let prompt = |left_out| self.prompt(&without(left_out), background);
                objects.iter().map(prompt).collect()
            }
        };
        prompts.retain(|prompt| *prompt != right);
        prompts
    }

    fn prompt(&self, objects: &[usize], background: Option<&str>) -> String {
        let words: Vec<String> = objects
            .iter()
            .map(|&c| with_article(self.words[c]))
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        prompt(&words, background)
    }
}

fn least(values: &[f64]) -> Option<f64> {
    values.iter().copied().reduce(f64::min)
}

fn largest(values: &[f64]) -> Option<f64> {
    values.iter().copied().reduce(f64::max)
}
