//! A process's way to its service's store.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::event::Event;
use kiln_model::name::RequestId;
use kiln_store::{
    AuditRecord, Batch, Change, Committed, Cursor, Document, Error, MemoryStore, Page, Store, StoredAnswer,
};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::invariants::Invariants;
use crate::life::Life;
use crate::world::World;

/// A reader is behind by so much at most, and so late is heard of what others commit.
const BEHIND: Duration = Duration::from_millis(BEHIND_MILLIS);
const BEHIND_MILLIS: u64 = 500;
const FULL: &str = "the disk is full";

/// What was written over, and when.
#[derive(Clone)]
struct Before<T> {
    until: Instant,
    kind: String,
    id: String,
    /// None where there was nothing.
    was: Option<T>,
}

/// Newest last, and nothing that no reader is so far behind as to see.
struct Past<T>(VecDeque<Before<T>>);

impl<T: Clone> Past<T> {
    fn remember(&mut self, kind: &str, id: &str, was: Option<T>) {
        let until = Instant::now();
        while self.0.front().is_some_and(|before| before.until.elapsed() >= BEHIND) {
            self.0.pop_front();
        }
        self.0.push_back(Before { until, kind: kind.to_owned(), id: id.to_owned(), was });
    }

    /// What was written over since a moment, newest first: undone in this order, it gives what there was then.
    fn since(&self, moment: Instant, kind: &str) -> Vec<Before<T>> {
        let newest = self.0.iter().rev().take_while(|before| before.until > moment);
        newest.filter(|before| before.kind == kind).cloned().collect()
    }
}

/// What a store's disk has: it outlives the processes.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) store: MemoryStore,
    /// For readers that are behind.
    documents: Arc<Mutex<Past<Document>>>,
    watermarks: Arc<Mutex<Past<u64>>>,
    full_until: Arc<Mutex<Option<Instant>>>,
}

impl Disk {
    pub(crate) fn new(epoch: &str) -> Self {
        Self {
            store: MemoryStore::new(epoch),
            documents: Arc::new(Mutex::new(Past(VecDeque::new()))),
            watermarks: Arc::new(Mutex::new(Past(VecDeque::new()))),
            full_until: Arc::default(),
        }
    }

    /// What is on it can be read, and nothing is written.
    pub(crate) fn fill_until(&self, moment: Instant) {
        let mut until = self.full_until.lock().unwrap();
        *until = until.max(Some(moment));
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full_until.lock().unwrap().is_some_and(|until| Instant::now() < until)
    }

    /// The documents of a batch as they are.
    async fn documents(&self, batch: &Batch) -> Vec<Document> {
        let mut documents = Vec::new();
        for change in &batch.changes {
            let (Change::Put { kind, id, .. } | Change::Delete { kind, id, .. }) = change;
            documents.extend(self.store.get(kind, id).await.unwrap());
        }
        documents
    }

    fn remember(&self, batch: &Batch, documents: &[Document], watermarks: Vec<u64>) {
        let mut past = self.documents.lock().unwrap();
        for change in &batch.changes {
            let (Change::Put { kind, id, .. } | Change::Delete { kind, id, .. }) = change;
            let was = documents.iter().find(|document| document.kind == *kind && document.id == *id);
            past.remember(kind, id, was.cloned());
        }
        let mut past = self.watermarks.lock().unwrap();
        for (mark, was) in batch.watermarks.iter().zip(watermarks) {
            past.remember(&mark.source_kind, &mark.source_id, Some(was));
        }
    }
}

#[derive(Clone)]
pub(crate) struct SimStore {
    disk: Disk,
    life: Life,
    world: World,
    invariants: Invariants,
    /// What this process has heard of, where it hears late of what others commit.
    heard: Option<Arc<watch::Sender<u64>>>,
}

impl SimStore {
    pub(crate) fn new(disk: &Disk, life: &Life, world: &World, invariants: &Invariants) -> Self {
        let heard = world.extras().late_lists.then(|| hear_late(disk, life, world));
        let (disk, life, world) = (disk.clone(), life.clone(), world.clone());
        Self { disk, life, world, invariants: invariants.clone(), heard }
    }

    fn refused(&self, what: &'static str, reason: &str) -> Error {
        Error::Unavailable { what, place: self.life.service.to_string(), reason: reason.to_owned() }
    }

    async fn write(&self, what: &'static str) -> Result<&MemoryStore, Error> {
        let store = self.read().await?;
        if self.disk.is_full() { Err(self.refused(what, FULL)) } else { Ok(store) }
    }

    async fn read(&self) -> Result<&MemoryStore, Error> {
        self.life.does("read");
        self.life.here().await;
        if self.world.chance(self.world.faults().store_refuses) {
            return Err(self.refused("read", "the disk is busy"));
        }
        Ok(&self.disk.store)
    }

    /// As of when it is read, where that is not now: what it gives was found before others wrote, and comes after.
    fn behind(&self) -> Option<Instant> {
        let (world, more) = (&self.world, self.world.more());
        if !world.extras().late_lists || !more.chance(world.faults().stale_read) {
            return None;
        }
        let by = Duration::from_millis(more.between(1, BEHIND_MILLIS));
        Instant::now().checked_sub(by)
    }
}

