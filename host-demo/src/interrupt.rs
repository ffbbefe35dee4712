//! Ctrl-C: once to stop in order, twice to stop at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::console::complain;

/// As shells report a process that Ctrl-C ended.
pub(crate) const EXIT_CANCELED: u8 = 130;

/// A flag that Ctrl-C sets. The second Ctrl-C ends the process.
///
/// # Errors
/// The system does not let signals be handled.
pub(crate) fn flag() -> Result<Arc<AtomicBool>, ctrlc::Error> {
    let canceled = Arc::new(AtomicBool::new(false));
    let flag = canceled.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            // What was not finished is swept by the next run.
            std::process::exit(EXIT_CANCELED.into());
        }
        complain("stopping at the next step; Ctrl-C again stops at once");
    })?;
    Ok(canceled)
}
