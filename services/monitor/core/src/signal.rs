//! The life of a signal: raised, acts once, by itself or when a person lets it, and is resolved when what it reported
//! is no longer so.
//!
//! ```text
//!   raise ──> Open, acts ──────────────┬──(cause gone)──> Resolved ──(raised again)──> Open
//!     └─────> Waiting ──(approve)──────┘                                  acts again only after BREAKER
//! ```
//!
//! A signal acts at once. The debounce of `update` is the builder's, where all that calls for a plan is joined.

mod reconcile;
#[cfg(test)]
mod tests;

pub use reconcile::{Observation, Step, reconcile};

use std::time::Duration;

use jiff::Timestamp;
use kiln_model::cause::CauseKind;
use kiln_model::definition::{Mode, UpdatePolicy};
use kiln_model::signal::{Signal, SignalState};
use serde::{Deserialize, Serialize};

/// How soon a signal that was resolved and came back may act again. A cause that its remedy does not cure would
/// otherwise be followed again and again.
pub const BREAKER: Duration = Duration::from_secs(600);

/// How long a resolved signal is remembered.
pub const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// A signal with what decides on its next step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub signal: Signal,
    /// Not before, where it acts by itself.
    pub acts_at: Timestamp,
    /// When it last acted.
    pub acted: Option<Timestamp>,
    pub resolved: Option<Timestamp>,
    /// The server's newest revision when it was raised: a later one answers a report.
    pub generation: u64,
}

/// What others are told of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announcement {
    NeedsUpdate,
    WaitsForApproval,
    Settled,
}

/// A step that this signal can't take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    #[error("it does not wait for an approval: it acts by itself")]
    ActsByItself,
    #[error("what it reported is no longer so")]
    Resolved,
}

/// When a signal that was raised before is raised again: later than that by any clock, also by one that was set back. Whoever
/// followed it knows by its time that this is news.
fn again(raised: Timestamp, now: Timestamp) -> Timestamp {
    now.max(raised.checked_add(Duration::from_millis(1)).unwrap_or(raised))
}

/// Whether a cause acts by itself under a policy.
pub const fn mode(cause: CauseKind, policy: &UpdatePolicy) -> Mode {
    match cause {
        CauseKind::DefinitionChanged => policy.definition,
        CauseKind::PackageUpdates => policy.packages,
        CauseKind::Unhealthy => policy.unhealthy,
        // What died is replaced under every policy. A report was asked for by somebody.
        _ => Mode::Auto,
    }
}

impl Record {
    pub fn is_live(&self) -> bool {
        self.signal.state != SignalState::Resolved
    }

    /// It acted in its present life.
    fn has_acted(&self) -> bool {
        self.acted.is_some_and(|acted| acted >= self.acts_at)
    }

    /// When it acts by itself next, if it does.
    pub fn due(&self) -> Option<Timestamp> {
        (self.signal.state == SignalState::Open && !self.has_acted()).then_some(self.acts_at)
    }

    /// Acts, where its time has come. It counts as raised at that moment: who followed it before its breaker held it
    /// knows by that, that it is to be followed again.
    pub fn act(&self, now: Timestamp) -> Option<Step> {
        let due = self.due()?;
        (due <= now).then(|| {
            let mut record = Self { acted: Some(now), ..self.clone() };
            record.signal.raised = if self.acted.is_some() {
                again(self.signal.raised, now)
            } else {
                self.signal.raised.max(now)
            };
            Step { record, announce: Some(Announcement::NeedsUpdate), fresh: false }
        })
    }

    /// A person lets it act.
    ///
    /// # Errors
    /// [`Illegal`] where nothing waits for a person.
    pub fn approve(&self, actor: &str, now: Timestamp) -> Result<Step, Illegal> {
        match self.signal.state {
            SignalState::Open => Err(Illegal::ActsByItself),
            SignalState::Resolved => Err(Illegal::Resolved),
            SignalState::Waiting => {
                let mut record = self.clone();
                record.signal.state = SignalState::Open;
                record.signal.evidence.push(format!("approved by {actor}"));
                record.signal.raised = now;
                record.acts_at = now;
                record.acted = Some(now);
                Ok(Step { record, announce: Some(Announcement::NeedsUpdate), fresh: false })
            }
        }
    }

    /// What it reported is no longer so.
    pub fn resolve(&self, now: Timestamp) -> Option<Step> {
        self.is_live().then(|| {
            let mut record = self.clone();
            record.signal.state = SignalState::Resolved;
            record.resolved = Some(now);
            Step { record, announce: Some(Announcement::Settled), fresh: false }
        })
    }

    /// It was resolved so long ago that nobody needs it.
    pub fn is_forgotten(&self, now: Timestamp) -> bool {
        self.resolved
            .is_some_and(|resolved| now.duration_since(resolved).unsigned_abs() > KEPT && resolved < now)
    }
}
