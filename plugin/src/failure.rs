//! Errors of the crates below to errors with a code and the input that they are about.

use plugin_api::{ErrorCode, NodeError};

/// An error of the model; `input` names the socket or parameter that it came from.
pub(crate) fn from_model(input: &str, error: &stable_diffusion::Error) -> NodeError {
    use stable_diffusion::Error;
    let code = match error {
        Error::Canceled => return NodeError::canceled(),
        Error::Config { .. } | Error::Checkpoint(_) | Error::Unreadable { .. } => {
            ErrorCode::InvalidFile
        }
        Error::Prompt(_) | Error::Argument { .. } => ErrorCode::InvalidInput,
        _ => ErrorCode::Internal,
    };
    NodeError {
        input: input.into(),
        ..NodeError::new(code, error.to_string())
    }
}

/// An error of the method; `input` names the socket or parameter that it came from.
pub(crate) fn from_method(input: &str, error: &personalization::Error) -> NodeError {
    use personalization::Error;
    let code = match error {
        Error::Model(error) => return from_model(input, error),
        Error::Canceled => return NodeError::canceled(),
        Error::File { .. } => ErrorCode::InvalidFile,
        Error::CannotWrite { .. } => ErrorCode::CannotWrite,
        Error::Tensor(_) => ErrorCode::Internal,
        _ => ErrorCode::InvalidInput,
    };
    NodeError {
        input: input.into(),
        ..NodeError::new(code, error.to_string())
    }
}
