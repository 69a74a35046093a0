//! One watched instance: what is known of it now, and what of that is written.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use kiln_api::convert::{
    Invalid, from_optional_timestamp, optional, optional_text, text, to_age, to_duration, to_timestamp,
};
use kiln_api::{deployer, events, monitor, types};
use kiln_model::cause::CauseKind;
use kiln_model::check::{Check, CheckResult};
use kiln_model::event::{EventType, NewEvent, Service};
use kiln_model::name::{InstanceId, NodeName};
use kiln_model::run::HealthPolicy;
use kiln_model::signal::{HealthState, Remedy};
use kiln_model::time::{Age, Now};
use kiln_monitor_core::health::{Fact, Terms, Track};
use kiln_monitor_core::schedule::Cadence;
use kiln_monitor_core::signal::Observation;
use prost::Message;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::documents::{HEALTH, Seen, Watched};
use crate::ports::Target;

/// Answers that are kept.
const CHECKS: usize = 10;

/// What the deployer told of an instance.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) id: InstanceId,
    node: NodeName,
    pub(super) seen: Seen,
    pub(super) retired: bool,
    leaving: bool,
    /// It ended by itself, and why.
    ended: Option<String>,
    address: Option<IpAddr>,
    policy: Option<HealthPolicy>,
    launched: Timestamp,
    traceparent: String,
}

impl Facts {
    /// What another replica was told.
    fn of(document: &Watched) -> Self {
        let ended = document.state == HealthState::Gone && !document.absent;
        Self {
            id: document.id.clone(),
            node: document.node.clone(),
            seen: document.seen.clone(),
            retired: false,
            leaving: document.leaving,
            ended: ended.then(|| document.detail.clone()),
            address: document.address,
            policy: document.policy.clone(),
            launched: document.launched,
            traceparent: document.traceparent.clone(),
        }
    }
}

/// Reads the deployer's message.
pub(super) fn read(epoch: &str, message: deployer::Instance, now: Timestamp) -> Result<Facts, Invalid> {
    use deployer::InstanceState as State;
    let state = State::try_from(message.state)
        .map_err(|_| Invalid::new("state", format!("has the value {}, which is unknown", message.state)))?;
    // One whose launch was cut off never was there: the deployer launches another one unasked.
    let leaving = state == State::Draining || state == State::Failed && message.cut_off;
    let ended = matches!(state, State::Exited | State::Failed).then(|| match message.exit_code {
        _ if state == State::Failed => format!("could not be launched: {}", message.detail),
        Some(code) => format!("exited with status {code}: {}", message.detail),
        None => format!("exited: {}", message.detail),
    });
    Ok(Facts {
        id: text("id", &message.id)?,
        node: optional_text("node", &message.node)?.unwrap_or_else(NodeName::local),
        seen: Seen { epoch: epoch.to_owned(), version: message.version },
        retired: state == State::Retired,
        leaving,
        ended: ended.map(|detail| detail.trim_end_matches([':', ' ']).to_owned()),
        address: optional_text("address", &message.address)?,
        policy: optional("health_policy", message.health_policy)?,
        launched: from_optional_timestamp("launched", message.launched)?.unwrap_or(now),
        traceparent: message.cause.map(|cause| cause.traceparent).unwrap_or_default(),
    })
}

/// A change, or an answer that changed nothing.
#[derive(Debug, Clone)]
pub struct Told(pub Arc<monitor::Health>);

impl Told {
    pub(super) fn new(health: monitor::Health) -> Self {
        Self(Arc::new(health))
    }
}

