//! Where a build's time goes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_builder_core::build::{Phase, Timing};

/// What the phases of one build have taken so far; all clones are of the same build.
#[derive(Debug, Clone, Default)]
pub struct Timings {
    spent: Arc<Mutex<BTreeMap<Phase, Duration>>>,
}

impl Timings {
    /// Does a part of a phase, which is a span of its own in the trace.
    pub fn during<T>(&self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let (done, took) = watch(phase, work);
        self.add(phase, took);
        done
    }

    pub fn add(&self, phase: Phase, took: Duration) {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        *spent.entry(phase).or_default() += took;
    }

    /// In the order of the phases.
    pub fn so_far(&self) -> Vec<Timing> {
        let spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        spent.iter().map(|(phase, took)| Timing { phase: *phase, took: (*took).into() }).collect()
    }
}

/// Does something in a span of the phase's name, and says how long it took.
pub fn watch<T>(phase: Phase, work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let done = span(phase).in_scope(work);
    (done, began.elapsed())
}

pub fn span(phase: Phase) -> tracing::Span {
    tracing::info_span!("phase", otel.name = phase.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_phase_are_added_up() {
        let timings = Timings::default();
        let other = timings.clone();
        timings.add(Phase::Write, Duration::from_millis(2));
        other.add(Phase::Fetch, Duration::from_micros(700));
        other.add(Phase::Fetch, Duration::from_micros(700));
        assert_eq!(timings.during(Phase::Write, || 7), 7);
        let [fetch, write] = &timings.so_far()[..] else { panic!("{:?}", timings.so_far()) };
        assert_eq!((fetch.phase, fetch.took.0), (Phase::Fetch, 1));
        assert!(write.phase == Phase::Write && write.took.0 >= 2);
    }
}
