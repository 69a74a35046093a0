//! A process's way to its service's store.

use std::collections::BTreeMap;
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

/// A reader is behind by so much at most.
const BEHIND: Duration = Duration::from_millis(500);

/// By kind and id, with when it was written over.
type Before = BTreeMap<(String, String), (Document, Instant)>;

/// What a store's disk has: it outlives the processes.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) store: MemoryStore,
    /// Each document as it was before it was last written, for readers that are behind.
    before: Arc<Mutex<Before>>,
}

impl Disk {
    pub(crate) fn new(epoch: &str) -> Self {
        Self { store: MemoryStore::new(epoch), before: Arc::default() }
    }

    fn remember(&self, documents: Vec<Document>) {
        let mut before = self.before.lock().unwrap();
        let now = Instant::now();
        before.extend(documents.into_iter().map(|old| ((old.kind.clone(), old.id.clone()), (old, now))));
    }

    async fn documents(&self, batch: &Batch) -> Vec<Document> {
        let mut documents = Vec::new();
        for change in &batch.changes {
            let (Change::Put { kind, id, .. } | Change::Delete { kind, id, .. }) = change;
            documents.extend(self.store.get(kind, id).await.unwrap());
        }
        documents
    }
}

#[derive(Clone)]
pub(crate) struct SimStore {
    pub(crate) disk: Disk,
    pub(crate) life: Life,
    pub(crate) world: World,
    pub(crate) invariants: Invariants,
}

impl SimStore {
    fn refused(&self, what: &'static str, reason: &str) -> Error {
        Error::Unavailable { what, place: self.life.service.to_string(), reason: reason.to_owned() }
    }

    async fn read(&self) -> Result<&MemoryStore, Error> {
        self.life.does("read");
        self.life.here().await;
        if self.world.chance(self.world.faults().store_refuses) {
            return Err(self.refused("read", "the disk is busy"));
        }
        Ok(&self.disk.store)
    }
}

#[async_trait]
impl Store for SimStore {
    fn epoch(&self) -> &str {
        self.disk.store.epoch()
    }

    fn sequence(&self) -> watch::Receiver<u64> {
        self.disk.store.sequence()
    }

    async fn get(&self, kind: &str, id: &str) -> Result<Option<Document>, Error> {
        let store = self.read().await?;
        if self.world.chance(self.world.faults().stale_read) {
            let before = self.disk.before.lock().unwrap().get(&(kind.to_owned(), id.to_owned())).cloned();
            if let Some((document, _)) = before.filter(|(_, until)| until.elapsed() < BEHIND) {
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
        self.read().await?.list(kind, prefix, after, limit).await
    }

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
        self.read().await?.watermark(source_kind, source_id).await
    }

    async fn answer(&self, request: &RequestId) -> Result<Option<StoredAnswer>, Error> {
        self.read().await?.answer(request).await
    }

    async fn commit(&self, batch: Batch) -> Result<Committed, Error> {
        self.life.does("commit");
        self.world.slowly().await;
        self.life.step("before a commit").await;
        let faults = self.world.faults();
        if self.world.chance(faults.store_refuses) {
            return Err(self.refused("commit", "the disk is full"));
        }
        let before = self.disk.documents(&batch).await;
        let committed = self.disk.store.commit(batch.clone()).await?;
        let after = self.disk.documents(&batch).await;
        self.invariants.committed(&self.life, &committed, &before, &after);
        self.disk.remember(before);
        self.life.step("after a commit").await;
        if self.world.chance(faults.commit_unknown) {
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
        self.read().await?.mark_sent(sequences).await
    }

    async fn audit(&self, before: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.read().await?.audit(before, limit).await
    }

    async fn audit_after(&self, after: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.read().await?.audit_after(after, limit).await
    }

    async fn prune(&self, now: jiff::Timestamp) -> Result<u64, Error> {
        self.read().await?.prune(now).await
    }
}