pub(super) struct Tracked {
    pub(super) id: InstanceId,
    live: Mutex<Live>,
    /// Something other than time calls for attention.
    pub(super) wake: Notify,
    /// It is forgotten, or the monitor ends: its task ends, and nothing of it is written any more.
    pub(super) ended: CancellationToken,
    /// One writer at a time.
    pub(super) writing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Live {
    watched: Watched,
    /// Of the newest answer.
    age: Option<Age>,
    track: Track,
    terms: Terms,
    cadence: Cadence,
    /// When it was first looked at, or could have been.
    began: Duration,
    looks: u64,
    /// Version of the document; 0 while there is none.
    version: u64,
    /// State, and whether it leaves, as the document says.
    written: Option<(HealthState, bool)>,
    /// What of the deployer's is known to the store as handled.
    handled: Option<Seen>,
    /// Whether this replica looked at it, the last time that was asked.
    mine: bool,
}

/// A document to be written, as it was decided on.
pub(super) struct Draft {
    pub(super) expected: u64,
    pub(super) watched: Watched,
    /// Its state differs from the document's.
    pub(super) changed: bool,
    /// What of the deployer's was not handled before.
    pub(super) news: Option<Seen>,
}

impl Tracked {
    pub(super) fn new(facts: Facts, now: Now) -> Self {
        let terms = Terms::of(facts.policy.as_ref());
        let track = Track::new(&terms, now.monotonic);
        let watched = Watched {
            id: facts.id.clone(),
            node: facts.node.clone(),
            state: track.state(),
            absent: false,
            changed: now.wall,
            observed: None,
            checks: Vec::new(),
            policy: facts.policy.clone(),
            address: facts.address,
            launched: facts.launched,
            leaving: facts.leaving,
            detail: String::new(),
            traceparent: facts.traceparent.clone(),
            seen: facts.seen.clone(),
        };
        let tracked = Self::from_parts(watched, track, terms, now, 0);
        if let Some(detail) = &facts.ended {
            tracked.learn(Fact::Gone, detail, now);
        }
        tracked
    }

    /// As the document says; the answers before the restart do not count for the next state.
    pub(super) fn resume(watched: Watched, version: u64, now: Now) -> Self {
        let terms = Terms::of(watched.policy.as_ref());
        let track = Track::resume(watched.state, watched.absent, &terms, now.monotonic);
        Self::from_parts(watched, track, terms, now, version)
    }

    fn from_parts(watched: Watched, track: Track, terms: Terms, now: Now, version: u64) -> Self {
        let id = watched.id.clone();
        let known = version > 0;
        let live = Live {
            cadence: cadence(&watched, &terms),
            written: known.then_some((watched.state, watched.leaving)),
            handled: known.then(|| watched.seen.clone()),
            // The clock may have been set since it was stored.
            age: watched.observed.map(|_| Age::unknown(now)),
            watched,
            track,
            terms,
            began: now.monotonic,
            looks: 0,
            version,
            mine: false,
        };
        Self {
            id,
            live: Mutex::new(live),
            wake: Notify::new(),
            ended: CancellationToken::new(),
            writing: tokio::sync::Mutex::new(()),
        }
    }

    /// Takes over what the deployer told anew. True where it is to be looked at otherwise than before.
    pub(super) fn update(&self, facts: Facts, now: Now) -> bool {
        let mut live = self.live();
        let before = (live.watched.address, live.watched.leaving, live.track.state());
        if live.watched.address != facts.address || live.watched.policy != facts.policy {
            live.terms = Terms::of(facts.policy.as_ref());
            if live.watched.address.is_none() {
                // Launched only now: its start begins here.
                let Watched { state, absent, .. } = live.watched;
                live.track = Track::resume(state, absent, &live.terms, now.monotonic);
                live.began = now.monotonic;
            }
            live.watched.address = facts.address;
            live.watched.policy = facts.policy;
            live.watched.launched = facts.launched;
            live.cadence = cadence(&live.watched, &live.terms);
        }
        live.watched.leaving = facts.leaving;
        live.watched.seen = facts.seen;
        if !facts.traceparent.is_empty() {
            live.watched.traceparent = facts.traceparent;
        }
        drop(live);
        if let Some(detail) = &facts.ended {
            self.learn(Fact::Gone, detail, now);
        }
        let live = self.live();
        before != (live.watched.address, live.watched.leaving, live.track.state())
    }

    /// A fact without an answer. True where it changed the state. That what leaves ends is as it should be.
    pub(super) fn learn(&self, fact: Fact, detail: &str, now: Now) -> bool {
        let mut live = self.live();
        let changed = !live.watched.leaving && live.learn(fact, now);
        if changed {
            live.watched.detail = detail.to_owned();
            live.watched.observed = Some(now.wall);
            live.age = Some(Age::new(Duration::ZERO, now));
        }
        changed
    }

    /// An answer. True where it changed the state.
    pub(super) fn answer(&self, result: CheckResult, now: Now) -> bool {
        let mut live = self.live();
        // What was under way when it ended, or was told to, is no answer.
        if live.watched.leaving || live.track.state() == HealthState::Gone {
            return false;
        }
        let fact = if result.passed { Fact::Passed } else { Fact::Failed };
        live.looks += 1;
        live.watched.observed = Some(result.time);
        live.age = Some(Age::new(Duration::ZERO, now));
        if live.watched.checks.len() == CHECKS {
            live.watched.checks.remove(0);
        }
        live.watched.checks.push(result);
        live.learn(fact, now)
    }

