//! A plan that is wanted: what asks for it, and when it is made.

use std::time::Duration;

use jiff::Timestamp;
use kiln_model::cause::{Cause, CauseKind};
use serde::{Deserialize, Serialize};

use crate::time::{after, backoff, due, due_within};

/// More causes than this are told apart by nobody; further ones still ask for the plan, unnamed.
const MAX_CAUSES: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// In the order in which they came; the first one's trace is followed.
    pub causes: Vec<Cause>,
    /// The end of the debounce, or of the backoff.
    pub due: Timestamp,
    /// Failed attempts in a row.
    pub attempts: u32,
}

impl Wanted {
    pub fn new(cause: Cause, due: Timestamp) -> Self {
        Self { causes: vec![cause], due, attempts: 0 }
    }

    /// A further cause joins: the plan is due at the earlier of the two times, so that a stream of signals can't put it
    /// off for ever, and what a person asks for does not wait for a debounce.
    pub fn join(&mut self, cause: Cause, due: Timestamp) {
        self.due = self.due.min(due);
        if self.causes.iter().all(|known| known.id != cause.id) && self.causes.len() < MAX_CAUSES {
            self.causes.push(cause);
        }
    }

    /// When the plan is due, as of `now`: at once where the clock was set back since it was put off, which is for no longer
    /// than `debounce`.
    pub fn due(&self, now: Timestamp, debounce: Duration) -> Timestamp {
        match self.attempts {
            0 => due_within(debounce, self.due, now),
            _ => due(self.due, now),
        }
    }

    pub fn names(&self, id: &str) -> bool {
        self.causes.iter().any(|cause| cause.id == id)
    }

    /// Nothing but what Kiln noticed by itself in the archives or was told by another system.
    pub fn is_automatic(&self) -> bool {
        self.causes.iter().all(|cause| is_automatic(cause.kind))
    }

    /// The same wish after a failure that may pass.
    pub fn again(mut self, now: Timestamp) -> Self {
        self.attempts = self.attempts.saturating_add(1);
        self.due = after(now, backoff(self.attempts));
        self
    }

    /// What is left of the wish after a plan for `planned` was made; causes that came meanwhile want one more.
    pub fn without(mut self, planned: &[Cause]) -> Option<Self> {
        self.causes.retain(|cause| planned.iter().all(|done| done.id != cause.id));
        self.attempts = 0;
        (!self.causes.is_empty()).then_some(self)
    }
}

/// Whether a cause of this kind counts against the bound on what Kiln does by itself in an hour.
pub fn is_automatic(kind: CauseKind) -> bool {
    matches!(kind, CauseKind::PackageUpdates | CauseKind::Reported)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_puts_nothing_off() {
        let asked: Timestamp = "2026-01-02T12:00:00Z".parse().unwrap();
        let cause = Cause {
            kind: CauseKind::Manual,
            id: "c1".to_owned(),
            summary: String::new(),
            actor: "me".to_owned(),
            time: asked,
            traceparent: String::new(),
        };
        let debounce = Duration::from_secs(30);
        let wanted = Wanted::new(cause, after(asked, debounce));
        assert_eq!(wanted.due(asked, debounce), wanted.due);
        let back: Timestamp = "2026-01-02T08:00:00Z".parse().unwrap();
        assert_eq!(wanted.due(back, debounce), back);
        let again = wanted.again(asked);
        assert_eq!(again.due(asked, debounce), after(asked, Duration::from_secs(2)));
        assert_eq!(again.due(back, debounce), back);
    }
}
