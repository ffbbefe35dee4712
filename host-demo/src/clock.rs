//! Dates without a calendar library. All times are UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment as a person reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    seconds: u64,
}

impl Moment {
    pub(crate) fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        Self {
            seconds: since.as_secs(),
        }
    }

    /// Year, month and day of the Gregorian calendar (Howard Hinnant, `civil_from_days`).
    fn date(self) -> (u64, u64, u64) {
        let days = self.seconds / 86_400 + 719_468;
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        (year_of_era + era * 400 + u64::from(month <= 2), month, day)
    }

    fn time(self) -> (u64, u64, u64) {
        let in_day = self.seconds % 86_400;
        (in_day / 3600, in_day / 60 % 60, in_day % 60)
    }

    /// `20260725-170912`, for names of folders.
    pub(crate) fn compact(self) -> String {
        let ((year, month, day), (hour, minute, second)) = (self.date(), self.time());
        format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
    }

    /// `2026-07-25T17:09:12Z`.
    pub(crate) fn iso(self) -> String {
        let ((year, month, day), (hour, minute, second)) = (self.date(), self.time());
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
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
    fn dates_are_right_across_leap_years() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (4_102_444_799, "2099-12-31T23:59:59Z"),
        ] {
            assert_eq!(Moment { seconds }.iso(), expected);
        }
        assert_eq!(
            Moment {
                seconds: 951_782_400
            }
            .compact(),
            "20000229-000000"
        );
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(
            [0.0853, 12.34, 247.2, 7260.0].map(duration),
            ["85 ms", "12.3 s", "4 min 07 s", "2 h 01 min"]
        );
    }
}
