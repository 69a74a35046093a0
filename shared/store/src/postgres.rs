//! A store in a schema of a PostgreSQL database, for several replicas at once.
//!
//! Whoever writes holds an advisory lock from the beginning of a transaction to its end: sequences are in the order of
//! commits, and versions are compared with what nobody else can change meanwhile. After a commit the others are told by
//! NOTIFY; what is not heard is found by looking, see `listen`.

mod listen;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgSslMode};
use sqlx::{ConnectOptions as _, PgConnection, Postgres};
use tokio::sync::watch;

use crate::Error;
use crate::connection::{Connection, Link, Value};
use crate::layout::Migration;
use crate::place::Database;
use crate::seen::Witness;
use crate::session::Backend;
use crate::store::SqlStore;

/// The name of the schema is what the connections search, and nothing else. A role without the right to make a schema
/// can be given one that is there.
const FOUNDATION: &str = "
DO $$ BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE EXCEPTION 'the encoding of the database is %: make one with UTF8', current_setting('server_encoding');
    END IF;
    IF current_setting('fsync') = 'off' THEN
        RAISE WARNING 'fsync is off on this server: a power loss can take what was committed';
    END IF;
    IF to_regnamespace(current_setting('search_path')) IS NULL THEN
        EXECUTE 'CREATE SCHEMA ' || current_setting('search_path');
    END IF;
END $$;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
";

/// Ids are in the order of their bytes, as everywhere in Kiln, whatever language the database sorts by.
const MIGRATIONS: &[Migration] = &[Migration {
    layout: 1,
    readable_from: 1,
    statements: r#"
CREATE TABLE documents (
    kind TEXT COLLATE "C" NOT NULL, id TEXT COLLATE "C" NOT NULL, version BIGINT NOT NULL, sequence BIGINT NOT NULL,
    schema_number BIGINT NOT NULL, body TEXT NOT NULL, deleted BIGINT,
    PRIMARY KEY (kind, id));
CREATE INDEX documents_by_sequence ON documents (kind, sequence, id);
CREATE TABLE watermarks (
    source_kind TEXT NOT NULL, source_id TEXT NOT NULL, version BIGINT NOT NULL,
    PRIMARY KEY (source_kind, source_id));
CREATE TABLE answers (
    request TEXT PRIMARY KEY, request_digest TEXT NOT NULL, answer BYTEA NOT NULL, created BIGINT NOT NULL);
CREATE TABLE outbox (
    sequence BIGINT PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    aggregate_kind TEXT NOT NULL, aggregate_id TEXT NOT NULL, aggregate_version BIGINT NOT NULL, place BIGINT NOT NULL,
    service TEXT NOT NULL, entity TEXT NOT NULL, verb TEXT NOT NULL, server TEXT,
    payload BYTEA NOT NULL, time TEXT NOT NULL, traceparent TEXT NOT NULL, created BIGINT NOT NULL, sent BIGINT);
CREATE UNIQUE INDEX outbox_by_aggregate ON outbox (aggregate_kind, aggregate_id, aggregate_version, place);
CREATE INDEX outbox_unsent ON outbox (sequence) WHERE sent IS NULL;
CREATE TABLE audit (
    sequence BIGINT PRIMARY KEY, time TEXT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
    request TEXT, body TEXT NOT NULL);
"#,
}];

/// Each statement but the first of a transaction has a snapshot of its own, taken behind the lock.
const BEGIN: &str =
    "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended(current_setting('search_path'), 0))";

