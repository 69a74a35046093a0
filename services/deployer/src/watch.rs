//! What the others tell by themselves: the node of its instances, the monitor of health. And the resync, which finds
//! what nobody told.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use jiff::{SignedDuration, Timestamp};
use kiln_api::{engine, types};
use kiln_model::name::{NodeName, ServerName};
use kiln_model::revision::Revision;
use kiln_service::changes::Follower;
use kiln_service::clock::Clock;
use kiln_service::shutdown::requested;
use kiln_store::{Batch, Change, Entry, Store, decode};

use crate::board::How;
use crate::ports::Problem;
use crate::reconcile::Deployer;
use crate::record::{CURSOR, FLEET, INSTANCE, InstanceRecord, SCHEMA};
use crate::store::{list, put, read, servers};
use crate::{ports, revisions};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const REVISIONS: &str = "builder.revision";
/// Records of instances are kept as long as the node keeps their logs.
const KEPT: SignedDuration = SignedDuration::from_hours(7 * 24);

/// Follows each node, for ever.
pub(crate) async fn nodes<S: Store, C: Clock>(deployer: Deployer<S, C>) {
    futures::future::join_all(deployer.peers.nodes.names().map(|name| node(&deployer, name))).await;
}

async fn node<S: Store, C: Clock>(deployer: &Deployer<S, C>, node: &NodeName) {
    let mut stop = deployer.stop();
    let mut pause = FIRST_PAUSE;
    while !*stop.borrow() {
        let followed = tokio::select! {
            biased;
            () = requested(&mut stop) => return,
            followed = follow_node(deployer, node) => followed,
        };
        deployer.board.node_away(node);
        match followed {
            Ok(()) => {
                tracing::warn!(%node, "the node's watch ended; it is begun anew");
                pause = FIRST_PAUSE;
            }
            Err(problem) => tracing::warn!(%node, %problem, again_in = ?pause, "the node can't be followed"),
        }
        deployer.clock.sleep(pause).await;
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

async fn follow_node<S: Store, C: Clock>(deployer: &Deployer<S, C>, node: &NodeName) -> Result<(), Problem> {
    // First the watch, then the list: what changes in between comes by the watch.
    let mut changes: BoxStream<'_, engine::Instance> = deployer.peers.nodes.of(node)?.watch().await?;
    list_node(deployer, node).await?;
    while let Some(instance) = changes.next().await {
        if let Err(invalid) = deployer.board.engine(node, instance, deployer.clock.now().monotonic) {
            tracing::warn!(%node, error = %invalid, "the node tells of an instance that makes no sense");
        }
    }
    Ok(())
}

pub(crate) async fn list_node<S: Store, C: Clock>(
    deployer: &Deployer<S, C>,
    node: &NodeName,
) -> Result<(), Problem> {
    let since = deployer.clock.now().monotonic;
    let listing: ports::Listing = deployer.peers.nodes.of(node)?.list().await?;
    deployer.board.listing(node, listing, since, deployer.clock.now().monotonic);
    Ok(())
}

/// Follows the monitor, for ever: the short way for health, beside the events.
pub(crate) async fn monitor<S: Store, C: Clock>(deployer: Deployer<S, C>) {
    let mut stop = deployer.stop();
    let mut pause = FIRST_PAUSE;
    while !*stop.borrow() {
        let followed = tokio::select! {
            biased;
            () = requested(&mut stop) => return,
            followed = follow_monitor(&deployer) => followed,
        };
        match followed {
            Ok(()) => pause = FIRST_PAUSE,
            Err(problem) => tracing::debug!(%problem, "the monitor can't be followed"),
        }
        deployer.clock.sleep(pause).await;
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

async fn follow_monitor<S: Store, C: Clock>(deployer: &Deployer<S, C>) -> Result<(), Problem> {
    let mut changes = deployer.peers.monitor.watch().await?;
    list_health(deployer).await?;
    while let Some(health) = changes.next().await {
        take_health(deployer, health);
    }
    Ok(())
}

async fn list_health<S: Store, C: Clock>(deployer: &Deployer<S, C>) -> Result<(), Problem> {
    for health in deployer.peers.monitor.health(None).await? {
        take_health(deployer, health);
    }
    Ok(())
}

fn take_health<S: Store, C: Clock>(deployer: &Deployer<S, C>, health: kiln_api::monitor::Health) {
    if let Err(invalid) = deployer.board.health(health, How::Asked, deployer.clock.now()) {
        tracing::warn!(error = %invalid, "the monitor says something that makes no sense");
    }
}

/// Follows what other replicas change, for ever: a fleet that they were told of may be this one's to see to, and is when
/// they are gone.
pub(crate) async fn replicas<S: Store, C: Clock>(deployer: Deployer<S, C>) {
    if deployer.members.is_alone() {
        return;
    }
    let mut stop = deployer.stop();
    let mut sequence = deployer.store.sequence();
    let mut others = deployer.members.changes();
    let mut fleets = Follower::new(FLEET);
    while !*stop.borrow() {
        sequence.borrow_and_update();
        match fleets.changes(&deployer.store).await {
            Ok(changed) => {
                let ids = changed.iter().filter_map(|entry| match entry {
                    Entry::Document(document) => document.id.parse().ok(),
                    Entry::Tombstone { .. } => None,
                });
                ids.for_each(|server: ServerName| deployer.look_after(&server));
            }
            Err(error) => {
                tracing::warn!(%error, "what other replicas change can't be seen");
                deployer.clock.sleep(LONGEST_PAUSE).await;
                continue;
            }
        }
        tokio::select! {
            biased;
            () = requested(&mut stop) => return,
            Ok(()) = others.changed() => deployer.board.wake_all(),
            Ok(()) = sequence.changed() => {}
        }
    }
}

/// Asks everybody for everything that events may have failed to tell. Whoever is away does not keep us from asking the
/// others.
pub(crate) async fn resync<S: Store, C: Clock>(deployer: &Deployer<S, C>) -> Result<(), kiln_store::Error> {
    for server in servers(&deployer.store).await? {
        deployer.look_after(&server);
    }
    for node in deployer.peers.nodes.names().filter(|node| deployer.board.is_synced(node)) {
        if let Err(problem) = list_node(deployer, node).await {
            tracing::warn!(%node, %problem, "the node could not be asked");
        }
    }
    if let Err(problem) = list_health(deployer).await {
        tracing::warn!(%problem, "the monitor could not be asked for health");
    }
    match deployer.peers.monitor.signals().await {
        Ok(signals) => take_signals(deployer, signals).await?,
        Err(problem) => tracing::warn!(%problem, "the monitor could not be asked for signals"),
    }
    take_revisions(deployer).await
}

async fn take_signals<S: Store, C: Clock>(
    deployer: &Deployer<S, C>,
    listed: ports::Signals,
) -> Result<(), kiln_store::Error> {
    for message in listed.signals {
        match revisions::signal(message) {
            Ok((signal, version)) => {
                let taken = deployer.take_signal(&signal, &listed.epoch, version).await;
                of_one(&signal.server, "a signal", taken)?;
            }
            Err(invalid) => {
                tracing::warn!(error = %invalid, "the monitor lists a signal that makes no sense")
            }
        }
    }
    Ok(())
}

async fn take_revisions<S: Store, C: Clock>(deployer: &Deployer<S, C>) -> Result<(), kiln_store::Error> {
    let stored = read::<S, kiln_store::Cursor>(&deployer.store, CURSOR, REVISIONS).await?;
    let since = stored
        .as_ref()
        .map(|(cursor, _)| types::Cursor { epoch: cursor.epoch.clone(), sequence: cursor.sequence });
    let listed = match deployer.peers.builder.revisions(since.as_ref()).await {
        Ok(listed) => listed,
        Err(problem) => {
            tracing::warn!(%problem, "the builder could not be asked for revisions");
            return Ok(());
        }
    };
    // Of each server the newest: what was replaced before it was seen is not rolled out on the way.
    let mut newest: BTreeMap<ServerName, Revision> = BTreeMap::new();
    for message in listed.revisions {
        match Revision::try_from(message) {
            Ok(revision) => {
                let known = newest.get(&revision.server).map_or(0, |known| known.generation);
                if revision.generation > known {
                    newest.insert(revision.server.clone(), revision);
                }
            }
            Err(invalid) => {
                tracing::warn!(error = %invalid, "the builder lists a revision that makes no sense")
            }
        }
    }
    let mut all = true;
    for revision in newest.values() {
        let taken = deployer.take_revision(revision).await;
        all &= of_one(&revision.server, "a revision", taken)?;
    }
    if !all {
        // Given again by the next listing.
        return Ok(());
    }
    let Some(cursor) = listed.cursor.filter(|cursor| since.as_ref() != Some(cursor)) else { return Ok(()) };
    let cursor = kiln_store::Cursor { epoch: cursor.epoch, sequence: cursor.sequence };
    let change = put(CURSOR, REVISIONS, stored.map_or(0, |(_, version)| version), &cursor)?;
    deployer.store.commit(Batch { changes: vec![change], ..Batch::default() }).await?;
    Ok(())
}

/// Whether what was told of one server could be taken. What is wrong with its documents keeps no other waiting; a store
/// that can't be had is an error for all of them.
fn of_one(
    server: &ServerName,
    what: &str,
    taken: Result<(), kiln_store::Error>,
) -> Result<bool, kiln_store::Error> {
    match taken {
        Ok(()) => Ok(true),
        Err(error @ kiln_store::Error::Unavailable { .. }) => Err(error),
        Err(error) => {
            tracing::error!(%server, what, %error, "could not be taken; trying again at the next resync");
            Ok(false)
        }
    }
}

/// Drops records of instances that ended long ago.
pub(crate) async fn prune<S: Store>(store: &S, now: Timestamp) -> Result<(), kiln_store::Error> {
    let mut changes = Vec::new();
    for document in list(store, INSTANCE, "").await? {
        let record: InstanceRecord = match decode(&document, SCHEMA) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(instance = document.id, %error, "an old record can't be read, and stays");
                continue;
            }
        };
        let old = record.instance.ended.is_some_and(|ended| now.duration_since(ended) > KEPT);
        if record.past && old {
            let (kind, expected) = (document.kind, document.version);
            changes.push(Change::Delete { kind, id: document.id, expected });
        }
    }
    for chunk in changes.chunks(100) {
        store.commit(Batch { changes: chunk.to_vec(), ..Batch::default() }).await?;
    }
    Ok(())
}
