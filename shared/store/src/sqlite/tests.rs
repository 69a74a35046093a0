use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use serde_json::json;
use sqlx::Connection as _;

use super::*;
use crate::conformance::conformance;
use crate::layout::tests::go_forward;
use crate::{Batch, Change, Cursor, Store as _};

fn put(kind: &str, id: &str, expected: u64, body: serde_json::Value) -> Batch {
    let change =
        Change::Put { kind: kind.to_owned(), id: id.to_owned(), expected, schema: 1, body: body.into() };
    Batch { changes: vec![change], ..Batch::default() }
}

#[tokio::test]
async fn it_keeps_every_promise() {
    let folder = tempfile::tempdir().unwrap();
    conformance(async |name| {
        let path = folder.path().join(name);
        open(&path).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn its_files_are_private() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store.db")).await.unwrap();
    store.commit(put("a", "1", 0, json!({}))).await.unwrap();
    let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(Result::unwrap).collect();
    assert!(files.len() > 1, "no log beside the file");
    for file in files {
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", file.path());
    }
}

#[tokio::test]
async fn a_scratch_store_goes_with_its_last_handle() {
    let store = in_memory().await.unwrap();
    let folder = Path::new(store.place()).parent().unwrap().to_owned();
    let clone = store.clone();
    drop(store);
    assert!(folder.is_dir());
    clone.commit(put("a", "1", 0, json!({}))).await.unwrap();
    drop(clone);
    assert!(!folder.exists());
}

/// On one thread all batches are queued before the writer runs, so they must share few commits. Each commit shows as
/// one step of the sequence.
#[tokio::test]
async fn a_burst_shares_a_commit() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store.db")).await.unwrap();
    let mut sequence = store.sequence();
    let watcher = tokio::spawn(async move {
        let mut steps = 0;
        while *sequence.borrow_and_update() < 100 {
            sequence.changed().await.unwrap();
            steps += 1;
        }
        steps
    });
    let commits = (0..100).map(|n| {
        let store = store.clone();
        // Every tenth is refused, and takes nobody with it.
        let expected = u64::from(n % 10 == 9);
        async move { store.commit(put("a", &n.to_string(), expected, json!({}))).await.is_ok() }
    });
    let done = futures::future::join_all(commits).await;
    assert_eq!(done.iter().filter(|done| **done).count(), 90);
    for n in 0..10 {
        store.commit(put("b", &n.to_string(), 0, json!({}))).await.unwrap();
    }
    let steps = watcher.await.unwrap();
    assert!((11..=13).contains(&steps), "{steps} commits for a burst of 90 and ten single ones");
}

const CHILD: &str = "KILN_STORE_KILLED";

/// Run by the test below, as a process of its own.
#[tokio::test]
async fn killed_child() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let store = open(Path::new(&path)).await.unwrap();
    for n in 0_u64.. {
        let mut batch = put("counter", "c", n, json!({"n": n}));
        batch.changes.extend(put("item", &format!("{n:08}"), 0, json!({})).changes);
        store.commit(batch).await.unwrap();
        println!("committed {}", n + 1);
        std::io::stdout().flush().unwrap();
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_sigkill() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let mut acknowledged = 0;
    for round in 1..=5_u64 {
        std::fs::remove_dir_all(folder.path()).unwrap();
        std::fs::create_dir(folder.path()).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sqlite::tests::killed_child", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut counts = lines.filter_map(|line| line.split("committed ").nth(1)?.parse::<u64>().ok());
        acknowledged = counts.find(|count| *count >= round * 7).unwrap();
        child.kill().unwrap();
        // What it said between the look and the kill counts too.
        acknowledged = counts.last().unwrap_or(acknowledged);
        child.wait().unwrap();
        let store = open(&path).await.unwrap();
        let found = store.get("counter", "c").await.unwrap().unwrap().version;
        assert!(found == acknowledged || found == acknowledged + 1, "{found} of {acknowledged}");
        // Whole batches only.
        let mut items = 0;
        let mut after: Option<String> = None;
        loop {
            let page = store.list("item", "", after.as_deref(), 500).await.unwrap();
            let Some(last) = page.last() else { break };
            items += page.len() as u64;
            after = Some(last.id.clone());
        }
        assert_eq!(items, found);
    }
    assert!(acknowledged >= 35);
}

struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        assert!(Command::new("umount").arg("-l").arg(&self.0).status().unwrap().success());
    }
}

