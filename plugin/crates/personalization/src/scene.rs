//! What is learned from: pictures, and the concepts that each of them shows.

use candle_core::{Device, Tensor};
use image::imageops::{FilterType, resize};
use image::{Rgb, Rgb32FImage};
use stable_diffusion::DiffusionModel;

use crate::error::{Error, Result};
use crate::size::Size;

/// What a concept is to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A thing.
    Object,
    /// What lies behind all things.
    Background,
}

/// The concepts of a picture that compete for its foreground: the objects, or all if there is no object.
pub(crate) fn competitors(roles: &[Role]) -> Vec<usize> {
    let objects: Vec<usize> = (0..roles.len())
        .filter(|&c| roles[c] == Role::Object)
        .collect();
    if objects.is_empty() {
        (0..roles.len()).collect()
    } else {
        objects
    }
}

/// One thing to learn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concept {
    /// The placeholder in prompts, for example `<rex>`.
    pub token: String,
    /// What it is, in a word of the model's vocabulary, for example `dog`.
    pub class_word: String,
    /// Object or background.
    pub role: Role,
}

/// A whole picture at the size at which it is learned, Lanczos: see [`Size::to_learn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    size: Size,
    rgb: Vec<u8>,
}

impl Picture {
    /// The size at which a model learns pictures of the size `from`.
    #[must_use]
    pub fn size_for(model: &DiffusionModel, from: Size) -> Size {
        from.to_learn(model.image_size(), model.image_unit())
    }

    /// From `[h, w, 3]` of the size `from` in [0, 1], sRGB.
    ///
    /// # Errors
    /// A length that does not fit, or an empty picture.
    pub fn from_unit_f32(from: Size, pixels: &[f32], size: Size) -> Result<Self> {
        if from.area() == 0 || pixels.len() != 3 * from.area() {
            return Err(Error::PictureValues {
                size: from,
                values: pixels.len(),
            });
        }
        let wrong = |_| Error::PictureSide { size: from };
        let sides = |size: Size| -> Result<[u32; 2]> {
            let side = |side: usize| u32::try_from(side).map_err(wrong);
            Ok([side(size.width)?, side(size.height)?])
        };
        let ([w, h], [width, height]) = (sides(from)?, sides(size)?);
        let whole = Rgb32FImage::from_raw(w, h, pixels.to_vec());
        let whole = whole.ok_or(Error::PictureSide { size: from })?;
        let scaled = if from == size {
            whole
        } else {
            resize(&whole, width, height, FilterType::Lanczos3)
        };
        let byte = |v: f32| (v * 255.0).round().clamp(0.0, 255.0) as u8;
        let rgb = scaled
            .pixels()
            .flat_map(|Rgb(channels)| channels.map(byte))
            .collect();
        Ok(Self { size, rgb })
    }

    /// From `[h, w, 3]` bytes of the size `from`, sRGB.
    ///
    /// # Errors
    /// As [`Picture::from_unit_f32`].
    pub fn from_rgb8(from: Size, rgb: &[u8], size: Size) -> Result<Self> {
        let pixels: Vec<f32> = rgb.iter().map(|&v| f32::from(v) / 255.0).collect();
        Self::from_unit_f32(from, &pixels, size)
    }

    /// Width and height in pixels.
    #[must_use]
    pub fn size(&self) -> Size {
        self.size
    }

    /// `[H, W, 3]` bytes, sRGB.
    #[must_use]
    pub fn rgb8(&self) -> &[u8] {
        &self.rgb
    }

    /// `[1, 3, H, W]` in [-1, 1], as the VAE takes it; mirrored left to right if `flipped`.
    ///
    /// # Errors
    /// The tensor library fails.
    pub fn tensor(&self, flipped: bool, device: &Device) -> Result<Tensor> {
        let Size { width, height } = self.size;
        let value = |i: usize| {
            let (y, x) = self.size.place(i % self.size.area());
            let x = if flipped { width - 1 - x } else { x };
            let channel = i / self.size.area();
            f32::from(self.rgb[3 * (y * width + x) + channel]) / 127.5 - 1.0
        };
        let values: Vec<f32> = (0..3 * self.size.area()).map(value).collect();
        Ok(Tensor::from_vec(values, (1, 3, height, width), device)?)
    }
}

/// A picture and the concepts that it shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScenePicture {
    /// The picture.
    pub picture: Picture,
    /// Indices into the scene's concepts, in the order of its prompt.
    pub concepts: Vec<usize>,
}

