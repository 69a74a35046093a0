//! Several replicas on one store.

use std::collections::BTreeSet;
use std::time::Instant;

use kiln_model::event::{EventType, NewEvent, Service};

use super::*;
use crate::{Cursor, Error};

const REPLICAS: u64 = 4;
const COMMITS: u64 = 60;

async fn replicas(place: &Database) -> Vec<SqlStore> {
    let opened = futures::future::join_all((0..REPLICAS).map(|_| open(place))).await;
    opened.into_iter().map(Result::unwrap).collect()
}

fn event(id: &str) -> NewEvent {
    NewEvent {
        kind: EventType::new(Service::Builder, "build", "succeeded"),
        server: None,
        aggregate_kind: "build".to_owned(),
        aggregate_id: id.to_owned(),
        aggregate_version: 1,
        payload: Vec::new(),
        time: jiff::Timestamp::UNIX_EPOCH,
        traceparent: String::new(),
    }
}

/// Reads on from a cursor until `all` documents were seen. What a page leaves out behind its cursor is never seen.
async fn read_all(store: SqlStore, all: u64) -> BTreeSet<String> {
    let (mut seen, mut cursor) = (BTreeSet::new(), None::<Cursor>);
    let mut sequence = store.sequence();
    while (seen.len() as u64) < all {
        let mut token = String::new();
        loop {
            let page = store.changes("item", cursor.as_ref(), &token, 7).await.unwrap();
            seen.extend(page.entries.iter().map(|entry| match entry {
                crate::Entry::Document(document) => document.id.clone(),
                other => panic!("{other:?}"),
            }));
            token = page.next_page_token;
            if token.is_empty() {
                cursor = Some(page.cursor);
                break;
            }
        }
        if (seen.len() as u64) < all && cursor.as_ref().unwrap().sequence == *sequence.borrow_and_update() {
            sequence.changed().await.unwrap();
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_while_many_write_sees_everything() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let place = database(&server, "many");
    let stores = replicas(&place).await;
    let all = REPLICAS * COMMITS;
    let reader = tokio::spawn(read_all(open(&place).await.unwrap(), all));
    let writers = stores.iter().cloned().zip(0..).map(|(store, replica)| {
        tokio::spawn(async move {
            // Some alone, some as a burst.
            for burst in 0..COMMITS / 6 {
                let commits = (0..6).map(|n| {
                    let id = format!("{replica}-{burst}-{n}");
                    let mut batch = put("item", &id, 0, json!({}));
                    batch.events = vec![event(&id), NewEvent { aggregate_version: 2, ..event(&id) }];
                    store.commit(batch)
                });
                futures::future::try_join_all(commits).await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let read = tokio::time::timeout(Duration::from_secs(30), reader).await.expect("something was skipped");
    assert_eq!(read.unwrap().len() as u64, all);
    // Every number was given once, and none is missing.
    let mut sequences = Vec::new();
    loop {
        let page = stores[0].log(sequences.last().copied().unwrap_or(0), 500).await.unwrap();
        if page.is_empty() {
            break;
        }
        sequences.extend(page.into_iter().map(|event| event.sequence));
    }
    assert_eq!(sequences, (1..=2 * all).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_that_write_one_version_one_wins() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let stores = replicas(&database(&server, "counter")).await;
    let counting = stores.iter().cloned().map(|store| {
        tokio::spawn(async move {
            let mut won = 0;
            while won < 25 {
                let found = store.get("counter", "c").await.unwrap();
                let (version, n) = found.map_or((0, 0), |it| (it.version, it.body["n"].as_u64().unwrap()));
                match store.commit(put("counter", "c", version, json!({ "n": n + 1 }))).await {
                    Ok(_) => won += 1,
                    Err(Error::Conflict { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        })
    });
    for one in counting.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    let counter = stores[0].get("counter", "c").await.unwrap().unwrap();
    assert_eq!((counter.version, (*counter.body).clone()), (25 * REPLICAS, json!({ "n": 25 * REPLICAS })));
}

#[tokio::test]
async fn a_commit_wakes_the_other_replicas() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let place = database(&server, "wakes");
    let (one, other) = (open(&place).await.unwrap(), open(&place).await.unwrap());
    let mut sequence = other.sequence();
    let seen = async |sequence: &mut watch::Receiver<u64>, wanted: u64| {
        let reached = sequence.wait_for(|found| *found >= wanted);
        tokio::time::timeout(Duration::from_secs(10), reached).await.expect("not seen").unwrap();
    };
    // What comes before it listens is found at the next look, a second later, after which it listens anew.
    let listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'";
    for n in 0.. {
        let limit = Instant::now() + Duration::from_secs(10);
        while server.psql("kiln", listening).unwrap().trim() != "2" {
            assert!(Instant::now() < limit, "they do not listen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let started = Instant::now();
        let first = one.commit(put("first", &format!("{n}"), 0, json!({}))).await.unwrap();
        seen(&mut sequence, first.sequence).await;
        if started.elapsed() < Duration::from_millis(250) {
            break;
        }
        assert!(n < 10, "it is not told");
    }
    let started = Instant::now();
    for n in 0..20 {
        let done = one.commit(put("a", &n.to_string(), 0, json!({}))).await.unwrap();
        seen(&mut sequence, done.sequence).await;
    }
    // Each would take until the next look, were it not told.
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());

    // One that nobody is told of is found by looking.
    server.psql("kiln", "UPDATE kiln_test_wakes.meta SET value = '100' WHERE name = 'sequence'").unwrap();
    seen(&mut sequence, 100).await;
    // And one that is told on a connection that was cut.
    server
        .psql("kiln", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        .unwrap();
    let done = one.commit(put("a", "last", 0, json!({}))).await.unwrap();
    seen(&mut sequence, done.sequence).await;
}

/// A process that is stopped in the middle of a transaction holds up the others for a bounded time, and does no harm when it
/// wakes.
#[tokio::test]
async fn a_replica_that_is_frozen_in_a_commit_is_cut_off() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let place = database(&server, "frozen");
    let store = open(&place).await.unwrap();
    store.commit(put("a", "1", 0, json!({}))).await.unwrap();
    let mut frozen = connect(&options(&place).unwrap()).await.unwrap();
    sqlx::raw_sql(BEGIN).execute(&mut frozen).await.unwrap();
    sqlx::raw_sql("UPDATE documents SET version = 99").execute(&mut frozen).await.unwrap();

    let started = Instant::now();
    store.commit(put("a", "1", 1, json!({}))).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(sqlx::raw_sql("COMMIT").execute(&mut frozen).await.is_err());
    assert_eq!(store.get("a", "1").await.unwrap().unwrap().version, 2);
}
