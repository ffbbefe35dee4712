//! What can go wrong, by who is at fault.

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
    /// Concepts, pictures or masks that do not make a scene.
    #[error("{0}")]
    Scene(String),
    /// A constant outside of its range.
    #[error("{what} is {value}; {range}")]
    Config {
        /// Which constant.
        what: &'static str,
        /// What it is.
        value: String,
        /// What it can be.
        range: &'static str,
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
    pub(crate) fn file(file: &std::path::Path, reason: impl std::fmt::Display) -> Self {
        Self::File {
            file: file.display().to_string(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn scene(text: impl Into<String>) -> Self {
        Self::Scene(text.into())
    }
}
