//! A store in one SQLite file.
//!
//! One task writes (see `writer`), a few connections read. The write-ahead log lets readers go on while a commit is
//! under way; `synchronous=FULL` makes the commit wait for the disk.

mod rows;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::TryStreamExt as _;
use kiln_model::event::Event;
use kiln_model::name::RequestId;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, SqliteConnection};
use tokio::sync::{mpsc, watch};

use crate::batch::{AuditRecord, Batch, StoredAnswer};
use crate::document::{Cursor, Document, Page};
use crate::token::Position;
use crate::{Committed, Error, PAGE_BYTES, Store, sql};
use writer::{Job, Writer};

/// The tables. `WITHOUT ROWID` keeps a document beside its key.
const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS documents (
    kind TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, sequence INTEGER NOT NULL,
    schema_number INTEGER NOT NULL, body TEXT NOT NULL, deleted INTEGER,
    PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS documents_by_sequence ON documents (kind, sequence, id);
CREATE TABLE IF NOT EXISTS watermarks (
    source_kind TEXT NOT NULL, source_id TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (source_kind, source_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    request TEXT PRIMARY KEY, request_digest TEXT NOT NULL, answer BLOB NOT NULL, created INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (
    sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    aggregate_kind TEXT NOT NULL, aggregate_id TEXT NOT NULL, aggregate_version INTEGER NOT NULL, place INTEGER NOT NULL,
    service TEXT NOT NULL, entity TEXT NOT NULL, verb TEXT NOT NULL, server TEXT,
    payload BLOB NOT NULL, time TEXT NOT NULL, traceparent TEXT NOT NULL, created INTEGER NOT NULL, sent INTEGER);
CREATE UNIQUE INDEX IF NOT EXISTS outbox_by_aggregate
    ON outbox (aggregate_kind, aggregate_id, aggregate_version, place);
CREATE INDEX IF NOT EXISTS outbox_unsent ON outbox (sequence) WHERE sent IS NULL;
CREATE TABLE IF NOT EXISTS audit (
    sequence INTEGER PRIMARY KEY, time TEXT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
    request TEXT, body TEXT NOT NULL);
";

/// Bound on waiting for another process that holds the file, a backup for instance.
const BUSY: Duration = Duration::from_secs(5);
const READERS: u32 = 4;
/// Jobs that may wait for the writer; past it callers wait to hand theirs in.
const QUEUE: usize = 1024;

/// Cheap to clone; every clone is the same store.
#[derive(Debug, Clone)]
pub struct SqliteStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    epoch: String,
    place: String,
    readers: SqlitePool,
    jobs: mpsc::Sender<Job>,
    sequence: watch::Receiver<u64>,
    /// Last, so that it goes when the connections are closed.
    _scratch: Option<Scratch>,
}

/// The folder of a store that lives as long as its handles.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "could not remove a scratch store");
        }
    }
}

impl SqliteStore {
    /// Opens the store in a file, and makes it where it does not exist.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where the file can't be opened, is damaged, or was written by a newer Kiln.
    pub async fn open(path: &Path) -> Result<Self, Error> {
        create_private(path)?;
        Self::start(path, SqliteSynchronous::Full, None).await
    }

    /// A store for tests: as fast as memory, gone with its last handle.
    ///
    /// # Errors
    /// As [`SqliteStore::open`].
    pub async fn in_memory() -> Result<Self, Error> {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let folder = base.join(format!("kiln-store-{}", ulid::Ulid::generate()));
        std::fs::create_dir(&folder).map_err(|error| unavailable("open", &folder, error.to_string()))?;
        let scratch = Scratch(folder);
        let path = scratch.0.join("store.db");
        create_private(&path)?;
        Self::start(&path, SqliteSynchronous::Off, Some(scratch)).await
    }