    pub(super) fn leave(&self) {
        self.live().watched.leaving = true;
    }

    pub(super) fn seen(&self) -> Seen {
        self.live().watched.seen.clone()
    }

    pub(super) fn version(&self) -> u64 {
        self.live().version
    }

    pub(super) fn traceparent(&self) -> String {
        self.live().watched.traceparent.clone()
    }

    /// Where to look, and how often; none where there is nothing to be seen.
    pub(super) fn target(&self) -> Option<(Target, Duration)> {
        let live = self.live();
        if live.watched.leaving || live.track.state() == HealthState::Gone {
            return None;
        }
        let target = Target {
            id: self.id.clone(),
            node: live.watched.node.clone(),
            address: live.watched.address?,
            policy: live.watched.policy.clone(),
        };
        Some((target, live.terms.interval))
    }

    pub(super) fn gap(&self, now: Duration) -> Duration {
        let live = self.live();
        live.cadence.gap(&live.track, live.began, now, live.looks)
    }

    pub(super) fn first_after_restart(&self) -> Duration {
        self.live().cadence.first_after_restart()
    }

    /// Unhealthy or gone, and not by intent.
    pub(super) fn is_bad(&self) -> bool {
        let live = self.live();
        !live.watched.leaving && matches!(live.track.state(), HealthState::Unhealthy | HealthState::Gone)
    }

    pub(super) fn message(&self, now: Now) -> monitor::Health {
        let live = self.live();
        let age = live.age.map(|age| to_duration(age.at(now).into()));
        monitor::Health { age, ..health_of(&live.watched, live.version) }
    }

    /// What its health calls for.
    pub(super) fn observations(&self) -> Vec<Observation> {
        if !self.is_bad() {
            return Vec::new();
        }
        let live = self.live();
        let (cause, evidence) = match live.watched.state {
            HealthState::Gone => (CauseKind::Gone, format!("{} {}", self.id, live.watched.detail)),
            _ => {
                let last = live.watched.checks.last().map_or("nothing was seen", |check| &check.detail);
                let row = live.track.failures().max(live.terms.unhealthy);
                (CauseKind::Unhealthy, format!("{}: {row} checks in a row failed, the last: {last}", self.id))
            }
        };
        vec![Observation {
            server: self.id.server.clone(),
            cause,
            fingerprint: self.id.to_string(),
            remedy: Remedy::Replace,
            evidence: vec![evidence],
            instance: Some(self.id.clone()),
            since: live.watched.changed,
            reporter: Service::Monitor.to_string(),
            generation: 0,
        }]
    }

    pub(super) fn is_unwritten(&self) -> bool {
        self.live().is_unwritten()
    }

    /// What is to be written now, if anything.
    pub(super) fn draft(&self) -> Option<Draft> {
        let live = self.live();
        if !live.is_unwritten() || self.ended.is_cancelled() {
            return None;
        }
        let news = (live.handled.as_ref() != Some(&live.watched.seen)).then(|| live.watched.seen.clone());
        Some(Draft {
            expected: live.version,
            watched: live.watched.clone(),
            changed: live.written.map_or(HealthState::Starting, |written| written.0) != live.watched.state,
            news,
        })
    }

    pub(super) fn written(&self, draft: &Draft) {
        let mut live = self.live();
        live.version = live.version.max(draft.expected + 1);
        live.written = Some((draft.watched.state, draft.watched.leaving));
        live.handled = Some(draft.watched.seen.clone());
    }

    /// What the deployer told was handled already.
    pub(super) fn no_news(&self, draft: &Draft) {
        self.live().handled = Some(draft.watched.seen.clone());
    }

    /// The document's version, where it is not as it was thought to be.
    pub(super) fn found(&self, version: u64) {
        self.live().version = version;
    }

