//! Several monitors on one store: what one keeps in memory follows what the others write, and the answers of their probes
//! are heard from them, since only changes are written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use kiln_api::monitor::GetServerStatusResponse;
use kiln_model::name::ServerName;
use kiln_service::changes::Follower;
use kiln_service::clock::Clock;
use kiln_service::members::{Member, Members};
use kiln_service::shutdown::requested;
use kiln_store::{Entry, Error, Store, decode};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::documents::{HEALTH, KnownServer, SCHEMA, SERVER, SIGNAL, Watched};
use crate::ports::Others;
use crate::servers::Servers;
use crate::signals::Signals;
use crate::watcher::Watcher;

/// After a store or a replica that could not be asked.
const PAUSE: Duration = Duration::from_secs(1);

pub struct Replicas<S, C> {
    store: S,
    clock: C,
    members: Members,
    others: Arc<dyn Others>,
    watcher: Watcher<S, C>,
    servers: Servers<S>,
    signals: Signals<S, C>,
}

impl<S: Store, C: Clock> Replicas<S, C> {
    pub fn new(
        store: S,
        clock: C,
        members: Members,
        others: Arc<dyn Others>,
        watcher: Watcher<S, C>,
        servers: Servers<S>,
        signals: Signals<S, C>,
    ) -> Self {
        Self { store, clock, members, others, watcher, servers, signals }
    }

    /// Keeps in step with the others until told to stop; nothing to do where there are none.
    pub async fn run(&self, stop: watch::Receiver<bool>) {
        if !self.members.is_alone() {
            tokio::join!(self.follow(stop.clone()), self.hear(stop));
        }
    }

    /// What each of the others knows of a server by itself. One that does not answer is left out.
    pub async fn ask(&self, server: &ServerName) -> Vec<GetServerStatusResponse> {
        let others = self.members.others();
        let asked = others.iter().map(|member| async move {
            let answer = self.others.status(&member.address, server).await;
            answer
                .inspect_err(
                    |problem| tracing::debug!(replica = member.id, %problem, "another replica can't be asked"),
                )
                .ok()
        });
        futures::future::join_all(asked).await.into_iter().flatten().collect()
    }

    async fn follow(&self, mut stop: watch::Receiver<bool>) {
        let mut sequence = self.store.sequence();
        let mut others = self.members.changes();
        let (mut health, mut servers, mut signals) =
            (Follower::new(HEALTH), Follower::new(SERVER), Follower::new(SIGNAL));
        while !*stop.borrow() {
            sequence.borrow_and_update();
            // Servers first: what their policies say decides on signals.
            let followed = async {
                self.follow_servers(servers.changes(&self.store).await?);
                self.follow_signals(signals.changes(&self.store).await?);
                self.follow_health(health.changes(&self.store).await?);
                Ok::<_, Error>(())
            };
            if let Err(error) = followed.await {
                tracing::warn!(%error, "what other replicas write can't be seen");
                self.clock.sleep(PAUSE).await;
                continue;
            }
            tokio::select! {
                biased;
                () = requested(&mut stop) => return,
                Ok(()) = others.changed() => self.watcher.share_anew(),
                Ok(()) = sequence.changed() => {}
            }
        }
    }

    fn follow_servers(&self, entries: Vec<Entry>) {
        for entry in entries {
            match (&entry, read::<KnownServer>(&entry)) {
                (_, Some((server, _))) => self.servers.adopt(server),
                (Entry::Tombstone { id, .. }, _) => {
                    id.parse().iter().for_each(|id| self.servers.adopt_end(id))
                }
                _ => {}
            }
        }
    }

    fn follow_signals(&self, entries: Vec<Entry>) {
        for entry in entries {
            match (&entry, read(&entry)) {
                (_, Some((record, version))) => self.signals.adopt(record, version),
                (Entry::Tombstone { id, .. }, _) => self.signals.adopt_end(id),
                _ => {}
            }
        }
    }

    fn follow_health(&self, entries: Vec<Entry>) {
        for entry in entries {
            match (&entry, read::<Watched>(&entry)) {
                (_, Some((watched, version))) => self.watcher.adopt(watched, version),
                (Entry::Tombstone { id, .. }, _) => {
                    id.parse().iter().for_each(|id| self.watcher.adopt_end(id))
                }
                _ => {}
            }
        }
    }

    /// Listens to each of the others, as they come and go.
    async fn hear(&self, mut stop: watch::Receiver<bool>) {
        let mut changes = self.members.changes();
        let mut heard: BTreeMap<String, AbortHandle> = BTreeMap::new();
        let mut tasks = JoinSet::new();
        while !*stop.borrow() {
            changes.borrow_and_update();
            let there = self.members.others();
            heard.retain(|id, task| {
                let stays = there.iter().any(|member| member.id == *id);
                if !stays {
                    task.abort();
                }
                stays
            });
            for member in there {
                let listening = (self.others.clone(), self.watcher.clone(), self.clock.clone());
                heard.entry(member.id.clone()).or_insert_with(|| {
                    let (others, watcher, clock) = listening;
                    tasks.spawn(async move { hear_one(&*others, &watcher, &clock, &member).await })
                });
            }
            tokio::select! {
                biased;
                () = requested(&mut stop) => return,
                Some(_) = tasks.join_next() => {}
                Ok(()) = changes.changed() => {}
            }
        }
    }
}

/// Until it is aborted, which ends with the replica.
async fn hear_one<S: Store, C: Clock>(
    others: &dyn Others,
    watcher: &Watcher<S, C>,
    clock: &C,
    member: &Member,
) {
    loop {
        match others.watch(&member.address).await {
            Ok(mut answers) => {
                while let Some(answer) = answers.next().await {
                    if let Err(invalid) = watcher.hear(answer) {
                        tracing::warn!(replica = member.id, %invalid, "another replica's answer makes no sense");
                    }
                }
                tracing::debug!(replica = member.id, "another replica is not heard any more");
            }
            Err(problem) => tracing::warn!(replica = member.id, %problem, "another replica can't be heard"),
        }
        clock.sleep(PAUSE).await;
    }
}

/// A changed document with its version; none where it was deleted, or can't be read, which is told and holds nothing up.
fn read<T: DeserializeOwned>(entry: &Entry) -> Option<(T, u64)> {
    let Entry::Document(document) = entry else { return None };
    match decode(document, SCHEMA) {
        Ok(value) => Some((value, document.version)),
        Err(error) => {
            tracing::error!(%error, "what another replica wrote can't be read");
            None
        }
    }
}
