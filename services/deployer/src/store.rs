//! Fleets in the store: read with their releases, written with everything that tells of them, in one batch.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use kiln_api::events;
use kiln_deployer_core::{Event, Fleet, Instance, Release, Releases, Rollout, RolloutVerb};
use kiln_model::event::{EventType, NewEvent, Service};
use kiln_model::name::{InstanceId, ServerName};
use kiln_store::{Batch, Change, Document, Error, Store, decode, encode};
use prost::Message as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::audit;
use crate::record::{FLEET, INSTANCE, InstanceRecord, RELEASE, ROLLOUT, RolloutRecord, SCHEMA, release_id};
use crate::wire;

/// Documents read at a time.
const PAGE: u32 = 500;

/// A fleet as it was read, with the releases that a decision on it may look at.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    pub(crate) fleet: Fleet,
    /// 0 where there is none yet.
    pub(crate) version: u64,
    pub(crate) releases: Releases,
}

/// What a decision changes.
pub(crate) struct Outcome<'a> {
    pub(crate) fleet: &'a Fleet,
    /// New ones, and those whose marks changed.
    pub(crate) releases: &'a [Release],
    pub(crate) events: &'a [Event],
    pub(crate) now: Timestamp,
}

pub(crate) async fn load<S: Store>(store: &S, server: &ServerName) -> Result<Loaded, Error> {
    let document = store.get(FLEET, server.as_str()).await?;
    let (fleet, version) = match &document {
        Some(document) => (decode::<Fleet>(document, SCHEMA)?, document.version),
        None => (Fleet::new(server.clone()), 0),
    };
    let fleet = fleet.numbered_above(store.numbers_above());
    let mut releases = Releases::new();
    for number in fleet.releases_needed() {
        if let Some(release) = read::<S, Release>(store, RELEASE, &release_id(server, number)).await? {
            releases.insert(number, release.0);
        }
    }
    Ok(Loaded { fleet, version, releases })
}

/// Every release of a server.
pub(crate) async fn all_releases<S: Store>(store: &S, server: &ServerName) -> Result<Releases, Error> {
    let documents = list(store, RELEASE, &format!("{server}/")).await?;
    let releases = documents.iter().map(|document| decode::<Release>(document, SCHEMA));
    releases.map(|release| release.map(|release| (release.number, release))).collect()
}

pub(crate) async fn read<S: Store, T: DeserializeOwned>(
    store: &S,
    kind: &str,
    id: &str,
) -> Result<Option<(T, u64)>, Error> {
    let document = store.get(kind, id).await?;
    document.map(|document| Ok((decode(&document, SCHEMA)?, document.version))).transpose()
}

pub(crate) async fn list<S: Store>(store: &S, kind: &str, prefix: &str) -> Result<Vec<Document>, Error> {
    let mut all: Vec<Document> = Vec::new();
    loop {
        let after = all.last().map(|document| document.id.clone());
        let page = store.list(kind, prefix, after.as_deref(), PAGE).await?;
        let last = page.len() < PAGE as usize;
        all.extend(page);
        if last {
            return Ok(all);
        }
    }
}

pub(crate) fn put<T: Serialize>(kind: &str, id: &str, expected: u64, value: &T) -> Result<Change, Error> {
    let body = encode(kind, id, value)?;
    Ok(Change::Put { kind: kind.to_owned(), id: id.to_owned(), expected, schema: SCHEMA, body })
}

/// The batch that takes a fleet from what was loaded to what was decided. The fleet's own version fences all of it: who
/// read an older fleet writes nothing, so what lies beside it can be read and written without a race.
pub(crate) async fn batch<S: Store>(
    store: &S,
    before: &Loaded,
    outcome: &Outcome<'_>,
) -> Result<Batch, Error> {
    let Outcome { fleet, releases, events, .. } = outcome;
    let server = &fleet.server;
    let mut writer = Writer { store, changes: Vec::new(), versions: BTreeMap::new() };
    writer.changes.push(put(FLEET, server.as_str(), before.version, fleet)?);
    let mut known = before.releases.clone();
    for release in *releases {
        writer.write(RELEASE, &release_id(server, release.number), release).await?;
        known.insert(release.number, release.clone());
    }
    for rollout in rollouts(&before.fleet, fleet, events) {
        let id = rollout.id.clone();
        writer.write(ROLLOUT, &id, &RolloutRecord { server: server.clone(), rollout }).await?;
    }
    for (id, record) in instances(&before.fleet, fleet, events, &known) {
        writer.write(INSTANCE, &id.to_string(), &record).await?;
    }
    let mut told = Vec::new();
    for event in *events {
        told.push(writer.event(outcome, &known, event).await?);
    }
    let audit = audit::decisions(&before.fleet, outcome);
    Ok(Batch { changes: writer.changes, events: told, audit, ..Batch::default() })
}