/// One or several pictures that share concepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scene {
    concepts: Vec<Concept>,
    pictures: Vec<ScenePicture>,
}

impl Scene {
    /// Checks that pictures and concepts fit.
    ///
    /// # Errors
    /// No concept or picture; a token twice, or not of the form `<name>`; a picture without concepts or with two
    /// backgrounds; a concept that no picture shows.
    pub fn new(concepts: Vec<Concept>, pictures: Vec<ScenePicture>) -> Result<Self> {
        if concepts.is_empty() || pictures.is_empty() {
            return Err(Error::EmptyScene);
        }
        for (i, concept) in concepts.iter().enumerate() {
            let token = &concept.token;
            let named = token.len() > 2 && token.starts_with('<') && token.ends_with('>');
            if !named
                || token.chars().any(char::is_whitespace)
                || token[1..token.len() - 1].contains(['<', '>'])
            {
                return Err(Error::BadToken {
                    token: token.clone(),
                });
            }
            if concepts[..i].iter().any(|other| other.token == *token) {
                return Err(Error::TokenTwice {
                    token: token.clone(),
                });
            }
            if !pictures.iter().any(|picture| picture.concepts.contains(&i)) {
                return Err(Error::NotShown {
                    token: token.clone(),
                });
            }
        }
        for (number, picture) in pictures
            .iter()
            .enumerate()
            .map(|(i, picture)| (i + 1, picture))
        {
            let backgrounds = picture
                .concepts
                .iter()
                .filter(|&&c| concepts[c].role == Role::Background)
                .count();
            if picture.concepts.is_empty() || backgrounds > 1 {
                return Err(Error::PictureConcepts {
                    picture: number,
                    concepts: picture.concepts.len(),
                    backgrounds,
                });
            }
        }
        Ok(Self { concepts, pictures })
    }

    /// All concepts.
    #[must_use]
    pub fn concepts(&self) -> &[Concept] {
        &self.concepts
    }

    /// All pictures.
    #[must_use]
    pub fn pictures(&self) -> &[ScenePicture] {
        &self.pictures
    }

    /// Roles of one picture's concepts, in its order.
    #[must_use]
    pub fn roles(&self, picture: usize) -> Vec<Role> {
        self.pictures[picture]
            .concepts
            .iter()
            .map(|&c| self.concepts[c].role)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn concept(token: &str, role: Role) -> Concept {
        Concept {
            token: token.into(),
            class_word: "dog".into(),
            role,
        }
    }

    fn picture(concepts: &[usize]) -> ScenePicture {
        let picture = Picture::from_rgb8(Size::square(2), &[7; 12], Size::square(2)).unwrap();
        ScenePicture {
            picture,
            concepts: concepts.to_vec(),
        }
    }

    #[test]
    fn scenes_that_cannot_be_learned_are_refused() {
        use Role::{Background, Object};
        for (concepts, pictures, part) in [
            (vec![], vec![picture(&[])], "at least one concept"),
            (
                vec![concept("dog", Object)],
                vec![picture(&[0])],
                "of the form <name>",
            ),
            (
                vec![concept("<a b>", Object)],
                vec![picture(&[0])],
                "without spaces",
            ),
            (
                vec![concept("<a>", Object), concept("<a>", Object)],
                vec![picture(&[0, 1])],
                "used twice",
            ),
            (
                vec![concept("<a>", Object), concept("<b>", Object)],
                vec![picture(&[0])],
                "no picture shows <b>",
            ),
            (
                vec![concept("<a>", Background), concept("<b>", Background)],
                vec![picture(&[0, 1])],
                "2 of them",
            ),
        ] {
            let error = Scene::new(concepts, pictures).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_wide_picture_is_kept_whole() {
        let wide: Vec<u8> = (0..8).flat_map(|i| [i % 4 / 2 * 80; 3]).collect();
        let (of, to) = (Size::new(4, 2), Size::new(2, 1));
        let small = Picture::from_rgb8(of, &wide, to).unwrap();
        let red: Vec<u8> = small.rgb8().iter().step_by(3).copied().collect();
        assert!(red[0] < 20 && red[1] > 60, "{red:?}");
        let mirrored = small
            .tensor(true, &Device::Cpu)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        assert!(mirrored[0] > mirrored[1]);
    }
}
