//! Errors that cross the boundary: a stable code, one sentence, and what to do about it.

use abi_stable::StableAbi;
use abi_stable::std_types::RString;

use crate::TensorError;

/// Who is at fault, with numbers that never change meaning. New codes are appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorCode {
    /// A value on a socket or a parameter cannot be used.
    InvalidInput = 1,
    /// A file or directory cannot be read, or is not what it should be.
    InvalidFile = 2,
    /// A file or directory cannot be written.
    CannotWrite = 3,
    /// The host asked the node to stop; nothing is wrong.
    Canceled = 4,
    /// Memory of the host or of a device ran out, or cannot suffice; freeing caches and trying again may help.
    OutOfMemory = 5,
    /// The node panicked: a fault of the plugin.
    Panicked = 6,
    /// Anything else that is not the user's fault.
    Internal = 7,
}

impl ErrorCode {
    /// The code with this number, or [`ErrorCode::Internal`] for one that this build does not know.
    #[must_use]
    pub fn from_number(number: u32) -> Self {
        match number {
            1 => Self::InvalidInput,
            2 => Self::InvalidFile,
            3 => Self::CannotWrite,
            4 => Self::Canceled,
            5 => Self::OutOfMemory,
            6 => Self::Panicked,
            _ => Self::Internal,
        }
    }

    /// The name that user interfaces show and tests match.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidInput => "InvalidInput",
            Self::InvalidFile => "InvalidFile",
            Self::CannotWrite => "CannotWrite",
            Self::Canceled => "Canceled",
            Self::OutOfMemory => "OutOfMemory",
            Self::Panicked => "NodePanicked",
            Self::Internal => "InternalError",
        }
    }
}

/// An error of a node, as it crosses the boundary.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, PartialEq, Eq)]
pub struct NodeError {
    /// A number of [`ErrorCode`]; a plain integer, so that newer plugins can send newer codes.
    pub code: u32,
    /// One sentence: what is wrong, with the name of the file, input or parameter, and what to do.
    pub message: RString,
    /// The socket or parameter that it is about; empty if none.
    pub input: RString,
}

impl NodeError {
    /// An error with this code and sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code: code as u32,
            message: RString::from(message.into()),
            input: RString::new(),
        }
    }

    /// [`ErrorCode::InvalidInput`] about the socket or parameter `input`.
    pub fn invalid_input(input: &str, message: impl Into<String>) -> Self {
        Self {
            input: RString::from(input),
            ..Self::new(ErrorCode::InvalidInput, message)
        }
    }

    /// The answer of a node that stopped because the host asked it to.
    #[must_use]
    pub fn canceled() -> Self {
        Self::new(ErrorCode::Canceled, "canceled")
    }

    /// The code as an enum.
    #[must_use]
    pub fn error_code(&self) -> ErrorCode {
        ErrorCode::from_number(self.code)
    }
}

impl std::fmt::Display for NodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for NodeError {}

/// A tensor that cannot be used is nobody's input until somebody says whose.
impl From<TensorError> for NodeError {
    fn from(error: TensorError) -> Self {
        Self::new(ErrorCode::Internal, error.to_string())
    }
}
