//! A store in an SQL database: the handle, what reads, and the way to the task that writes.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use kiln_model::event::Event;
use kiln_model::name::RequestId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::batch::{AuditRecord, Batch, StoredAnswer};
use crate::connection::{Connection, Row, Value};
use crate::document::{Cursor, Document, Page};
use crate::layout::{Identity, prepare};
use crate::rows::{self, number};
use crate::session::{Backend, Session, failure};
use crate::token::Position;
use crate::writer::{Job, Writer};
use crate::{Committed, Error, PAGE_BYTES, Place, Store, postgres, sql, sqlite};

/// Jobs that may wait for the writer; past it callers wait to hand theirs in.
const QUEUE: usize = 1024;

/// A store in SQLite or PostgreSQL. Cheap to clone; every clone is the same store.
#[derive(Clone)]
pub struct SqlStore {
    inner: Arc<Inner>,
}

struct Inner {
    epoch: String,
    restored: u64,
    jobs: mpsc::Sender<Job>,
    sequence: watch::Receiver<u64>,
    backend: Arc<dyn Backend>,
    /// Last, so that it goes when the connections are closed.
    _scratch: Option<Scratch>,
}

impl std::fmt::Debug for SqlStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqlStore").field("place", &self.place()).finish_non_exhaustive()
    }
}

/// The folder of a store that lives as long as its handles.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "could not remove a scratch store");
        }
    }
}

impl SqlStore {
    /// Opens the store in a place, and makes it where it does not exist.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where the file can't be opened or the server not be reached, where it is damaged, or was
    /// written by a Kiln that is too new.
    pub async fn open(place: &Place) -> Result<Self, Error> {
        match place {
            Place::File(path) => sqlite::open(path).await,
            Place::Postgres(database) => postgres::open(database).await,
        }
    }

    /// A store for tests: as fast as memory, gone with its last handle.
    ///
    /// # Errors
    /// As [`SqlStore::open`].
    pub async fn in_memory() -> Result<Self, Error> {
        sqlite::in_memory().await
    }

    /// For people.
    pub(crate) fn place(&self) -> &str {
        self.inner.backend.place()
    }

    pub(crate) async fn start(
        backend: Arc<dyn Backend>,
        announce: Arc<watch::Sender<u64>>,
        scratch: Option<Scratch>,
    ) -> Result<Self, Error> {
        let connected = backend.connect().await;
        let mut connection = connected.map_err(|error| failure(&*backend, "open", &error))?;
        let mut session = Session::new(&mut *connection, &*backend, "open");
        let identity = prepare(&mut session, &*backend).await?;
        announce.send_replace(identity.sequence);
        let (jobs, queue) = mpsc::channel(QUEUE);
        let sequence = announce.subscribe();
        let Identity { epoch, sequence: at, restored } = identity;
        let keeper = backend.witness().map(|witness| witness.keep(&epoch, at)).transpose();
        let keeper = keeper.unwrap_or_else(|error| {
            // The next time the store is taken for a restored one, which does no harm.
            tracing::warn!(store = backend.place(), %error, "what is committed can't be noted beside the store");
            None
        });
        let writer = Writer::new(connection, backend.clone(), epoch.clone(), announce, keeper);
        tokio::spawn(writer.run(queue));
        Ok(Self { inner: Arc::new(Inner { epoch, restored, jobs, sequence, backend, _scratch: scratch }) })
    }

