//! The one place where a panic of a node becomes an error.
//!
//! A panic inside an `abi_stable` method ends the process, so the guard sits inside every exported method.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{ErrorCode, NodeError};

/// Runs `body`; a panic inside it becomes a [`NodeError`] with [`ErrorCode::Panicked`].
///
/// # Errors
/// The error of `body`, or its panic message.
pub fn guarded<T>(what: &str, body: impl FnOnce() -> Result<T, NodeError>) -> Result<T, NodeError> {
    // A node that panicked is not run again by the host, so no broken state is ever seen.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        Err(NodeError::new(
            ErrorCode::Panicked,
            format!("{what} panicked ({text}); this is a fault of the plugin, please report it"),
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_message() {
        let error = guarded::<()>("node X", || panic!("index 3 out of 2")).unwrap_err();
        assert_eq!(error.error_code(), ErrorCode::Panicked);
        assert!(error.message.contains("node X") && error.message.contains("index 3 out of 2"));
    }

    #[test]
    fn results_pass_through() {
        assert_eq!(guarded("n", || Ok(3)), Ok(3));
        assert_eq!(
            guarded::<()>("n", || Err(NodeError::canceled())),
            Err(NodeError::canceled())
        );
    }
}
