//! When a state is written: by time, so that a kill loses little, and seldom enough that nobody notices.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A kill loses no more than this, or one step if that is longer, where writing is quick enough for [`SHARE`].
const LIMIT: Duration = Duration::from_secs(30);
/// The first one comes sooner: it shows what one costs.
const FIRST: Duration = Duration::from_secs(2);
/// A state is written no sooner than this many times what that takes: writing is below 2 % of the time.
const SHARE: u32 = 60;
/// Bytes a second that are expected of a disk before anything was written.
const EXPECTED: u64 = 250 << 20;

/// Set to 0 by tests: every state is written.
const VARIABLE: &str = "CONCEPTLOOM_TESTS_PACE";

/// See the module. It decides when a state is written, never what is in it.
#[derive(Debug)]
pub struct Pace {
    written: Instant,
    asked: Instant,
    /// What the last one took.
    cost: Option<Duration>,
}

impl Default for Pace {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            written: now,
            asked: now,
            cost: None,
        }
    }
}

impl Pace {
    /// Asked after every step: whether a state of about so many bytes is to be written now.
    pub fn is_due(&mut self, bytes: u64) -> bool {
        self.is_due_at(Instant::now(), bytes) || is_hurried()
    }

    fn is_due_at(&mut self, now: Instant, bytes: u64) -> bool {
        let (since, step) = (now - self.written, now - self.asked);
        self.asked = now;
        let expected = || Duration::from_secs_f64(bytes as f64 / EXPECTED as f64);
        let limit = if self.cost.is_some() { LIMIT } else { FIRST };
        // Another step such as this one would be too many.
        since + step >= limit && since >= self.cost.unwrap_or_else(expected) * SHARE
    }

    /// A state was written, or could not be.
    pub fn was_written(&mut self, cost: Duration) {
        self.written = Instant::now();
        self.asked = self.written;
        self.cost = Some(cost);
    }
}

fn is_hurried() -> bool {
    static HURRIED: OnceLock<bool> = OnceLock::new();
    *HURRIED.get_or_init(|| std::env::var_os(VARIABLE).is_some_and(|value| value == "0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds at which states are written in `n` steps of `step` seconds; each costs `cost`.
    fn written(n: usize, step: f64, cost: f64, bytes: u64) -> Vec<f64> {
        let begun = Instant::now();
        let at = |seconds: f64| begun + Duration::from_secs_f64(seconds);
        let mut pace = Pace {
            written: begun,
            asked: begun,
            cost: None,
        };
        let (mut now, mut times) = (0.0, Vec::new());
        for _ in 0..n {
            now += step;
            if pace.is_due_at(at(now), bytes) {
                times.push(now);
                now += cost;
                (pace.written, pace.asked) = (at(now), at(now));
                pace.cost = Some(Duration::from_secs_f64(cost));
            }
        }
        times
    }

    #[test]
    fn little_is_lost_and_little_is_spent() {
        for (step, cost) in [
            (0.05, 0.01),
            (1.0, 0.2),
            (7.0, 0.1),
            (12.0, 0.3),
            (45.0, 0.5),
        ] {
            let times = written(2000, step, cost, 0);
            let mut before = 0.0;
            for &time in &times {
                let lost = time - before;
                assert!(lost <= f64::max(30.0, step) + 1e-6, "{step} {cost}: {lost}");
                before = time + cost;
            }
            let all = 2000.0 * step;
            assert!(times.len() as f64 * cost < 0.02 * all, "{step} {cost}");
        }
    }

    #[test]
    fn what_takes_long_is_written_seldom() {
        let (step, cost) = (6.0, 20.0);
        let bytes = 5 << 30;
        let times = written(1000, step, cost, bytes);
        assert!(times[0] > 1000.0, "{}", times[0]);
        assert!(
            times
                .windows(2)
                .all(|pair| pair[1] - pair[0] >= 60.0 * cost)
        );
        assert!(times.len() as f64 * cost < 0.02 * 1000.0 * step);
    }
}