/// Bounds that the server keeps. A replica that is frozen in a transaction is cut off before those that wait for its lock
/// give up.
const SETTINGS: [(&str, &str); 4] = [
    ("statement_timeout", "10s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "3s"),
    ("client_min_messages", "warning"),
];
/// On an answer, where the server is gone without a word. Longer than what the server itself allows.
const ANSWER: Duration = Duration::from_secs(12);
const CONNECT: Duration = Duration::from_secs(5);
const READERS: u32 = 4;

/// Where the server's settings say that a commit waits for no disk.
const DURABLE: &str = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";

pub(crate) struct Server {
    place: String,
    schema: String,
    options: PgConnectOptions,
    readers: PgPool,
    migrations: &'static [Migration],
    witness: Witness,
}

pub(crate) async fn open(database: &Database) -> Result<SqlStore, Error> {
    start(database, MIGRATIONS).await
}

/// Of all tables at one moment, for a copy: it takes as long as it takes, and no writer waits for it.
pub(crate) const SNAPSHOT: &str =
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL idle_in_transaction_session_timeout = '60s'";

/// The database outside of a service.
pub(crate) fn backend(database: &Database) -> Result<Server, Error> {
    with(database, MIGRATIONS)
}

async fn start(database: &Database, migrations: &'static [Migration]) -> Result<SqlStore, Error> {
    let server = Arc::new(with(database, migrations)?);
    let (announce, _) = watch::channel(0);
    let announce = Arc::new(announce);
    let store = SqlStore::start(server.clone(), announce.clone(), None).await?;
    tokio::spawn(listen::run(server, announce));
    Ok(store)
}

fn with(database: &Database, migrations: &'static [Migration]) -> Result<Server, Error> {
    let place = format!("{} (schema {})", database.url, database.schema);
    let options = options(database).map_err(|error| Error::Unavailable {
        what: "open",
        place: place.clone(),
        reason: error.to_string(),
    })?;
    let readers = PgPoolOptions::new()
        .max_connections(READERS)
        .acquire_timeout(CONNECT)
        .idle_timeout(None)
        .max_lifetime(None)
        .connect_lazy_with(options.clone());
    let schema = database.schema.clone();
    let witness = Witness { path: database.seen.clone(), alone: false };
    Ok(Server { place, schema, options, readers, migrations, witness })
}

fn options(database: &Database) -> Result<PgConnectOptions, sqlx::Error> {
    let url = &database.url;
    let mut options = PgConnectOptions::from_url(url.as_url())?
        .application_name(&database.schema)
        .options(SETTINGS)
        .options([("search_path", database.schema.as_str())])
        .disable_statement_logging();
    if url.parameter("sslmode").is_none() {
        // What the environment says is for other programs' databases.
        let mode = if url.is_local() { PgSslMode::Prefer } else { PgSslMode::VerifyFull };
        options = options.ssl_mode(mode);
    }
    if let Some(password) = &database.password {
        options = options.password(password.expose());
    }
    Ok(options)
}

/// Bounded as a whole: neither the resolver nor the server's greeting has a bound of its own.
async fn connect(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(CONNECT, options.connect()).await.unwrap_or_else(|_| {
        let reason = format!("no connection within {} s", CONNECT.as_secs());
        Err(std::io::Error::new(std::io::ErrorKind::TimedOut, reason).into())
    })
}

#[async_trait]
impl Backend for Server {
    fn place(&self) -> &str {
        &self.place
    }

    async fn connect(&self) -> Result<Box<dyn Connection>, sqlx::Error> {
        let mut link = Link::<Postgres, _>::new(Box::new(connect(&self.options).await?), Some(ANSWER));
        link.script(DURABLE).await?;
        Ok(Box::new(link))
    }

    async fn reader(&self) -> Result<Box<dyn Connection>, sqlx::Error> {
        Ok(Box::new(Link::<Postgres, _>::new(self.readers.acquire().await?, Some(ANSWER))))
    }

    fn begin(&self) -> &'static str {
        BEGIN
    }

    fn advice(&self, error: &sqlx::Error) -> Option<&'static str> {
        let error = match error {
            sqlx::Error::Database(error) => error,
            sqlx::Error::Io(_) => {
                return Some("the server can't be reached; check that it runs, and the address");
            }
            sqlx::Error::Tls(_) => {
                return Some(
                    "no encrypted connection; check the server's certificate, `sslmode` and `sslrootcert`",
                );
            }
            sqlx::Error::PoolTimedOut => {
                return Some("no connection in time; the server is away, starting, or has none left to give");
            }
            _ => return None,
        };
        Some(match &*error.code()? {
            "53100" => "the server's disk is full; free some space there, and it goes on by itself",
            "53300" => {
                "the server takes no more connections; raise its max_connections: a service takes up to six"
            }
            "28000" | "28P01" => {
                "the server refuses this user; check the user in the URL, the password, and the server's pg_hba.conf"
            }
            "3D000" => "there is no such database; make it with `createdb`",
            "42501" => "the user has too few rights; grant it CREATE on the database, or give it this schema",
            "25006" => "the server is read-only, a standby maybe; name the primary in the URL",
            "55P03" => "another replica held the store for too long",
            "57014" => "the server took too long",
            "25P03" => "this process stood still within a transaction, and was cut off",
            "57P01" | "57P02" | "57P03" => "the server stops or starts; it goes on by itself",
            "3F000" | "42P01" => "its tables are gone; restore the database, then restart the service",
            "XX001" | "XX002" => "the database is damaged; restore it from a copy",
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
        Some(&self.witness)
    }

    /// Outside of the commit: NOTIFY within one makes it wait for all other commits of the server that notify.
    async fn tell(&self, connection: &mut dyn Connection, sequence: u64) -> Result<(), sqlx::Error> {
        let sequence = sequence.to_string();
        let values = [Value::Text(&self.schema), Value::Text(&sequence)];
        connection.execute("SELECT pg_notify($1, $2)", &values).await.map(drop)
    }
}
