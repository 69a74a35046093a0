//! A process that can be killed after any of its steps: whatever it would do next never comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use kiln_model::event::Event;
use kiln_model::name::RequestId;
use kiln_store::{
    AuditRecord, Batch, Committed, Cursor, Document, Error, Page, SqlStore, Store, StoredAnswer,
};
use tokio::sync::watch;

/// Counts steps: commits, and effects at the node.
#[derive(Clone)]
pub(super) struct Life {
    steps: Arc<AtomicU64>,
    /// The step after which it is dead.
    last: u64,
    dead: watch::Sender<bool>,
}

impl Life {
    pub(super) fn long() -> Self {
        Self::of(u64::MAX)
    }

    pub(super) fn of(last: u64) -> Self {
        Self { steps: Arc::default(), last, dead: watch::channel(false).0 }
    }

    pub(super) fn kill(&self) {
        self.dead.send_replace(true);
    }

    pub(super) fn death(&self) -> watch::Receiver<bool> {
        self.dead.subscribe()
    }

    /// Comes back only in a process that lives.
    pub(super) async fn alive(&self) {
        if *self.dead.borrow() {
            std::future::pending::<()>().await;
        }
    }

    /// Something was done, that outlives the process.
    pub(super) async fn step(&self) {
        if self.steps.fetch_add(1, Ordering::SeqCst) + 1 == self.last {
            self.kill();
        }
        self.alive().await;
    }
}

/// A store that its process loses when it dies.
#[derive(Clone)]
pub(super) struct Mortal {
    pub(super) inner: SqlStore,
    pub(super) life: Life,
}

#[async_trait]
impl Store for Mortal {
    fn epoch(&self) -> &str {
        self.inner.epoch()
    }

    fn sequence(&self) -> watch::Receiver<u64> {
        self.inner.sequence()
    }

    async fn get(&self, kind: &str, id: &str) -> Result<Option<Document>, Error> {
        self.life.alive().await;
        self.inner.get(kind, id).await
    }

    async fn list(
        &self,
        kind: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Document>, Error> {
        self.life.alive().await;
        self.inner.list(kind, prefix, after, limit).await
    }

    async fn changes(
        &self,
        kind: &str,
        since: Option<&Cursor>,
        page_token: &str,
        limit: u32,
    ) -> Result<Page, Error> {
        self.life.alive().await;
        self.inner.changes(kind, since, page_token, limit).await
    }

    async fn watermark(&self, source_kind: &str, source_id: &str) -> Result<u64, Error> {
        self.life.alive().await;
        self.inner.watermark(source_kind, source_id).await
    }

    async fn answer(&self, request: &RequestId) -> Result<Option<StoredAnswer>, Error> {
        self.life.alive().await;
        self.inner.answer(request).await
    }

    async fn commit(&self, batch: Batch) -> Result<Committed, Error> {
        self.life.alive().await;
        let committed = self.inner.commit(batch).await;
        if committed.is_ok() {
            self.life.step().await;
        }
        committed
    }

    async fn unsent(&self, limit: u32) -> Result<Vec<Event>, Error> {
        self.life.alive().await;
        self.inner.unsent(limit).await
    }

    async fn log(&self, after: u64, limit: u32) -> Result<Vec<Event>, Error> {
        self.life.alive().await;
        self.inner.log(after, limit).await
    }

    async fn mark_sent(&self, sequences: &[u64]) -> Result<(), Error> {
        self.life.alive().await;
        self.inner.mark_sent(sequences).await
    }

    async fn audit(&self, before: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.life.alive().await;
        self.inner.audit(before, limit).await
    }

    async fn audit_after(&self, after: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.life.alive().await;
        self.inner.audit_after(after, limit).await
    }

    async fn prune(&self, now: jiff::Timestamp) -> Result<u64, Error> {
        self.life.alive().await;
        self.inner.prune(now).await
    }
}
