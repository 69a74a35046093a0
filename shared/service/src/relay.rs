//! The outbox on its way to the bus.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use kiln_bus::Bus;
use kiln_model::event::Event;
use kiln_store::Store;
use tokio::sync::{mpsc, watch};

use crate::metrics;
use crate::shutdown::requested;

const PAGE: u32 = 500;
/// Aggregates whose events are published at the same time.
const CONCURRENT: usize = 32;
const PRUNE: Duration = Duration::from_secs(3600);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// After a restart of the broker events flow within this time.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Publishes what the store commits, at once and in order per aggregate, until told to stop. While the broker is away
/// the rows wait. Once an hour it drops what is too old to be asked for.
pub async fn run<S: Store, B: Bus>(store: S, bus: B, stop: watch::Receiver<bool>) {
    let sent = Sent::default();
    let (marks, queue) = mpsc::unbounded_channel();
    let marker = tokio::spawn(mark(store.clone(), sent.clone(), queue));
    tokio::select! {
        biased;
        () = publish(&store, &bus, &sent, marks, stop) => {}
        // Ends only with the process.
        () = prune(&store) => {}
    }
    // The marks of what was published are waited for; an unmarked event is published twice, which does no harm.
    if let Err(error) = marker.await {
        tracing::warn!(%error, "the relay's marker ended early");
    }
}

/// What was published and is not yet marked in the store: the mark costs a wait for the disk, and the next event
/// should not wait for it.
#[derive(Debug, Clone, Default)]
struct Sent(Arc<Mutex<HashSet<u64>>>);

