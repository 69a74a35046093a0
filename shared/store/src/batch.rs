//! A change of the store as data.

use std::sync::Arc;

use jiff::Timestamp;
use kiln_model::event::NewEvent;
use kiln_model::name::{RequestId, ServerName};
use serde::{Deserialize, Serialize};

/// Applied as a whole or not at all.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Versions that must still hold, of documents that are read but not written.
    pub expects: Vec<Expect>,
    pub changes: Vec<Change>,
    pub watermarks: Vec<Watermark>,
    /// In the order in which they are to be published.
    pub events: Vec<NewEvent>,
    pub audit: Vec<AuditRecord>,
    /// Kept with its answer, so that a repeated request does nothing twice.
    pub answer: Option<StoredAnswer>,
}

/// A document's version as it was read; 0 for one that did not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expect {
    pub kind: String,
    pub id: String,
    pub version: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Writes a document whose version is `expected` (0: it must not exist); its version becomes the next one.
    /// A document that is written again after its deletion goes on counting.
    Put { kind: String, id: String, expected: u64, schema: u32, body: Arc<serde_json::Value> },
    /// Leaves a tombstone.
    Delete { kind: String, id: String, expected: u64 },
}

/// Advances what was handled of a source aggregate; [`crate::Error::Stale`] where it stands there already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watermark {
    pub source_kind: String,
    pub source_id: String,
    pub version: u64,
}

/// Who did what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    pub time: Timestamp,
    pub actor: String,
    pub action: String,
    pub subject: String,
    /// The server that it is about, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerName>,
    pub request_id: Option<RequestId>,
    pub before: serde_json::Value,
    pub after: serde_json::Value,
    /// What a later version says as well. It is kept and hashed as it stands: who goes back to this one neither finds such
    /// a record altered nor seals it by half.
    #[serde(flatten)]
    pub others: serde_json::Map<String, serde_json::Value>,
}

impl AuditRecord {
    pub fn new(time: Timestamp, actor: &str, action: &str, subject: impl Into<String>) -> Self {
        Self {
            time,
            actor: actor.to_owned(),
            action: action.to_owned(),
            subject: subject.into(),
            server: None,
            request_id: None,
            before: serde_json::Value::Null,
            after: serde_json::Value::Null,
            others: serde_json::Map::new(),
        }
    }

    #[must_use]
    pub fn of_server(self, server: &ServerName) -> Self {
        Self { server: Some(server.clone()), ..self }
    }

    /// In a call with this id.
    #[must_use]
    pub fn asked(self, request_id: &str) -> Self {
        Self { request_id: request_id.parse().ok(), ..self }
    }

    #[must_use]
    pub fn changed(self, before: serde_json::Value, after: serde_json::Value) -> Self {
        Self { before, after, ..self }
    }
}

/// The encoded answer of a mutating call, and the digest of its request: the same id with another request is refused
/// by the caller of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAnswer {
    pub request: RequestId,
    pub request_digest: kiln_model::digest::Digest,
    pub answer: Vec<u8>,
}
