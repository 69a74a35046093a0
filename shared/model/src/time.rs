//! Time as an argument: cores never ask a clock.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The two clocks at one moment.
///
/// Wall time serves ages, windows and what people read; soak and deadline are sums of monotonic ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    pub wall: Timestamp,
    /// Since an arbitrary start of the process; never compared across processes.
    pub monotonic: Duration,
}

/// More than a century.
const UNKNOWN: Duration = Duration::from_secs(1 << 32);

/// How old something is: from when that was known on, the steady clock counts, so a wall clock that is set makes nothing older
/// or younger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Age {
    had: Duration,
    at: Duration,
}

impl Age {
    pub const fn new(had: Duration, now: Now) -> Self {
        Self { had, at: now.monotonic }
    }

    /// Of what may be of any time: older than all that matters, and still a duration that can be told.
    pub const fn unknown(now: Now) -> Self {
        Self::new(UNKNOWN, now)
    }

    pub fn is_unknown(&self) -> bool {
        self.had >= UNKNOWN
    }

    /// By the wall clock. That it was set back is seen where the time is yet to come: how old something is, is unknown then.
    pub fn since(time: Timestamp, now: Now) -> Self {
        let had = Duration::try_from(now.wall.duration_since(time));
        had.map_or_else(|_| Self::unknown(now), |had| Self::new(had, now))
    }

    pub const fn at(&self, now: Now) -> Duration {
        self.had.saturating_add(now.monotonic.saturating_sub(self.at))
    }
}

/// A duration that is stored and hashed as whole milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Millis {
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1000)
    }

    pub const fn as_duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl From<Duration> for Millis {
    fn from(duration: Duration) -> Self {
        Self(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    }
}
