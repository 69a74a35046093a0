//! Durations that may be of days.

use std::time::Duration;

use jiff::SignedDuration;

const DAY: u64 = 24 * 3600;

/// How long something is to be good or kept: `90m`, `12h`, `30d`.
///
/// # Errors
/// In words, where it is no duration, or not between a minute and ten years.
pub fn lifetime(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration between 1m and 3650d, such as 12h or 30d");
    let seconds = match text.strip_suffix('d') {
        Some(days) => days.parse::<u64>().ok().and_then(|days| days.checked_mul(DAY)).ok_or_else(wrong)?,
        None => {
            let duration: SignedDuration = text.parse().map_err(|_| wrong())?;
            u64::try_from(duration.as_secs()).map_err(|_| wrong())?
        }
    };
    if (60..=3650 * DAY).contains(&seconds) { Ok(Duration::from_secs(seconds)) } else { Err(wrong()) }
}

/// How long what no build uses is kept: longer than any build takes, so that none loses what it began with.
pub(super) fn check_unused(text: &str) -> Result<Duration, String> {
    let unused = lifetime(text)?;
    if unused >= Duration::from_secs(DAY) { Ok(unused) } else { Err(format!("`{text}` is less than a day")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_has_a_unit_and_bounds() {
        let hours = |hours: u64| Ok(Duration::from_secs(hours * 3600));
        assert_eq!(
            [lifetime("12h"), lifetime("30d"), lifetime("90m")],
            [hours(12), hours(720), Ok(Duration::from_secs(5400))]
        );
        for bad in ["", "d", "-1d", "12", "30s", "99999999999999999999d", "3651d", "-2h"] {
            assert!(lifetime(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_unused_is_kept_for_a_day_at_least() {
        assert_eq!(check_unused("1d"), check_unused("24h"));
        assert!(check_unused("1d").is_ok());
        assert!(check_unused("23h").unwrap_err().contains("less than a day"));
    }
}
