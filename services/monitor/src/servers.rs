//! What the builder told of its servers: their policies, and what their images were made from.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_api::builder;
use kiln_api::convert::{Invalid, optional, optional_text, text};
use kiln_model::definition::UpdatePolicy;
use kiln_model::name::ServerName;
use kiln_store::{Batch, Change, Error, Store};
use tokio::sync::watch;

use crate::documents::{self, KnownServer, SERVER, Seen, UNKNOWN_POLICY};
use crate::ports::{Listing, Pinned};

/// Cheap to clone; every clone is the same.
#[derive(Debug, Clone)]
pub struct Servers<S> {
    store: S,
    kept: Arc<Mutex<BTreeMap<ServerName, KnownServer>>>,
    changed: watch::Sender<u64>,
}

impl<S: Store> Servers<S> {
    /// # Errors
    /// Where the store can't be read.
    pub async fn load(store: S) -> Result<Self, Error> {
        let servers: Vec<(u64, KnownServer)> = documents::load(&store, SERVER).await?;
        let kept = servers.into_iter().map(|(_, server)| (server.name.clone(), server));
        Ok(Self { store, kept: Arc::new(Mutex::new(kept.collect())), changed: watch::Sender::new(0) })
    }

    /// Ticks with every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub fn get(&self, name: &ServerName) -> Option<KnownServer> {
        self.kept().get(name).cloned()
    }

    pub fn all(&self) -> Vec<KnownServer> {
        self.kept().values().cloned().collect()
    }

    pub fn policy(&self, name: &ServerName) -> UpdatePolicy {
        self.kept().get(name).map_or(UNKNOWN_POLICY, |server| server.update)
    }

    /// Takes over a server as it was told in an event.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn tell(&self, epoch: &str, message: builder::Server) -> Result<(), Error> {
        match read(epoch, message) {
            Ok((server, false)) => self.keep(server).await,
            Ok((server, true)) => self.drop_unless_newer(&server.name, Some(&server.seen)).await,
            Err((name, invalid)) => {
                tracing::warn!(server = name, %invalid, "the builder told of a server that can't be read");
                Ok(())
            }
        }
    }

    /// Takes over the full list: what is not in it does not exist.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn take(&self, listing: Listing<builder::Server>) -> Result<(), Error> {
        let mut there = BTreeSet::new();
        // Told by an event while the list was under way: it may be newer than the list.
        let before: BTreeSet<ServerName> = self.kept().keys().cloned().collect();
        for message in listing.items {
            let removed = message.removed;
            if !removed {
                there.extend(message.name.parse::<ServerName>());
            }
            self.tell(&listing.epoch, message).await?;
        }
        for name in before.difference(&there) {
            self.drop_unless_newer(name, None).await?;
        }
        Ok(())
    }

    /// Takes over what another replica wrote.
    pub fn adopt(&self, server: KnownServer) {
        let name = server.name.clone();
        if self.kept().insert(name, server.clone()) != Some(server) {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// Another replica was told that it does not exist.
    pub fn adopt_end(&self, name: &ServerName) {
        if self.kept().remove(name).is_some() {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    async fn keep(&self, server: KnownServer) -> Result<(), Error> {
        let old = self.kept().get(&server.name).is_some_and(|kept| !server.seen.is_newer_than(&kept.seen));
        if old {
            return Ok(());
        }
        let expected = self.version(&server.name).await?;
        self.commit(documents::put(SERVER, server.name.as_str(), expected, &server)?).await?;
        self.kept().insert(server.name.clone(), server);
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    async fn drop_unless_newer(&self, name: &ServerName, seen: Option<&Seen>) -> Result<(), Error> {
        let stays =
            self.kept().get(name).is_none_or(|kept| seen.is_some_and(|seen| !seen.is_newer_than(&kept.seen)));
        if stays {
            return Ok(());
        }
        let (kind, id) = (SERVER.to_owned(), name.to_string());
        let expected = self.version(name).await?;
        self.commit(Change::Delete { kind, id, expected }).await?;
        self.kept().remove(name);
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    async fn version(&self, name: &ServerName) -> Result<u64, Error> {
        Ok(self.store.get(SERVER, name.as_str()).await?.map_or(0, |document| document.version))
    }

    async fn commit(&self, change: Change) -> Result<(), Error> {
        self.store.commit(Batch { changes: vec![change], ..Batch::default() }).await.map(drop)
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<ServerName, KnownServer>> {
        // No code that can panic runs under the lock.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A server, and whether it was removed.
fn read(epoch: &str, message: builder::Server) -> Result<(KnownServer, bool), (String, Invalid)> {
    let name = message.name.clone();
    let whole = || -> Result<(KnownServer, bool), Invalid> {
        let release_files = message.release_files.iter().map(|file| {
            let digest = text("release_files.digest", &file.digest)?;
            Ok(Pinned { url: file.url.clone(), digest })
        });
        let server = KnownServer {
            name: text("name", &message.name)?,
            source: message.source.clone(),
            definition: optional_text("definition_digest", &message.definition_digest)?,
            generation: message.generation,
            update: optional("update", message.update)?.unwrap_or(UNKNOWN_POLICY),
            release_files: release_files.collect::<Result<_, Invalid>>()?,
            seen: Seen { epoch: epoch.to_owned(), version: message.version },
        };
        Ok((server, message.removed))
    };
    whole().map_err(|invalid| (name, invalid))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_api::types;
    use kiln_store::SqlStore;

    use super::*;

    fn message(name: &str, version: u64) -> builder::Server {
        builder::Server {
            name: name.to_owned(),
            version,
            generation: version,
            update: Some(types::UpdatePolicy {
                definition: types::Mode::Auto.into(),
                packages: types::Mode::Auto.into(),
                unhealthy: types::Mode::Approve.into(),
                debounce: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            }),
            ..builder::Server::default()
        }
    }

    fn listing(items: Vec<builder::Server>) -> Listing<builder::Server> {
        Listing { epoch: "e1".to_owned(), items }
    }

    #[tokio::test]
    async fn what_was_told_outlives_a_restart_and_old_news_are_ignored() {
        let store = SqlStore::in_memory().await.unwrap();
        let servers = Servers::load(store.clone()).await.unwrap();
        let web: ServerName = "web".parse().unwrap();
        assert_eq!(servers.policy(&web), UNKNOWN_POLICY);
        servers.tell("e1", message("web", 3)).await.unwrap();
        servers.tell("e1", message("web", 2)).await.unwrap();
        servers.tell("e1", message("not a name", 9)).await.unwrap();
        assert_eq!(servers.get(&web).unwrap().generation, 3);
        let again = Servers::load(store).await.unwrap();
        assert_eq!(again.get(&web), servers.get(&web));
        // A restored builder counts anew.
        again.tell("e2", message("web", 1)).await.unwrap();
        assert_eq!(again.get(&web).unwrap().generation, 1);
    }

    #[tokio::test]
    async fn what_is_removed_or_not_listed_is_dropped_and_can_come_back() {
        let store = SqlStore::in_memory().await.unwrap();
        let servers = Servers::load(store).await.unwrap();
        let names = |servers: &Servers<SqlStore>| {
            servers.all().iter().map(|server| server.name.to_string()).collect::<Vec<_>>()
        };
        servers.take(listing(vec![message("a", 1), message("b", 1), message("c", 1)])).await.unwrap();
        assert_eq!(names(&servers), ["a", "b", "c"]);
        let removed = builder::Server { removed: true, ..message("b", 2) };
        servers.take(listing(vec![message("a", 1), removed])).await.unwrap();
        assert_eq!(names(&servers), ["a"]);
        servers.take(listing(vec![message("a", 1), message("c", 4)])).await.unwrap();
        assert_eq!(names(&servers), ["a", "c"]);
        servers.take(listing(vec![message("a", 5), message("c", 4)])).await.unwrap();
        assert_eq!(servers.get(&"a".parse().unwrap()).unwrap().generation, 5);
    }
}
