//! Copies of a store, whatever it lies in: out of it while it is in use, as one SQLite file, and back into a new one.

#[cfg(test)]
pub(crate) mod tests;

use std::path::Path;

use jiff::Timestamp;
use serde_json::json;

use crate::batch::AuditRecord;
use crate::connection::{Connection, Row, Value};
use crate::layout::{self, prepare};
use crate::seen::Witness;
use crate::session::{Backend, Session, failure};
use crate::{Error, Place, postgres, rows, sql, sqlite};

/// Rows that are carried over at a time.
const ROWS: i64 = 500;

/// What a copy holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copied {
    pub epoch: String,
    pub sequence: u64,
    pub layout: u64,
}

/// A store's epochs before and after it was made a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewed {
    pub before: String,
    pub after: String,
}

/// Writes a consistent copy of a store to a file that does not exist yet. The service goes on meanwhile.
///
/// # Errors
/// [`Error::Unavailable`] where the store can't be read or the file not be written.
pub async fn copy_out(from: &Place, to: &Path) -> Result<Copied, Error> {
    match from {
        Place::File(path) => sqlite::copy(path, to).await?,
        Place::Postgres(database) => {
            let source = postgres::backend(database)?;
            let mut source_link = connect(&source, "copy").await?;
            let mut reading = Session::new(&mut *source_link, &source, "copy");
            reading.script(postgres::SNAPSHOT).await?;
            let target = sqlite::create(to)?;
            let mut target_link = connect(&target, "copy").await?;
            let mut writing = Session::new(&mut *target_link, &target, "copy");
            carry(&mut reading, &mut writing, &target).await?;
        }
    }
    described(to).await
}

/// Makes a store out of a copy, in a place that has none yet, and gives it a new epoch.
///
/// # Errors
/// [`Error::Unavailable`] where there is a store already, or the copy was written by a program that is too new.
pub async fn copy_in(from: &Path, to: &Place, by: &str, now: Timestamp) -> Result<Renewed, Error> {
    let copied = described(from).await?;
    match to {
        Place::File(path) => {
            if path.exists() {
                return Err(taken(&path.display().to_string()));
            }
            sqlite::copy(from, path).await?;
        }
        Place::Postgres(database) => {
            let target = postgres::backend(database)?;
            let mut target_link = connect(&target, "restore").await?;
            let mut writing = Session::new(&mut *target_link, &target, "restore");
            writing.script(target.begin()).await?;
            writing.script(target.foundation()).await?;
            if writing.meta("epoch").await?.is_some() {
                return Err(taken(target.place()));
            }
            writing.script("ROLLBACK").await?;
            let source = sqlite::existing(from);
            let mut source_link = connect(&source, "restore").await?;
            let mut reading = Session::new(&mut *source_link, &source, "restore");
            reading.script("BEGIN").await?;
            carry(&mut reading, &mut writing, &target).await?;
        }
    }
    tracing::info!(epoch = copied.epoch, sequence = copied.sequence, "a store was restored");
    renew_epoch(to, by, now).await
}

/// Makes a store that went back in time a new one: whoever presents a place in the old one is given all of it. No
/// service may have it open.
///
/// # Errors
/// [`Error::Unavailable`] where it can't be opened or written.
pub async fn renew_epoch(place: &Place, by: &str, now: Timestamp) -> Result<Renewed, Error> {
    match place {
        Place::File(path) => renew(&sqlite::existing(path), &sqlite::witness(path), by, now).await,
        Place::Postgres(database) => {
            let witness = Witness { path: database.seen.clone(), alone: false };
            renew(&postgres::backend(database)?, &witness, by, now).await
        }
    }
}

