//! Documents as an earlier version of each service wrote them, of every kind and in most of the shapes that a site of some
//! days has. What reads documents reads these: a program that can't would not start on the store of the one before it.
//!
//! Lines are added, for what a version newly writes. One that is there is never changed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "all of it is tests")]

use kiln_store::{Document, decode, encode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A store's documents, without what they are stored with.
#[derive(Deserialize)]
struct Line {
    kind: String,
    id: String,
    schema: u32,
    body: Value,
}

pub const BUILDER: &str = include_str!("../documents/builder.jsonl");
pub const DEPLOYER: &str = include_str!("../documents/deployer.jsonl");
pub const MONITOR: &str = include_str!("../documents/monitor.jsonl");
pub const NODE: &str = include_str!("../documents/node.jsonl");

/// The documents of one service.
///
/// # Panics
/// Where a line is none.
pub fn documents(lines: &str) -> Vec<Document> {
    let document = |line| {
        let Line { kind, id, schema, body } = serde_json::from_str(line).unwrap();
        Document { kind, id, version: 1, sequence: 1, schema, body: body.into() }
    };
    lines.lines().map(document).collect()
}

/// Reads a document, and loses nothing of it.
///
/// # Panics
/// Where it can't be read, or has something that comes back otherwise or not at all.
pub fn read<T: Serialize + DeserializeOwned>(document: &Document, schema: u32) {
    let Document { kind, id, body, .. } = document;
    let value: T = decode(document, schema).unwrap();
    let again = encode(kind, id, &value).unwrap();
    if let Some(place) = lost(body, &again) {
        panic!("{kind} {id}: {place} does not come back: {body} became {again}");
    }
}

/// Where `is` lacks something that `was` had. What is new there is a newer version's.
fn lost(was: &Value, is: &Value) -> Option<String> {
    match (was, is) {
        (Value::Object(was), Value::Object(is)) => was.iter().find_map(|(key, was)| {
            let place = is.get(key).map_or_else(|| Some(String::new()), |is| lost(was, is))?;
            Some(format!("/{key}{place}"))
        }),
        (Value::Array(was), Value::Array(is)) if was.len() == is.len() => {
            let mut pairs = was.iter().zip(is).enumerate();
            pairs.find_map(|(place, (was, is))| Some(format!("/{place}{}", lost(was, is)?)))
        }
        (was, is) if was == is => None,
        _ => Some(String::new()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_lost_is_named_and_what_is_new_is_not() {
        let was = json!({ "a": [{ "b": 1 }, { "b": 2 }], "c": null });
        assert_eq!(lost(&was, &json!({ "a": [{ "b": 1, "d": 3 }, { "b": 2 }], "c": null, "e": 1 })), None);
        for (is, place) in [
            (json!({ "a": [{ "b": 1 }, { "b": 3 }], "c": null }), "/a/1/b"),
            (json!({ "a": [{ "b": 1 }, {}], "c": null }), "/a/1/b"),
            (json!({ "a": [{ "b": 1 }], "c": null }), "/a"),
            (json!({ "a": [{ "b": 1 }, { "b": 2 }] }), "/c"),
        ] {
            assert_eq!(lost(&was, &is).as_deref(), Some(place));
        }
    }
}
