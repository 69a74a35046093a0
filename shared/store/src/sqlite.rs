//! A store in one SQLite file.
//!
//! One task writes (see `writer`), a few connections read. The write-ahead log lets readers go on while a commit is
//! under way; `synchronous=FULL` makes the commit wait for the disk.

mod damage;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, Sqlite};
use tokio::sync::watch;

use crate::Error;
use crate::connection::{Connection, Link};
use crate::layout::Migration;
use crate::seen::{Witness, beside};
use crate::session::Backend;
use crate::store::{Scratch, SqlStore};

/// `WITHOUT ROWID` keeps a document beside its key.
const FOUNDATION: &str =
    "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID";

const MIGRATIONS: &[Migration] = &[Migration {
    layout: 1,
    readable_from: 1,
    statements: "
CREATE TABLE documents (
    kind TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, sequence INTEGER NOT NULL,
    schema_number INTEGER NOT NULL, body TEXT NOT NULL, deleted INTEGER,
    PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE INDEX documents_by_sequence ON documents (kind, sequence, id);
CREATE TABLE watermarks (
    source_kind TEXT NOT NULL, source_id TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (source_kind, source_id)) WITHOUT ROWID;
CREATE TABLE answers (
    request TEXT PRIMARY KEY, request_digest TEXT NOT NULL, answer BLOB NOT NULL, created INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE outbox (
    sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    aggregate_kind TEXT NOT NULL, aggregate_id TEXT NOT NULL, aggregate_version INTEGER NOT NULL, place INTEGER NOT NULL,
    service TEXT NOT NULL, entity TEXT NOT NULL, verb TEXT NOT NULL, server TEXT,
    payload BLOB NOT NULL, time TEXT NOT NULL, traceparent TEXT NOT NULL, created INTEGER NOT NULL, sent INTEGER);
CREATE UNIQUE INDEX outbox_by_aggregate ON outbox (aggregate_kind, aggregate_id, aggregate_version, place);
CREATE INDEX outbox_unsent ON outbox (sequence) WHERE sent IS NULL;
CREATE TABLE audit (
    sequence INTEGER PRIMARY KEY, time TEXT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
    request TEXT, body TEXT NOT NULL);
",
}];

/// Bound on waiting for another process that holds the file, a backup for instance.
const BUSY: Duration = Duration::from_secs(5);
const READERS: u32 = 4;

pub(crate) struct File {
    place: String,
    options: SqliteConnectOptions,
    readers: SqlitePool,
    migrations: &'static [Migration],
    witness: Option<Witness>,
}

pub(crate) async fn open(path: &Path) -> Result<SqlStore, Error> {
    create_private(path)?;
    damage::look_for(path).await?;
    start(path, SqliteSynchronous::Full, MIGRATIONS, None).await
}

pub(crate) async fn in_memory() -> Result<SqlStore, Error> {
    let shm = Path::new("/dev/shm");
    let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
    let folder = base.join(format!("kiln-store-{}", ulid::Ulid::generate()));
    std::fs::create_dir(&folder).map_err(|error| unavailable(&folder, &error))?;
    let scratch = Scratch(folder);
    let path = scratch.0.join("store.db");
    create_private(&path)?;
    start(&path, SqliteSynchronous::Off, MIGRATIONS, Some(scratch)).await
}

async fn start(
    path: &Path,
    synchronous: SqliteSynchronous,
    migrations: &'static [Migration],
    scratch: Option<Scratch>,
) -> Result<SqlStore, Error> {
    let (announce, _) = watch::channel(0);
    let witness = scratch.is_none().then(|| witness(path));
    let file = backend(path, synchronous, SqliteJournalMode::Wal, migrations, witness);
    SqlStore::start(Arc::new(file), Arc::new(announce), scratch).await
}

fn backend(
    path: &Path,
    synchronous: SqliteSynchronous,
    journal: SqliteJournalMode,
    migrations: &'static [Migration],
    witness: Option<Witness>,
) -> File {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .journal_mode(journal)
        .synchronous(synchronous)
        .busy_timeout(BUSY)
        .foreign_keys(false)
        // The log is cut back to this after a checkpoint, else one burst would keep its size for ever.
        .pragma("journal_size_limit", "67108864")
        .disable_statement_logging();
    // Kept once they are made, and never tested before use: a read costs its statement alone.
    let readers = SqlitePoolOptions::new()
        .max_connections(READERS)
        .test_before_acquire(false)
        .idle_timeout(None)
        .max_lifetime(None)
        .connect_lazy_with(options.clone());
    File { place: path.display().to_string(), options, readers, migrations, witness }
}

pub(crate) fn witness(path: &Path) -> Witness {
    Witness { path: beside(path), alone: true }
}

/// A file that is there, outside of a service: without a log beside it that would have to go along.
pub(crate) fn existing(path: &Path) -> File {
    backend(path, SqliteSynchronous::Full, SqliteJournalMode::Delete, MIGRATIONS, None)
}

/// As [`existing`], of a file that is made now.
pub(crate) fn create(path: &Path) -> Result<File, Error> {
    let mut options = std::fs::OpenOptions::new();
    let made =
        std::os::unix::fs::OpenOptionsExt::mode(options.create_new(true).write(true), 0o600).open(path);
    made.map_err(|error| unavailable(path, &error))?;
    Ok(existing(path))
}

/// Writes a consistent copy of a file that may be in use to one that does not exist.
pub(crate) async fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    create(to)?;
    let place = from.display().to_string();
    let failed = |error: &sqlx::Error| Error::Unavailable {
        what: "copy",
        place: place.clone(),
        reason: error.to_string(),
    };
    // Whatever mode the journal has: a copy must not change it.
    let options = SqliteConnectOptions::new().filename(from).create_if_missing(false).busy_timeout(BUSY);
    let mut link = options.disable_statement_logging().connect().await.map_err(|error| failed(&error))?;
    let target = to.display().to_string();
    // VACUUM INTO takes a file that is there where that is empty; this one has the mode that keeps others out.
    let copied = sqlx::query("VACUUM INTO ?").bind(&target).execute(&mut link).await;
    copied.map_err(|error| failed(&error))?;
    let synced = std::fs::File::open(to).and_then(|file| file.sync_all());
    synced.map_err(|error| unavailable(to, &error))
}

#[async_trait]
impl Backend for File {
    fn place(&self) -> &str {
        &self.place
    }

    async fn connect(&self) -> Result<Box<dyn Connection>, sqlx::Error> {
        let connection = Box::new(self.options.connect().await?);
        Ok(Box::new(Link::<Sqlite, _>::new(connection, None)))
    }

    async fn reader(&self) -> Result<Box<dyn Connection>, sqlx::Error> {
        Ok(Box::new(Link::<Sqlite, _>::new(self.readers.acquire().await?, None)))
    }

    fn begin(&self) -> &'static str {
        // IMMEDIATE: a lock that is taken later can't be waited for, since the snapshot would be stale.
        "BEGIN IMMEDIATE"
    }

    /// SQLite's primary result code says what a person can do about it.
    fn advice(&self, error: &sqlx::Error) -> Option<&'static str> {
        let code = error.as_database_error()?.code()?.parse::<i32>().ok()? & 0xff;
        Some(match code {
            13 => "the disk is full; free some space there, and it goes on by itself",
            5 | 6 => "another process holds the store; find it with `fuser` on the file",
            8 => "the file, or its file system, is read-only",
            10 => "the disk failed to read or write; see `dmesg`",
            11 | 26 => damage::ADVICE,
            14 => "the file can't be opened; check its folder and permissions",
            _ => return None,
        })
    }

    fn foundation(&self) -> &'static str {
        FOUNDATION
    }

    fn migrations(&self) -> &'static [Migration] {
        self.migrations
    }

    fn witness(&self) -> Option<&Witness> {
        self.witness.as_ref()
    }

    /// A file has one process that writes: there is nobody to tell.
    async fn tell(&self, _: &mut dyn Connection, _: u64) -> Result<(), sqlx::Error> {
        Ok(())
    }
}

/// SQLite gives its log and its index the mode of the file itself.
fn create_private(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let made = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    made.and_then(|file| file.set_permissions(std::fs::Permissions::from_mode(0o600)))
        .map_err(|error| unavailable(path, &error))
}

fn unavailable(path: &Path, error: &std::io::Error) -> Error {
    Error::Unavailable { what: "open", place: path.display().to_string(), reason: error.to_string() }
}
