use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use kiln_model::event::Event;
use kiln_model::name::RequestId;
use kiln_store::{
    AuditRecord, Batch, Committed, Cursor, Document, Error, Page, SqlStore, Store, StoredAnswer,
};

/// A real store where others can be first with every commit.
#[derive(Clone)]
pub(crate) struct Contended {
    store: SqlStore,
    lose: Arc<AtomicU32>,
}

impl Contended {
    pub(crate) async fn new() -> Self {
        Self { store: SqlStore::in_memory().await.unwrap(), lose: Arc::default() }
    }

    /// The next commits lose against somebody.
    pub(crate) fn lose(&self, commits: u32) {
        self.lose.store(commits, Ordering::SeqCst);
    }
}

#[async_trait]
impl Store for Contended {
    fn epoch(&self) -> &str {
        self.store.epoch()
    }

    fn sequence(&self) -> tokio::sync::watch::Receiver<u64> {
        self.store.sequence()
    }

    async fn get(&self, kind: &str, id: &str) -> Result<Option<Document>, Error> {
        self.store.get(kind, id).await
    }

    async fn list(
        &self,
        kind: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Document>, Error> {
        self.store.list(kind, prefix, after, limit).await
    }

    async fn changes(
        &self,
        kind: &str,
        since: Option<&Cursor>,
        page_token: &str,
        limit: u32,
    ) -> Result<Page, Error> {
        self.store.changes(kind, since, page_token, limit).await
    }

    async fn watermark(&self, source_kind: &str, source_id: &str) -> Result<u64, Error> {
        self.store.watermark(source_kind, source_id).await
    }

    async fn answer(&self, request: &RequestId) -> Result<Option<StoredAnswer>, Error> {
        self.store.answer(request).await
    }

    async fn commit(&self, batch: Batch) -> Result<Committed, Error> {
        let lost = self.lose.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if lost.is_ok() {
            let (kind, id) = ("server".to_owned(), "web".to_owned());
            return Err(Error::Conflict { kind, id, expected: 1, actual: 2 });
        }
        self.store.commit(batch).await
    }

    async fn unsent(&self, limit: u32) -> Result<Vec<Event>, Error> {
        self.store.unsent(limit).await
    }

    async fn log(&self, after: u64, limit: u32) -> Result<Vec<Event>, Error> {
        self.store.log(after, limit).await
    }

    async fn mark_sent(&self, sequences: &[u64]) -> Result<(), Error> {
        self.store.mark_sent(sequences).await
    }

    async fn audit(&self, before: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.store.audit(before, limit).await
    }

    async fn audit_after(&self, after: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.store.audit_after(after, limit).await
    }

    async fn prune(&self, now: jiff::Timestamp) -> Result<u64, Error> {
        self.store.prune(now).await
    }
}
