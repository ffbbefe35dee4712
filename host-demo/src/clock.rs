//! Moments and durations as people and clients read them.

use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// `20260725-170912` UTC, for names of folders.
pub(crate) fn compact(moment: Timestamp) -> String {
    moment
        .to_zoned_datetime(TimeZone::UTC)
        .strftime("%Y%m%d-%H%M%S")
        .to_string()
}

/// `2026-07-25T17:09:12Z`.
pub(crate) fn iso(moment: Timestamp) -> String {
    moment.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// `4 min 07 s`, `12.3 s`, `85 ms`.
pub(crate) fn duration(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1000.0)
    } else if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        let whole = seconds.round() as u64;
        let (hours, minutes, seconds) = (whole / 3600, whole / 60 % 60, whole % 60);
        if hours > 0 {
            format!("{hours} h {minutes:02} min")
        } else {
            format!("{minutes} min {seconds:02} s")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_utc_whatever_the_time_zone() {
        let moment = Timestamp::from_second(951_782_400).unwrap();
        assert_eq!(iso(moment), "2000-02-29T00:00:00Z");
        assert_eq!(compact(moment), "20000229-000000");
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(
            [0.0853, 12.34, 247.2, 7260.0].map(duration),
            ["85 ms", "12.3 s", "4 min 07 s", "2 h 01 min"]
        );
    }
}