/// Needs root, for a file system of its own.
#[tokio::test]
async fn a_full_disk_is_a_clear_error_and_no_half_state() {
    let folder = tempfile::tempdir().unwrap();
    let mounted = folder.path().join("small");
    std::fs::create_dir(&mounted).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(&mounted).status();
    assert!(mount.unwrap().success(), "can't mount: run the tests as root");
    let mounted = Mounted(mounted);
    let store = open(&mounted.0.join("store.db")).await.unwrap();
    let big = json!({"text": "x".repeat(50_000)});
    let mut kept = 0_u64;
    let error = loop {
        match store.commit(put("a", &kept.to_string(), 0, big.clone())).await {
            Ok(_) => kept += 1,
            Err(error) => break error.to_string(),
        }
        assert!(kept < 100, "the disk never filled");
    };
    assert!(error.contains("disk is full") && error.contains("store.db"), "{error}");
    // Reads go on, and nothing of the refused batch is there.
    assert_eq!(store.list("a", "", None, 500).await.unwrap().len() as u64, kept);
    assert_eq!(store.get("a", &kept.to_string()).await.unwrap(), None);
    // With room again it goes on by itself.
    let remount = Command::new("mount").args(["-o", "remount,size=16m"]).arg(&mounted.0).status();
    assert!(remount.unwrap().success());
    store.commit(put("a", &kept.to_string(), 0, big)).await.unwrap();
    drop(store);
    let store = open(&mounted.0.join("store.db")).await.unwrap();
    assert_eq!(store.list("a", "", None, 500).await.unwrap().len() as u64, kept + 1);
    drop(store);
}

#[tokio::test]
async fn copies_are_whole_and_restored_ones_are_new() {
    let folder = tempfile::tempdir().unwrap();
    crate::copy::tests::copies_are_whole_and_restored_ones_are_new(|name| {
        crate::Place::File(folder.path().join(name))
    })
    .await;
}

#[tokio::test]
async fn audit_records_that_were_tampered_with_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    crate::seal::tests::what_was_tampered_with_is_named(
        async |name| open(&path(name)).await.unwrap(),
        async |name, statements| {
            let mut raw = SqliteConnectOptions::new().filename(path(name)).connect().await.unwrap();
            sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned())).execute(&mut raw).await.unwrap();
        },
    )
    .await;
}

#[tokio::test]
async fn a_damaged_file_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let damaged = folder.path().join("damaged.db");
    std::fs::write(&damaged, "this is no database, and long enough to be looked at".repeat(100)).unwrap();
    let error = open(&damaged).await.unwrap_err().to_string();
    assert!(error.contains("damaged") && error.contains("put a copy"), "{error}");

    let nowhere = open(&folder.path().join("no/such/store.db")).await.unwrap_err().to_string();
    assert!(nowhere.contains("no/such/store.db"), "{nowhere}");
}

#[tokio::test]
async fn another_writer_is_waited_for_and_then_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = open(&path).await.unwrap();
    let mut other = SqliteConnectOptions::new().filename(&path).connect().await.unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    let error = store.commit(put("a", "1", 0, json!({}))).await.unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    store.commit(put("a", "1", 0, json!({}))).await.unwrap();
}

#[tokio::test]
async fn its_layout_goes_forward() {
    let folder = tempfile::tempdir().unwrap();
    go_forward(MIGRATIONS, async |name, migrations| {
        let path = folder.path().join(name);
        create_private(&path)?;
        start(&path, SqliteSynchronous::Off, migrations, None).await
    })
    .await;
}

/// As the first programs wrote it, which did not say from which layout on it can be read.
const FIRST: &str = "
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    kind TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, sequence INTEGER NOT NULL,
    schema_number INTEGER NOT NULL, body TEXT NOT NULL, deleted INTEGER,
    PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE INDEX documents_by_sequence ON documents (kind, sequence, id);
