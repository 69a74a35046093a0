//! Rows of SQLite as the store's types, and its failures in words.

use jiff::Timestamp;
use kiln_model::event::{Event, EventType, NewEvent, Service};
use sqlx::sqlite::SqliteRow;
use sqlx::{Decode, Row, Sqlite, Type};

use crate::Error;
use crate::batch::AuditRecord;
use crate::document::{Document, Entry};

pub(super) fn limit(limit: u32) -> i64 {
    i64::from(limit.clamp(1, crate::PAGE_LIMIT))
}

/// Versions and sequences grow by small steps from 0: 2⁶³ is not reached.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn column<'r, T: Decode<'r, Sqlite> + Type<Sqlite>>(
    row: &'r SqliteRow,
    name: &'static str,
) -> Result<T, Error> {
    row.try_get(name).map_err(|error| unreadable("column", name, &error))
}

fn unreadable(kind: &str, id: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::Unreadable { kind: kind.to_owned(), id: id.to_owned(), reason: reason.to_string() }
}

fn number(row: &SqliteRow, name: &'static str) -> Result<u64, Error> {
    column::<i64>(row, name).map(unsigned)
}

pub(super) fn document(row: &SqliteRow) -> Result<Document, Error> {
    let (kind, id): (String, String) = (column(row, "kind")?, column(row, "id")?);
    let body: &str = column(row, "body")?;
    let body = serde_json::from_str(body).map_err(|error| unreadable(&kind, &id, &error))?;
    Ok(Document {
        version: number(row, "version")?,
        sequence: number(row, "sequence")?,
        schema: column(row, "schema_number")?,
        body,
        kind,
        id,
    })
}

/// Bytes of a document's body; none of a tombstone.
pub(super) fn size(row: &SqliteRow) -> Result<usize, Error> {
    column::<&str>(row, "body").map(str::len)
}

pub(super) fn entry(row: &SqliteRow) -> Result<Entry, Error> {
    if column::<Option<i64>>(row, "deleted")?.is_none() {
        return document(row).map(Entry::Document);
    }
    Ok(Entry::Tombstone {
        id: column(row, "id")?,
        version: number(row, "version")?,
        sequence: number(row, "sequence")?,
    })
}

pub(super) fn event(row: &SqliteRow, epoch: &str) -> Result<Event, Error> {
    let id: &str = column(row, "id")?;
    let wrong = |what: &str| unreadable("event", id, &what);
    let service: &str = column(row, "service")?;
    let server: Option<&str> = column(row, "server")?;
    let time: &str = column(row, "time")?;
    Ok(Event {
        id: id.parse().map_err(|_| wrong("its id is no digest"))?,
        sequence: number(row, "sequence")?,
        epoch: epoch.to_owned(),
        event: NewEvent {
            kind: EventType {
                service: Service::ALL
                    .into_iter()
                    .find(|known| known.as_str() == service)
                    .ok_or_else(|| wrong("unknown service"))?,
                entity: column(row, "entity")?,
                verb: column(row, "verb")?,
            },
            server: server.map(str::parse).transpose().map_err(|_| wrong("bad server name"))?,
            aggregate_kind: column(row, "aggregate_kind")?,
            aggregate_id: column(row, "aggregate_id")?,
            aggregate_version: number(row, "aggregate_version")?,
            payload: column(row, "payload")?,
            time: time.parse::<Timestamp>().map_err(|_| wrong("bad time"))?,
            traceparent: column(row, "traceparent")?,
        },
    })
}

pub(super) fn audit(row: &SqliteRow) -> Result<(u64, AuditRecord), Error> {
    let sequence = number(row, "sequence")?;
    let body: &str = column(row, "body")?;
    let record =
        serde_json::from_str(body).map_err(|error| unreadable("audit", &sequence.to_string(), &error))?;
    Ok((sequence, record))
}

/// SQLite's primary result code says what a person can do about it.
pub(super) fn failure(what: &'static str, place: &str, error: &sqlx::Error) -> Error {
    let code = error
        .as_database_error()
        .and_then(|error| error.code())
        .and_then(|code| code.parse::<i32>().ok())
        .map(|extended| extended & 0xff);
    let advice = match code {
        Some(13) => "the disk is full; free some space there, and it goes on by itself",
        Some(5 | 6) => "another process holds the store; find it with `fuser` on the file",
        Some(8) => "the file, or its file system, is read-only",
        Some(10) => "the disk failed to read or write; see `dmesg`",
        Some(11 | 26) => "the file is damaged; stop the service and restore its store from a copy",
        Some(14) => "the file can't be opened; check its folder and permissions",
        _ => return Error::Unavailable { what, place: place.to_owned(), reason: error.to_string() },
    };
    Error::Unavailable { what, place: place.to_owned(), reason: format!("{advice} ({error})") }
}
