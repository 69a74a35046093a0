//! Following signals: each is followed once, one that comes back a bounded number of times.

use std::time::Duration;

use jiff::Timestamp;
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::definition::Mode;
use kiln_model::signal::{Remedy, Signal, SignalId, SignalState};
use serde::{Deserialize, Serialize};

use crate::server::Server;
use crate::time::{after, age};

/// Signals that a server remembers; an older one that comes back is taken for a new one.
const MAX_HANDLED: usize = 64;
/// Times in an hour that a signal which comes back is followed before the breaker trips.
const MAX_RECURRENCES: usize = 3;
const HOUR: Duration = Duration::from_secs(3600);
/// The time that the monitor gets to see that a signal's cause is gone. Its archive poll is the slowest of its looks.
const PERSISTS_AFTER: Duration = Duration::from_secs(600);

/// A signal that was followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handled {
    pub id: SignalId,
    pub raised: Timestamp,
    /// When it was followed within the last hour, oldest first.
    pub followed: Vec<Timestamp>,
    pub outcome: Outcome,
    /// When the outcome was reached.
    pub settled: Option<Timestamp>,
    /// What the breaker says.
    pub tripped: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Pending,
    /// The lock did not differ.
    Unchanged,
    /// A revision was made.
    Shipped,
    /// What it would give is quarantined.
    Held,
    Failed,
}

/// What a signal leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intake {
    /// Nothing to do: not ours, not open, or followed before.
    Ignored,
    /// A plan is wanted.
    Wanted,
    /// The source is to be looked at; the plan follows from there.
    LookAtSource,
    /// It came back too often.
    Tripped,
}

/// The cause that a signal is.
pub fn cause(signal: &Signal) -> Cause {
    let summary = signal.evidence.first().cloned().unwrap_or_else(|| signal.cause.as_str().replace('_', " "));
    Cause {
        kind: signal.cause,
        id: signal.id.to_string(),
        summary,
        actor: signal.reporter.clone(),
        time: signal.raised,
        traceparent: signal.traceparent.clone(),
    }
}

/// A signal is there.
pub fn receive(server: &mut Server, signal: &Signal, now: Timestamp) -> Intake {
    let mode = match signal.cause {
        CauseKind::DefinitionChanged => server.head.update.definition,
        CauseKind::PackageUpdates => server.head.update.packages,
        _ => Mode::Auto,
    };
    let ours = signal.remedy == Remedy::Rebuild && signal.state == SignalState::Open && mode != Mode::Never;
    let cause = cause(signal);
    let followed = if signal.cause == CauseKind::DefinitionChanged {
        // A plan that it led to may still be under way, and another definition may have been taken over since: what a
        // commit brings back is to be taken over again.
        signal.fingerprint == server.head.digest.to_string()
    } else {
        server.is_following(&cause.id)
    };
    if !ours || server.removed || followed {
        return Intake::Ignored;
    }
    let known = server.handled.iter().position(|handled| handled.id == signal.id);
    if known.and_then(|at| server.handled.get(at)).is_some_and(|handled| handled.raised >= signal.raised) {
        return Intake::Ignored;
    }
    // Taken out and put at the end, so that the oldest ones are dropped first.
    let mut handled = match known {
        Some(at) => server.handled.remove(at),
        None => Handled {
            id: signal.id,
            raised: signal.raised,
            followed: Vec::new(),
            outcome: Outcome::Pending,
            settled: None,
            tripped: None,
        },
    };
    handled.raised = signal.raised;
    handled.followed.retain(|time| age(*time, now) < HOUR);
    let intake = if handled.followed.len() >= MAX_RECURRENCES {
        handled.tripped = Some(format!(
            "`{}` came back {} times within an hour after it was followed, and is left alone for an hour: find out what \
             raises it, then run `kiln build {}`",
            cause.summary, MAX_RECURRENCES, server.name
        ));
        Intake::Tripped
    } else {
        handled.followed.push(now);
        handled.outcome = Outcome::Pending;
        handled.settled = None;
        handled.tripped = None;
        if signal.cause == CauseKind::DefinitionChanged {
            Intake::LookAtSource
        } else {
            let due = after(now, server.head.update.debounce.as_duration());
            server.want(cause, due);
            Intake::Wanted
        }
    };
    server.handled.push(handled);
    let excess = server.handled.len().saturating_sub(MAX_HANDLED);
    server.handled.drain(..excess);
    intake
}

/// The source was looked at because of these signals, and there was nothing to take over.
pub fn in_vain(server: &mut Server, causes: &[Cause], now: Timestamp) {
    server.settle(causes, Outcome::Unchanged, now);
}

/// An open signal is seen again by a resync. Where it persists although it was followed, the breaker trips: it is said
/// once, and not followed again until it was away. True where this is news.
pub fn persists(server: &mut Server, signal: &Signal, now: Timestamp) -> bool {
    let name = server.name.clone();
    let Some(handled) = server.handled.iter_mut().find(|handled| handled.id == signal.id) else {
        return false;
    };
    let followed_in_vain = matches!(handled.outcome, Outcome::Unchanged | Outcome::Shipped)
        && handled.settled.is_some_and(|settled| age(settled, now) >= PERSISTS_AFTER);
    if !followed_in_vain || handled.tripped.is_some() || signal.raised > handled.raised {
        return false;
    }
    handled.tripped = Some(format!(
        "`{}` persists although it was followed by a plan, and is not followed again: see `kiln plan {name}` and what \
         reports it",
        cause(signal).summary
    ));
    true
}

/// A signal is resolved: what the breaker said of it no longer holds. True where it had tripped.
pub fn resolved(server: &mut Server, id: SignalId) -> bool {
    let found = server.handled.iter_mut().find(|handled| handled.id == id);
    found.is_some_and(|handled| handled.tripped.take().is_some())
}
