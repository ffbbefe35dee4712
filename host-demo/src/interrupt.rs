//! Ctrl-C, or a signal that asks the process to end: once to stop in order, twice to stop at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;

use crate::console::complain;

/// As shells report a process that Ctrl-C ended.
pub(crate) const EXIT_CANCELED: u8 = 130;

/// A flag that Ctrl-C sets, and a scheduler that wants the machine back. The second time the process ends.
///
/// # Errors
/// The system does not let signals be handled.
pub(crate) fn flag() -> anyhow::Result<Arc<AtomicBool>> {
    let canceled = Arc::new(AtomicBool::new(false));
    let flag = canceled.clone();
    let stop = move || {
        if flag.swap(true, Ordering::SeqCst) {
            // What was not finished is swept by the next run.
            std::process::exit(EXIT_CANCELED.into());
        }
        complain("stopping at the next step; Ctrl-C again stops at once");
    };
    #[cfg(unix)]
    on_termination(stop.clone()).context("the signal to end cannot be handled")?;
    ctrlc::set_handler(stop).context("Ctrl-C cannot be handled")?;
    Ok(canceled)
}

#[cfg(unix)]
fn on_termination(stop: impl Fn() + Send + 'static) -> std::io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM])?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || signals.forever().for_each(|_| stop()))?;
    Ok(())
}

/// Who asks once more is not to wait for a node that does not stop.
pub(crate) fn end_at_next_signal() {
    #[cfg(unix)]
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let always = Arc::new(AtomicBool::new(true));
        // Where it cannot be handled, only the harder signal ends it.
        let _ =
            signal_hook::flag::register_conditional_shutdown(signal, EXIT_CANCELED.into(), always);
    }
}

/// Leaves it to the process that started this one: whoever asks them to end asks the whole group of them, and this one ends
/// with the other.
///
/// # Errors
/// The system does not let signals be handled.
pub(crate) fn leave_to_parent() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {}).context("Ctrl-C cannot be handled")?;
    #[cfg(unix)]
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, Arc::default())
            .context("the signal to end cannot be handled")?;
    }
    Ok(())
}
