//! What is learned from: pictures, and the concepts that each of them shows.

use candle_core::{Device, Tensor};
use image::imageops::{FilterType, crop_imm, resize};
use image::{Rgb, Rgb32FImage};

use crate::error::{Error, Result};

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

/// A picture at the model's size: centered square, Lanczos.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    size: usize,
    rgb: Vec<u8>,
}

impl Picture {
    /// From `[height, width, 3]` in [0, 1], sRGB.
    ///
    /// # Errors
    /// A length that does not fit, or an empty picture.
    pub fn from_unit_f32(width: usize, height: usize, pixels: &[f32], size: usize) -> Result<Self> {
        if width * height == 0 || pixels.len() != 3 * width * height {
            return Err(Error::PictureValues {
                width,
                height,
                values: pixels.len(),
            });
        }
        let wrong = || Error::PictureSide {
            side: width.max(height).max(size),
        };
        let (w, h) = (
            u32::try_from(width).map_err(|_| wrong())?,
            u32::try_from(height).map_err(|_| wrong())?,
        );
        let whole = Rgb32FImage::from_raw(w, h, pixels.to_vec()).ok_or_else(wrong)?;
        let side = w.min(h);
        let square = crop_imm(&whole, (w - side) / 2, (h - side) / 2, side, side).to_image();
        let target = u32::try_from(size).map_err(|_| wrong())?;
        let scaled = if side == target {
            square
        } else {
            resize(&square, target, target, FilterType::Lanczos3)
        };
        let byte = |v: f32| (v * 255.0).round().clamp(0.0, 255.0) as u8;
        let rgb = scaled
            .pixels()
            .flat_map(|Rgb(channels)| channels.map(byte))
            .collect();
        Ok(Self { size, rgb })
    }

    /// From `[height, width, 3]` bytes, sRGB.
    ///
    /// # Errors
    /// As [`Picture::from_unit_f32`].
    pub fn from_rgb8(width: usize, height: usize, rgb: &[u8], size: usize) -> Result<Self> {
        let pixels: Vec<f32> = rgb.iter().map(|&v| f32::from(v) / 255.0).collect();
        Self::from_unit_f32(width, height, &pixels, size)
    }

    /// Width and height in pixels.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// `[size, size, 3]` bytes, sRGB.
    #[must_use]
    pub fn rgb8(&self) -> &[u8] {
        &self.rgb
    }

    /// `[1, 3, size, size]` in [-1, 1], as the VAE takes it; mirrored left to right if `flipped`.
    ///
    /// # Errors
    /// The tensor library fails.
    pub fn tensor(&self, flipped: bool, device: &Device) -> Result<Tensor> {
        let size = self.size;
        let value = |i: usize| {
            let (channel, y, x) = (i / (size * size), i / size % size, i % size);
            let x = if flipped { size - 1 - x } else { x };
            f32::from(self.rgb[3 * (y * size + x) + channel]) / 127.5 - 1.0
        };
        let values: Vec<f32> = (0..3 * size * size).map(value).collect();
        Ok(Tensor::from_vec(values, (1, 3, size, size), device)?)
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
        let picture = Picture::from_rgb8(2, 2, &[7; 12], 2).unwrap();
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
    fn a_wide_picture_loses_its_sides() {
        let wide: Vec<u8> = (0..8).flat_map(|i| [i % 4 * 80; 3]).collect();
        let cropped = Picture::from_rgb8(4, 2, &wide, 2).unwrap();
        let red: Vec<u8> = cropped.rgb8().iter().step_by(3).copied().collect();
        assert_eq!(red, [80, 160, 80, 160]);
        let mirrored = cropped
            .tensor(true, &Device::Cpu)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        assert!(mirrored[0] > mirrored[1]);
    }
}
