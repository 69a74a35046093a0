//! A store within one process, for the simulation: it keeps every promise but that of surviving the process, without a
//! disk, a thread or a clock of its own below it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use jiff::Timestamp;
use kiln_model::event::Event;
use kiln_model::name::RequestId;
use tokio::sync::watch;

use crate::batch::{AuditRecord, Batch, Change, StoredAnswer, Watermark};
use crate::document::{Cursor, Document, Entry, Page};
use crate::token::Position;
use crate::{Committed, Error, KEEP_EVENTS, KEEP_TOMBSTONES, PAGE_BYTES, PAGE_LIMIT, Store};

/// Cheap to clone; every clone is the same store.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    epoch: String,
    state: Mutex<State>,
    sequence: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    sequence: u64,
    /// The newest tombstone that was dropped.
    horizon: u64,
    /// By kind and id.
    documents: BTreeMap<(String, String), Stored>,
    watermarks: BTreeMap<(String, String), u64>,
    answers: BTreeMap<RequestId, (StoredAnswer, Timestamp)>,
    /// By sequence.
    events: BTreeMap<u64, Logged>,
    unsent: BTreeSet<u64>,
    /// Events so far of each version of an aggregate.
    places: BTreeMap<(String, String, u64), usize>,
    audit: BTreeMap<u64, AuditRecord>,
}

#[derive(Debug)]
struct Stored {
    document: Document,
    /// Bytes of the text of its body, which is what pages are limited by.
    size: usize,
    deleted: Option<Timestamp>,
}

#[derive(Debug)]
struct Logged {
    event: Event,
    created: Timestamp,
}

