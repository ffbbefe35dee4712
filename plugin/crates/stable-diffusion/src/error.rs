//! What can go wrong, by fault: the checkpoint, its configuration, the prompt, the tensor library.

use std::fmt;

use crate::memory::is_out_of_memory;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// One failure, worded so that it can be shown to a user as it stands.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed: out of memory, or a shape this crate should have checked.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A configuration file is not understood, or asks for what is not supported.
    #[error("{file}: {reason}")]
    Config {
        /// The file, or the checkpoint if no single file is at fault.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The tensors of a checkpoint are not those of the model that its configuration describes.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A file is missing, truncated, or not of the format its place says.
    #[error("{file}: {reason}")]
    Unreadable {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file cannot be written.
    #[error("{file} cannot be written: {reason}")]
    CannotWrite {
        /// The file.
        file: String,
        /// The system's reason.
        reason: String,
    },
    /// A prompt cannot be encoded.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// A caller passed a value outside the documented range.
    #[error("{what}: {reason}")]
    Argument {
        /// The value's name.
        what: &'static str,
        /// The range and what was passed.
        reason: String,
    },
    /// A device's memory ran out.
    #[error("the device's memory ran out during {doing}")]
    OutOfDeviceMemory {
        /// What was being done.
        doing: String,
    },
    /// The machine's memory would run out: known before it does.
    #[error("{what} takes at least {} of memory, and this process may have {}", gibibytes(*least), gibibytes(*total))]
    NotEnoughMemory {
        /// What was asked for.
        what: String,
        /// Bytes.
        least: u64,
        /// Bytes: of the machine, or of what the process is limited to.
        total: u64,
    },
    /// The caller asked to stop.
    #[error("canceled")]
    Canceled,
}

impl Error {
    /// Whether memory ran out.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::OutOfDeviceMemory { .. } | Self::NotEnoughMemory { .. } => true,
            Self::Tensor(error) => is_out_of_memory(error),
            _ => false,
        }
    }

    /// This error; where a device's memory ran out, with what was being done.
    #[must_use]
    pub fn during(self, doing: impl FnOnce() -> String) -> Self {
        match self {
            Self::Tensor(error) if is_out_of_memory(&error) => {
                let doing = doing();
                Self::OutOfDeviceMemory { doing }
            }
            other => other,
        }
    }

    pub(crate) fn config(file: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self::Config {
            file: file.into(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn unreadable(file: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self::Unreadable {
            file: file.into(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn argument(what: &'static str, reason: impl fmt::Display) -> Self {
        Self::Argument {
            what,
            reason: reason.to_string(),
        }
    }
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Why a prompt cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// More tokens than the text encoder has positions.
    #[error("the prompt has {tokens} tokens with its start and end, the model takes {limit}")]
    TooLong {
        /// Tokens with start and end.
        tokens: usize,
        /// Positions of the text encoder.
        limit: usize,
    },
    /// More than is taken of any prompt; see [`crate::prompt::MAX_TOKENS`].
    #[error("the prompt \"{begins}…\" has {length} {unit}, at most {limit} are taken: shorten it")]
    TooMuch {
        /// How the prompt begins.
        begins: String,
        /// How long it is.
        length: usize,
        /// In what: characters or tokens.
        unit: &'static str,
        /// How long it may be.
        limit: usize,
    },
    /// A weight that no embedding survives; see [`crate::prompt::MAX_WEIGHT`].
    #[error(
        "\"{begins}…\" weighs more than {} in the prompt, where brackets around brackets multiply: lower its weight",
        crate::prompt::MAX_WEIGHT
    )]
    TooHeavy {
        /// How the part begins.
        begins: String,
    },
    /// A word that yields no token at all.
    #[error("\"{word}\" has no token in this model's vocabulary")]
    NoToken {
        /// The word as passed.
        word: String,
    },
    /// A placeholder that is in the vocabulary already, empty, or listed twice.
    #[error("\"{token}\" cannot be a concept's token: {reason}")]
    Placeholder {
        /// The token as passed.
        token: String,
        /// Why not.
        reason: &'static str,
    },
}

/// A tensor whose shape is not the model's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misshapen {
    /// Name in diffusers' layout.
    pub name: String,
    /// Shape of the model.
    pub expected: Vec<usize>,
    /// Shape in the file.
    pub found: Vec<usize>,
}

/// Every difference between a checkpoint and the model that its configuration describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointError {
    /// The file or component.
    pub file: String,
    /// Tensors of the model that the file lacks.
    pub missing: Vec<String>,
    /// Tensors of the file that the model lacks.
    pub unexpected: Vec<String>,
    /// Tensors with another shape than the model's.
    pub misshapen: Vec<Misshapen>,
}

impl std::error::Error for CheckpointError {}

/// Names shown of each list; the lists themselves are complete.
const SHOWN: usize = 12;

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} does not hold the model that its configuration describes:",
            self.file
        )?;
        let list = |f: &mut fmt::Formatter<'_>, what: &str, names: &[String]| {
            if names.is_empty() {
                return Ok(());
            }
            write!(
                f,
                "\n  {} {what}: {}",
                names.len(),
                names[..names.len().min(SHOWN)].join(", ")
            )?;
            if names.len() > SHOWN {
                write!(f, ", … and {} more", names.len() - SHOWN)?;
            }
            Ok(())
        };
        list(f, "missing", &self.missing)?;
        list(f, "unexpected", &self.unexpected)?;
        let shapes: Vec<String> = self
            .misshapen
            .iter()
            .map(|m| format!("{} is {:?} and should be {:?}", m.name, m.found, m.expected))
            .collect();
        list(f, "of the wrong shape", &shapes)
    }
}
