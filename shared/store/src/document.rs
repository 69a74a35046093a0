//! Documents and their place in the store's order.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// A position in the order of commits.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cursor {
    pub epoch: String,
    pub sequence: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    pub kind: String,
    pub id: String,
    /// Grows by one with each write, from 1.
    pub version: u64,
    /// The sequence of the commit that wrote it.
    pub sequence: u64,
    pub schema: u32,
    pub body: Arc<serde_json::Value>,
}

/// One line of a listing of changes.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    Document(Document),
    Tombstone { id: String, version: u64, sequence: u64 },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Page {
    pub entries: Vec<Entry>,
    /// Empty on the last page.
    pub next_page_token: String,
    /// To be presented the next time; meaningful on the last page.
    pub cursor: Cursor,
    /// The cursor's epoch was unknown, or there was none: what is not listed does not exist.
    pub full: bool,
}

/// Reads a document as `T`, of at most the schema that this program knows.
///
/// # Errors
/// [`Error::Schema`] for a newer one, [`Error::Unreadable`] for a body that is not a `T`.
pub fn decode<T: DeserializeOwned>(document: &Document, known_schema: u32) -> Result<T, Error> {
    let Document { kind, id, schema, body, .. } = document;
    if *schema > known_schema {
        return Err(Error::Schema {
            kind: kind.clone(),
            id: id.clone(),
            found: *schema,
            known: known_schema,
        });
    }
    T::deserialize(&**body).map_err(|error| Error::Unreadable {
        kind: kind.clone(),
        id: id.clone(),
        reason: error.to_string(),
    })
}

/// The body of a document.
///
/// # Errors
/// [`Error::Unreadable`] where the value has no JSON form.
pub fn encode<T: Serialize>(kind: &str, id: &str, value: &T) -> Result<Arc<serde_json::Value>, Error> {
    serde_json::to_value(value).map(Arc::new).map_err(|error| Error::Unreadable {
        kind: kind.to_owned(),
        id: id.to_owned(),
        reason: error.to_string(),
    })
}
