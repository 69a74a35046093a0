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

    /// Which state of each is known.
    pub fn seen(&self) -> BTreeMap<ServerName, Seen> {
        self.kept().iter().map(|(name, server)| (name.clone(), server.seen.clone())).collect()
    }

    /// Takes over a server as it was told in an event.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn tell(&self, epoch: &str, message: builder::Server) -> Result<(), Error> {
        match read(epoch, message) {
            Ok((server, false)) => self.keep(server).await,
            Ok((server, true)) => self.drop_where(&server.name, |kept| server.seen.is_newer_than(kept)).await,
            Err((name, invalid)) => {
                tracing::warn!(server = name, %invalid, "the builder told of a server that can't be read");
                Ok(())
            }
        }
    }

    /// Takes over the full list: what is not in it does not exist, as far as it was known `before` it was asked for. What
    /// was told since then may be newer than the list.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn take(
        &self,
        listing: Listing<builder::Server>,
        before: &BTreeMap<ServerName, Seen>,
    ) -> Result<(), Error> {
        let mut there = BTreeSet::new();
        for message in listing.items {
            if !message.removed {
                there.extend(message.name.parse::<ServerName>());
            }
            self.tell(&listing.epoch, message).await?;
        }
        for (name, seen) in before.iter().filter(|(name, _)| !there.contains(*name)) {
            self.drop_where(name, |kept| kept == seen).await?;
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
        let is_old = |kept: &KnownServer| !server.seen.is_newer_than(&kept.seen);
        if self.kept().get(&server.name).is_some_and(is_old) {
            return Ok(());
        }
        let stored = self.stored(&server.name).await?;
        if let Some((_, stored)) = stored.as_ref().filter(|(_, stored)| is_old(stored)) {
            // By another replica, whose write was not followed yet.
            self.adopt(stored.clone());
            return Ok(());
        }
        let expected = stored.map_or(0, |(version, _)| version);
        self.commit(documents::put(SERVER, server.name.as_str(), expected, &server)?).await?;
        self.adopt(server);
        Ok(())
    }

    /// Drops a server of which no more is known than what is `over`.
    async fn drop_where(&self, name: &ServerName, over: impl Fn(&Seen) -> bool) -> Result<(), Error> {
        if !self.kept().get(name).is_some_and(|kept| over(&kept.seen)) {
            return Ok(());
        }
        // Another replica may have dropped it meanwhile, or have been told more.
        match self.stored(name).await? {
            Some((_, stored)) if !over(&stored.seen) => self.adopt(stored),
            stored => {
                if let Some((expected, _)) = stored {
                    let (kind, id) = (SERVER.to_owned(), name.to_string());
                    self.commit(Change::Delete { kind, id, expected }).await?;
                }
                self.adopt_end(name);
            }
        }
        Ok(())
    }

    async fn stored(&self, name: &ServerName) -> Result<Option<(u64, KnownServer)>, Error> {
        documents::one(&self.store, SERVER, name.as_str()).await
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
        let listed = async |items| servers.take(listing(items), &servers.seen()).await.unwrap();
        listed(vec![message("a", 1), message("b", 1), message("c", 1)]).await;
        assert_eq!(names(&servers), ["a", "b", "c"]);
        let removed = builder::Server { removed: true, ..message("b", 2) };
        listed(vec![message("a", 1), removed]).await;
        assert_eq!(names(&servers), ["a"]);
        listed(vec![message("a", 1), message("c", 4)]).await;
        assert_eq!(names(&servers), ["a", "c"]);
        listed(vec![message("a", 5), message("c", 4)]).await;
        assert_eq!(servers.get(&"a".parse().unwrap()).unwrap().generation, 5);
    }

    #[tokio::test]
    async fn what_was_told_while_a_list_was_under_way_is_not_dropped() {
        let store = SqlStore::in_memory().await.unwrap();
        let servers = Servers::load(store.clone()).await.unwrap();
        servers.tell("e1", message("again", 1)).await.unwrap();
        let another = Servers::load(store.clone()).await.unwrap();
        let before = servers.seen();
        servers.tell("e1", message("new", 1)).await.unwrap();
        // Nothing of it was followed yet.
        another.tell("e1", message("again", 3)).await.unwrap();
        servers.take(listing(Vec::new()), &before).await.unwrap();
        for servers in [servers, Servers::load(store).await.unwrap()] {
            let versions: Vec<_> = servers.all().iter().map(|server| server.seen.version).collect();
            assert_eq!(versions, [3, 1]);
        }
    }

    #[tokio::test]
    async fn old_news_do_not_undo_what_another_replica_was_told() {
        let store = SqlStore::in_memory().await.unwrap();
        let (servers, another) =
            (Servers::load(store.clone()).await.unwrap(), Servers::load(store).await.unwrap());
        another.tell("e1", message("web", 3)).await.unwrap();
        servers.tell("e1", message("web", 2)).await.unwrap();
        assert_eq!(servers.get(&"web".parse().unwrap()).unwrap().seen.version, 3);
    }
}
