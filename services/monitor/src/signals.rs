//! Signals as they stand: in memory for deciding, in the store for good. Every change of one is a commit with its event.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use kiln_api::{events, types};
use kiln_model::cause::CauseKind;
use kiln_model::event::{EventType, NewEvent, Service};
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::signal::{Remedy, SignalId};
use kiln_monitor_core::signal::{Announcement, Observation, Record, Step, reconcile};
use kiln_service::clock::Clock;
use kiln_service::{shutdown, trace};
use kiln_store::{AuditRecord, Batch, Change, Error, Store, decode};
use prost::Message;
use tokio::sync::{Notify, watch};

use crate::documents::{self, SCHEMA, SIGNAL};
use crate::servers::Servers;

/// Which signals one sight of the world decides on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All of one cause of a server: what is not seen any more is resolved.
    Cause(ServerName, CauseKind),
    /// The health of an instance.
    Health(InstanceId),
    /// One report.
    Report(SignalId),
}

impl Scope {
    fn of(record: &Record) -> Self {
        let signal = &record.signal;
        match (signal.cause, &signal.instance) {
            (CauseKind::Unhealthy | CauseKind::Gone, Some(instance)) => Self::Health(instance.clone()),
            (CauseKind::Reported, _) => Self::Report(signal.id),
            (cause, _) => Self::Cause(signal.server.clone(), cause),
        }
    }
}

#[derive(Debug, Clone)]
struct Kept {
    version: u64,
    record: Record,
}

/// Writers of one scope wait for each other; a burst over many scopes shares a commit.
const LOCKS: usize = 64;

/// As whom the monitor decides.
const ACTOR: &str = "monitor";

/// Others may write the same signal: how often it is decided anew.
const TRIES: u32 = 8;

/// Cheap to clone; every clone is the same.
#[derive(Debug, Clone)]
pub struct Signals<S, C> {
    store: S,
    clock: C,
    servers: Servers<S>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    kept: Mutex<BTreeMap<SignalId, Kept>>,
    locks: [tokio::sync::Mutex<()>; LOCKS],
    /// A signal may be due earlier than the timer waits for.
    due_changed: Notify,
}

impl<S: Store, C: Clock> Signals<S, C> {
    /// # Errors
    /// Where the store can't be read.
    pub async fn load(store: S, clock: C, servers: Servers<S>) -> Result<Self, Error> {
        let records: Vec<(u64, Record)> = documents::load(&store, SIGNAL).await?;
        let kept = records.into_iter().map(|(version, record)| (record.signal.id, Kept { version, record }));
        let shared = Shared {
            kept: Mutex::new(kept.collect()),
            locks: std::array::from_fn(|_| tokio::sync::Mutex::new(())),
            due_changed: Notify::new(),
        };
        Ok(Self { store, clock, servers, shared: Arc::new(shared) })
    }

    /// Takes over what another replica wrote.
    pub fn adopt(&self, record: Record, version: u64) {
        let mut kept = self.kept();
        let id = record.signal.id;
        if kept.get(&id).is_none_or(|kept| kept.version < version) {
            kept.insert(id, Kept { version, record });
            self.shared.due_changed.notify_one();
        }
    }

    /// Another replica forgot one that was resolved long ago.
    pub fn adopt_end(&self, document: &str) {
        self.kept().retain(|id, _| id.0.hex() != document);
    }

    /// Signals that are not resolved.
    pub fn live(&self) -> Vec<Record> {
        self.kept().values().filter(|kept| kept.record.is_live()).map(|kept| kept.record.clone()).collect()
    }

    pub fn get(&self, id: &SignalId) -> Option<types::Signal> {
        self.kept().get(id).map(|kept| message(&kept.record, kept.version))
    }

    /// The live signals of a server, oldest first.
    pub fn of_server(&self, server: &ServerName) -> Vec<types::Signal> {
        let kept = self.kept();
        let live = kept.values().filter(|kept| kept.record.is_live() && kept.record.signal.server == *server);
        let mut live: Vec<&Kept> = live.collect();
        live.sort_by_key(|kept| kept.record.signal.raised);
        live.into_iter().map(|kept| message(&kept.record, kept.version)).collect()
    }