    /// Hands a job to the writer and waits for its end. The job is carried out even where the caller goes away.
    async fn ask<T>(
        &self,
        what: &'static str,
        job: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Job,
    ) -> Result<T, Error> {
        let gone = || Error::Unavailable {
            what,
            place: self.place().to_owned(),
            reason: "the store's writer has ended: restart the service".to_owned(),
        };
        let (reply, answer) = oneshot::channel();
        self.inner.jobs.send(job(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn reader(&self) -> Result<Box<dyn Connection>, Error> {
        let backend = &*self.inner.backend;
        backend.reader().await.map_err(|error| failure(backend, "read", &error))
    }

    async fn all<T: Send>(
        &self,
        statement: &'static str,
        values: &[Value<'_>],
        read: impl FnMut(&dyn Row) -> Result<T, Error> + Send,
    ) -> Result<Vec<T>, Error> {
        let mut connection = self.reader().await?;
        Session::new(&mut *connection, &*self.inner.backend, "read").all(statement, values, read).await
    }

    async fn one<T: Send>(
        &self,
        statement: &'static str,
        values: &[Value<'_>],
        read: impl FnMut(&dyn Row) -> Result<T, Error> + Send,
    ) -> Result<Option<T>, Error> {
        Ok(self.all(statement, values, read).await?.pop())
    }
}

#[async_trait]
impl Store for SqlStore {
    fn epoch(&self) -> &str {
        &self.inner.epoch
    }

    fn numbers_above(&self) -> u64 {
        self.inner.restored
    }

    fn sequence(&self) -> watch::Receiver<u64> {
        self.inner.sequence.clone()
    }

    async fn get(&self, kind: &str, id: &str) -> Result<Option<Document>, Error> {
        self.one(sql::DOCUMENT_GET, &[Value::Text(kind), Value::Text(id)], rows::document).await
    }

    async fn list(
        &self,
        kind: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Document>, Error> {
        let end = format!("{prefix}{}", char::MAX);
        let values = [
            Value::Text(kind),
            Value::Text(prefix),
            Value::Text(&end),
            Value::Text(after.unwrap_or("")),
            Value::Number(rows::limit(limit)),
        ];
        self.all(sql::DOCUMENT_LIST, &values, rows::document).await
    }

    async fn changes(
        &self,
        kind: &str,
        since: Option<&Cursor>,
        page_token: &str,
        limit: u32,
    ) -> Result<Page, Error> {
        let epoch = &self.inner.epoch;
        let mut connection = self.reader().await?;
        let mut session = Session::new(&mut *connection, &*self.inner.backend, "read");
        // Read before the rows: what is committed in between may be listed twice, and is never left out.
        let now = session.meta_number("sequence").await?;
        let position = if page_token.is_empty() {
            let horizon = session.meta_number("horizon").await?;
            Position::first(since, epoch, now, horizon)
        } else {
            Position::parse(page_token, epoch)?
        };
        let limit = rows::limit(limit);
        let values = [
            Value::Text(kind),
            number(position.sequence),
            Value::Text(&position.id),
            number(position.tombstones_after),
            Value::Number(limit + 1),
        ];
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let (mut entries, mut bytes, mut more) = (Vec::new(), 0, false);
        let read = session.each(sql::DOCUMENT_CHANGES, &values, |row| {
            let size = rows::size(row)?;
            if entries.len() >= limit || (!entries.is_empty() && bytes + size > PAGE_BYTES) {
                more = true;
                return Ok(ControlFlow::Break(()));
            }
            bytes += size;
            entries.push(rows::entry(row)?);
            Ok(ControlFlow::Continue(()))
        });
        read.await?;
        Ok(position.page(entries, more, epoch, now))
    }

    async fn watermark(&self, source_kind: &str, source_id: &str) -> Result<u64, Error> {
        let source = [Value::Text(source_kind), Value::Text(source_id)];
        let version = self.one(sql::WATERMARK_GET, &source, |row| rows::unsigned(row, "version"));
        Ok(version.await?.unwrap_or(0))
    }

    async fn answer(&self, request: &RequestId) -> Result<Option<StoredAnswer>, Error> {
        let name = request.as_str();
        let found = self.one(sql::ANSWER_GET, &[Value::Text(name)], |row| rows::answer(row, name)).await?;
        Ok(found.map(|(request_digest, answer)| StoredAnswer {
            request: request.clone(),
            request_digest,
            answer,
        }))
    }

    async fn commit(&self, batch: Batch) -> Result<Committed, Error> {
        self.ask("commit", |reply| Job::Commit(Box::new(batch), reply)).await
    }

    async fn unsent(&self, limit: u32) -> Result<Vec<Event>, Error> {
        let values = [Value::Number(rows::limit(limit))];
        self.all(sql::EVENT_UNSENT, &values, |row| rows::event(row, &self.inner.epoch)).await
    }

    async fn log(&self, after: u64, limit: u32) -> Result<Vec<Event>, Error> {
        let values = [number(after), Value::Number(rows::limit(limit))];
        self.all(sql::EVENT_LOG, &values, |row| rows::event(row, &self.inner.epoch)).await
    }

    async fn mark_sent(&self, sequences: &[u64]) -> Result<(), Error> {
        let sequences = sequences.to_vec();
        self.ask("mark events as sent", |reply| Job::MarkSent(sequences, reply)).await
    }

    async fn audit(&self, before: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        let before = if before == 0 { u64::MAX } else { before };
        self.all(sql::AUDIT_LIST, &[number(before), Value::Number(rows::limit(limit))], rows::audit).await
    }

    async fn audit_after(&self, after: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        self.all(sql::AUDIT_AFTER, &[number(after), Value::Number(rows::limit(limit))], rows::audit).await
    }

    async fn prune(&self, now: jiff::Timestamp) -> Result<u64, Error> {
        self.ask("prune", |reply| Job::Prune(now, reply)).await
    }
}