impl Sent {
    fn with<T>(&self, f: impl FnOnce(&mut HashSet<u64>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn publish<S: Store, B: Bus>(
    store: &S,
    bus: &B,
    sent: &Sent,
    marks: mpsc::UnboundedSender<u64>,
    mut stop: watch::Receiver<bool>,
) {
    let mut sequence = store.sequence();
    let mut pause = FIRST_PAUSE;
    while !*stop.borrow() {
        // Before the look, so that a commit in between wakes again.
        sequence.mark_unchanged();
        // As well: what is marked while the rows are read is still known here.
        let published = sent.with(|sent| sent.clone());
        let round = match store.unsent(PAGE).await {
            Ok(mut events) => {
                let seen = events.len();
                events.retain(|event| !published.contains(&event.sequence));
                metrics::outbox_waiting(events.len());
                publish_all(bus, events, sent, &marks).await.map(|published| (published, seen))
            }
            Err(error) => Err(error.to_string()),
        };
        match round {
            Ok((published, seen)) => {
                pause = FIRST_PAUSE;
                if published > 0 {
                    continue;
                }
                // A page that is full of what waits for its mark hides what comes behind it.
                let hidden = seen >= PAGE as usize;
                tokio::select! {
                    biased;
                    () = requested(&mut stop) => return,
                    // The store is gone with its last handle, which this one is not.
                    _ = sequence.changed() => {}
                    () = tokio::time::sleep(FIRST_PAUSE), if hidden => {}
                }
            }
            Err(reason) => {
                tracing::warn!(reason, again_in = ?pause, "events wait in the outbox");
                tokio::select! {
                    biased;
                    () = requested(&mut stop) => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// How many were published; an error where none could be. Behind one that failed the others of its aggregate wait.
async fn publish_all<B: Bus>(
    bus: &B,
    events: Vec<Event>,
    sent: &Sent,
    marks: &mpsc::UnboundedSender<u64>,
) -> Result<usize, String> {
    let mut aggregates: BTreeMap<(String, String), Vec<Event>> = BTreeMap::new();
    for event in events {
        let key = (event.event.aggregate_kind.clone(), event.event.aggregate_id.clone());
        aggregates.entry(key).or_default().push(event);
    }
    let rounds = futures::stream::iter(aggregates.into_values().map(|events| async move {
        let mut published = 0;
        for event in events {
            match bus.publish(&event).await {
                Ok(()) => {}
                // It would hold up its aggregate for ever. What it tells is in the state.
                Err(error @ kiln_bus::Error::Undecodable { .. }) => {
                    tracing::error!(%error, id = %event.id, "an event can't be published and is left out");
                }
                Err(error) => return (published, Some(error.to_string())),
            }
            published += 1;
            sent.with(|sent| sent.insert(event.sequence));
            metrics::event_published(&event.event.kind);
            // The marker lives for as long as the sender.
            let _ = marks.send(event.sequence);
        }
        (published, None)
    }));
    let (mut published, mut failed) = (0, None);
    let mut rounds = rounds.buffer_unordered(CONCURRENT);
    while let Some((count, error)) = rounds.next().await {
        published += count;
        failed = failed.or(error);
    }
    match failed {
        Some(error) if published == 0 => Err(error),
        Some(error) => {
            tracing::warn!(error, "some events wait in the outbox");
            Ok(published)
        }
        None => Ok(published),
    }
}

/// Marks what was published, many at a time. Ends when all is marked and nothing more can come.
async fn mark<S: Store>(store: S, sent: Sent, mut queue: mpsc::UnboundedReceiver<u64>) {
    let mut sequences = Vec::new();
    while queue.recv_many(&mut sequences, PAGE as usize).await > 0 {
        // Tried a few times and then left: the mark only saves a second publish.
        for _ in 0..3 {
            match store.mark_sent(&sequences).await {
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(%error, "can't mark events as sent");
                    tokio::time::sleep(FIRST_PAUSE).await;
                }
            }
        }
        sent.with(|sent| sent.retain(|sequence| !sequences.contains(sequence)));
        sequences.clear();
    }
}

async fn prune<S: Store>(store: &S) {
    let mut hours = tokio::time::interval(PRUNE);
    loop {
        hours.tick().await;
        match store.prune(Timestamp::now()).await {
            Ok(0) => {}
            Ok(dropped) => tracing::info!(dropped, "dropped what is too old to be asked for"),
            Err(error) => tracing::warn!(%error, "can't prune the store"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    use kiln_bus::MemoryBus;
    use kiln_model::event::{EventType, NewEvent, Service};
    use kiln_store::{Batch, SqlStore};

    fn event(aggregate: &str, version: u64) -> NewEvent {
        NewEvent {
            kind: EventType::new(Service::Builder, "build", "queued"),
            server: None,
            aggregate_kind: "build".to_owned(),
            aggregate_id: aggregate.to_owned(),
            aggregate_version: version,
            payload: Vec::new(),
            time: Timestamp::UNIX_EPOCH,
            traceparent: String::new(),
        }
    }

    async fn commit(store: &SqlStore, events: Vec<NewEvent>) {
        store.commit(Batch { events, ..Batch::default() }).await.unwrap();
    }

    async fn until(mut condition: impl AsyncFnMut() -> bool) {
        let begin = Instant::now();
        while !condition().await {
            assert!(begin.elapsed() < Duration::from_secs(30));
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_is_committed_is_published_in_order_and_marked() {
        let (store, bus) = (SqlStore::in_memory().await.unwrap(), MemoryBus::new("home".parse().unwrap()));
        // Some from before it starts, some while it runs.
        commit(&store, vec![event("a", 1), event("b", 1), event("a", 2)]).await;
        let (stop, stopped) = watch::channel(false);
        let relay = tokio::spawn(run(store.clone(), bus.clone(), stopped));
        for version in 3..=20 {
            commit(&store, vec![event("a", version), event("b", version)]).await;
        }
        until(async || bus.published().len() == 39).await;
        stop.send_replace(true);
        relay.await.unwrap();
        assert_eq!(store.unsent(10).await.unwrap(), []);
        let versions: Vec<_> = bus.published().into_iter().map(|event| event.event).collect();
        for (aggregate, count) in [("a", 20), ("b", 19)] {
            let own = versions.iter().filter(|event| event.aggregate_id == aggregate);
            let own: Vec<_> = own.map(|event| event.aggregate_version).collect();
            assert_eq!(own.len(), count);
            assert!(own.is_sorted(), "{aggregate}: {own:?}");
        }
    }

    #[tokio::test]
    async fn an_event_that_no_broker_takes_holds_nothing_up() {
        let (store, bus) = (SqlStore::in_memory().await.unwrap(), MemoryBus::new("home".parse().unwrap()));
        let big = NewEvent { payload: vec![0; 1 << 20], ..event("a", 1) };
        commit(&store, vec![big, event("a", 2)]).await;
        let (_stop, stopped) = watch::channel(false);
        let relay = tokio::spawn(run(store.clone(), bus.clone(), stopped));
        until(async || store.unsent(10).await.unwrap().is_empty()).await;
        assert_eq!(bus.published().iter().map(|event| event.sequence).collect::<Vec<_>>(), [2]);
        relay.abort();
    }

    #[tokio::test]
    async fn while_the_broker_is_away_events_wait_and_the_stop_is_heard() {
        let (store, bus) = (SqlStore::in_memory().await.unwrap(), MemoryBus::new("home".parse().unwrap()));
        bus.set_away(true);
        commit(&store, vec![event("a", 1), event("a", 2)]).await;
        let (stop, stopped) = watch::channel(false);
        let relay = tokio::spawn(run(store.clone(), bus.clone(), stopped));
        stop.send_replace(true);
        tokio::time::timeout(Duration::from_secs(30), relay).await.unwrap().unwrap();
        assert_eq!(store.unsent(10).await.unwrap().len(), 2);
        let (_stop, stopped) = watch::channel(false);
        let relay = tokio::spawn(run(store.clone(), bus.clone(), stopped));
        bus.set_away(false);
        until(async || store.unsent(10).await.unwrap().is_empty()).await;
        assert_eq!(bus.published().len(), 2);
        relay.abort();
    }
}
