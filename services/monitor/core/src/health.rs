//! The health of one instance, with hysteresis: a single answer never flips it.

use std::time::Duration;

use kiln_model::run::HealthPolicy;
use kiln_model::signal::HealthState;

/// How often an instance that declares no check is taken for running.
pub const ENGINE_INTERVAL: Duration = Duration::from_secs(1);

/// No interval is shorter, whatever a release says.
const SHORTEST: Duration = Duration::from_millis(10);

/// Failures between passes, which no count of answers in a row sees. Each adds three and each pass takes one away, so that
/// they add up only where more than one answer in four fails. Pass and failure in turn reach the bound at the tenth failure;
/// from there on the instance flaps, until passes have taken all of it away.
const OF_A_FAILURE: u32 = 3;
const FLAPPING: u32 = 20;

/// What of a health policy the state machine needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    pub interval: Duration,
    pub timeout: Duration,
    pub healthy: u32,
    pub unhealthy: u32,
    pub start: Duration,
}

impl Terms {
    /// Without a policy an instance is healthy while the engine says that it runs.
    pub fn of(policy: Option<&HealthPolicy>) -> Self {
        policy.map_or(
            Self {
                interval: ENGINE_INTERVAL,
                timeout: ENGINE_INTERVAL,
                healthy: 1,
                unhealthy: 1,
                // It is looked for often until the engine tells of it.
                start: Duration::from_secs(10),
            },
            |policy| Self {
                interval: policy.interval.as_duration().max(SHORTEST),
                timeout: policy.timeout.as_duration(),
                healthy: policy.healthy.max(1),
                unhealthy: policy.unhealthy.max(1),
                start: policy.start.as_duration(),
            },
        )
    }
}

/// One thing that was learned of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact {
    /// A check passed.
    Passed,
    /// A check failed. A check that could not be asked is no fact.
    Failed,
    /// The engine says that it does not run. It is never started again.
    Gone,
    /// The engine does not know it: as good as gone, until it is known to run after all.
    Absent,
    /// The engine says that it runs.
    Runs,
}

/// A fact that can't follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    /// An answer that was under way when the instance ended.
    #[error("an instance that is gone has no health that could change")]
    AfterGone,
}

/// What the answers so far make of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Track {
    state: HealthState,
    passes: u32,
    failures: u32,
    /// Of failures that followed a pass; see [`FLAPPING`].
    unrest: u32,
    flaps: bool,
    passed_once: bool,
    /// It is gone only as far as the engine did not know it.
    absent: bool,
    /// Monotonic. Until then, failures of an instance that was never healthy do not count.
    shielded_until: Duration,
}

impl Track {
    /// An instance that is heard of at `now`, monotonic. Its start begins here, and not when the deployer says that it was
    /// launched: a clock that was set, or that differs from the deployer's, would take its time from an instance that starts
    /// slowly, and a good release would be convicted. A restart of the monitor gives it anew.
    pub fn new(terms: &Terms, now: Duration) -> Self {
        Self {
            state: HealthState::Starting,
            passes: 0,
            failures: 0,
            unrest: 0,
            flaps: false,
            passed_once: false,
            absent: false,
            shielded_until: now + terms.start,
        }
    }

    /// One whose state was kept over a restart. The answers before it are forgotten: only new ones change the state.
    pub fn resume(state: HealthState, absent: bool, terms: &Terms, now: Duration) -> Self {
        let passed_once = matches!(state, HealthState::Healthy | HealthState::Unhealthy);
        Self { state, passed_once, absent, ..Self::new(terms, now) }
    }

    pub const fn state(&self) -> HealthState {
        self.state
    }

    /// Gone, though nobody saw it end.
    pub const fn is_absent(&self) -> bool {
        self.absent
    }

    /// Answers in a row that failed and counted.
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// It has never answered, and may still take its time.
    pub fn awaits_first_pass(&self, now: Duration) -> bool {
        self.state == HealthState::Starting && !self.passed_once && now < self.shielded_until
    }