CREATE TABLE watermarks (
    source_kind TEXT NOT NULL, source_id TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (source_kind, source_id)) WITHOUT ROWID;
CREATE TABLE answers (
    request TEXT PRIMARY KEY, request_digest TEXT NOT NULL, answer BLOB NOT NULL, created INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE outbox (
    sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    aggregate_kind TEXT NOT NULL, aggregate_id TEXT NOT NULL, aggregate_version INTEGER NOT NULL, place INTEGER NOT NULL,
    service TEXT NOT NULL, entity TEXT NOT NULL, verb TEXT NOT NULL, server TEXT,
    payload BLOB NOT NULL, time TEXT NOT NULL, traceparent TEXT NOT NULL, created INTEGER NOT NULL, sent INTEGER);
CREATE UNIQUE INDEX outbox_by_aggregate ON outbox (aggregate_kind, aggregate_id, aggregate_version, place);
CREATE INDEX outbox_unsent ON outbox (sequence) WHERE sent IS NULL;
CREATE TABLE audit (
    sequence INTEGER PRIMARY KEY, time TEXT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
    request TEXT, body TEXT NOT NULL);
INSERT INTO meta VALUES ('layout', '1'), ('epoch', '01JFIRST'), ('sequence', '41');
INSERT INTO documents VALUES ('server', 'web', 7, 41, 1, '{\"n\":1}', NULL);
";

#[tokio::test]
async fn a_store_of_the_first_programs_opens_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let options = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
    let mut old = options.connect().await.unwrap();
    sqlx::raw_sql(FIRST).execute(&mut old).await.unwrap();
    let tables = "SELECT group_concat(sql) FROM (SELECT sql FROM sqlite_schema ORDER BY name)";
    let before: String = sqlx::query_scalar(tables).fetch_one(&mut old).await.unwrap();

    // Nothing vouches for its being the one that was there last, which a program that wrote it could have said.
    let store = open(&path).await.unwrap();
    let sequence = *store.sequence().borrow();
    assert!(store.epoch() != "01JFIRST" && sequence > 41, "{} at {sequence}", store.epoch());
    assert_eq!(*store.get("server", "web").await.unwrap().unwrap().body, json!({"n": 1}));
    assert_eq!(store.commit(put("server", "web", 7, json!({}))).await.unwrap().sequence, sequence + 1);
    let after: String = sqlx::query_scalar(tables).fetch_one(&mut old).await.unwrap();
    assert_eq!(before, after);
}

fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap();
}

#[tokio::test]
async fn a_copy_in_its_place_begins_an_epoch_and_goes_on_past_what_was_lost() {
    let folder = tempfile::tempdir().unwrap();
    let (path, kept) = (folder.path().join("store.db"), folder.path().join("copy.db"));
    let store = open(&path).await.unwrap();
    let first = store.epoch().to_owned();
    store.commit(put("a", "1", 0, json!({}))).await.unwrap();
    close(store).await;
    let store = open(&path).await.unwrap();
    assert_eq!((store.epoch(), store.numbers_above()), (&*first, 0), "opened again it is the same");
    close(store).await;
    copy(&path, &kept);

    let store = open(&path).await.unwrap();
    for version in 1..=20 {
        store.commit(put("a", "1", version, json!({}))).await.unwrap();
    }
    let lost = *store.sequence().borrow();
    let cursor = Cursor { epoch: first.clone(), sequence: lost };
    close(store).await;

    // Written over, and put there as another file.
    let mut epochs = vec![first];
    let mut above = lost;
    for round in 0..4 {
        if round % 2 == 1 {
            std::fs::remove_file(&path).unwrap();
        }
        copy(&kept, &path);
        let store = open(&path).await.unwrap();
        assert!(!epochs.contains(&store.epoch().to_owned()), "round {round}");
        epochs.push(store.epoch().to_owned());
        let sequence = *store.sequence().borrow();
        assert!(
            sequence > above && store.numbers_above() == sequence,
            "round {round}: {sequence} after {above}"
        );
        assert_eq!(store.get("a", "1").await.unwrap().unwrap().version, 1);
        assert!(
            store.changes("a", Some(&cursor), "", 10).await.unwrap().full,
            "who knew the lost one asks anew"
        );
        above = store.commit(put("a", "1", 1, json!({}))).await.unwrap().sequence;
        close(store).await;
        let store = open(&path).await.unwrap();
        assert_eq!((store.epoch(), *store.sequence().borrow()), (&*epochs[epochs.len() - 1], above));
        close(store).await;
    }
}