    async fn start(
        path: &Path,
        synchronous: SqliteSynchronous,
        scratch: Option<Scratch>,
    ) -> Result<Self, Error> {
        let place = path.display().to_string();
        let failed = |what| {
            let place = place.clone();
            move |error| rows::failure(what, &place, &error)
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(false)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(synchronous)
            .busy_timeout(BUSY)
            .foreign_keys(false)
            // The log is cut back to this after a checkpoint, else one burst would keep its size for ever.
            .pragma("journal_size_limit", "67108864")
            .disable_statement_logging();
        let mut connection = options.connect().await.map_err(failed("open"))?;
        let (epoch, sequence) = prepare(&mut connection, &place).await?;
        // Made ahead and never tested before use: a read costs its statement alone.
        let readers = SqlitePoolOptions::new()
            .min_connections(READERS)
            .max_connections(READERS)
            .test_before_acquire(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options.clone())
            .await
            .map_err(failed("open"))?;
        let (announce, sequence) = watch::channel(sequence);
        let (jobs, queue) = mpsc::channel(QUEUE);
        let writer = Writer::new(connection, options, epoch.clone(), place.clone(), announce);
        tokio::spawn(writer.run(queue));
        Ok(Self { inner: Arc::new(Inner { epoch, place, readers, jobs, sequence, _scratch: scratch }) })
    }

    fn failure(&self, what: &'static str) -> impl Fn(sqlx::Error) -> Error + '_ {
        move |error| rows::failure(what, &self.inner.place, &error)
    }

    /// Hands a job to the writer and waits for its end. The job is carried out even where the caller goes away.
    async fn ask<T>(
        &self,
        what: &'static str,
        job: impl FnOnce(tokio::sync::oneshot::Sender<Result<T, Error>>) -> Job,
    ) -> Result<T, Error> {
        let gone = || Error::Unavailable {
            what,
            place: self.inner.place.clone(),
            reason: "the store's writer has ended: restart the service".to_owned(),
        };
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.inner.jobs.send(job(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn meta(&self, connection: &mut SqliteConnection, name: &str) -> Result<u64, Error> {
        let text: Option<String> = sqlx::query_scalar(sql::META_GET)
            .bind(name)
            .fetch_optional(connection)
            .await
            .map_err(self.failure("read"))?;
        Ok(text.and_then(|text| text.parse().ok()).unwrap_or(0))
    }
}

/// SQLite gives its log and its index the mode of the file itself.
fn create_private(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let made = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    made.and_then(|file| file.set_permissions(std::fs::Permissions::from_mode(0o600)))
        .map_err(|error| unavailable("open", path, error.to_string()))
}

fn unavailable(what: &'static str, path: &Path, reason: String) -> Error {
    Error::Unavailable { what, place: path.display().to_string(), reason }
}

/// Makes the tables where they are missing, and returns the epoch and the sequence.
async fn prepare(connection: &mut SqliteConnection, place: &str) -> Result<(String, u64), Error> {
    let failed = |error: sqlx::Error| rows::failure("open", place, &error);
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
    sqlx::raw_sql(SCHEMA).execute(&mut *transaction).await.map_err(failed)?;
    let mut values = Vec::new();
    for (name, initial) in [
        ("layout", sql::LAYOUT.to_owned()),
        ("epoch", ulid::Ulid::generate().to_string()),
        ("sequence", "0".to_owned()),
    ] {
        let found: Option<String> = sqlx::query_scalar(sql::META_GET)
            .bind(name)
            .fetch_optional(&mut *transaction)
            .await
            .map_err(failed)?;
        if found.is_none() {
            sqlx::query(sql::META_SET)
                .bind(name)
                .bind(&initial)
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        values.push(found.unwrap_or(initial));
    }
    transaction.commit().await.map_err(failed)?;
    let wrong = |reason: String| Error::Unavailable { what: "open", place: place.to_owned(), reason };
    let [layout, epoch, sequence] =
        <[String; 3]>::try_from(values).map_err(|_| wrong("no meta".to_owned()))?;
    if layout != sql::LAYOUT {
        return Err(wrong(format!(
            "its layout is {layout}, this program knows {}: use the Kiln that wrote it, or a newer one",
            sql::LAYOUT
        )));
    }
    let sequence =
        sequence.parse().map_err(|_| wrong(format!("`{sequence}` is not a sequence: restore the store")))?;
    Ok((epoch, sequence))
}

#[async_trait]
impl Store for SqliteStore {
    fn epoch(&self) -> &str {
        &self.inner.epoch
    }

    fn sequence(&self) -> watch::Receiver<u64> {
        self.inner.sequence.clone()
    }

    async fn get(&self, kind: &str, id: &str) -> Result<Option<Document>, Error> {
        let row = sqlx::query(sql::DOCUMENT_GET)
            .bind(kind)
            .bind(id)
            .fetch_optional(&self.inner.readers)
            .await
            .map_err(self.failure("read"))?;
        row.as_ref().map(rows::document).transpose()
    }

    async fn list(
        &self,
        kind: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Document>, Error> {
        let rows = sqlx::query(sql::DOCUMENT_LIST)
            .bind(kind)
            .bind(prefix)
            .bind(format!("{prefix}{}", char::MAX))
            .bind(after.unwrap_or(""))
            .bind(rows::limit(limit))
            .fetch_all(&self.inner.readers)
            .await
            .map_err(self.failure("read"))?;
        rows.iter().map(rows::document).collect()
    }

    async fn changes(
        &self,
        kind: &str,
        since: Option<&Cursor>,
        page_token: &str,
        limit: u32,
    ) -> Result<Page, Error> {
        let mut connection = self.inner.readers.acquire().await.map_err(self.failure("read"))?;
        // Read before the rows: what is committed in between may be listed twice, and is never left out.
        let now = self.meta(&mut connection, "sequence").await?;
        let position = if page_token.is_empty() {
            let horizon = self.meta(&mut connection, "horizon").await?;
            Position::first(since, &self.inner.epoch, now, horizon)
        } else {
            Position::parse(page_token, &self.inner.epoch)?
        };
        let limit = rows::limit(limit);
        let mut found = sqlx::query(sql::DOCUMENT_CHANGES)
            .bind(kind)
            .bind(rows::signed(position.sequence))
            .bind(&position.id)
            .bind(rows::signed(position.tombstones_after))
            .bind(limit + 1)
            .fetch(&mut *connection);
        let (mut entries, mut bytes, mut more) = (Vec::new(), 0, false);
        while let Some(row) = found.try_next().await.map_err(self.failure("read"))? {
            let size = rows::size(&row)?;
            let full = entries.len() >= usize::try_from(limit).unwrap_or(usize::MAX);
            if full || (!entries.is_empty() && bytes + size > PAGE_BYTES) {
                more = true;
                break;
            }
            bytes += size;
            entries.push(rows::entry(&row)?);
        }
        Ok(position.page(entries, more, &self.inner.epoch, now))
    }

    async fn watermark(&self, source_kind: &str, source_id: &str) -> Result<u64, Error> {
        let version: Option<i64> = sqlx::query_scalar(sql::WATERMARK_GET)
            .bind(source_kind)
            .bind(source_id)
            .fetch_optional(&self.inner.readers)
            .await
            .map_err(self.failure("read"))?;
        Ok(version.map_or(0, rows::unsigned))
    }

    async fn answer(&self, request: &RequestId) -> Result<Option<StoredAnswer>, Error> {
        let row = sqlx::query(sql::ANSWER_GET)
            .bind(request.as_str())
            .fetch_optional(&self.inner.readers)
            .await
            .map_err(self.failure("read"))?;
        row.map(|row| {
            let digest: String = row.try_get(0).map_err(self.failure("read"))?;
            Ok(StoredAnswer {
                request: request.clone(),
                request_digest: digest.parse().map_err(|error| Error::Unreadable {
                    kind: "answer".to_owned(),
                    id: request.to_string(),
                    reason: format!("{error}"),
                })?,
                answer: row.try_get(1).map_err(self.failure("read"))?,
            })
        })
        .transpose()
    }

    async fn commit(&self, batch: Batch) -> Result<Committed, Error> {
        self.ask("commit", |reply| Job::Commit(Box::new(batch), reply)).await
    }

    async fn unsent(&self, limit: u32) -> Result<Vec<Event>, Error> {
        let rows = sqlx::query(sql::EVENT_UNSENT)
            .bind(rows::limit(limit))
            .fetch_all(&self.inner.readers)
            .await
            .map_err(self.failure("read"))?;
        rows.iter().map(|row| rows::event(row, &self.inner.epoch)).collect()
    }

    async fn log(&self, after: u64, limit: u32) -> Result<Vec<Event>, Error> {
        let rows = sqlx::query(sql::EVENT_LOG)
            .bind(rows::signed(after))
            .bind(rows::limit(limit))
            .fetch_all(&self.inner.readers)
            .await
            .map_err(self.failure("read"))?;
        rows.iter().map(|row| rows::event(row, &self.inner.epoch)).collect()
    }

    async fn mark_sent(&self, sequences: &[u64]) -> Result<(), Error> {
        let sequences = sequences.to_vec();
        self.ask("mark events as sent", |reply| Job::MarkSent(sequences, reply)).await
    }

    async fn audit(&self, before: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error> {
        let before = if before == 0 { i64::MAX } else { rows::signed(before) };
        let rows = sqlx::query(sql::AUDIT_LIST)
            .bind(before)
            .bind(rows::limit(limit))
            .fetch_all(&self.inner.readers)
            .await
            .map_err(self.failure("read"))?;
        rows.iter().map(rows::audit).collect()
    }

    async fn prune(&self, now: jiff::Timestamp) -> Result<u64, Error> {
        self.ask("prune", |reply| Job::Prune(now, reply)).await
    }
}