/// Rollouts whose record is to be written: what is under way, and what ended, as far as it is not as it was.
fn rollouts(before: &Fleet, after: &Fleet, events: &[Event]) -> Vec<Rollout> {
    let mut records: BTreeMap<String, Rollout> = BTreeMap::new();
    for event in events {
        if let Event::Rollout(_, rollout) = event {
            records.insert(rollout.id.clone(), rollout.record());
        }
    }
    let was: Vec<Rollout> = before.rollout.iter().chain(&before.finished).map(Rollout::record).collect();
    for rollout in after.finished.iter().chain(&after.rollout).map(Rollout::record) {
        if !was.contains(&rollout) {
            records.insert(rollout.id.clone(), rollout);
        }
    }
    records.into_values().collect()
}

fn instances(
    before: &Fleet,
    after: &Fleet,
    events: &[Event],
    releases: &Releases,
) -> BTreeMap<InstanceId, InstanceRecord> {
    // The last word on those that the fleet has done with; what still is in the fleet overrules it.
    let mut last: BTreeMap<&InstanceId, &Instance> = BTreeMap::new();
    last.extend(before.instances.iter().filter(|(id, _)| !after.instances.contains_key(*id)));
    for event in events {
        if let Event::Instance(_, id, instance) = event {
            last.insert(id, instance);
        }
    }
    last.extend(&after.instances);
    let mut records = BTreeMap::new();
    for (id, instance) in last {
        let record = InstanceRecord::of(after, releases, id, instance);
        let was = before.instances.get(id).map(|was| InstanceRecord::of(before, releases, id, was));
        if was.as_ref() != Some(&record) {
            records.insert(id.clone(), record);
        }
    }
    records
}

/// Collects changes, and the versions that they lead to.
struct Writer<'a, S> {
    store: &'a S,
    changes: Vec<Change>,
    versions: BTreeMap<(&'static str, String), u64>,
}

impl<S: Store> Writer<'_, S> {
    async fn write<T: Serialize>(&mut self, kind: &'static str, id: &str, value: &T) -> Result<(), Error> {
        let version = self.stored(kind, id).await?;
        self.changes.push(put(kind, id, version, value)?);
        self.versions.insert((kind, id.to_owned()), version + 1);
        Ok(())
    }

    async fn stored(&self, kind: &str, id: &str) -> Result<u64, Error> {
        Ok(self.store.get(kind, id).await?.map_or(0, |document| document.version))
    }

    async fn version(&self, kind: &'static str, id: &str) -> Result<u64, Error> {
        match self.versions.get(&(kind, id.to_owned())) {
            Some(version) => Ok(*version),
            None => self.stored(kind, id).await,
        }
    }

    async fn event(
        &self,
        outcome: &Outcome<'_>,
        releases: &Releases,
        event: &Event,
    ) -> Result<NewEvent, Error> {
        let server = &outcome.fleet.server;
        let (kind, id, entity, verb) = match event {
            Event::Release(release) => (RELEASE, release_id(server, release.number), "release", "created"),
            Event::Rollout(verb, rollout) => (ROLLOUT, rollout.id.clone(), "rollout", verb.as_str()),
            Event::Instance(verb, id, _) => (INSTANCE, id.to_string(), "instance", verb.as_str()),
        };
        let version = self.version(kind, &id).await?;
        let aggregate_id = match event {
            // As people write it.
            Event::Release(release) => format!("{server}-r{}", release.number),
            Event::Rollout(..) | Event::Instance(..) => id.clone(),
        };
        let (payload, traceparent) = match event {
            Event::Release(release) => {
                let message =
                    events::ReleaseCreated { release: Some(wire::release(server, release, version)) };
                (message.encode_to_vec(), release.revision.cause.traceparent.clone())
            }
            Event::Rollout(verb, rollout) => {
                let convicted = rollout.convicted.as_ref().filter(|_| *verb == RolloutVerb::RolledBack);
                let message = events::RolloutChanged {
                    rollout: Some(wire::rollout(server, rollout, version)),
                    quarantine: convicted.map(|convicted| wire::quarantine(server, convicted)),
                };
                (message.encode_to_vec(), rollout.cause.traceparent.clone())
            }
            Event::Instance(_, id, instance) => {
                let instance = outcome.fleet.instances.get(id).unwrap_or(instance);
                let record = InstanceRecord::of(outcome.fleet, releases, id, instance);
                let message =
                    events::InstanceChanged { instance: Some(wire::instance(id, &record, version)) };
                (message.encode_to_vec(), instance.cause.traceparent.clone())
            }
        };
        Ok(NewEvent {
            kind: EventType::new(Service::Deployer, entity, verb),
            server: Some(server.clone()),
            aggregate_kind: kind.to_owned(),
            aggregate_id,
            aggregate_version: version,
            payload,
            time: outcome.now,
            traceparent,
        })
    }
}

/// The names of all servers that there is a fleet of.
pub(crate) async fn servers<S: Store>(store: &S) -> Result<BTreeSet<ServerName>, Error> {
    let documents = list(store, FLEET, "").await?;
    Ok(documents.iter().filter_map(|document| document.id.parse().ok()).collect())
}