    /// # Errors
    /// [`Illegal::AfterGone`] for an answer of an instance that is gone.
    pub fn next(self, fact: Fact, terms: &Terms, now: Duration) -> Result<Self, Illegal> {
        match (self.state, fact) {
            (HealthState::Gone, Fact::Gone) => Ok(Self { absent: false, ..self }),
            (HealthState::Gone, Fact::Absent) => Ok(self),
            // What it answered before its absence does not count for its next state.
            (HealthState::Gone, Fact::Runs) if self.absent => {
                Ok(Self { state: HealthState::Starting, absent: false, ..self })
            }
            (HealthState::Gone, _) => Err(Illegal::AfterGone),
            (_, Fact::Runs) => Ok(self),
            (_, Fact::Gone | Fact::Absent) => {
                let absent = fact == Fact::Absent;
                Ok(Self { state: HealthState::Gone, passes: 0, failures: 0, absent, ..self })
            }
            (_, Fact::Passed) => {
                let passes = self.passes.saturating_add(1);
                let unrest = self.unrest.saturating_sub(1);
                let flaps = self.flaps && unrest > 0;
                let state = if passes >= terms.healthy && !flaps { HealthState::Healthy } else { self.state };
                Ok(Self { state, passes, failures: 0, unrest, flaps, passed_once: true, ..self })
            }
            (HealthState::Starting, Fact::Failed) if now < self.shielded_until => {
                Ok(Self { passes: 0, ..self })
            }
            (_, Fact::Failed) => {
                let failures = self.failures.saturating_add(1);
                let more = if self.failures == 0 { OF_A_FAILURE } else { 0 };
                let unrest = (self.unrest + more).min(FLAPPING);
                let flaps = self.flaps || unrest == FLAPPING;
                let is_unhealthy = failures >= terms.unhealthy || flaps;
                let state = if is_unhealthy { HealthState::Unhealthy } else { self.state };
                Ok(Self { state, passes: 0, failures, unrest, flaps, ..self })
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Duration = Duration::from_secs(30);

    fn terms(healthy: u32, unhealthy: u32, start: Duration) -> Terms {
        Terms { interval: Duration::from_secs(2), timeout: Duration::from_secs(1), healthy, unhealthy, start }
    }

    /// Feeds answers a second apart: `+` passed, `-` failed, `x` gone, `?` absent, `!` runs; gives the states after each.
    fn story(terms: &Terms, answers: &str) -> String {
        let mut track = Track::new(terms, Duration::ZERO);
        let mut states = String::new();
        for (second, answer) in (1..).zip(answers.chars()) {
            let fact = match answer {
                '+' => Fact::Passed,
                '-' => Fact::Failed,
                '?' => Fact::Absent,
                '!' => Fact::Runs,
                _ => Fact::Gone,
            };
            if let Ok(next) = track.next(fact, terms, Duration::from_secs(second)) {
                track = next;
            }
            states.push(match track.state() {
                HealthState::Starting => 's',
                HealthState::Healthy => 'h',
                HealthState::Unhealthy => 'u',
                HealthState::Gone => 'x',
            });
        }
        states
    }

    #[test]
    fn one_answer_never_flips_it() {
        let none = terms(2, 3, Duration::ZERO);
        let ten = terms(2, 3, Duration::from_secs(10));
        for (terms, answers, states) in [
            (none, "++", "sh"),
            (none, "+-++", "sssh"),
            (none, "---", "ssu"),
            (none, "++--+---", "shhhhhhu"),
            (none, "---+-++", "ssuuuuh"),
            // Nine failures within the start do not count, nor do they later.
            (ten, "------------", "sssssssssssu"),
            // A pass within the start counts.
            (ten, "-++", "ssh"),
            // Once healthy, the start no longer shields.
            (ten, "++---", "shhhu"),
            // Gone is final, whatever was under way.
            (none, "++x++", "shxxx"),
            (none, "x---", "xxxx"),
            (none, "++x!", "shxx"),
            // That the engine did not know it is undone when it does; that it ended is not.
            (none, "++?-!++", "shxxssh"),
            (none, "?x!", "xxx"),
            (none, "x?!", "xxx"),
            (none, "!++", "ssh"),
        ] {
            assert_eq!(story(&terms, answers), states, "{answers}");
        }
    }

    /// What answers every second time never fails twice in a row.
    #[test]
    fn an_instance_that_flaps_is_unhealthy_until_it_has_kept_well() {
        let once = terms(1, 2, Duration::ZERO);
        let flapping = "+-".repeat(10);
        assert_eq!(story(&once, &flapping), format!("{}u", "h".repeat(19)));
        let well = format!("{flapping}{}", "+".repeat(20));
        assert_eq!(story(&once, &well), format!("{}{}h", "h".repeat(19), "u".repeat(20)));
        // One failure in four is what an instance may have; a time without any answer is no flapping.
        let (seldom, away) = ("+++-".repeat(100), format!("+{}+", "-".repeat(100)));
        assert_eq!(story(&once, &seldom), "h".repeat(400));
        assert!(story(&once, &away).ends_with("uh"));
    }

    #[test]
    fn the_start_counts_from_when_it_was_heard_of() {
        let heard_of = Duration::from_secs(1000);
        let track = Track::new(&terms(1, 1, START), heard_of);
        assert!(track.awaits_first_pass(heard_of + Duration::from_secs(29)));
        assert!(!track.awaits_first_pass(heard_of + START));
    }

    #[test]
    fn a_restart_keeps_the_state_and_forgets_the_answers() {
        let terms = terms(2, 2, START);
        let now = Duration::ZERO;
        let resumed = Track::resume(HealthState::Healthy, false, &terms, now);
        assert!(!resumed.awaits_first_pass(now));
        let once = resumed.next(Fact::Failed, &terms, now).unwrap();
        assert_eq!(once.state(), HealthState::Healthy);
        let twice = once.next(Fact::Failed, &terms, now).unwrap();
        assert_eq!(twice.state(), HealthState::Unhealthy);
        let gone = Track::resume(HealthState::Gone, false, &terms, now);
        assert_eq!(gone.next(Fact::Passed, &terms, now), Err(Illegal::AfterGone));
        assert_eq!(gone.next(Fact::Runs, &terms, now), Err(Illegal::AfterGone));
        let absent = Track::resume(HealthState::Gone, true, &terms, now);
        let back = absent.next(Fact::Runs, &terms, now).unwrap();
        assert_eq!((back.state(), back.is_absent()), (HealthState::Starting, false));
    }

    proptest! {
        /// Against the words of the definition: healthy after n passes in a row, unhealthy after n failures in a row
        /// that counted, and nothing else changes it where it does not flap.
        #[test]
        fn a_state_changes_only_by_the_last_answers(
            healthy in 1_u32..4,
            unhealthy in 1_u32..4,
            start in 0_u64..12,
            // Seven failures between passes, which no count of fewer can take to the bound.
            answers in proptest::collection::vec(any::<bool>(), 0..14),
        ) {
            let terms = terms(healthy, unhealthy, Duration::from_secs(start));
            let mut track = Track::new(&terms, Duration::ZERO);
            let mut expected = HealthState::Starting;
            let mut counted: Vec<bool> = Vec::new();
            for (second, passed) in (1..).zip(answers) {
                let now = Duration::from_secs(second);
                let shielded = expected == HealthState::Starting && second < start;
                let fact = if passed { Fact::Passed } else { Fact::Failed };
                if passed || !shielded {
                    counted.push(passed);
                } else {
                    // It interrupts a row of passes all the same.
                    counted.clear();
                }
                let row = |wanted: bool, n: u32| {
                    counted.len() >= n as usize && counted.iter().rev().take(n as usize).all(|p| *p == wanted)
                };
                if row(true, healthy) {
                    expected = HealthState::Healthy;
                } else if row(false, unhealthy) {
                    expected = HealthState::Unhealthy;
                }
                track = track.next(fact, &terms, now).unwrap();
                prop_assert_eq!(track.state(), expected);
            }
        }
    }
}