    /// Takes over what another replica wrote: what it was told, and the state, unless that is this replica's to find and it
    /// has just found another one. Who was contradicted looks again before it writes: two that both take an instance for
    /// theirs for a moment would write without end. True where it was news.
    pub(super) fn adopt(&self, document: Watched, version: u64, mine: bool, now: Now) -> bool {
        if version <= self.version() {
            return false;
        }
        let Watched { state, absent, leaving, .. } = document;
        if document.seen.is_newer_than(&self.seen()) {
            self.update(Facts::of(&document), now);
            self.live().handled = Some(document.seen.clone());
        }
        let mut live = self.live();
        let found = live.written.is_none_or(|(written, _)| written != live.watched.state);
        live.version = version;
        live.written = Some((state, leaving));
        // Nobody who leaves comes back. Taken from whoever knows: two that kept to what they know would write without end.
        live.watched.leaving |= leaving;
        if state != live.watched.state && (!(mine && found) || state == HealthState::Gone) {
            live.track = Track::resume(state, absent, &live.terms, now.monotonic);
            let Watched { changed, detail, observed, checks, .. } = document;
            let before = live.watched.clone();
            live.age = observed.map(|observed| Age::since(observed, now));
            live.watched = Watched { state, absent, changed, detail, observed, checks, ..before };
        }
        true
    }

    /// Takes over an answer that another replica had. False where it is of another state than the one known here, which its
    /// document tells.
    pub(super) fn hear(&self, heard: monitor::Health, now: Now) -> Result<bool, Invalid> {
        let Some(observed) = from_optional_timestamp("observed", heard.observed)? else { return Ok(false) };
        let age = to_age("age", heard.age, observed, now)?;
        let checks = heard.last_checks.into_iter().map(CheckResult::try_from).collect::<Result<_, _>>()?;
        let mut live = self.live();
        // The same one comes back from whoever was told of it.
        let newer = live.watched.observed != Some(observed)
            && live.age.is_none_or(|known| age.at(now) < known.at(now));
        let fits = heard.version == live.version && newer;
        if fits {
            live.watched.observed = Some(observed);
            live.age = Some(age);
            live.watched.checks = checks;
        }
        Ok(fits)
    }

    /// Whether this replica looks at it from now on, and whether that is new.
    pub(super) fn share(&self, mine: bool) -> bool {
        std::mem::replace(&mut self.live().mine, mine) != mine
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        // No code that can panic runs under the lock.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    fn learn(&mut self, fact: Fact, now: Now) -> bool {
        let before = self.track.state();
        // What can't follow any more says nothing.
        if let Ok(next) = self.track.next(fact, &self.terms, now.monotonic) {
            self.track = next;
        }
        let changed = self.track.state() != before;
        if changed {
            self.watched.state = self.track.state();
            self.watched.absent = self.track.is_absent();
            self.watched.changed = now.wall;
        }
        changed
    }

    fn is_unwritten(&self) -> bool {
        self.written != Some((self.watched.state, self.watched.leaving))
            || self.handled.as_ref() != Some(&self.watched.seen)
    }
}

impl Draft {
    /// What others are told of it; that it starts is nobody's concern.
    pub(super) fn event(&self, time: Timestamp) -> Option<NewEvent> {
        let verb = match self.watched.state {
            _ if !self.changed => return None,
            HealthState::Starting => return None,
            HealthState::Healthy => "healthy",
            HealthState::Unhealthy => "unhealthy",
            HealthState::Gone => "gone",
        };
        let version = self.expected + 1;
        let payload = events::HealthChanged { health: Some(health_of(&self.watched, version)) };
        Some(NewEvent {
            kind: EventType::new(Service::Monitor, "instance", verb),
            server: Some(self.watched.id.server.clone()),
            aggregate_kind: HEALTH.to_owned(),
            aggregate_id: self.watched.id.to_string(),
            aggregate_version: version,
            payload: payload.encode_to_vec(),
            time,
            traceparent: self.watched.traceparent.clone(),
        })
    }
}

fn cadence(watched: &Watched, terms: &Terms) -> Cadence {
    // Numbers that tell instances apart are enough for a spread.
    let InstanceId { release, ordinal, attempt, server } = &watched.id;
    let name =
        server.as_str().bytes().fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let seed = name ^ release.rotate_left(48) ^ u64::from(*ordinal).rotate_left(24) ^ attempt;
    let costly = watched.policy.as_ref().is_some_and(|p| !matches!(p.check, Check::Http(_) | Check::Tcp(_)));
    Cadence { interval: terms.interval, costly, seed }
}

/// The message for an instance.
pub fn health_of(watched: &Watched, version: u64) -> monitor::Health {
    monitor::Health {
        instance: watched.id.to_string(),
        server: watched.id.server.to_string(),
        release: watched.id.release,
        state: types::HealthState::from(watched.state).into(),
        last_checks: watched.checks.iter().cloned().map(Into::into).collect(),
        changed: Some(to_timestamp(watched.changed)),
        observed: watched.observed.map(to_timestamp),
        version,
        age: None,
    }
}