impl MemoryStore {
    /// An empty one of this epoch.
    pub fn new(epoch: &str) -> Self {
        let inner =
            Inner { epoch: epoch.to_owned(), state: Mutex::default(), sequence: watch::Sender::new(0) };
        Self { inner: Arc::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stored {
    /// As a reader sees it: 0 for what does not exist.
    fn live(&self) -> u64 {
        if self.deleted.is_some() { 0 } else { self.document.version }
    }

    /// In the order of what changed.
    fn place(&self) -> (u64, &str) {
        (self.document.sequence, &self.document.id)
    }

    fn entry(&self) -> Entry {
        let Document { id, version, sequence, .. } = &self.document;
        match self.deleted {
            None => Entry::Document(self.document.clone()),
            Some(_) => Entry::Tombstone { id: id.clone(), version: *version, sequence: *sequence },
        }
    }
}

impl State {
    /// `made` is the version that the same batch gave the document before.
    fn expect(&self, kind: &str, id: &str, expected: u64, made: Option<u64>) -> Result<(), Error> {
        let stored = || self.documents.get(&(kind.to_owned(), id.to_owned())).map_or(0, Stored::live);
        let actual = made.unwrap_or_else(stored);
        if actual == expected {
            return Ok(());
        }
        Err(Error::Conflict { kind: kind.to_owned(), id: id.to_owned(), expected, actual })
    }

    /// Whether a batch can be applied as a whole.
    fn check(&self, batch: &Batch) -> Result<(), Error> {
        if let Some(answer) = &batch.answer
            && self.answers.contains_key(&answer.request)
        {
            return Err(Error::Answered(answer.request.clone()));
        }
        for Watermark { source_kind, source_id, version } in &batch.watermarks {
            let key = (source_kind.clone(), source_id.clone());
            if self.watermarks.get(&key).copied().unwrap_or(0) >= *version {
                let (source_kind, source_id) = key;
                return Err(Error::Stale { source_kind, source_id, version: *version });
            }
        }
        for expect in &batch.expects {
            self.expect(&expect.kind, &expect.id, expect.version, None)?;
        }
        // What earlier changes of the batch will have made of a document's version.
        let mut made: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        for change in &batch.changes {
            let (Change::Put { kind, id, expected, .. } | Change::Delete { kind, id, expected }) = change;
            let key = (kind.as_str(), id.as_str());
            self.expect(kind, id, *expected, made.get(&key).copied())?;
            let deleted = matches!(change, Change::Delete { .. });
            made.insert(key, if deleted { 0 } else { self.last(kind, id) + 1 });
        }
        Ok(())
    }

    /// Applies what was checked.
    fn apply(&mut self, batch: Batch, epoch: &str, now: Timestamp) -> Committed {
        let Batch { changes, watermarks, events, audit, answer, .. } = batch;
        let base = self.sequence;
        self.sequence = base + events.len().max(audit.len()).max(1) as u64;
        for change in changes {
            self.change(change, now);
        }
        for Watermark { source_kind, source_id, version } in watermarks {
            self.watermarks.insert((source_kind, source_id), version);
        }
        let mut published: Vec<Event> = Vec::with_capacity(events.len());
        for (event, sequence) in events.into_iter().zip(base + 1..) {
            let aggregate =
                (event.aggregate_kind.clone(), event.aggregate_id.clone(), event.aggregate_version);
            let place = self.places.entry(aggregate).or_default();
            let id = Event::id_of(epoch, &event, *place);
            *place += 1;
            let event = Event { id, sequence, epoch: epoch.to_owned(), event };
            self.events.insert(sequence, Logged { event: event.clone(), created: now });
            self.unsent.insert(sequence);
            published.push(event);
        }
        self.audit.extend((base + 1..).zip(audit));
        if let Some(answer) = answer {
            self.answers.insert(answer.request.clone(), (answer, now));
        }
        Committed { sequence: self.sequence, events: published }
    }

    fn change(&mut self, change: Change, now: Timestamp) {
        let sequence = self.sequence;
        let (kind, id, schema, body, deleted) = match change {
            Change::Put { kind, id, schema, body, .. } => (kind, id, schema, body, None),
            // What does not exist leaves no tombstone.
            Change::Delete { expected: 0, .. } => return,
            Change::Delete { kind, id, .. } => (kind, id, 0, Arc::default(), Some(now)),
        };
        let version = self.last(&kind, &id) + 1;
        let key = (kind.clone(), id.clone());
        let size = body.to_string().len();
        let document = Document { kind, id, version, sequence, schema, body };
        self.documents.insert(key, Stored { document, size, deleted });
    }

    /// The version that a document had last, deleted or not.
    fn last(&self, kind: &str, id: &str) -> u64 {
        self.documents.get(&(kind.to_owned(), id.to_owned())).map_or(0, |stored| stored.document.version)
    }

    fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Stored> {
        let first = (kind.to_owned(), String::new());
        self.documents.range(first..).map(|(_, stored)| stored).take_while(move |s| s.document.kind == kind)
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn epoch(&self) -> &str {
        &self.inner.epoch
    }

    fn sequence(&self) -> watch::Receiver<u64> {
        self.inner.sequence.subscribe()
    }

    async fn get(&self, kind: &str, id: &str) -> Result<Option<Document>, Error> {
        let state = self.lock();
        let stored = state.documents.get(&(kind.to_owned(), id.to_owned()));
        Ok(stored.filter(|stored| stored.deleted.is_none()).map(|stored| stored.document.clone()))
    }

    async fn list(
        &self,
        kind: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Document>, Error> {
        let state = self.lock();
        let wanted = state.of_kind(kind).filter(|stored| {
            let id = stored.document.id.as_str();
            stored.deleted.is_none() && id.starts_with(prefix) && after.is_none_or(|after| id > after)
        });
        let limit = limit.clamp(1, PAGE_LIMIT) as usize;
        Ok(wanted.take(limit).map(|stored| stored.document.clone()).collect())
    }

    async fn changes(
        &self,
        kind: &str,
        since: Option<&Cursor>,
        page_token: &str,
        limit: u32,
    ) -> Result<Page, Error> {
        let epoch = &self.inner.epoch;
        let state = self.lock();
        let position = if page_token.is_empty() {
            Position::first(since, epoch, state.sequence, state.horizon)
        } else {
            Position::parse(page_token, epoch)?
        };
        let mut found: Vec<&Stored> = state
            .of_kind(kind)
            .filter(|s| s.deleted.is_none() || s.document.sequence > position.tombstones_after)
            .filter(|s| s.place() > (position.sequence, position.id.as_str()))
            .collect();
        found.sort_by(|one, other| one.place().cmp(&other.place()));
        let limit = limit.clamp(1, PAGE_LIMIT) as usize;
        let (mut entries, mut bytes, mut more) = (Vec::new(), 0, false);
        for stored in found {
            if entries.len() >= limit || (!entries.is_empty() && bytes + stored.size > PAGE_BYTES) {
                more = true;
                break;
            }
            bytes += stored.size;
            entries.push(stored.entry());
        }
        Ok(position.page(entries, more, epoch, state.sequence))
    }

    async fn watermark(&self, source_kind: &str, source_id: &str) -> Result<u64, Error> {
        let key = (source_kind.to_owned(), source_id.to_owned());
        Ok(self.lock().watermarks.get(&key).copied().unwrap_or(0))
    }

    async fn answer(&self, request: &RequestId) -> Result<Option<StoredAnswer>, Error> {
        Ok(self.lock().answers.get(request).map(|(answer, _)| answer.clone()))
    }

    async fn commit(&self, batch: Batch) -> Result<Committed, Error> {
        let committed = {
            let mut state = self.lock();
            state.check(&batch)?;
            state.apply(batch, &self.inner.epoch, Timestamp::now())
        };
        self.inner.sequence.send_replace(committed.sequence);
        Ok(committed)
    }

    async fn unsent(&self, limit: u32) -> Result<Vec<Event>, Error> {
        let state = self.lock();
        let unsent = state.unsent.iter().filter_map(|sequence| state.events.get(sequence));
        Ok(unsent.take(limit.clamp(1, PAGE_LIMIT) as usize).map(|logged| logged.event.clone()).collect())
    }

    async fn log(&self, after: u64, limit: u32) -> Result<Vec<Event>, Error> {
        let state = self.lock();
        let later = state.events.range(after.saturating_add(1)..).map(|(_, logged)| logged.event.clone());
        Ok(later.take(limit.clamp(1, PAGE_LIMIT) as usize).collect())
    }

    async fn mark_sent(&self, sequences: &[u64]) -> Result<(), Error> {
        let mut state = self.lock();
        for sequence in sequences {
            state.unsent.remove(sequence);
        }
        Ok(())
    }

    async fn audit(&self, before: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        let state = self.lock();
        let before = if before == 0 { u64::MAX } else { before };
        let older = state.audit.range(..before).rev().map(|(sequence, record)| (*sequence, record.clone()));
        Ok(older.take(limit.clamp(1, PAGE_LIMIT) as usize).collect())
    }

    async fn audit_after(&self, after: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        let state = self.lock();
        let later = state.audit.range(after.saturating_add(1)..);
        let later = later.map(|(sequence, record)| (*sequence, record.clone()));
        Ok(later.take(limit.clamp(1, PAGE_LIMIT) as usize).collect())
    }

    async fn prune(&self, now: Timestamp) -> Result<u64, Error> {
        let before = |age| now.checked_sub(age).unwrap_or(Timestamp::MIN);
        let (events, tombstones) = (before(KEEP_EVENTS), before(KEEP_TOMBSTONES));
        let mut state = self.lock();
        let state = &mut *state;
        let count = |state: &State| state.events.len() + state.answers.len() + state.documents.len();
        let full = count(state);
        let unsent = &state.unsent;
        state.events.retain(|sequence, logged| unsent.contains(sequence) || logged.created >= events);
        state.answers.retain(|_, (_, created)| *created >= events);
        let mut horizon = state.horizon;
        state.documents.retain(|_, stored| {
            let keep = stored.deleted.is_none_or(|deleted| deleted >= tombstones);
            if !keep {
                horizon = horizon.max(stored.document.sequence);
            }
            keep
        });
        state.horizon = horizon;
        Ok((full - count(state)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::conformance;

    #[tokio::test]
    async fn it_keeps_every_promise() {
        let stores: Mutex<BTreeMap<String, MemoryStore>> = Mutex::default();
        conformance(async |name: &str| {
            let mut stores = stores.lock().unwrap();
            stores.entry(name.to_owned()).or_insert_with(|| MemoryStore::new(name)).clone()
        })
        .await;
    }
}
