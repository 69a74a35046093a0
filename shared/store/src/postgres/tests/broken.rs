//! A server that dies, or whose disk is full.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use super::*;

/// On a store that goes on by itself.
const GOES_ON: Duration = Duration::from_secs(30);

/// Commits one batch after another, each over two documents, for as long as it is let; counts what was acknowledged.
async fn count(store: SqlStore, id: String, mut stop: watch::Receiver<bool>) -> u64 {
    let mut acknowledged = 0;
    while !*stop.borrow_and_update() {
        // What is not known is looked up: that is what an answer that is lost asks for.
        let Ok(found) = store.get("counter", &id).await else { continue };
        let version = found.map_or(0, |document| document.version);
        assert!(version == acknowledged || version == acknowledged + 1, "{version} after {acknowledged}");
        let mut batch = put("counter", &id, version, json!({}));
        batch.changes.extend(put("item", &format!("{id}-{version:08}"), 0, json!({})).changes);
        match store.commit(batch).await {
            Ok(_) => acknowledged = version + 1,
            Err(crate::Error::Unavailable { .. }) => acknowledged = version,
            Err(other) => panic!("{other}"),
        }
    }
    acknowledged
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_the_death_of_the_server() {
    let mut server = Private::start(&[]).unwrap();
    let place = database(&server, "killed");
    let store = open(&place).await.unwrap();
    let (stop, stopped) = watch::channel(false);
    let counting: Vec<_> =
        (0..3).map(|n| tokio::spawn(count(store.clone(), n.to_string(), stopped.clone()))).collect();
    for round in 0..5_u64 {
        // In the midst of commits: the store has gone on since the last time.
        let mut sequence = store.sequence();
        let wanted = *sequence.borrow() + 50 + 7 * round;
        let going = sequence.wait_for(|found| *found >= wanted);
        tokio::time::timeout(GOES_ON, going).await.expect("it does not go on").unwrap();
        server.kill().unwrap();
        server.resume().unwrap();
    }
    stop.send(true).unwrap();
    for (n, one) in counting.into_iter().enumerate() {
        let acknowledged = one.await.unwrap();
        let found = store.get("counter", &n.to_string()).await.unwrap().unwrap().version;
        assert!(found == acknowledged || found == acknowledged + 1, "{found} of {acknowledged}");
        // Whole batches only.
        let (mut items, mut after) = (0, None);
        loop {
            let page = store.list("item", &format!("{n}-"), after.as_deref(), 500).await.unwrap();
            let Some(last) = page.last() else { break };
            items += page.len() as u64;
            after = Some(last.id.clone());
        }
        assert_eq!(items, found);
    }
}

#[tokio::test]
async fn a_server_that_is_away_is_said_and_waited_for() {
    let mut server = Private::start(&["fsync=off"]).unwrap();
    let place = database(&server, "away");
    let store = open(&place).await.unwrap();
    store.commit(put("a", "1", 0, json!({}))).await.unwrap();
    server.kill().unwrap();
    let started = Instant::now();
    let error = store.commit(put("a", "1", 1, json!({}))).await.unwrap_err().to_string();
    assert!(error.contains("can't be reached") && error.contains("postgres://"), "{error}");
    let error = store.get("a", "1").await.unwrap_err().to_string();
    assert!(error.contains("away") || error.contains("can't be reached"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    let error = open(&place).await.unwrap_err().to_string();
    assert!(error.contains("can't be reached"), "{error}");
    server.resume().unwrap();
    // The same handle, at once: neither what it kept nor what it lost is in the way.
    store.commit(put("a", "1", 1, json!({}))).await.unwrap();
    assert_eq!(store.get("a", "1").await.unwrap().unwrap().version, 2);
    // And where the server was away between two commits, nobody is told.
    server.kill().unwrap();
    server.resume().unwrap();
    store.commit(put("a", "1", 2, json!({}))).await.unwrap();
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        assert!(Command::new("umount").arg("-l").arg(&self.0).status().unwrap().success());
    }
}

/// Needs root, for a file system of its own.
#[tokio::test]
async fn a_full_disk_is_a_clear_error_and_no_half_state() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let small = server.socket().join("small");
    std::fs::create_dir(&small).unwrap();
    let mount =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=20m,mode=777", "tmpfs"]).arg(&small).status();
    assert!(mount.unwrap().success(), "can't mount: run the tests as root");
    let mounted = Mounted(small);
    let inner = mounted.0.join("data");
    std::fs::create_dir(&inner).unwrap();
    std::os::unix::fs::chown(&inner, Some(65534), Some(65534)).unwrap();
    server.psql("postgres", &format!("CREATE TABLESPACE small LOCATION '{}'", inner.display())).unwrap();
    server.psql("postgres", "CREATE DATABASE kiln TABLESPACE small").unwrap();
    let store = open(&database(&server, "full")).await.unwrap();
    // Nothing that PostgreSQL could make small.
    let big =
        || json!({ "text": (0..20_000).map(|_| ulid::Ulid::generate().to_string()).collect::<String>() });
    let mut kept = 0_u64;
    let error = loop {
        match store.commit(put("a", &kept.to_string(), 0, big())).await {
            Ok(_) => kept += 1,
            Err(error) => break error.to_string(),
        }
        assert!(kept < 200, "the disk never filled");
    };
    assert!(error.contains("disk is full"), "{error}");
    // A read may fail as well while the disk is full: it takes the place of a page that has to be written out first.
    if let Err(error) = store.list("a", "", None, 500).await {
        assert!(error.to_string().contains("disk is full"), "{error}");
    }
    let remount = Command::new("mount").args(["-o", "remount,size=60m"]).arg(&mounted.0).status();
    assert!(remount.unwrap().success());
    assert_eq!(store.list("a", "", None, 500).await.unwrap().len() as u64, kept);
    assert_eq!(store.get("a", &kept.to_string()).await.unwrap(), None);
    store.commit(put("a", &kept.to_string(), 0, big())).await.unwrap();
}