async fn renew(backend: &dyn Backend, witness: &Witness, by: &str, now: Timestamp) -> Result<Renewed, Error> {
    let mut link = connect(backend, "restore").await?;
    let mut session = Session::new(&mut *link, backend, "restore");
    let identity = prepare(&mut session, backend).await?;
    let (_, last) = session.begin().await?;
    let from = last.max(layout::now());
    let after = layout::new_epoch(&mut session, from, from).await?.epoch;
    let sequence = from + 1;
    // In the records that are sealed: a head that was published in the epoch before may be of what is lost.
    let change = AuditRecord::new(now, by, "restore", "store").changed(
        json!({ "epoch": identity.epoch, "sequence": identity.sequence }),
        json!({ "epoch": after }),
    );
    let body = serde_json::to_string(&change).map_err(|error| Error::Unreadable {
        kind: "audit".to_owned(),
        id: sequence.to_string(),
        reason: error.to_string(),
    })?;
    let time = now.to_string();
    let values = [
        rows::number(sequence),
        Value::Text(&time),
        Value::Text(&change.actor),
        Value::Text(&change.action),
        Value::Text(&change.subject),
        Value::TextOrNull(None),
        Value::Text(&body),
    ];
    session.execute(sql::AUDIT_ADD, &values).await?;
    session.set_meta("sequence", &sequence.to_string()).await?;
    session.script("COMMIT").await?;
    // The store that is here is the one that was meant: its service begins no other epoch.
    witness.keep(&after, sequence).map_err(|error| Error::Unavailable {
        what: "restore",
        place: witness.path.display().to_string(),
        reason: error.to_string(),
    })?;
    Ok(Renewed { before: identity.epoch, after })
}

async fn connect(backend: &dyn Backend, what: &'static str) -> Result<Box<dyn Connection>, Error> {
    backend.connect().await.map_err(|error| failure(backend, what, &error))
}

fn taken(place: &str) -> Error {
    let reason = "there is a store already, and it would be lost: name an empty place".to_owned();
    Error::Unavailable { what: "restore", place: place.to_owned(), reason }
}

/// What a file that holds a copy says of itself, once it was looked through.
async fn described(path: &Path) -> Result<Copied, Error> {
    let backend = sqlite::existing(path);
    let mut link = connect(&backend, "read").await?;
    let mut session = Session::new(&mut *link, &backend, "read");
    let found =
        session.all("PRAGMA quick_check(1)", &[], |row| rows::text(row, "quick_check").map(str::to_owned));
    let damaged = |reason: String| Error::Unavailable {
        what: "read",
        place: path.display().to_string(),
        reason: format!("the copy is damaged: {reason}"),
    };
    match found.await?.first().map(String::as_str) {
        Some("ok") => {}
        other => return Err(damaged(other.unwrap_or("it says nothing").to_owned())),
    }
    let layout = session.meta_number("layout").await?;
    let known = backend.migrations().last().map_or(0, |newest| newest.layout);
    if layout > known {
        return Err(damaged(format!(
            "its layout is {layout}, and this program knows {known}: use the Kiln that wrote it, or a newer one"
        )));
    }
    let epoch = session.meta("epoch").await?.ok_or_else(|| damaged("it has no epoch".to_owned()))?;
    Ok(Copied { epoch, sequence: session.meta_number("sequence").await?, layout })
}

