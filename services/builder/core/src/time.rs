use std::time::Duration;

use jiff::Timestamp;

/// `time` plus `duration`, at most the end of time.
pub(crate) fn after(time: Timestamp, duration: Duration) -> Timestamp {
    time.checked_add(duration).unwrap_or(Timestamp::MAX)
}

/// How long ago `time` was; nothing where it lies ahead (the clock was set back).
pub(crate) fn age(time: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(time)).unwrap_or_default()
}

/// The longest wait between two tries.
pub(crate) const LONGEST: Duration = Duration::from_secs(600);

/// When something that was put off until `at`, for at most `longest`, is due. What lies further ahead was put off before the
/// clock was set back, and waits no longer.
pub(crate) fn due_within(longest: Duration, at: Timestamp, now: Timestamp) -> Timestamp {
    if at > after(now, longest) { now } else { at }
}

/// The same of a wait between two tries.
pub(crate) fn due(at: Timestamp, now: Timestamp) -> Timestamp {
    due_within(LONGEST, at, now)
}

/// 2 s, 4 s, 8 s … up to ten minutes: an archive that is back after a hiccup is asked soon, one that is away for hours
/// is asked six times an hour.
pub(crate) fn backoff(attempt: u32) -> Duration {
    Duration::from_secs(2u64.saturating_pow(attempt.clamp(1, 10))).min(LONGEST)
}
