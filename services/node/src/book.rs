//! The node's store: a record for each instance, each server's fence, the ids that were retired, and what is wanted on
//! the edge. Records are held in memory too, for those who list and watch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_api::engine;
use kiln_model::name::{InstanceId, RequestId, ServerName};
use kiln_service::error::ApiError;
use kiln_store::{Batch, Change, Document, Expect, Store, decode, encode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::metrics;
use crate::record::Record;

const SCHEMA: u32 = 1;
const INSTANCE: &str = "instance";
const FENCE: &str = "fence";
const RETIRED: &str = "retired";
const ROUTE: &str = "route";
const VERIFIED: &str = "verified";
/// Changes that a slow watcher may be behind before it is given everything anew.
const BEHIND: usize = 256;

/// The highest generation of plans that was seen for a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Fence {
    generation: u64,
}

/// What a server has on the edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Route {
    pub(crate) generation: u64,
    /// Of the call that changed the listeners; none where an older node wrote it.
    #[serde(default)]
    pub(crate) request: Option<RequestId>,
    pub(crate) listeners: Vec<Listener>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listener {
    pub(crate) listen: u16,
    pub(crate) backends: Vec<Backend>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Backend {
    pub(crate) instance: InstanceId,
    pub(crate) target: u16,
}

/// A document as it was read, with its version; 0 for none.
#[derive(Debug, Clone)]
pub(crate) struct Versioned<T> {
    pub(crate) value: T,
    pub(crate) version: u64,
}

#[derive(Debug)]
pub(crate) struct Book<S> {
    store: S,
    instances: Mutex<BTreeMap<InstanceId, Versioned<Record>>>,
    changes: broadcast::Sender<engine::Instance>,
}

fn read<T: DeserializeOwned>(document: &Document) -> Result<Versioned<T>, ApiError> {
    Ok(Versioned { value: decode(document, SCHEMA)?, version: document.version })
}

fn put<T: Serialize>(kind: &str, id: &str, expected: u64, value: &T) -> Result<Change, ApiError> {
    let body = encode(kind, id, value)?;
    Ok(Change::Put { kind: kind.to_owned(), id: id.to_owned(), expected, schema: SCHEMA, body })
}

impl<S: Store> Book<S> {
    pub(crate) async fn open(store: S) -> Result<Arc<Self>, ApiError> {
        let mut instances = BTreeMap::new();
        for document in list(&store, INSTANCE).await? {
            let held: Versioned<Record> = read(&document)?;
            metrics::moved(None, Some(&held.value));
            instances.insert(held.value.spec.id.clone(), held);
        }
        let changes = broadcast::Sender::new(BEHIND);
        Ok(Arc::new(Self { store, instances: Mutex::new(instances), changes }))
    }

    fn with<T>(&self, see: impl FnOnce(&mut BTreeMap<InstanceId, Versioned<Record>>) -> T) -> T {
        // A panic elsewhere leaves the map whole: each change is one insertion or removal.
        see(&mut self.instances.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn get(&self, id: &InstanceId) -> Option<Versioned<Record>> {
        self.with(|all| all.get(id).cloned())
    }

    /// Every record, by id.
    pub(crate) fn all(&self) -> Vec<Versioned<Record>> {
        self.with(|all| all.values().cloned().collect())
    }

    /// Changes from now on.
    pub(crate) fn watch(&self) -> broadcast::Receiver<engine::Instance> {
        self.changes.subscribe()
    }

    /// Writes a record, which only the holder of the instance's lock does, with what must be written along.
    pub(crate) async fn write(&self, record: Record, mut along: Batch) -> Result<engine::Instance, ApiError> {
        let id = record.spec.id.clone();
        let expected = self.get(&id).map_or(0, |held| held.version);
        along.changes.push(put(INSTANCE, &id.to_string(), expected, &record)?);
        self.store.commit(along).await?;
        // An id that was forgotten is retired and never written again, so its count begins with 1.
        let version = expected + 1;
        let message = record.to_message(version);
        self.with(|all| {
            metrics::moved(all.get(&id).map(|held| &held.value), Some(&record));
            all.insert(id, Versioned { value: record, version });
        });
        // Fails where nobody watches.
        let _ = self.changes.send(message.clone());
        Ok(message)
    }

    /// Forgets a record; its id stays retired.
    pub(crate) async fn forget(&self, id: &InstanceId) -> Result<(), ApiError> {
        let Some(held) = self.get(id) else { return Ok(()) };
        let mut batch = self.retired_mark(id).await?;
        batch.changes.push(Change::Delete {
            kind: INSTANCE.to_owned(),
            id: id.to_string(),
            expected: held.version,
        });
        self.store.commit(batch).await?;
        metrics::moved(Some(&held.value), None);
        self.with(|all| all.remove(id));
        Ok(())
    }

    /// Refuses a plan that is older than one that was seen. The batch makes it the newest; it must be committed with
    /// what the plan does.
    pub(crate) async fn fence(&self, server: &ServerName, generation: u64) -> Result<Batch, ApiError> {
        let held = match self.store.get(FENCE, server.as_str()).await? {
            Some(document) => read::<Fence>(&document)?,
            None => Versioned { value: Fence { generation: 0 }, version: 0 },
        };
        let seen = held.value.generation;
        if generation < seen {
            return Err(ApiError::precondition(
                format!(
                    "the plan for server {server} has generation {generation}, but {seen} was carried out before"
                ),
                "drop this plan; a newer one exists",
            ));
        }
        if generation == seen && held.version > 0 {
            let expect = Expect { kind: FENCE.to_owned(), id: server.to_string(), version: held.version };
            return Ok(Batch { expects: vec![expect], ..Batch::default() });
        }
        let change = put(FENCE, server.as_str(), held.version, &Fence { generation })?;
        Ok(Batch { changes: vec![change], ..Batch::default() })
    }

    pub(crate) async fn is_retired(&self, id: &InstanceId) -> Result<bool, ApiError> {
        Ok(self.store.get(RETIRED, &id.to_string()).await?.is_some())
    }

    /// What marks an id as retired for ever; nothing where it is.
    pub(crate) async fn retired_mark(&self, id: &InstanceId) -> Result<Batch, ApiError> {
        let id = id.to_string();
        if self.store.get(RETIRED, &id).await?.is_some() {
            return Ok(Batch::default());
        }
        Ok(Batch { changes: vec![put(RETIRED, &id, 0, &serde_json::json!({}))?], ..Batch::default() })
    }

    pub(crate) async fn commit(&self, batch: Batch) -> Result<(), ApiError> {
        self.store.commit(batch).await?;
        Ok(())
    }

    pub(crate) async fn routes(&self) -> Result<BTreeMap<ServerName, Route>, ApiError> {
        let mut routes = BTreeMap::new();
        for document in list(&self.store, ROUTE).await? {
            let server: ServerName = document.id.parse().map_err(|error| ApiError::internal(&error))?;
            routes.insert(server, read::<Route>(&document)?.value);
        }
        Ok(routes)
    }

    /// Writes what a server has on the edge, with what must be written along. The caller holds the edge's lock.
    pub(crate) async fn write_route(
        &self,
        server: &ServerName,
        route: &Route,
        mut along: Batch,
    ) -> Result<(), ApiError> {
        let expected = self.store.get(ROUTE, server.as_str()).await?.map_or(0, |document| document.version);
        along.changes.push(put(ROUTE, server.as_str(), expected, route)?);
        self.commit(along).await
    }

    /// What an image's blobs looked like when all of their bytes were hashed.
    pub(crate) async fn verified<T: DeserializeOwned>(&self, image: &str) -> Result<Option<T>, ApiError> {
        let document = self.store.get(VERIFIED, image).await?;
        Ok(document.map(|document| read(&document)).transpose()?.map(|held| held.value))
    }

    pub(crate) async fn set_verified<T: Serialize>(&self, image: &str, value: &T) -> Result<(), ApiError> {
        let expected = self.store.get(VERIFIED, image).await?.map_or(0, |document| document.version);
        let change = put(VERIFIED, image, expected, value)?;
        match self.store.commit(Batch { changes: vec![change], ..Batch::default() }).await {
            // Another launch of the same image found the same.
            Err(kiln_store::Error::Conflict { .. }) => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }

    /// Drops what the store keeps beyond its bounds.
    pub(crate) async fn prune(&self, now: jiff::Timestamp) -> Result<(), ApiError> {
        self.store.prune(now).await?;
        Ok(())
    }
}

async fn list<S: Store>(store: &S, kind: &str) -> Result<Vec<Document>, ApiError> {
    const PAGE: u32 = 500;
    let mut all: Vec<Document> = Vec::new();
    loop {
        let after = all.last().map(|document| document.id.clone());
        let page = store.list(kind, "", after.as_deref(), PAGE).await?;
        let last = page.len() < PAGE as usize;
        all.extend(page);
        if last {
            return Ok(all);
        }
    }
}

#[cfg(test)]
mod tests {
    use kiln_test_earlier::{documents, read};

    use super::*;
    use crate::verify::BlobState;

    #[test]
    fn what_an_earlier_version_wrote_is_read() {
        for document in &documents(kiln_test_earlier::NODE) {
            match document.kind.as_str() {
                INSTANCE => read::<Record>(document, SCHEMA),
                FENCE => read::<Fence>(document, SCHEMA),
                // It says what it says by being there.
                RETIRED => read::<serde_json::Value>(document, SCHEMA),
                ROUTE => read::<Route>(document, SCHEMA),
                VERIFIED => read::<Vec<BlobState>>(document, SCHEMA),
                other => panic!("nobody reads {other}"),
            }
        }
    }
}
