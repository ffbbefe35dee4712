//! A run on the terminal: one progress bar, or plain lines where there is no terminal.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use crate::clock;
use crate::console::complain;
use crate::events::{Event, NodeLabel, Observer};

/// Time between two plain progress lines.
const LINE_EVERY: Duration = Duration::from_secs(10);
const REDRAWS_PER_SECOND: u8 = 10;

struct State {
    bar: Option<ProgressBar>,
    stage: String,
    last_line: Instant,
    /// `[2/7]`.
    place: String,
}

/// Shows events on standard error.
pub(crate) struct Terminal {
    is_terminal: bool,
    state: Mutex<State>,
}

impl Terminal {
    pub(crate) fn new() -> Self {
        let state = State {
            bar: None,
            stage: String::new(),
            last_line: Instant::now(),
            place: String::new(),
        };
        Self {
            is_terminal: std::io::stderr().is_terminal(),
            state: Mutex::new(state),
        }
    }

    /// A line above the bar.
    fn line(state: &State, text: &str) {
        match &state.bar {
            Some(bar) => bar.suspend(|| complain(text)),
            None => complain(text),
        }
    }

    fn progress(&self, state: &mut State, node: &NodeLabel, progress: &plugin_api::Progress) {
        let is_new_stage = state.stage != progress.stage.as_str();
        state.stage = progress.stage.to_string();
        if !self.is_terminal {
            let is_last = progress.done >= progress.total;
            if is_new_stage || is_last || state.last_line.elapsed() >= LINE_EVERY {
                state.last_line = Instant::now();
                complain(&format!(
                    "{} {}: {} {}/{}  {}",
                    state.place,
                    node.title,
                    progress.stage,
                    progress.done,
                    progress.total,
                    progress.text
                ));
            }
            return;
        }
        let Some(bar) = &state.bar else { return };
        if is_new_stage || bar.length() != Some(progress.total) {
            bar.set_length(progress.total);
            bar.set_style(style(true));
            bar.set_position(progress.done);
            bar.reset_eta();
        }
        bar.set_prefix(format!(
            "{} {} · {}",
            state.place, node.title, progress.stage
        ));
        bar.set_position(progress.done);
        bar.set_message(progress.text.to_string());
    }
}

fn style(has_length: bool) -> ProgressStyle {
    let template = if has_length {
        "{prefix}  {bar:24.cyan/dim} {pos}/{len}  {msg}  {eta} left"
    } else {
        "{prefix}  {spinner} {elapsed}  {msg}"
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━━─")
}

impl Observer for Terminal {
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>) {
        let mut state = self.state.lock();
        match event {
            Event::Started { index, total } => {
                state.place = format!("[{}/{total}]", index + 1);
                state.stage.clear();
                state.last_line = Instant::now();
                if self.is_terminal {
                    let bar = ProgressBar::new_spinner();
                    bar.set_draw_target(indicatif::ProgressDrawTarget::stderr_with_hz(
                        REDRAWS_PER_SECOND,
                    ));
                    bar.set_style(style(false));
                    bar.set_prefix(format!("{} {}", state.place, node.title));
                    bar.enable_steady_tick(Duration::from_millis(200));
                    state.bar = Some(bar);
                } else {
                    complain(&format!("{} {}", state.place, node.title));
                }
            }
            Event::Cached { .. } => Self::line(
                &state,
                &format!("      {} (unchanged, from the cache)", node.title),
            ),
            Event::Progress(progress) => self.progress(&mut state, node, progress),
            Event::Log { level, text } if *level >= 1 => {
                let kind = if *level >= 2 { "warning: " } else { "" };
                Self::line(&state, &format!("      {kind}{text}"));
            }
            Event::Finished { seconds, .. } => {
                if let Some(bar) = state.bar.take() {
                    bar.finish_and_clear();
                }
                complain(&format!(
                    "{} {} ✓ {}",
                    state.place,
                    node.title,
                    clock::duration(*seconds)
                ));
            }
            Event::Log { .. }
            | Event::Preview { .. }
            | Event::Metric { .. }
            | Event::Saved { .. } => {}
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(bar) = self.state.lock().bar.take() {
            bar.finish_and_clear();
        }
    }
}
