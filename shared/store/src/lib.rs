//! A service's state: versioned documents by kind and id, watermarks, outbox, audit and the answers to requests, all
//! in one transaction.
//!
//! A change is data, a [`Batch`], that is applied as a whole or not at all: what was read is named with the version it
//! had, and a batch whose versions are stale is refused with nothing written. So decisions can be made by any replica
//! on a snapshot, outside of any transaction, and a burst of batches can share one commit.

mod batch;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;

mod connection;
mod copy;
mod document;
mod layout;
mod memory;
mod place;
mod postgres;
mod rows;
pub mod seal;
mod seen;
mod session;
mod sql;
mod sqlite;
mod store;
mod token;
mod transaction;
mod writer;

pub use batch::{AuditRecord, Batch, Change, Expect, StoredAnswer, Watermark};

pub use copy::{Copied, Renewed, copy_in, copy_out, renew_epoch};
pub use document::{Cursor, Document, Entry, Page, decode, encode};
pub use memory::MemoryStore;
pub use place::{Database, Password, Place, PostgresUrl};
pub use store::SqlStore;

use async_trait::async_trait;
use jiff::SignedDuration;
use kiln_model::event::Event;
use kiln_model::name::RequestId;

/// Bodies of one page of changes, in bytes. A page goes out as one message, which is smaller than the bodies that it is
/// made from, and a gRPC client takes 4 MiB.
pub const PAGE_BYTES: usize = 2 << 20;

/// Documents, events or records of one page at most, whatever was asked for.
const PAGE_LIMIT: u32 = 500;

const KEEP_EVENTS: SignedDuration = SignedDuration::from_hours(7 * 24);
const KEEP_TOMBSTONES: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Where a batch ended up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The sequence of the store after the batch.
    pub sequence: u64,
    /// The events of the batch, with their identities.
    pub events: Vec<Event>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A document, or a watermark, was not at the version that the batch expects. Load again and decide anew.
    #[error("{kind}/{id} is at version {actual}, not {expected}")]
    Conflict { kind: String, id: String, expected: u64, actual: u64 },
    /// The watermark already stands at this version, or past it: the fact was handled before.
    #[error("{source_kind}/{source_id} version {version} was handled before")]
    Stale { source_kind: String, source_id: String, version: u64 },
    /// The request was answered before; its answer is in [`Store::answer`].
    #[error("request {0} was answered before")]
    Answered(RequestId),
    #[error(
        "document {kind}/{id} has schema {found}, this program knows up to {known}: upgrade this service"
    )]
    Schema { kind: String, id: String, found: u32, known: u32 },
    #[error("document {kind}/{id} can't be read: {reason}")]
    Unreadable { kind: String, id: String, reason: String },
    #[error("page token `{0}` is not one that this store gave")]
    BadPageToken(String),
    /// Disk full, busy past its bound, input/output.
    #[error("{what} failed in the store at {place}: {reason}")]
    Unavailable { what: &'static str, place: String, reason: String },
}

impl Error {
    /// What else is to be said of a failure.
    fn and(self, more: &str) -> Self {
        match self {
            Self::Unavailable { what, place, reason } => {
                Self::Unavailable { what, place, reason: format!("{reason}; {more}") }
            }
            other => other,
        }
    }
}

/// One service's store. Cheap to clone; every clone is the same store.
#[async_trait]
pub trait Store: Clone + Send + Sync + 'static {
    /// New at creation and at each restore.
    fn epoch(&self) -> &str;

    /// Numbers that others remember, such as a release's, go on above this: what a store that was restored has forgotten
    /// gave out lower ones. 0 for one that never was.
    fn numbers_above(&self) -> u64 {
        0
    }

    /// The newest committed sequence, as a watch: changes wake reconcile loops, relays and streams.
    fn sequence(&self) -> tokio::sync::watch::Receiver<u64>;

    async fn get(&self, kind: &str, id: &str) -> Result<Option<Document>, Error>;

    /// Live documents of a kind whose id begins with `prefix`, by id, at most `limit` (1 to 500), after `after`.
    async fn list(
        &self,
        kind: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Document>, Error>;

    /// What changed of a kind since a cursor, in the order of sequence, deletes as tombstones; with an unknown epoch,
    /// or none, every live document. `page_token` continues a listing. A page ends at `limit`, and before its bodies
    /// are more than [`PAGE_BYTES`] together, though not before its first one.
    async fn changes(
        &self,
        kind: &str,
        since: Option<&Cursor>,
        page_token: &str,
        limit: u32,
    ) -> Result<Page, Error>;

    /// The version of a source aggregate up to which its facts were handled; 0 where none was.
    async fn watermark(&self, source_kind: &str, source_id: &str) -> Result<u64, Error>;

    /// The answer that was kept for a request.
    async fn answer(&self, request: &RequestId) -> Result<Option<StoredAnswer>, Error>;

    /// Applies a batch as a whole, durably: when this returns, SIGKILL and power loss forget nothing of it.
    ///
    /// Refused batches have written nothing. [`Error::Unavailable`] leaves open whether all of it was written or nothing,
    /// since an answer can be lost on its way: load again and decide anew. A batch that is tried again as it was does
    /// nothing twice where it compares a version, a watermark or an answer.
    async fn commit(&self, batch: Batch) -> Result<Committed, Error>;

    /// Events not yet marked sent, in the order of sequence.
    async fn unsent(&self, limit: u32) -> Result<Vec<Event>, Error>;

    /// Every event of the last seven days after a sequence, sent or not.
    async fn log(&self, after: u64, limit: u32) -> Result<Vec<Event>, Error>;

    /// Marks events as stored by the bus.
    async fn mark_sent(&self, sequences: &[u64]) -> Result<(), Error>;

    /// Audit records, newest first, before a sequence (0 for the newest).
    async fn audit(&self, before: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error>;

    /// Audit records, oldest first, after a sequence.
    async fn audit_after(&self, after: u64, limit: u32) -> Result<Vec<(u64, AuditRecord)>, Error>;

    /// Drops events and request answers older than seven days, and tombstones older than thirty. Returns how many.
    async fn prune(&self, now: jiff::Timestamp) -> Result<u64, Error>;
}
