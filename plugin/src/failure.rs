//! Errors of the crates below to errors with a code and the input that they are about.

use std::io;
use std::path::Path;

use plugin_api::{ErrorCode, NodeError};
use stable_diffusion::memory::is_out_of_memory;

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
        error if error.is_out_of_memory() => {
            let of_device = !matches!(error, Error::NotEnoughMemory { .. });
            return out_of_memory(&error.to_string(), of_device);
        }
        _ => ErrorCode::Internal,
    };
    NodeError {
        input: input.into(),
        ..NodeError::new(code, error.to_string())
    }
}

/// A file that the node saves cannot be written; `input` says where it goes.
pub(crate) fn cannot_write(input: &str, file: &Path, error: &io::Error) -> NodeError {
    let message = format!("{} cannot be written: {error}", file.display());
    NodeError {
        input: input.into(),
        ..NodeError::new(ErrorCode::CannotWrite, message)
    }
}

/// Memory ran out: what for, and what takes less.
fn out_of_memory(what: &str, of_device: bool) -> NodeError {
    // The rest of the text may be where in candle it arose.
    let what = what.lines().next().unwrap_or_default();
    let less = "smaller pictures and memory = lean of LoadDiffusionModel";
    let message = if of_device {
        format!("{what}; {less} take less, and so does CONCEPTLOOM_DEVICE=cpu of the device")
    } else {
        format!("{what}; {less} take less")
    };
    NodeError::new(ErrorCode::OutOfMemory, message)
}

/// An error of the method. Where the fault alone does not say which socket or parameter it lies in, it is `input`:
/// where the concepts or files of this node come from.
pub(crate) fn from_method(input: &str, error: &personalization::Error) -> NodeError {
    use personalization::Error;
    let code = match error {
        Error::Model(error) => return from_model(input, error),
        Error::Canceled => return NodeError::canceled(),
        Error::File { .. } | Error::StateOfOtherWork { .. } => ErrorCode::InvalidFile,
        Error::CannotWrite { .. } => ErrorCode::CannotWrite,
        Error::Tensor(error) if is_out_of_memory(error) => {
            return out_of_memory(&error.to_string(), true);
        }
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
        Error::EvidenceDoesNotFit => "evidence",
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

    #[test]
    fn memory_that_ran_out_is_told_with_what_it_was_for() {
        use stable_diffusion::Error;
        let candle = || {
            candle_core::Error::Msg(
                "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".to_owned(),
            )
        };
        let told = |error: personalization::Error| {
            let error = from_method("images", &error);
            assert_eq!(error.error_code(), ErrorCode::OutOfMemory);
            assert_eq!(error.input, "", "it lies in no input");
            error.message.into_string()
        };
        let doing = "step 3 of the stage tokens";
        let of_step = Error::Tensor(candle()).during(|| doing.to_owned());
        let message = told(of_step.into());
        assert!(
            message.starts_with(&format!("the device's memory ran out during {doing}; ")),
            "{message}"
        );
        assert!(
            message.contains("memory = lean") && message.contains("CONCEPTLOOM_DEVICE"),
            "{message}"
        );
        // Where nobody said what for, the driver's word is all there is.
        for error in [candle().into(), Error::from(candle()).into()] {
            assert!(told(error).contains("CUDA_ERROR_OUT_OF_MEMORY"));
        }
        let (what, least, total) = ("a checkpoint".to_owned(), 3 << 30, 2 << 30);
        let message = told(Error::NotEnoughMemory { what, least, total }.into());
        assert!(
            message.starts_with("a checkpoint takes at least 3.0 GiB")
                && !message.contains("DEVICE"),
            "{message}"
        );
    }
}