/// A replica is told of another's commit by a message that may be lost, and looks by itself only now and then. Its own
/// it knows at once.
fn hear_late(disk: &Disk, life: &Life, world: &World) -> Arc<watch::Sender<u64>> {
    let mut newest = disk.store.sequence();
    let heard = Arc::new(watch::Sender::new(*newest.borrow_and_update()));
    let (tell, life, world) = (heard.clone(), life.clone(), world.clone());
    tokio::spawn(async move {
        let following = async {
            while newest.changed().await.is_ok() {
                let late = world.more().between(0, BEHIND_MILLIS);
                tokio::time::sleep(Duration::from_millis(late)).await;
                advance(&tell, *newest.borrow_and_update());
            }
        };
        tokio::select! {
            biased;
            () = life.died() => {}
            () = following => {}
        }
    });
    heard
}

fn advance(heard: &watch::Sender<u64>, to: u64) {
    heard.send_if_modified(|known| {
        let grows = to > *known;
        *known = to.max(*known);
        grows
    });
}

#[async_trait]
impl Store for SimStore {
    fn epoch(&self) -> &str {
        self.disk.store.epoch()
    }

    fn sequence(&self) -> watch::Receiver<u64> {
        match &self.heard {
            Some(heard) => heard.subscribe(),
            None => self.disk.store.sequence(),
        }
    }

    async fn get(&self, kind: &str, id: &str) -> Result<Option<Document>, Error> {
        let store = self.read().await?;
        if self.world.chance(self.world.faults().stale_read) {
            let past = self.disk.documents.lock().unwrap();
            let of_it = |before: &&Before<Document>| before.kind == kind && before.id == id;
            let mut newest = past.0.iter().rev().filter(of_it).filter(|it| it.until.elapsed() < BEHIND);
            if let Some(document) = newest.find_map(|before| before.was.clone()) {
                return Ok(Some(document));
            }
        }
        store.get(kind, id).await
    }

    async fn list(
        &self,
        kind: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Document>, Error> {
        let mut listed = self.read().await?.list(kind, prefix, after, limit).await?;
        let Some(moment) = self.behind() else { return Ok(listed) };
        // What comes after a full page is the next page's.
        let end =
            (listed.len() >= limit as usize).then(|| listed.last().map(|last| last.id.clone())).flatten();
        let is_on_page = |id: &str| {
            let (begins, ends) =
                (after.is_none_or(|after| id > after), end.as_deref().is_none_or(|end| id <= end));
            id.starts_with(prefix) && begins && ends
        };
        for Before { id, was, .. } in self.disk.documents.lock().unwrap().since(moment, kind) {
            if is_on_page(&id) {
                listed.retain(|document| document.id != id);
                listed.extend(was);
            }
        }
        listed.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(listed)
    }

    /// Never behind what [`Store::sequence`] has announced: both stores read where they write, and a follower that was
    /// woken by an announcement would not look again. What can be late is the announcement itself.
    async fn changes(
        &self,
        kind: &str,
        since: Option<&Cursor>,
        page_token: &str,
        limit: u32,
    ) -> Result<Page, Error> {
        self.read().await?.changes(kind, since, page_token, limit).await
    }

    async fn watermark(&self, source_kind: &str, source_id: &str) -> Result<u64, Error> {
        let newest = self.read().await?.watermark(source_kind, source_id).await?;
        let Some(moment) = self.behind() else { return Ok(newest) };
        let past = self.disk.watermarks.lock().unwrap().since(moment, source_kind);
        let oldest = past.into_iter().rfind(|before| before.id == source_id);
        Ok(oldest.and_then(|before| before.was).unwrap_or(newest))
    }

    /// Never behind: it is read again right after a commit was refused since the answer is there.
    async fn answer(&self, request: &RequestId) -> Result<Option<StoredAnswer>, Error> {
        self.read().await?.answer(request).await
    }

    async fn commit(&self, batch: Batch) -> Result<Committed, Error> {
        self.life.does("commit");
        self.world.slowly().await;
        self.life.step("before a commit").await;
        let faults = self.world.faults();
        if self.disk.is_full() || self.world.chance(faults.store_refuses) {
            return Err(self.refused("commit", FULL));
        }
        let before = self.disk.documents(&batch).await;
        let mut watermarks = Vec::new();
        for mark in &batch.watermarks {
            watermarks.push(self.disk.store.watermark(&mark.source_kind, &mark.source_id).await?);
        }
        let committed = self.disk.store.commit(batch.clone()).await?;
        let after = self.disk.documents(&batch).await;
        self.invariants.committed(&self.life, &committed, &before, &after);
        self.invariants.advanced(&self.life, &batch.watermarks, &watermarks);
        self.disk.remember(&batch, &before, watermarks);
        if let Some(heard) = &self.heard {
            advance(heard, committed.sequence);
        }
        self.life.step("after a commit").await;
        if self.world.chance(faults.commit_unknown) {
            if self.world.extras().late_answers {
                let late = self.world.more().between(1, BEHIND_MILLIS);
                tokio::time::sleep(Duration::from_millis(late)).await;
                self.life.here().await;
            }
            return Err(self.refused("commit", "the answer is lost"));
        }
        Ok(committed)
    }

    async fn unsent(&self, limit: u32) -> Result<Vec<Event>, Error> {
        self.read().await?.unsent(limit).await
    }

    async fn log(&self, after: u64, limit: u32) -> Result<Vec<Event>, Error> {
        self.read().await?.log(after, limit).await
    }

    async fn mark_sent(&self, sequences: &[u64]) -> Result<(), Error> {
        self.life.step("before it marks events as sent").await;
        self.write("mark events as sent").await?.mark_sent(sequences).await
    }

    async fn audit(&self, before: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.read().await?.audit(before, limit).await
    }

    async fn audit_after(&self, after: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.read().await?.audit_after(after, limit).await
    }

    async fn prune(&self, now: jiff::Timestamp) -> Result<u64, Error> {
        self.write("prune").await?.prune(now).await
    }
}
