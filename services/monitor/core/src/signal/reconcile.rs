//! From what is seen now to the signals that should stand.

use jiff::Timestamp;
use kiln_model::cause::CauseKind;
use kiln_model::definition::{Mode, UpdatePolicy};
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::signal::{Remedy, Signal, SignalId, SignalState};

use super::{Announcement, BREAKER, Record, again, mode};

/// Something about a server that calls for an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    pub server: ServerName,
    pub cause: CauseKind,
    pub fingerprint: String,
    pub remedy: Remedy,
    pub evidence: Vec<String>,
    pub instance: Option<InstanceId>,
    /// Since when the fix could be had.
    pub since: Timestamp,
    pub reporter: String,
    /// The server's newest revision.
    pub generation: u64,
}

impl Observation {
    pub fn id(&self) -> SignalId {
        SignalId::new(&self.server, self.cause, &self.fingerprint)
    }
}

/// A record as it is to be written, and what is said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub record: Record,
    pub announce: Option<Announcement>,
    /// It begins a life, and with it a trace.
    pub fresh: bool,
}

/// The steps from the `known` signals of one server to those that `observed` calls for.
///
/// `known` holds the signals of one server and one kind of cause, all that live and those resolved ones whose cause is
/// observed again. Each that lives and is not observed is resolved.
pub fn reconcile(
    known: &[Record],
    observed: &[Observation],
    policy: &UpdatePolicy,
    now: Timestamp,
) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for observation in observed {
        let id = observation.id();
        if steps.iter().any(|step| step.record.signal.id == id) {
            continue;
        }
        let record = known.iter().find(|record| record.signal.id == id);
        steps.extend(see(record, observation, policy, now));
    }
    let gone = known.iter().filter(|record| !observed.iter().any(|seen| seen.id() == record.signal.id));
    steps.extend(gone.filter_map(|record| record.resolve(now)));
    steps
}

/// What the sight of a cause makes of its signal.
fn see(record: Option<&Record>, seen: &Observation, policy: &UpdatePolicy, now: Timestamp) -> Option<Step> {
    let mode = mode(seen.cause, policy);
    match record {
        None => raise(seen, mode, now),
        Some(record) if record.is_live() => follow_policy(record, mode, now),
        // The same report is one signal, however often it comes.
        Some(_) if seen.cause == CauseKind::Reported => None,
        Some(record) => {
            let mut step = raise(seen, mode, now)?;
            // A definition comes back only by another commit, which somebody meant: it can't go round by itself.
            let held = match record.acted {
                Some(acted) if seen.cause != CauseKind::DefinitionChanged => (acted + BREAKER).max(now),
                _ => now,
            };
            step.record.signal.raised = again(record.signal.raised, now);
            if held > now {
                step.record.acts_at = held;
                step.record.acted = record.acted;
                step.record.signal.raised = record.signal.raised;
                step.announce = step.announce.filter(|said| *said != Announcement::NeedsUpdate);
                step.record
                    .signal
                    .evidence
                    .push(format!("came back after it was settled: acts again at {held}"));
            }
            Some(step)
        }
    }
}

fn raise(seen: &Observation, mode: Mode, now: Timestamp) -> Option<Step> {
    let Observation { server, cause, fingerprint, remedy, evidence, instance, since, reporter, generation } =
        seen.clone();
    let state = match mode {
        Mode::Auto => SignalState::Open,
        Mode::Approve => SignalState::Waiting,
        Mode::Never => return None,
    };
    let signal = Signal {
        id: seen.id(),
        server,
        cause,
        fingerprint,
        remedy,
        evidence,
        instance,
        state,
        // An archive's clock, or a committer's, may run ahead.
        since: since.min(now),
        raised: now,
        reporter,
        traceparent: String::new(),
    };
    let record = Record { signal, acts_at: now, acted: None, resolved: None, generation };
    let mut step = match state {
        SignalState::Open => record.act(now).unwrap_or(Step { record, announce: None, fresh: true }),
        _ => Step { record, announce: Some(Announcement::WaitsForApproval), fresh: true },
    };
    step.fresh = true;
    Some(step)
}

/// A signal that lives, and has not acted, under a policy that may have changed since.
fn follow_policy(record: &Record, mode: Mode, now: Timestamp) -> Option<Step> {
    match (record.signal.state, mode) {
        (SignalState::Open, _) if record.has_acted() => None,
        (_, Mode::Never) => record.resolve(now),
        (SignalState::Open, Mode::Approve) => {
            let mut record = record.clone();
            record.signal.state = SignalState::Waiting;
            Some(Step { record, announce: Some(Announcement::WaitsForApproval), fresh: false })
        }
        (SignalState::Waiting, Mode::Auto) => {
            let mut record = record.clone();
            record.signal.state = SignalState::Open;
            Some(record.act(now).unwrap_or(Step { record, announce: None, fresh: false }))
        }
        (SignalState::Open, Mode::Auto) => record.act(now),
        _ => None,
    }
}
