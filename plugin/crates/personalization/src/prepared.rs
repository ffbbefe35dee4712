//! What depends on a scene's pictures only: made when it is first needed, then used in every step.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::Tensor;
use densecrf::{CrfConfig, DenseCrf};
use stable_diffusion::DiffusionModel;
use stable_diffusion::vae::LatentMoments;

use crate::error::{Error, Result};
use crate::scene::{Picture, Scene};
use crate::size::Size;

/// A picture as the VAE sees it; each half is encoded when it is first asked for.
#[derive(Debug)]
struct EncodedPicture {
    picture: Picture,
    /// Of the picture and of its mirror image.
    moments: [OnceLock<LatentMoments>; 2],
}

impl EncodedPicture {
    fn moments(&self, model: &DiffusionModel, flipped: bool) -> Result<&LatentMoments> {
        let place = &self.moments[usize::from(flipped)];
        if let Some(moments) = place.get() {
            return Ok(moments);
        }
        let pixels = self.picture.tensor(flipped, &model.device)?;
        let encode = || {
            format!(
                "the encoding of a picture of {} pixels",
                self.picture.size()
            )
        };
        let moments = model.vae.moments(&pixels);
        let moments = moments.map_err(|error| error.during(encode))?;
        // Two threads that come at once compute the same values; one of them is kept.
        Ok(place.get_or_init(|| moments))
    }
}

/// The pictures that were last encoded with one VAE, so that every stage and every node of a graph shares one encoding
/// of a picture. Belongs to a checkpoint and to what is tuned from it: tuning leaves the VAE alone.
#[derive(Debug, Default)]
pub struct Encodings(Mutex<VecDeque<Arc<EncodedPicture>>>);

impl Encodings {
    /// Pictures that are kept: more than a scene usually has. An encoding is small, about 1/12 of its picture's pixels
    /// in `f32`.
    const KEPT: usize = 32;

    /// The encoding of a picture of these pixels.
    fn of(&self, picture: &Picture) -> Arc<EncodedPicture> {
        // A panic elsewhere leaves a list of whole pictures.
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.iter().position(|one| one.picture == *picture);
        let encoded = known.and_then(|i| kept.remove(i)).unwrap_or_else(|| {
            Arc::new(EncodedPicture {
                picture: picture.clone(),
                moments: [OnceLock::new(), OnceLock::new()],
            })
        });
        kept.push_front(encoded.clone());
        kept.truncate(Self::KEPT);
        encoded
    }
}

/// A scene with what its pictures cost once.
#[derive(Debug)]
pub struct PreparedScene<'a> {
    /// The scene.
    pub scene: &'a Scene,
    pictures: Vec<PreparedPicture>,
}

#[derive(Debug)]
struct PreparedPicture {
    encoded: Arc<EncodedPicture>,
    /// The last lattice that was asked for, and its constants.
    crf: Mutex<Option<(CrfConfig, Arc<DenseCrf>)>>,
}

impl<'a> PreparedScene<'a> {
    /// A scene of its own.
    ///
    /// # Errors
    /// Pictures with sides that are no multiples of the model's unit.
    pub fn new(model: &DiffusionModel, scene: &'a Scene) -> Result<Self> {
        Self::sharing(model, scene, &Encodings::default())
    }

    /// A scene whose pictures are encoded only if they are not among these encodings, which have to be of the model's
    /// VAE.
    ///
    /// # Errors
    /// Pictures with sides that are no multiples of the model's unit.
    pub fn sharing(
        model: &DiffusionModel,
        scene: &'a Scene,
        encodings: &Encodings,
    ) -> Result<Self> {
        let mut pictures = Vec::with_capacity(scene.pictures().len());
        for shown in scene.pictures() {
            let (size, unit) = (shown.picture.size(), model.image_unit());
            let sides = [size.width, size.height];
            let is_whole = size.area() > 0 && sides.iter().all(|side| side.is_multiple_of(unit));
            // A model takes its own size even where its levels cannot halve it evenly.
            if !is_whole && size != Size::square(model.image_size()) {
                return Err(Error::PictureSize { size, unit });
            }
            pictures.push(PreparedPicture {
                encoded: encodings.of(&shown.picture),
                crf: Mutex::new(None),
            });
        }
        Ok(Self { scene, pictures })
    }

    /// z = scaling · (mean + std · noise), `[B, 4, h, w]`, for noise `[B, 4, h, w]`.
    pub(crate) fn latents(
        &self,
        model: &DiffusionModel,
        picture: usize,
        flipped: bool,
        noise: &Tensor,
    ) -> Result<Tensor> {
        let moments = self.pictures[picture].encoded.moments(model, flipped)?;
        let z = noise
            .broadcast_mul(&moments.std)?
            .broadcast_add(&moments.mean)?;
        Ok(model.vae.scaled(&z)?)
    }

    /// Width and height of a picture's latent.
    pub(crate) fn latent_size(&self, model: &DiffusionModel, picture: usize) -> Size {
        let size = self.scene.pictures()[picture].picture.size();
        size.divided_by(model.config.vae.downsampling())
    }

    /// Scaled mean of the posterior, `[1, 4, h, w]`.
    pub(crate) fn mean_latents(&self, model: &DiffusionModel, picture: usize) -> Result<Tensor> {
        let moments = self.pictures[picture].encoded.moments(model, false)?;
        Ok(model.vae.scaled(&moments.mean)?)
    }

    /// The picture's CRF. Its lattice is built when it is first asked for, and anew for other constants.
    ///
    /// # Errors
    /// Constants out of range.
    pub fn crf(&self, picture: usize, config: &CrfConfig) -> Result<Arc<DenseCrf>> {
        let PreparedPicture { encoded, crf } = &self.pictures[picture];
        let mut last = crf.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((constants, crf)) = &*last
            && constants == config
        {
            return Ok(crf.clone());
        }
        let pixels = &encoded.picture;
        let crf = {
            let Size { width, height } = pixels.size();
            DenseCrf::new(width, height, pixels.rgb8(), config)?
        };
        let crf = Arc::new(crf);
        *last = Some((*config, crf.clone()));
        Ok(crf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_encoded_once_and_the_oldest_is_forgotten() {
        let picture = |shade: u8| {
            let one = Size::square(1);
            Picture::from_rgb8(one, &[shade; 3], one).unwrap()
        };
        let encodings = Encodings::default();
        let first = encodings.of(&picture(0));
        assert!(Arc::ptr_eq(&first, &encodings.of(&picture(0))));
        for shade in 1..=Encodings::KEPT {
            assert!(!Arc::ptr_eq(&first, &encodings.of(&picture(shade as u8))));
        }
        assert!(!Arc::ptr_eq(&first, &encodings.of(&picture(0))));
    }
}
