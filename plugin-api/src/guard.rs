//! The one place where a panic becomes an error.
//!
//! A panic that leaves an `abi_stable` method or an `extern "C"` function ends the process, so a guard stands inside every
//! one of them, on either side: nodes, opaque values, owners of tensors, extensions, the host's services, and all their
//! destructors. What no guard can catch ends the process as it would anywhere: a panic in a destructor that runs because of
//! another panic, an overflowing stack, a library built with `panic = "abort"` (which
//! [`export_plugin!`](crate::export_plugin) refuses to compile).

use std::any::{Any, type_name};
use std::cell::Cell;
use std::mem::needs_drop;
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
                let place = info.location().map(ToString::to_string);
                // A thread that ends may have lost the cell.
                let _ = PLACE.try_with(|cell| cell.set(place));
            }
        }));
    });
}

/// Runs `body` of a plugin; a panic inside it becomes a [`NodeError`] with [`ErrorCode::Panicked`].
///
/// # Errors
/// The error of `body`, or its panic message.
pub fn guarded<T>(what: &str, body: impl FnOnce() -> Result<T, NodeError>) -> Result<T, NodeError> {
    caught(what, "plugin", body)
}

/// [`guarded`] for what a host does.
///
/// # Errors
/// The error of `body`, or its panic message.
pub fn guarded_host<T>(
    what: &str,
    body: impl FnOnce() -> Result<T, NodeError>,
) -> Result<T, NodeError> {
    caught(what, "host", body)
}

fn caught<T>(
    what: &str,
    whose: &str,
    body: impl FnOnce() -> Result<T, NodeError>,
) -> Result<T, NodeError> {
    quiet_inside_of_guards();
    GUARDS.set(GUARDS.get() + 1);
    // A node that panicked is not run again by the host, so no broken state is ever seen.
    let result = catch_unwind(AssertUnwindSafe(body));
    GUARDS.set(GUARDS.get() - 1);
    match result {
        Ok(result) => result,
        Err(payload) => Err(panicked(what, whose, payload)),
    }
}

#[cold]
fn panicked(what: &str, whose: &str, payload: Box<dyn Any + Send>) -> NodeError {
    let text = payload
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    forget_payload(payload);
    let place = PLACE
        .try_with(Cell::take)
        .ok()
        .flatten()
        .map(|place| format!(" at {place}"))
        .unwrap_or_default();
    NodeError::new(
        ErrorCode::Panicked,
        format!(
            "{what} panicked{place} ({text}); this is a fault of the {whose}, please report it"
        ),
    )
}

/// What was thrown may be anything, with a destructor that panics too.
#[expect(
    clippy::mem_forget,
    reason = "what panics while it is dropped cannot be dropped"
)]
fn forget_payload(payload: Box<dyn Any + Send>) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(payload);
    }
}

/// A value whose destructor's panic stays inside. Nobody waits for a destructor's answer, so the panic is told on standard
/// error, as the standard library does.
#[derive(Debug)]
pub(crate) struct Contained<T>(Option<T>);

impl<T> Contained<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// The value.
    ///
    /// # Errors
    /// It is being dropped.
    pub(crate) fn get(&self) -> Result<&T, NodeError> {
        self.0.as_ref().ok_or_else(gone::<T>)
    }

    /// The value.
    ///
    /// # Errors
    /// It is being dropped.
    pub(crate) fn get_mut(&mut self) -> Result<&mut T, NodeError> {
        self.0.as_mut().ok_or_else(gone::<T>)
    }
}

fn gone<T>() -> NodeError {
    let message = format!("{} is used while it is dropped", type_name::<T>());
    NodeError::new(ErrorCode::Internal, message)
}

impl<T> Drop for Contained<T> {
    fn drop(&mut self) {
        let value = self.0.take();
        if !needs_drop::<T>() {
            return;
        }
        let outer = GUARDS.replace(0);
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
            forget_payload(payload);
        }
        GUARDS.set(outer);
    }
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

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("while it is dropped");
        }
    }

    #[test]
    fn destructors_that_panic_stay_inside() {
        drop(Contained::new(Bomb));
        let error = guarded::<()>("n", || std::panic::panic_any(Bomb)).unwrap_err();
        assert!(error.message.contains("no message"), "{error}");
        let error = guarded::<()>("n", || {
            let _first = Contained::new(Bomb);
            panic!("the second")
        });
        assert!(error.unwrap_err().message.contains("the second"));
    }
}
