//! When an instance is looked at next.

use std::time::Duration;

use crate::health::Track;

/// The first look again at an instance that has not answered yet.
const FIRST_GAP: Duration = Duration::from_millis(5);

/// The same for a check that costs a process inside the instance.
const FIRST_GAP_COSTLY: Duration = Duration::from_millis(100);

/// A look at an instance that has just been launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cadence {
    /// Between two looks, as the definition says.
    pub interval: Duration,
    /// A check that starts a process, and not one that a closed port answers at once.
    pub costly: bool,
    /// Tells instances apart, so that their looks spread.
    pub seed: u64,
}

impl Cadence {
    /// How long to wait after a look that ended at `now`, the `looks`-th of an instance that is watched since `began`.
    ///
    /// Until the first pass the gap is an eighth of the time that was waited already, so a launch is seen at most an
    /// eighth later than it could be; that is about 60 looks in the first 30 seconds, each a refused connection.
    pub fn gap(&self, track: &Track, began: Duration, now: Duration, looks: u64) -> Duration {
        if track.awaits_first_pass(now) {
            let first = if self.costly { FIRST_GAP_COSTLY } else { FIRST_GAP };
            return (now.saturating_sub(began) / 8).max(first).min(self.interval);
        }
        // Up to a sixteenth early, never late: facts that are older than some intervals are no facts.
        self.interval - self.share(self.interval / 16, looks)
    }

    /// How long after a restart an instance that was watched before is looked at first: spread, and soon.
    pub fn first_after_restart(&self) -> Duration {
        self.share(self.interval.min(Duration::from_secs(1)), 0)
    }

    /// A part of `whole` that depends on the instance and on `turn`.
    fn share(&self, whole: Duration, turn: u64) -> Duration {
        // SplitMix64's finalizer; the quality of the spread is all that is asked of it.
        let mut x = self.seed.wrapping_add(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        whole.mul_f64((x >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use kiln_model::signal::HealthState;
    use proptest::prelude::*;

    use super::*;
    use crate::health::{Fact, Terms};

    const SECOND: Duration = Duration::from_secs(1);

    fn terms() -> Terms {
        Terms { interval: SECOND * 2, timeout: SECOND, healthy: 2, unhealthy: 3, start: SECOND * 30 }
    }

    fn launched() -> Track {
        Track::new(&terms(), Duration::ZERO)
    }

    /// The times of all looks at an instance that never answers.
    fn looks(cadence: Cadence, until: Duration) -> Vec<Duration> {
        let track = launched();
        let mut times = vec![Duration::ZERO];
        loop {
            let now = times[times.len() - 1];
            let next = now + cadence.gap(&track, Duration::ZERO, now, times.len() as u64);
            if next > until {
                return times;
            }
            times.push(next);
        }
    }

    #[test]
    fn a_launch_is_looked_at_often_first_and_rarely_later() {
        let cadence = Cadence { interval: SECOND * 2, costly: false, seed: 1 };
        let times = looks(cadence, SECOND * 30);
        assert_eq!(times[1], Duration::from_millis(5));
        assert!(times.iter().filter(|t| **t <= Duration::from_millis(40)).count() >= 8);
        assert!(times.len() < 80, "{}", times.len());
        let costly = looks(Cadence { costly: true, ..cadence }, SECOND * 30);
        assert_eq!(costly[1], Duration::from_millis(100));
    }

    #[test]
    fn after_the_first_pass_the_interval_counts() {
        let cadence = Cadence { interval: SECOND * 2, costly: false, seed: 1 };
        let passed = launched().next(Fact::Passed, &terms(), Duration::ZERO);
        let gap = passed.map(|track| cadence.gap(&track, Duration::ZERO, Duration::ZERO, 1));
        assert!(gap.is_ok_and(|gap| gap > Duration::from_millis(1870)));
    }

    proptest! {
        #[test]
        fn no_gap_is_longer_than_the_interval_nor_zero(
            seed in any::<u64>(),
            looks in any::<u64>(),
            interval in 1_u64..100_000,
            now in 0_u64..1_000_000,
            healthy in any::<bool>(),
        ) {
            let cadence = Cadence { interval: Duration::from_millis(interval), costly: false, seed };
            let now = Duration::from_millis(now);
            let state = if healthy { HealthState::Healthy } else { HealthState::Starting };
            let track = Track::resume(state, false, &terms(), Duration::ZERO);
            let gap = cadence.gap(&track, Duration::ZERO, now, looks);
            prop_assert!(gap <= cadence.interval && !gap.is_zero());
            if healthy {
                prop_assert!(gap >= cadence.interval * 15 / 16);
            }
            prop_assert!(cadence.first_after_restart() <= SECOND.min(cadence.interval));
        }

        /// At any moment of the start, the next look is at most an eighth of the waited time away, or 5 ms.
        #[test]
        fn the_wait_for_a_first_pass_grows_with_what_was_waited(ready in 0_u64..16_000) {
            let ready = Duration::from_millis(ready);
            let seen = looks(Cadence { interval: SECOND * 2, costly: false, seed: 7 }, SECOND * 20)
                .into_iter()
                .find(|time| *time >= ready);
            let late = seen.map(|seen| seen - ready);
            prop_assert!(late.is_some_and(|late| late <= (ready / 8).max(Duration::from_millis(5))));
        }
    }
}