    /// Makes the signals of a scope what the sight of the world calls for.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn see(&self, scope: &Scope, observed: &[Observation]) -> Result<(), Error> {
        // Most sights change nothing, and cost nothing.
        if observed.is_empty() && self.known(scope, observed).is_empty() {
            return Ok(());
        }
        self.change(scope, |signals, now| {
            let known = signals.known(scope, observed);
            let Some(server) = observed.first().map(|seen| &seen.server).or(match scope {
                Scope::Cause(server, _) => Some(server),
                Scope::Health(instance) => Some(&instance.server),
                Scope::Report(_) => None,
            }) else {
                return Vec::new();
            };
            reconcile(&known, observed, &signals.servers.policy(server), now)
        })
        .await
    }

    /// Resolves what is live and meets a condition.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn settle(&self, ended: impl Fn(&Record) -> bool) -> Result<(), Error> {
        for record in self.live().into_iter().filter(|record| ended(record)) {
            let id = record.signal.id;
            self.change(&Scope::of(&record), |signals, now| {
                let record = signals.kept().get(&id).map(|kept| kept.record.clone());
                record
                    .filter(|record| ended(record))
                    .and_then(|record| record.resolve(now))
                    .into_iter()
                    .collect()
            })
            .await?;
        }
        Ok(())
    }

    /// The builder followed what calls for a plan: reports up to then are answered.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn answered(&self, server: &ServerName, cause: &str, generation: u64) -> Result<(), Error> {
        self.settle(|record| {
            let signal = &record.signal;
            signal.cause == CauseKind::Reported
                && signal.remedy == Remedy::Rebuild
                && signal.server == *server
                && (signal.id.0.to_string() == cause || generation > record.generation)
        })
        .await
    }

    /// Lets signals act whose time has come, until told to stop.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        const LONGEST: Duration = Duration::from_secs(60);
        while !*stop.borrow() {
            let now = self.clock.now().wall;
            let pause = match self.act(now).await {
                Ok(()) => self
                    .live()
                    .iter()
                    .filter_map(Record::due)
                    .map(|due| Duration::try_from(due.duration_since(now)).unwrap_or_default())
                    .min()
                    .unwrap_or(LONGEST)
                    .min(LONGEST),
                Err(error) => {
                    tracing::warn!(%error, "a signal could not act");
                    Duration::from_secs(1)
                }
            };
            tokio::select! {
                biased;
                () = shutdown::requested(&mut stop) => return,
                () = self.shared.due_changed.notified() => {}
                () = self.clock.sleep(pause) => {}
            }
        }
    }

    async fn act(&self, now: Timestamp) -> Result<(), Error> {
        let due = self.live().into_iter().filter(|record| record.due().is_some_and(|due| due <= now));
        for record in due {
            let id = record.signal.id;
            self.change(&Scope::of(&record), |signals, now| {
                let record = signals.kept().get(&id).map(|kept| kept.record.clone());
                record.and_then(|record| record.act(now)).into_iter().collect()
            })
            .await?;
        }
        Ok(())
    }

    /// Drops what was resolved so long ago that nobody needs it.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn forget(&self) -> Result<(), Error> {
        let now = self.clock.now().wall;
        let old: Vec<(SignalId, u64)> = {
            let kept = self.kept();
            let old = kept.iter().filter(|(_, kept)| kept.record.is_forgotten(now));
            old.map(|(id, kept)| (*id, kept.version)).collect()
        };
        for (id, expected) in old {
            let change = Change::Delete { kind: SIGNAL.to_owned(), id: id.0.hex(), expected };
            match self.store.commit(Batch { changes: vec![change], ..Batch::default() }).await {
                Ok(_) => drop(self.kept().remove(&id)),
                // By another replica, or by a commit whose answer was lost.
                Err(Error::Conflict { .. }) => self.refresh(&id).await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Holds a signal still; one that is not there yet is a report to be.
    pub async fn hold(&self, id: &SignalId) -> Held<'_, S, C> {
        let scope = self.kept().get(id).map_or(Scope::Report(*id), |kept| Scope::of(&kept.record));
        Held { signals: self, id: *id, _lock: self.lock(&scope).await }
    }

    /// Reads a signal anew: somebody else wrote it.
    async fn refresh(&self, id: &SignalId) -> Result<(), Error> {
        let document = self.store.get(SIGNAL, &id.0.hex()).await?;
        let kept = document
            .map(|document| {
                Ok::<_, Error>(Kept { version: document.version, record: decode(&document, SCHEMA)? })
            })
            .transpose()?;
        match kept {
            Some(kept) => drop(self.kept().insert(*id, kept)),
            None => drop(self.kept().remove(id)),
        }
        Ok(())
    }

    /// Decides, and commits what was decided with its events; decides anew where somebody else was faster.
    async fn change(
        &self,
        scope: &Scope,
        decide: impl Fn(&Self, Timestamp) -> Vec<Step>,
    ) -> Result<(), Error> {
        let _lock = self.lock(scope).await;
        let mut tries = 0;
        loop {
            let steps = decide(self, self.clock.now().wall);
            if steps.is_empty() {
                return Ok(());
            }
            let (batch, written) = self.batch(steps)?;
            match self.store.commit(batch).await {
                Ok(_) => {
                    self.kept().extend(written);
                    self.shared.due_changed.notify_one();
                    return Ok(());
                }
                Err(error @ Error::Conflict { .. }) => {
                    tries += 1;
                    if tries == TRIES {
                        return Err(error);
                    }
                    for (id, _) in written {
                        self.refresh(&id).await?;
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn batch(&self, steps: Vec<Step>) -> Result<(Batch, Vec<(SignalId, Kept)>), Error> {
        let now = self.clock.now().wall;
        let mut batch = Batch::default();
        let mut written = Vec::new();
        for mut step in steps {
            let id = step.record.signal.id;
            let expected = self.kept().get(&id).map_or(0, |kept| kept.version);
            if step.fresh {
                step.record.signal.traceparent = begin_trace(&step.record);
            }
            let version = expected + 1;
            batch.changes.push(documents::put(SIGNAL, &id.0.hex(), expected, &step.record)?);
            if let Some(said) = step.announce {
                batch.events.push(event(&step.record, version, said, now));
                let before = self.kept().get(&id).map(|kept| kept.record.clone());
                let action = format!("server.{}", verb(said));
                batch.audit.push(audited(now, ACTOR, &action, before.as_ref(), &step.record));
            }
            written.push((id, Kept { version, record: step.record }));
        }
        Ok((batch, written))
    }

    fn known(&self, scope: &Scope, observed: &[Observation]) -> Vec<Record> {
        let kept = self.kept();
        let mut known: Vec<Record> = kept
            .values()
            .filter(|kept| kept.record.is_live() && Scope::of(&kept.record) == *scope)
            .map(|kept| kept.record.clone())
            .collect();
        for seen in observed {
            let resolved = kept.get(&seen.id()).filter(|kept| !kept.record.is_live());
            known.extend(resolved.map(|kept| kept.record.clone()));
        }
        known
    }

    async fn lock(&self, scope: &Scope) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        scope.hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % LOCKS as u64).unwrap_or_default();
        self.shared.locks[index].lock().await
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<SignalId, Kept>> {
        // No code that can panic runs under the lock.
        self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A signal that nobody else here decides on meanwhile, for calls that commit with an answer of their own.
pub struct Held<'a, S, C> {
    signals: &'a Signals<S, C>,
    id: SignalId,
    _lock: tokio::sync::MutexGuard<'a, ()>,
}

impl<S: Store, C: Clock> Held<'_, S, C> {
    /// The signal as the store has it now.
    ///
    /// # Errors
    /// Where the store can't be read.
    pub async fn read(&self) -> Result<Option<Record>, Error> {
        self.signals.refresh(&self.id).await?;
        Ok(self.signals.kept().get(&self.id).map(|kept| kept.record.clone()))
    }

    /// The batch that takes a step from what was read, and the signal after it.
    ///
    /// # Errors
    /// Where the record has no JSON form.
    pub fn batch(&self, step: Option<Step>) -> Result<(Batch, types::Signal), Error> {
        let (batch, written) = self.signals.batch(step.into_iter().collect())?;
        let after = written.first().map(|(_, kept)| message(&kept.record, kept.version));
        Ok((batch, after.or_else(|| self.signals.get(&self.id)).unwrap_or_default()))
    }

    /// The batch was committed, or may have been.
    ///
    /// # Errors
    /// Where the store can't be read.
    pub async fn done(self) -> Result<(), Error> {
        self.signals.refresh(&self.id).await
    }
}

/// A signal begins a trace: everything up to the last replaced instance belongs to it. Where somebody asked for it in
/// a call, it belongs to the call's.
fn begin_trace(record: &Record) -> String {
    let signal = &record.signal;
    let parent = if signal.cause == CauseKind::Reported { trace::current() } else { String::new() };
    let span = trace::span_under(&parent, &format!("signal {}", signal.cause.as_str()));
    span.in_scope(|| {
        tracing::info!(
            server = %signal.server,
            cause = signal.cause.as_str(),
            signal = %signal.id.0.short(),
            state = ?signal.state,
            evidence = signal.evidence.join("; "),
            "a signal was raised"
        );
    });
    trace::of(&span)
}

fn message(record: &Record, version: u64) -> types::Signal {
    types::Signal { version, ..record.signal.clone().into() }
}

const fn verb(said: Announcement) -> &'static str {
    match said {
        Announcement::NeedsUpdate => "needs_update",
        Announcement::WaitsForApproval => "waits_for_approval",
        Announcement::Settled => "settled",
    }
}

/// That somebody, or the monitor by itself, changed a signal.
pub(crate) fn audited(
    time: Timestamp,
    by: &str,
    action: &str,
    before: Option<&Record>,
    after: &Record,
) -> AuditRecord {
    // A signal always has a JSON form.
    let json = |record: &Record| serde_json::to_value(&record.signal).unwrap_or_default();
    AuditRecord::new(time, by, action, format!("{SIGNAL}/{}", after.signal.id))
        .of_server(&after.signal.server)
        .changed(before.map(json).unwrap_or_default(), json(after))
}

fn event(record: &Record, version: u64, said: Announcement, time: Timestamp) -> NewEvent {
    let payload = events::NeedsUpdate { signal: Some(message(record, version)) };
    NewEvent {
        kind: EventType::new(Service::Monitor, "server", verb(said)),
        server: Some(record.signal.server.clone()),
        aggregate_kind: SIGNAL.to_owned(),
        aggregate_id: record.signal.id.0.hex(),
        aggregate_version: version,
        payload: payload.encode_to_vec(),
        time,
        traceparent: record.signal.traceparent.clone(),
    }
}

/// Reads a stored signal for a listing.
///
/// # Errors
/// Where the document can't be read.
pub fn from_document(document: &kiln_store::Document) -> Result<types::Signal, Error> {
    let record: Record = decode(document, SCHEMA)?;
    Ok(message(&record, document.version))
}
