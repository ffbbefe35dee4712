//! What can go wrong, by who is at fault.

use crate::size::Size;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// One failure, worded so that it can be shown as it stands.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model: a prompt, a checkpoint, a tensor operation inside it.
    #[error(transparent)]
    Model(#[from] stable_diffusion::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The dense CRF refused.
    #[error(transparent)]
    Crf(#[from] densecrf::CrfError),
    /// A scene of nothing.
    #[error("a scene needs at least one concept and one picture")]
    EmptyScene,
    /// A token that prompts could not name.
    #[error("the token {token} is not of the form <name>, without spaces")]
    BadToken {
        /// The token.
        token: String,
    },
    /// Two concepts of one token.
    #[error("the token {token} is used twice; every concept needs its own")]
    TokenTwice {
        /// The token.
        token: String,
    },
    /// A concept that cannot be learned from any picture.
    #[error("no picture shows {token}")]
    NotShown {
        /// Its token.
        token: String,
    },
    /// A picture without concepts, or with two backgrounds.
    #[error(
        "picture {picture} shows {concepts} concepts, {backgrounds} of them background; it needs at least one concept \
         and at most one background"
    )]
    PictureConcepts {
        /// Number of the picture, from 1.
        picture: usize,
        /// Concepts that it shows.
        concepts: usize,
        /// Backgrounds among them.
        backgrounds: usize,
    },
    /// Values that are not a picture's.
    #[error("a picture of {size} pixels does not have {values} values")]
    PictureValues {
        /// In pixels.
        size: Size,
        /// Values that came.
        values: usize,
    },
    /// A side that does not fit 32 bits.
    #[error("a picture has {size} pixels, more than 2^32 along a side")]
    PictureSide {
        /// In pixels.
        size: Size,
    },
    /// A picture that is not made of the model's units.
    #[error("a picture has {size} pixels, the model works with sides that are multiples of {unit}")]
    PictureSize {
        /// Of the picture.
        size: Size,
        /// Of the model, in pixels.
        unit: usize,
    },
    /// A plane of another size than it should have.
    #[error("a mask has {pixels} pixels, {size} are needed")]
    MaskSize {
        /// Of the plane.
        pixels: usize,
        /// What is needed.
        size: Size,
    },
    /// A soft mask of another size than it is said to have.
    #[error("mask {mask} does not have {size} pixels")]
    SoftMaskSize {
        /// Number of the mask, from 1.
        mask: usize,
        /// In pixels.
        size: Size,
    },
    /// A mask with nothing inside at the size at which the picture is learned.
    #[error("mask {mask} is empty; draw the concept, or leave the masks out")]
    EmptyGivenMask {
        /// Number of the mask, from 1.
        mask: usize,
    },
    /// Masks of one picture that are not those of its concepts.
    #[error(
        "{masks} masks of {size} pixels do not fit {concepts} concepts on a picture of {pixels} pixels"
    )]
    MasksDoNotFitPicture {
        /// Number of masks.
        masks: usize,
        /// Of each.
        size: Size,
        /// Concepts of the picture.
        concepts: usize,
        /// Pixels of the picture.
        pixels: usize,
    },
    /// Attention maps that are not those of a picture's concepts.
    #[error("{maps} maps do not fit {concepts} concepts")]
    MapsDoNotFit {
        /// Number of maps.
        maps: usize,
        /// Concepts of the picture.
        concepts: usize,
    },
    /// Masks that are not those of a scene.
    #[error(
        "the masks do not fit the {pictures} pictures: there has to be one per picture and concept, of its size"
    )]
    MasksDoNotFit {
        /// Pictures of the scene.
        pictures: usize,
    },
    /// Mode `Given` without masks.
    #[error("the mode `given` needs masks; link them, or choose another mode")]
    MasksMissing,
    /// A mask without a pixel.
    #[error("the mask of {token} in picture {picture} is empty; nothing can be learned from it")]
    EmptyMask {
        /// The concept's token.
        token: String,
        /// Number of the picture, from 1.
        picture: usize,
    },
    /// A mask without a pixel, and nothing that could stand in for it.
    #[error("a mask is empty before and after the CRF; link the attention maps, or draw a mask")]
    EmptyRefinedMask,
    /// A loss that is NaN or infinite.
    #[error(
        "the loss is no longer a finite number at step {step} of the stage {stage}; lower the learning rate"
    )]
    NonFiniteLoss {
        /// Name of the stage, as events have it.
        stage: &'static str,
        /// The step, from 1.
        step: usize,
    },
    /// A saved state from which this work cannot go on.
    #[error("the saved state is not one of this work: it has {other}")]
    StateOfOtherWork {
        /// What does not fit.
        other: &'static str,
    },
    /// A prompt in which a concept's token is missing.
    #[error("the prompt does not name {token}")]
    NotInPrompt {
        /// The token.
        token: String,
    },
    /// Evidence of other pictures or of other concepts.
    #[error(
        "the evidence is not one of these pictures and concepts; link it from an extraction of the same ones, or leave it out"
    )]
    EvidenceDoesNotFit,
    /// Concepts that were learned on another kind of model.
    #[error("the concepts are {found} wide, this model's text encoder is {wanted} wide")]
    ConceptWidth {
        /// Of the concepts.
        found: usize,
        /// Of the model.
        wanted: usize,
    },
    /// Concepts of different lengths where one length is learned.
    #[error(
        "{first} and {other} have different numbers of vectors; tokens that are learned together have as many each, so \
         load them apart"
    )]
    UnevenVectors {
        /// The first concept.
        first: String,
        /// One that differs.
        other: String,
    },
    /// No file to read concepts from.
    #[error("no concept file is named")]
    NoConceptFile,
    /// A constant outside of its range.
    #[error("{what} is {value}; {least} to {most} is possible")]
    Config {
        /// Which constant.
        what: &'static str,
        /// What it is.
        value: String,
        /// The least that it can be.
        least: String,
        /// The most that it can be.
        most: String,
    },
    /// A prompt that names a token nobody learned.
    #[error(
        "the prompt \"{prompt}\" names {token}, which is not among the learned concepts ({known})"
    )]
    UnknownToken {
        /// The prompt.
        prompt: String,
        /// The token in it.
        token: String,
        /// The learned ones.
        known: String,
    },
    /// A file that is not what it should be.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that cannot be written.
    #[error("{file} cannot be written: {reason}")]
    CannotWrite {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// The observer asked to stop.
    #[error("canceled")]
    Canceled,
}

impl Error {
    /// This error; where a device's memory ran out, with what was being done.
    pub(crate) fn during(self, doing: impl FnOnce() -> String) -> Self {
        match self {
            Self::Model(error) => Self::Model(error.during(doing)),
            Self::Tensor(error) => match stable_diffusion::Error::Tensor(error).during(doing) {
                stable_diffusion::Error::Tensor(error) => Self::Tensor(error),
                error => Self::Model(error),
            },
            other => other,
        }
    }

    pub(crate) fn file(file: &std::path::Path, reason: impl std::fmt::Display) -> Self {
        Self::File {
            file: file.display().to_string(),
            reason: reason.to_string(),
        }
    }
}
