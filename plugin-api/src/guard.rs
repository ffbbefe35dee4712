//! The one place where a panic of a node becomes an error.
//!
//! A panic inside an `abi_stable` method ends the process, so the guard sits inside every exported method.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use crate::{ErrorCode, NodeError};

thread_local! {
    /// How many guards this thread is inside of, and where its last panic was.
    static GUARDS: Cell<usize> = const { Cell::new(0) };
    static PLACE: Cell<Option<String>> = const { Cell::new(None) };
}

/// Panics inside of a guard are told as errors, so the standard message on the terminal would be a second one. All
/// other panics are left to the hook that was there.
fn quiet_inside_of_guards() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if GUARDS.get() == 0 {
                before(info);
            } else {
                PLACE.set(info.location().map(ToString::to_string));
            }
        }));
    });
}

/// Runs `body`; a panic inside it becomes a [`NodeError`] with [`ErrorCode::Panicked`].
///
/// # Errors
/// The error of `body`, or its panic message.
pub fn guarded<T>(what: &str, body: impl FnOnce() -> Result<T, NodeError>) -> Result<T, NodeError> {
    quiet_inside_of_guards();
    GUARDS.set(GUARDS.get() + 1);
    // A node that panicked is not run again by the host, so no broken state is ever seen.
    let result = catch_unwind(AssertUnwindSafe(body));
    GUARDS.set(GUARDS.get() - 1);
    result.unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        let place = PLACE
            .take()
            .map(|place| format!(" at {place}"))
            .unwrap_or_default();
        Err(NodeError::new(
            ErrorCode::Panicked,
            format!(
                "{what} panicked{place} ({text}); this is a fault of the plugin, please report it"
            ),
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
