//! Lines for a person; on standard error while standard output carries results.

use std::io::Write as _;

/// A line on standard error.
pub(crate) fn complain(line: &str) {
    // Nobody is left to tell if this fails.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A line on standard output; a reader that has gone away is no error.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