#[derive(Clone, Copy)]
enum Column {
    Number(&'static str),
    Text(&'static str),
    Bytes(&'static str),
}

/// A table, for being read in pages and written row by row. A layout that adds a column adds it here.
struct Table {
    read: &'static str,
    write: &'static str,
    columns: &'static [Column],
}

use Column::{Bytes, Number, Text};

/// `meta` last: a store without an epoch is none, and what was left half-way is seen by that.
const TABLES: [Table; 6] = [
    Table {
        read: "SELECT kind, id, version, sequence, schema_number, body, deleted FROM documents \
               ORDER BY kind, id LIMIT $1 OFFSET $2",
        write: "INSERT INTO documents (kind, id, version, sequence, schema_number, body, deleted) \
                VALUES ($1, $2, $3, $4, $5, $6, $7)",
        columns: &[
            Text("kind"),
            Text("id"),
            Number("version"),
            Number("sequence"),
            Number("schema_number"),
            Text("body"),
            Number("deleted"),
        ],
    },
    Table {
        read: "SELECT source_kind, source_id, version FROM watermarks \
               ORDER BY source_kind, source_id LIMIT $1 OFFSET $2",
        write: "INSERT INTO watermarks (source_kind, source_id, version) VALUES ($1, $2, $3)",
        columns: &[Text("source_kind"), Text("source_id"), Number("version")],
    },
    Table {
        read: "SELECT request, request_digest, answer, created FROM answers ORDER BY request LIMIT $1 OFFSET $2",
        write: "INSERT INTO answers (request, request_digest, answer, created) VALUES ($1, $2, $3, $4)",
        columns: &[Text("request"), Text("request_digest"), Bytes("answer"), Number("created")],
    },
    Table {
        read: "SELECT sequence, id, aggregate_kind, aggregate_id, aggregate_version, place, service, entity, verb, \
               server, payload, time, traceparent, created, sent FROM outbox ORDER BY sequence LIMIT $1 OFFSET $2",
        write: "INSERT INTO outbox (sequence, id, aggregate_kind, aggregate_id, aggregate_version, place, service, \
                entity, verb, server, payload, time, traceparent, created, sent) \
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
        columns: &[
            Number("sequence"),
            Text("id"),
            Text("aggregate_kind"),
            Text("aggregate_id"),
            Number("aggregate_version"),
            Number("place"),
            Text("service"),
            Text("entity"),
            Text("verb"),
            Text("server"),
            Bytes("payload"),
            Text("time"),
            Text("traceparent"),
            Number("created"),
            Number("sent"),
        ],
    },
    Table {
        read: "SELECT sequence, time, actor, action, subject, request, body FROM audit \
               ORDER BY sequence LIMIT $1 OFFSET $2",
        write: sql::AUDIT_ADD,
        columns: &[
            Number("sequence"),
            Text("time"),
            Text("actor"),
            Text("action"),
            Text("subject"),
            Text("request"),
            Text("body"),
        ],
    },
    Table {
        read: "SELECT name, value FROM meta ORDER BY name LIMIT $1 OFFSET $2",
        write: sql::META_SET,
        columns: &[Text("name"), Text("value")],
    },
];

/// A value of a row that was read.
enum Owned {
    Number(Option<i64>),
    Text(Option<String>),
    Bytes(Vec<u8>),
}

impl Column {
    fn of(self, row: &dyn Row) -> Result<Owned, sqlx::Error> {
        Ok(match self {
            Number(name) => Owned::Number(row.number(name)?),
            Text(name) => Owned::Text(row.text(name)?.map(str::to_owned)),
            Bytes(name) => Owned::Bytes(row.bytes(name)?.unwrap_or_default().to_vec()),
        })
    }
}

impl Owned {
    fn value(&self) -> Value<'_> {
        match self {
            Self::Number(number) => Value::NumberOrNull(*number),
            Self::Text(text) => Value::TextOrNull(text.as_deref()),
            Self::Bytes(bytes) => Value::Bytes(bytes),
        }
    }
}

/// Carries every row over into new tables, in one transaction that ends with this.
async fn carry(from: &mut Session<'_>, to: &mut Session<'_>, target: &dyn Backend) -> Result<(), Error> {
    let known = from.meta_number("layout").await?;
    layout::create(to, target, known).await?;
    for table in &TABLES {
        let mut offset = 0;
        loop {
            let page = [Value::Number(ROWS), Value::Number(offset)];
            let rows = from.all(table.read, &page, |row| {
                let values = table.columns.iter().map(|column| column.of(row));
                values.collect::<Result<Vec<_>, _>>().map_err(|error| Error::Unreadable {
                    kind: "row".to_owned(),
                    id: offset.to_string(),
                    reason: error.to_string(),
                })
            });
            let rows = rows.await?;
            for row in &rows {
                to.execute(table.write, &row.iter().map(Owned::value).collect::<Vec<_>>()).await?;
            }
            offset += ROWS;
            if rows.len() < usize::try_from(ROWS).unwrap_or(usize::MAX) {
                break;
            }
        }
    }
    to.script("COMMIT").await
}