#[tokio::test]
async fn what_was_decided_on_a_store_is_not_written_into_its_copy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = open(&path).await.unwrap();
    store.commit(put("a", "1", 0, json!({}))).await.unwrap();
    let mut other = SqliteConnectOptions::new().filename(&path).connect().await.unwrap();
    sqlx::raw_sql("UPDATE meta SET value = '01ZZZZ' WHERE name = 'epoch'").execute(&mut other).await.unwrap();
    let error = store.commit(put("a", "1", 1, json!({}))).await.unwrap_err().to_string();
    assert!(error.contains("restored") && error.contains("restart"), "{error}");
    assert_eq!(store.get("a", "1").await.unwrap().unwrap().version, 1);
}

/// The writer ends some time after the last handle, and a copy of a file that is written to is no copy. The last
/// connection takes the log with it, unless two close at the same moment: each finds the other one still there. So one
/// more comes and goes.
async fn close(store: SqlStore) {
    let path = std::path::PathBuf::from(store.place());
    drop(store);
    let wal = path.with_extension("db-wal");
    let limit = std::time::Instant::now() + Duration::from_secs(10);
    while wal.exists() {
        assert!(std::time::Instant::now() < limit, "the last connection takes its log with it");
        let mut last = SqliteConnectOptions::new().filename(&path).connect().await.unwrap();
        sqlx::query("SELECT name FROM sqlite_schema").fetch_all(&mut last).await.unwrap();
        last.close().await.unwrap();
    }
}

/// Closed well, or left behind with its log as by SIGKILL.
#[tokio::test]
async fn a_file_that_was_cut_short_anywhere_is_refused_and_a_copy_of_it_opens() {
    let folder = tempfile::tempdir().unwrap();
    let (path, wal) = (folder.path().join("store.db"), folder.path().join("store.db-wal"));
    let text = "x".repeat(3_000);
    let store = open(&path).await.unwrap();
    let mut commits = 0;
    let mut left = None;
    while commits < 60 {
        store.commit(put("a", &commits.to_string(), 0, json!({"text": text}))).await.unwrap();
        commits += 1;
        if commits == 30 {
            let mut other = SqliteConnectOptions::new().filename(&path).connect().await.unwrap();
            sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut other).await.unwrap();
        }
        if commits == 45 {
            left = Some((std::fs::read(&path).unwrap(), std::fs::read(&wal).unwrap()));
        }
    }
    close(store).await;
    let closed = (std::fs::read(&path).unwrap(), Vec::new());
    for (name, (whole, log)) in [("closed", closed), ("left", left.unwrap())] {
        let ends =
            (0..16).map(|part| whole.len() * part / 16).chain([1, whole.len() - 1, whole.len() - 4096]);
        for end in ends {
            std::fs::write(&path, &whole[..end]).unwrap();
            std::fs::write(&wal, &log).unwrap();
            let _ = std::fs::remove_file(path.with_extension("db-shm"));
            // An empty file with a whole log is refused too: most of it is missing.
            let error = open(&path).await.err().map(|error| error.to_string());
            let error = error.unwrap_or_else(|| panic!("{name}: opened with {end} of {} bytes", whole.len()));
            assert!(error.contains("copy") && error.contains("in its place"), "{name}, {end}: {error}");
        }
        std::fs::write(&path, &whole).unwrap();
        std::fs::write(&wal, &log).unwrap();
        let _ = std::fs::remove_file(path.with_extension("db-shm"));
        let store = open(&path).await.unwrap();
        let count = if name == "closed" { 60 } else { 45 };
        assert_eq!(store.list("a", "", None, 500).await.unwrap().len(), count, "{name}");
        close(store).await;
    }
}
