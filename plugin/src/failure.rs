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
        Error::CannotWrite { .. } => ErrorCode::CannotWrite,
        Error::Prompt(_) | Error::Argument { .. } => ErrorCode::InvalidInput,
        _ => ErrorCode::Internal,
    };
    NodeError {
        input: input.into(),
        ..NodeError::new(code, error.to_string())
    }
}

/// An error of the method. Where the fault alone does not say which socket or parameter it lies in, it is `input`:
/// where the concepts or files of this node come from.
pub(crate) fn from_method(input: &str, error: &personalization::Error) -> NodeError {
    use personalization::Error;
    let code = match error {
        Error::Model(error) => return from_model(input, error),
        Error::Canceled => return NodeError::canceled(),
        Error::File { .. } | Error::StateOfOtherWeights => ErrorCode::InvalidFile,
        Error::CannotWrite { .. } => ErrorCode::CannotWrite,
        Error::Tensor(_) => ErrorCode::Internal,
        _ => ErrorCode::InvalidInput,
    };
    NodeError {
        input: at_fault(error).unwrap_or(input).into(),
        ..NodeError::new(code, error.to_string())
    }
}

/// The socket or parameter, of the same name in all nodes, that a fault lies in.
fn at_fault(error: &personalization::Error) -> Option<&'static str> {
    use personalization::Error;
    Some(match error {
        Error::PictureValues { .. } | Error::PictureSide { .. } | Error::PictureSize { .. } => {
            "images"
        }
        Error::MaskSize { .. }
        | Error::SoftMaskSize { .. }
        | Error::EmptyGivenMask { .. }
        | Error::MasksDoNotFitPicture { .. }
        | Error::MasksDoNotFit { .. }
        | Error::MasksMissing
        | Error::EmptyMask { .. }
        | Error::EmptyRefinedMask => "masks",
        Error::NonFiniteLoss {
            stage: personalization::joint::STAGE,
            ..
        } => "joint_learning_rate",
        Error::NonFiniteLoss { .. } => "learning_rate",
        Error::ConceptWidth { .. } => "concepts",
        Error::StateOfOtherWeights => "joint_scope",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_told_of_the_input_that_it_lies_in() {
        use personalization::Error;
        let of = |error: Error| from_method("concept_list", &error).input.to_string();
        let not_finite = |stage| Error::NonFiniteLoss { stage, step: 3 };
        assert_eq!(of(not_finite("tokens")), "learning_rate");
        assert_eq!(
            of(not_finite(personalization::joint::STAGE)),
            "joint_learning_rate"
        );
        assert_eq!(of(Error::MasksMissing), "masks");
        let (size, unit) = (personalization::Size::square(63), 64);
        assert_eq!(of(Error::PictureSize { size, unit }), "images");
        let token = "<a>".to_owned();
        assert_eq!(of(Error::TokenTwice { token }), "concept_list");
    }
}
