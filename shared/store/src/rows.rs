//! Rows as the store's types.

use jiff::Timestamp;
use kiln_model::digest::Digest;
use kiln_model::event::{Event, EventType, NewEvent, Service};

use crate::Error;
use crate::batch::AuditRecord;
use crate::connection::{Row, Value};
use crate::document::{Document, Entry};

pub(crate) fn limit(limit: u32) -> i64 {
    i64::from(limit.clamp(1, crate::PAGE_LIMIT))
}

/// Versions and sequences grow by small steps from 0: 2⁶³ is not reached.
pub(crate) fn number(number: u64) -> Value<'static> {
    Value::Number(i64::try_from(number).unwrap_or(i64::MAX))
}

fn unreadable(kind: &str, id: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::Unreadable { kind: kind.to_owned(), id: id.to_owned(), reason: reason.to_string() }
}

fn column<T>(name: &'static str, read: Result<Option<T>, sqlx::Error>) -> Result<T, Error> {
    let found = read.map_err(|error| unreadable("column", name, &error))?;
    found.ok_or_else(|| unreadable("column", name, &"it is null"))
}

pub(crate) fn text<'r>(row: &'r dyn Row, name: &'static str) -> Result<&'r str, Error> {
    column(name, row.text(name))
}

fn owned(row: &dyn Row, name: &'static str) -> Result<String, Error> {
    text(row, name).map(str::to_owned)
}

fn bytes(row: &dyn Row, name: &'static str) -> Result<Vec<u8>, Error> {
    column(name, row.bytes(name)).map(<[u8]>::to_vec)
}

pub(crate) fn unsigned(row: &dyn Row, name: &'static str) -> Result<u64, Error> {
    column(name, row.number(name)).map(|number| u64::try_from(number).unwrap_or(0))
}

fn is_deleted(row: &dyn Row) -> Result<bool, Error> {
    row.number("deleted").map(|at| at.is_some()).map_err(|error| unreadable("column", "deleted", &error))
}

/// The last version that a document had, and whether that was its deletion.
pub(crate) struct Version {
    pub(crate) last: u64,
    deleted: bool,
}

impl Version {
    pub(crate) const NONE: Self = Self { last: 0, deleted: false };

    /// As a reader saw it: 0 for what does not exist.
    pub(crate) fn live(&self) -> u64 {
        if self.deleted { 0 } else { self.last }
    }
}

pub(crate) fn version(row: &dyn Row) -> Result<Version, Error> {
    Ok(Version { last: unsigned(row, "version")?, deleted: is_deleted(row)? })
}

pub(crate) fn document(row: &dyn Row) -> Result<Document, Error> {
    let (kind, id) = (owned(row, "kind")?, owned(row, "id")?);
    let body: serde_json::Value =
        serde_json::from_str(text(row, "body")?).map_err(|error| unreadable(&kind, &id, &error))?;
    let schema = unsigned(row, "schema_number")?;
    Ok(Document {
        version: unsigned(row, "version")?,
        sequence: unsigned(row, "sequence")?,
        // One that does not fit is newer than any that a program knows.
        schema: u32::try_from(schema).unwrap_or(u32::MAX),
        body: body.into(),
        kind,
        id,
    })
}

/// Bytes of a document's body; none of a tombstone.
pub(crate) fn size(row: &dyn Row) -> Result<usize, Error> {
    text(row, "body").map(str::len)
}

pub(crate) fn entry(row: &dyn Row) -> Result<Entry, Error> {
    if !is_deleted(row)? {
        return document(row).map(Entry::Document);
    }
    Ok(Entry::Tombstone {
        id: owned(row, "id")?,
        version: unsigned(row, "version")?,
        sequence: unsigned(row, "sequence")?,
    })
}

pub(crate) fn event(row: &dyn Row, epoch: &str) -> Result<Event, Error> {
    let id = text(row, "id")?;
    let wrong = |what: &str| unreadable("event", id, &what);
    let service = text(row, "service")?;
    let server = row.text("server").map_err(|error| unreadable("column", "server", &error))?;
    Ok(Event {
        id: id.parse().map_err(|_| wrong("its id is no digest"))?,
        sequence: unsigned(row, "sequence")?,
        epoch: epoch.to_owned(),
        event: NewEvent {
            kind: EventType {
                service: Service::ALL
                    .into_iter()
                    .find(|known| known.as_str() == service)
                    .ok_or_else(|| wrong("unknown service"))?,
                entity: owned(row, "entity")?,
                verb: owned(row, "verb")?,
            },
            server: server.map(str::parse).transpose().map_err(|_| wrong("bad server name"))?,
            aggregate_kind: owned(row, "aggregate_kind")?,
            aggregate_id: owned(row, "aggregate_id")?,
            aggregate_version: unsigned(row, "aggregate_version")?,
            payload: bytes(row, "payload")?,
            time: text(row, "time")?.parse::<Timestamp>().map_err(|_| wrong("bad time"))?,
            traceparent: owned(row, "traceparent")?,
        },
    })
}

/// The digest of the request, and the answer.
pub(crate) fn answer(row: &dyn Row, request: &str) -> Result<(Digest, Vec<u8>), Error> {
    let digest = text(row, "request_digest")?;
    let digest = digest.parse().map_err(|error| unreadable("answer", request, &error))?;
    Ok((digest, bytes(row, "answer")?))
}

pub(crate) fn audit(row: &dyn Row) -> Result<(u64, AuditRecord), Error> {
    let sequence = unsigned(row, "sequence")?;
    let record = serde_json::from_str(text(row, "body")?)
        .map_err(|error| unreadable("audit", &sequence.to_string(), &error))?;
    Ok((sequence, record))
}
