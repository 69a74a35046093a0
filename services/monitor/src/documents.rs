//! What the monitor keeps: kinds, schemas, and reading them all at boot.

use kiln_model::definition::{Mode, UpdatePolicy};
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, NodeName, ServerName};
use kiln_model::run::HealthPolicy;
use kiln_model::signal::HealthState;
use kiln_model::time::Millis;
use kiln_store::{Change, Error, Store, decode, encode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ports::Pinned;

pub const SCHEMA: u32 = 1;
/// An instance that is watched, by its id.
pub const HEALTH: &str = "health";
/// A signal, by its id's hexadecimal digits.
pub const SIGNAL: &str = "signal";
/// A server as the builder told, by its name.
pub const SERVER: &str = "server";

/// Which state of another service's aggregate was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Of the other's store: versions of different epochs say nothing of each other.
    pub epoch: String,
    pub version: u64,
}

impl Seen {
    pub fn is_newer_than(&self, other: &Self) -> bool {
        self.epoch != other.epoch || self.version > other.version
    }
}

/// A watched instance. Its newest answers are kept in memory, and written when its state changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Watched {
    pub id: InstanceId,
    #[serde(default = "NodeName::local")]
    pub node: NodeName,
    pub state: HealthState,
    /// Gone, as far as the engine did not know it.
    #[serde(default)]
    pub absent: bool,
    pub changed: jiff::Timestamp,
    /// Of the last answer.
    pub observed: Option<jiff::Timestamp>,
    /// The newest ones, newest last.
    pub checks: Vec<kiln_model::check::CheckResult>,
    pub policy: Option<HealthPolicy>,
    /// None until it was launched.
    pub address: Option<std::net::IpAddr>,
    /// Nothing here asks for it. The version before can't read a document without it.
    pub launched: jiff::Timestamp,
    /// On its way out: not looked at any more.
    pub leaving: bool,
    /// Why it is gone, for people.
    pub detail: String,
    /// Of the instance's cause.
    pub traceparent: String,
    /// The deployer's instance that this is from.
    pub seen: Seen,
}

/// A server as the monitor needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownServer {
    pub name: ServerName,
    pub source: String,
    /// Of the head definition that the builder took.
    pub definition: Option<Digest>,
    pub generation: u64,
    pub update: UpdatePolicy,
    /// What its lock in force was resolved from.
    pub release_files: Vec<Pinned>,
    pub seen: Seen,
}

/// What holds for a server that the builder has not told of yet: what died is replaced.
pub const UNKNOWN_POLICY: UpdatePolicy = UpdatePolicy {
    definition: Mode::Never,
    packages: Mode::Never,
    unhealthy: Mode::Auto,
    debounce: Millis(0),
};

/// The change that writes a document whose version is `expected`.
///
/// # Errors
/// Where the value has no JSON form.
pub fn put<T: Serialize>(kind: &str, id: &str, expected: u64, value: &T) -> Result<Change, Error> {
    Ok(Change::Put {
        kind: kind.to_owned(),
        id: id.to_owned(),
        expected,
        schema: SCHEMA,
        body: encode(kind, id, value)?,
    })
}

/// Reads a document, with its version; none where it is not there.
///
/// # Errors
/// As [`load`].
pub async fn one<S: Store, T: DeserializeOwned>(
    store: &S,
    kind: &str,
    id: &str,
) -> Result<Option<(u64, T)>, Error> {
    let Some(document) = store.get(kind, id).await? else { return Ok(None) };
    Ok(Some((document.version, decode(&document, SCHEMA)?)))
}

/// Reads every live document of a kind, with its version.
///
/// # Errors
/// Where the store can't be read, or holds what this program does not know.
pub async fn load<S: Store, T: DeserializeOwned>(store: &S, kind: &str) -> Result<Vec<(u64, T)>, Error> {
    const PAGE: u32 = 500;
    let mut all = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.list(kind, "", after.as_deref(), PAGE).await?;
        for document in &page {
            all.push((document.version, decode(document, SCHEMA)?));
        }
        match page.last() {
            Some(last) if page.len() == PAGE as usize => after = Some(last.id.clone()),
            _ => return Ok(all),
        }
    }
}

#[cfg(test)]
mod tests {
    use kiln_monitor_core::signal::Record;
    use kiln_test_earlier::{documents, read};

    use super::*;

    #[test]
    fn what_an_earlier_version_wrote_is_read() {
        for document in &documents(kiln_test_earlier::MONITOR) {
            match document.kind.as_str() {
                HEALTH => read::<Watched>(document, SCHEMA),
                SIGNAL => read::<Record>(document, SCHEMA),
                SERVER => read::<KnownServer>(document, SCHEMA),
                other => panic!("nobody reads {other}"),
            }
        }
    }
}
