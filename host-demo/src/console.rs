//! Lines for a person; on standard error while standard output carries results.

use std::collections::VecDeque;
use std::io::Write as _;

use jiff::Timestamp;
use parking_lot::Mutex;

use crate::catalog::Devices;
use crate::clock;

/// Lines that are remembered, for clients of the server that ask.
const REMEMBERED: usize = 300;
/// Characters of one that are.
const LONGEST: usize = 4096;

/// The last lines on standard error, with their moments.
static LAST: Mutex<VecDeque<(String, String)>> = Mutex::new(VecDeque::new());

/// A line on standard error.
pub(crate) fn complain(line: &str) {
    // Nobody is left to tell if this fails.
    let _ = writeln!(std::io::stderr(), "{line}");
    let mut last = LAST.lock();
    if last.len() == REMEMBERED {
        last.pop_front();
    }
    let line: String = line.chars().take(LONGEST).collect();
    last.push_back((clock::iso(Timestamp::now()), line));
}

/// Says where plugins compute.
pub(crate) fn tell_devices(devices: &Devices) {
    for line in devices.lines() {
        complain(&line);
    }
}

/// The last lines that [`complain`] wrote, with their moments.
pub(crate) fn last_lines() -> Vec<(String, String)> {
    LAST.lock().iter().cloned().collect()
}

/// A line on standard output; a reader that has gone away is no error.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
