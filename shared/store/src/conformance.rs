//! What every backend must keep, whatever it is made of.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a suite of assertions")]

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use kiln_model::digest::Digest;
use kiln_model::event::{Event, EventType, NewEvent, Service};
use serde_json::json;

use crate::{
    AuditRecord, Batch, Change, Cursor, Document, Entry, Error, Expect, PAGE_BYTES, Page, Store,
    StoredAnswer, Watermark, decode, encode, seal,
};

/// Runs the whole suite. `open` gives the store of a name: a new one the first time, the same one, opened anew, each
/// time after.
pub async fn conformance<S: Store>(open: impl AsyncFn(&str) -> S) {
    versions(&open("versions").await).await;
    tombstones(&open("tombstones").await).await;
    schemas(&open("schemas").await).await;
    expectations(&open("expectations").await).await;
    watermarks(&open("watermarks").await).await;
    answers(&open("answers").await).await;
    atomicity(&open("atomicity").await).await;
    lists(&open("lists").await).await;
    changes(&open("changes").await).await;
    changes_while_paging(&open("paging").await).await;
    changes_that_are_large(&open("large").await).await;
    foreign_cursors(&open("cursors").await).await;
    outbox(&open("outbox").await).await;
    event_identities(&open("identities").await).await;
    audit(&open("audit").await).await;
    seals(&open("seals").await, &open("seals").await).await;
    wakes(&open("wakes").await).await;
    contention(&open("contention").await).await;
    pruning(&open("pruning").await).await;
    reopening(&open).await;
}

fn put(kind: &str, id: &str, expected: u64, body: serde_json::Value) -> Change {
    Change::Put { kind: kind.to_owned(), id: id.to_owned(), expected, schema: 1, body: body.into() }
}

fn delete(kind: &str, id: &str, expected: u64) -> Change {
    Change::Delete { kind: kind.to_owned(), id: id.to_owned(), expected }
}

fn change(change: Change) -> Batch {
    Batch { changes: vec![change], ..Batch::default() }
}

fn event(id: &str, version: u64, verb: &'static str) -> NewEvent {
    NewEvent {
        kind: EventType::new(Service::Builder, "build", verb),
        server: Some("web".parse().unwrap()),
        aggregate_kind: "build".to_owned(),
        aggregate_id: id.to_owned(),
        aggregate_version: version,
        payload: vec![0, 255, 7],
        time: "2026-01-02T03:04:05.000000678Z".parse().unwrap(),
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
    }
}

fn watermark(version: u64) -> Watermark {
    Watermark { source_kind: "revision".to_owned(), source_id: "web".to_owned(), version }
}

fn answer(request: &str, text: &str) -> StoredAnswer {
    StoredAnswer {
        request: request.parse().unwrap(),
        request_digest: Digest::of(request.as_bytes()),
        answer: text.as_bytes().to_vec(),
    }
}

fn record(action: &str) -> AuditRecord {
    AuditRecord::new("2026-01-02T03:04:05Z".parse().unwrap(), "me", action, "web")
        .of_server(&"web".parse().unwrap())
        .asked("r1")
        .changed(json!(null), json!({"removed": true}))
}

async fn version(store: &impl Store, kind: &str, id: &str) -> u64 {
    store.get(kind, id).await.unwrap().map_or(0, |document| document.version)
}

fn conflict<T: std::fmt::Debug>(result: Result<T, Error>) -> (u64, u64) {
    match result.unwrap_err() {
        Error::Conflict { expected, actual, .. } => (expected, actual),
        other => panic!("wanted a conflict, found {other}"),
    }
}

async fn versions(store: &impl Store) {
    assert_eq!(store.get("server", "web").await.unwrap(), None);
    let first =
        store.commit(change(put("server", "web", 0, json!({"n": 1, "text": "ü\u{0}\"'"})))).await.unwrap();
    let document = store.get("server", "web").await.unwrap().unwrap();
    assert_eq!((document.version, document.sequence), (1, first.sequence));
    assert_eq!(*document.body, json!({"n": 1, "text": "ü\u{0}\"'"}));
    // Another kind is another document.
    assert_eq!(store.get("source", "web").await.unwrap(), None);

    assert_eq!(conflict(store.commit(change(put("server", "web", 0, json!({})))).await), (0, 1));
    assert_eq!(conflict(store.commit(change(put("server", "web", 2, json!({})))).await), (2, 1));
    assert_eq!(conflict(store.commit(change(put("server", "other", 1, json!({})))).await), (1, 0));
    assert_eq!(document, store.get("server", "web").await.unwrap().unwrap());

    let second = store.commit(change(put("server", "web", 1, json!({"n": 2})))).await.unwrap();
    assert!(second.sequence > first.sequence);
    let document = store.get("server", "web").await.unwrap().unwrap();
    assert_eq!((document.version, document.sequence), (2, second.sequence));

    // Within a batch each change sees the ones before it.
    let twice = Batch {
        changes: vec![put("server", "web", 2, json!({"n": 3})), put("server", "web", 3, json!({"n": 4}))],
        ..Batch::default()
    };
    store.commit(twice).await.unwrap();
    assert_eq!(version(store, "server", "web").await, 4);
}

async fn tombstones(store: &impl Store) {
    store.commit(change(put("server", "web", 0, json!({})))).await.unwrap();
    assert_eq!(conflict(store.commit(change(delete("server", "web", 2))).await), (2, 1));
    store.commit(change(delete("server", "web", 1))).await.unwrap();
    assert_eq!(store.get("server", "web").await.unwrap(), None);
    assert_eq!(store.list("server", "", None, 10).await.unwrap(), []);
    // What is deleted does not exist, and its version goes on when it comes back.
    assert_eq!(conflict(store.commit(change(delete("server", "web", 2))).await), (2, 0));
    assert_eq!(conflict(store.commit(change(put("server", "web", 2, json!({})))).await), (2, 0));
    store.commit(change(put("server", "web", 0, json!({})))).await.unwrap();
    assert_eq!(version(store, "server", "web").await, 3);
    // Deleting what never was leaves nothing.
    store.commit(change(delete("server", "ghost", 0))).await.unwrap();
    let page = store.changes("server", None, "", 10).await.unwrap();
    assert_eq!(page.entries.len(), 1);
}

async fn schemas(store: &impl Store) {
    let body = encode("n", "a", &vec![1_u32, 2]).unwrap();
    let (kind, id) = ("n".to_owned(), "a".to_owned());
    store.commit(change(Change::Put { kind, id, expected: 0, schema: 2, body })).await.unwrap();
    let document = store.get("n", "a").await.unwrap().unwrap();
    assert_eq!(decode::<Vec<u32>>(&document, 2).unwrap(), [1, 2]);
    assert!(matches!(decode::<Vec<u32>>(&document, 1), Err(Error::Schema { found: 2, known: 1, .. })));
    assert!(matches!(decode::<String>(&document, 2), Err(Error::Unreadable { .. })));
}

async fn expectations(store: &impl Store) {
    store.commit(change(put("server", "web", 0, json!({})))).await.unwrap();
    let expecting = |id: &str, version| Batch {
        expects: vec![Expect { kind: "server".to_owned(), id: id.to_owned(), version }],
        changes: vec![put("build", "b", 0, json!({}))],
        ..Batch::default()
    };
    assert_eq!(conflict(store.commit(expecting("web", 2)).await), (2, 1));
    assert_eq!(conflict(store.commit(expecting("web", 0)).await), (0, 1));
    assert_eq!(conflict(store.commit(expecting("ghost", 1)).await), (1, 0));
    assert_eq!(version(store, "build", "b").await, 0);
    store.commit(expecting("web", 1)).await.unwrap();
    assert_eq!((version(store, "build", "b").await, version(store, "server", "web").await), (1, 1));
}

async fn watermarks(store: &impl Store) {
    let batch = |mark, expected| Batch {
        watermarks: vec![watermark(mark)],
        changes: vec![put("release", "web", expected, json!({}))],
        ..Batch::default()
    };
    assert_eq!(store.watermark("revision", "web").await.unwrap(), 0);
    store.commit(batch(3, 0)).await.unwrap();
    assert_eq!(store.watermark("revision", "web").await.unwrap(), 3);
    for old in [3, 2, 0] {
        assert!(
            matches!(store.commit(batch(old, 1)).await, Err(Error::Stale { version, .. }) if version == old)
        );
    }
    // Staleness is told even where the documents would conflict too: the fact was handled, there is nothing to retry.
    assert!(matches!(store.commit(batch(3, 0)).await, Err(Error::Stale { .. })));
    assert_eq!(version(store, "release", "web").await, 1);
    // A conflict leaves the watermark where it was.
    conflict(store.commit(batch(4, 0)).await);
    assert_eq!(store.watermark("revision", "web").await.unwrap(), 3);
    store.commit(batch(9, 1)).await.unwrap();
    assert_eq!(store.watermark("revision", "web").await.unwrap(), 9);
    assert_eq!(store.watermark("revision", "db").await.unwrap(), 0);
}

async fn answers(store: &impl Store) {
    let request = "r1".parse().unwrap();
    assert_eq!(store.answer(&request).await.unwrap(), None);
    let batch = |expected, text| Batch {
        changes: vec![put("server", "web", expected, json!({}))],
        answer: Some(answer("r1", text)),
        ..Batch::default()
    };
    conflict(store.commit(batch(5, "lost")).await);
    assert_eq!(store.answer(&request).await.unwrap(), None);
    store.commit(batch(0, "first")).await.unwrap();
    assert!(matches!(store.commit(batch(1, "second")).await, Err(Error::Answered(id)) if id == request));
    assert_eq!(store.answer(&request).await.unwrap(), Some(answer("r1", "first")));
    assert_eq!(version(store, "server", "web").await, 1);
}

async fn atomicity(store: &impl Store) {
    let before = *store.sequence().borrow();
    let refused = Batch {
        changes: vec![put("a", "1", 0, json!({})), put("a", "2", 7, json!({}))],
        watermarks: vec![watermark(5)],
        events: vec![event("1", 1, "queued")],
        audit: vec![record("apply")],
        answer: Some(answer("r1", "x")),
        ..Batch::default()
    };
    assert_eq!(conflict(store.commit(refused.clone()).await), (7, 0));
    assert_eq!(store.get("a", "1").await.unwrap(), None);
    assert_eq!(store.watermark("revision", "web").await.unwrap(), 0);
    assert_eq!(store.unsent(10).await.unwrap(), []);
    assert_eq!(store.audit(0, 10).await.unwrap(), []);
    assert_eq!(store.answer(&"r1".parse().unwrap()).await.unwrap(), None);
    assert_eq!(*store.sequence().borrow(), before);

    let whole = Batch { changes: vec![put("a", "1", 0, json!({})), put("a", "2", 0, json!({}))], ..refused };
    let committed = store.commit(whole).await.unwrap();
    assert_eq!(*store.sequence().borrow(), committed.sequence);
    assert_eq!((version(store, "a", "1").await, version(store, "a", "2").await), (1, 1));
    assert_eq!(store.watermark("revision", "web").await.unwrap(), 5);
    assert_eq!(store.unsent(10).await.unwrap(), committed.events);
    assert_eq!(store.audit(0, 10).await.unwrap().len(), 1);
}

async fn lists(store: &impl Store) {
    for id in ["web-b1", "web-b2", "web-b10", "webx", "we", "web", "über", "a_b", "a%b", "axb"] {
        store.commit(change(put("build", id, 0, json!({"id": id})))).await.unwrap();
    }
    store.commit(change(put("other", "web-b3", 0, json!({})))).await.unwrap();
    let ids = async |prefix: &str, after: Option<&str>, limit| {
        let documents = store.list("build", prefix, after, limit).await.unwrap();
        documents.into_iter().map(|document| document.id).collect::<Vec<_>>()
    };
    assert_eq!(ids("web-b", None, 10).await, ["web-b1", "web-b10", "web-b2"]);
    assert_eq!(ids("web-b", Some("web-b1"), 10).await, ["web-b10", "web-b2"]);
    assert_eq!(ids("web-b", None, 2).await, ["web-b1", "web-b10"]);
    assert_eq!(ids("web-b", Some("web-b2"), 10).await, Vec::<String>::new());
    // A prefix is a text and no pattern.
    assert_eq!(ids("a_", None, 10).await, ["a_b"]);
    assert_eq!(ids("a%", None, 10).await, ["a%b"]);
    // By bytes, in every locale.
    assert_eq!(ids("", None, 500).await.last().unwrap(), "über");
    assert_eq!(ids("", None, 0).await.len(), 1);
}

/// Reads all pages, and what they come to.
async fn read_all(store: &impl Store, kind: &str, since: Option<&Cursor>, limit: u32) -> (Vec<Entry>, Page) {
    let (mut entries, mut token) = (Vec::new(), String::new());
    loop {
        let page = store.changes(kind, since, &token, limit).await.unwrap();
        assert!(page.entries.len() <= limit as usize);
        entries.extend(page.entries.iter().cloned());
        token.clone_from(&page.next_page_token);
        if token.is_empty() {
            return (entries, page);
        }
    }
}

fn ids(entries: &[Entry]) -> Vec<(&str, bool)> {
    entries
        .iter()
        .map(|entry| match entry {
            Entry::Document(document) => (document.id.as_str(), true),
            Entry::Tombstone { id, .. } => (id.as_str(), false),
        })
        .collect()
}

async fn changes(store: &impl Store) {
    for id in ["a", "b", "c"] {
        store.commit(change(put("server", id, 0, json!({})))).await.unwrap();
    }
    store.commit(change(put("noise", "n", 0, json!({})))).await.unwrap();
    store.commit(change(delete("server", "b", 1))).await.unwrap();
    // Several documents of one commit, over the edge of a page.
    let together = Batch {
        changes: ["e", "d", "f"].map(|id| put("server", id, 0, json!({}))).to_vec(),
        ..Batch::default()
    };
    store.commit(together).await.unwrap();
    for limit in [1, 2, 100] {
        let (entries, last) = read_all(store, "server", None, limit).await;
        assert_eq!(ids(&entries), [("a", true), ("c", true), ("d", true), ("e", true), ("f", true)]);
        assert!(last.full);
        assert_eq!(
            last.cursor,
            Cursor { epoch: store.epoch().to_owned(), sequence: *store.sequence().borrow() }
        );
    }
    let (_, first) = read_all(store, "server", None, 100).await;
    let (entries, last) = read_all(store, "server", Some(&first.cursor), 100).await;
    assert_eq!((entries.len(), last.full), (0, false));

    store.commit(change(put("server", "a", 1, json!({"n": 2})))).await.unwrap();
    store.commit(change(delete("server", "c", 1))).await.unwrap();
    store.commit(change(put("server", "b", 0, json!({})))).await.unwrap();
    for limit in [1, 2, 100] {
        let (entries, last) = read_all(store, "server", Some(&first.cursor), limit).await;
        assert_eq!(ids(&entries), [("a", true), ("c", false), ("b", true)]);
        assert!(!last.full);
        let Entry::Tombstone { version, .. } = &entries[1] else { panic!("wanted a tombstone") };
        assert_eq!(*version, 2);
    }
}

/// Whatever happens between two pages, a reader who goes on from the last page's cursor ends with what there is.
async fn changes_while_paging(store: &impl Store) {
    for id in ["a", "b", "c", "d"] {
        store.commit(change(put("server", id, 0, json!({"n": 1})))).await.unwrap();
    }
    let mut seen: BTreeMap<String, Document> = BTreeMap::new();
    let mut take = |page: &Page| {
        for entry in &page.entries {
            match entry {
                Entry::Document(document) => drop(seen.insert(document.id.clone(), document.clone())),
                Entry::Tombstone { id, .. } => drop(seen.remove(id)),
            }
        }
    };
    let mut page = store.changes("server", None, "", 2).await.unwrap();
    take(&page);
    assert!(page.full && !page.next_page_token.is_empty());
    // On a page that was read, on one that was not, and new.
    store.commit(change(delete("server", "a", 1))).await.unwrap();
    store.commit(change(put("server", "b", 1, json!({"n": 2})))).await.unwrap();
    store.commit(change(delete("server", "c", 1))).await.unwrap();
    store.commit(change(put("server", "e", 0, json!({"n": 1})))).await.unwrap();
    while !page.next_page_token.is_empty() {
        page = store.changes("server", None, &page.next_page_token, 2).await.unwrap();
        assert!(page.full);
        take(&page);
    }
    store.commit(change(delete("server", "d", 1))).await.unwrap();
    let (entries, last) = read_all(store, "server", Some(&page.cursor), 2).await;
    take(&Page { entries, ..last });
    let there = store.list("server", "", None, 100).await.unwrap();
    assert_eq!(seen.into_values().collect::<Vec<_>>(), there);
    assert_eq!(there.iter().map(|document| document.id.as_str()).collect::<Vec<_>>(), ["b", "e"]);
}

/// However many documents are asked for, a page is no more than a message can hold; one that is larger than that alone
/// is given alone.
async fn changes_that_are_large(store: &impl Store) {
    let third = "x".repeat(PAGE_BYTES / 3);
    let alone = "x".repeat(PAGE_BYTES + 1);
    for (id, text) in [("a", &third), ("b", &third), ("c", &third), ("d", &alone), ("e", &third)] {
        store.commit(change(put("server", id, 0, json!({ "text": text })))).await.unwrap();
    }
    let (mut pages, mut token) = (Vec::new(), String::new());
    loop {
        let page = store.changes("server", None, &token, 500).await.unwrap();
        pages.push(ids(&page.entries).into_iter().map(|(id, _)| id.to_owned()).collect::<String>());
        token.clone_from(&page.next_page_token);
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, ["ab", "c", "d", "e"]);
}

async fn foreign_cursors(store: &impl Store) {
    store.commit(change(put("server", "a", 0, json!({})))).await.unwrap();
    let now = *store.sequence().borrow();
    let cursor = |epoch: &str, sequence| Cursor { epoch: epoch.to_owned(), sequence };
    for unknown in
        [cursor("another", now), cursor("", 0), cursor(store.epoch(), now + 1), cursor("x", u64::MAX)]
    {
        let page = store.changes("server", Some(&unknown), "", 10).await.unwrap();
        assert!(page.full, "{unknown:?}");
        assert_eq!(page.entries.len(), 1);
    }
    let epoch = store.epoch();
    for token in [
        "x",
        "another/f/0/0/a",
        &format!("{epoch}/f/0/-1/a"),
        &format!("{epoch}/z/0/0/a"),
        &format!("{epoch}/d/0"),
    ] {
        let refused = store.changes("server", None, token, 10).await;
        assert!(matches!(refused, Err(Error::BadPageToken(_))), "{token}");
    }
}

async fn outbox(store: &impl Store) {
    let mut sent = Vec::new();
    for version in 1..=3 {
        let events = vec![event("web-b1", version, "queued"), event("web-b2", version, "started")];
        sent.extend(store.commit(Batch { events, ..Batch::default() }).await.unwrap().events);
    }
    assert!(sent.is_sorted_by(|a, b| a.sequence < b.sequence));
    assert_eq!(store.unsent(100).await.unwrap(), sent);
    assert_eq!(store.unsent(2).await.unwrap(), sent[..2]);
    store.mark_sent(&[sent[0].sequence, sent[3].sequence]).await.unwrap();
    let left: Vec<Event> = [1, 2, 4, 5].map(|index| sent[index].clone()).to_vec();
    assert_eq!(store.unsent(100).await.unwrap(), left);
    // Marking again, or what never was, does no harm.
    store.mark_sent(&[sent[0].sequence, 1 << 40]).await.unwrap();
    store.mark_sent(&[]).await.unwrap();
    assert_eq!(store.unsent(100).await.unwrap(), left);
    assert_eq!(store.log(0, 100).await.unwrap(), sent);
    assert_eq!(store.log(sent[3].sequence, 100).await.unwrap(), sent[4..]);
}

async fn event_identities(store: &impl Store) {
    let commit = async |events| store.commit(Batch { events, ..Batch::default() }).await.unwrap().events;
    let first =
        commit(vec![event("a", 1, "queued"), event("a", 1, "started"), event("b", 1, "queued")]).await;
    let again = commit(vec![event("a", 1, "failed")]).await;
    let epoch = store.epoch();
    let expected: Vec<Digest> = [("a", 0), ("a", 1), ("b", 0), ("a", 2)]
        .map(|(id, index)| Event::id_of(epoch, &event(id, 1, "queued"), index))
        .to_vec();
    let found: Vec<Digest> = first.iter().chain(&again).map(|event| event.id).collect();
    assert_eq!(found, expected);
    assert!(first.iter().all(|event| event.epoch == epoch));
}

async fn audit(store: &impl Store) {
    let records = vec![record("apply"), record("remove")];
    let committed = store.commit(Batch { audit: records, ..Batch::default() }).await.unwrap();
    store.commit(Batch { audit: vec![record("build")], ..Batch::default() }).await.unwrap();
    let all = store.audit(0, 10).await.unwrap();
    let actions = |records: &[(u64, AuditRecord)]| {
        records.iter().map(|(_, record)| record.action.clone()).collect::<Vec<_>>()
    };
    assert_eq!(actions(&all), ["build", "remove", "apply"]);
    assert_eq!(all[2].1, record("apply"));
    assert_eq!(all[1].0, committed.sequence);
    assert_eq!(actions(&store.audit(all[0].0, 1).await.unwrap()), ["remove"]);
    assert_eq!(actions(&store.audit_after(0, 2).await.unwrap()), ["apply", "remove"]);
    assert_eq!(actions(&store.audit_after(all[2].0, 10).await.unwrap()), ["remove", "build"]);
    assert_eq!(store.audit_after(all[0].0, 10).await.unwrap(), []);
}

/// Two replicas of a service, each with its handle, seal what both write: once, in order, and all of it fits.
async fn seals<S: Store>(store: &S, other: &S) {
    let write = async |count: usize| {
        let audit = (0..count).map(|_| record("apply")).collect();
        store.commit(Batch { audit, ..Batch::default() }).await.unwrap();
    };
    assert!(seal::next(store).await.unwrap().is_none());
    write(3).await;
    let (one, two) = (seal::next(store).await.unwrap().unwrap(), seal::next(other).await.unwrap().unwrap());
    assert_eq!((one.head, one.head.records), (two.head, 3));
    store.commit(one.batch).await.unwrap();
    assert!(matches!(other.commit(two.batch).await, Err(Error::Conflict { .. })));
    assert!(seal::next(other).await.unwrap().is_none());

    write(450).await;
    let (mut sealed, mut seals) = (0, 0);
    while let Some(sealing) = seal::next(other).await.unwrap() {
        other.commit(sealing.batch).await.unwrap();
        (sealed, seals) = (sealing.head.records, seals + 1);
    }
    assert_eq!((sealed, seals), (453, 3));
    for _ in 0..120 {
        write(1).await;
        let sealing = seal::next(store).await.unwrap().unwrap();
        store.commit(sealing.batch).await.unwrap();
    }
    write(2).await;
    let (mut from, mut found, mut looks) = (seal::Link::start(), 0, 0);
    loop {
        let checked = seal::check(store, from, 0).await.unwrap();
        assert_eq!(checked.fault, None);
        (from, found, looks) = (checked.reached, found + checked.records, looks + 1);
        if !checked.more {
            assert_eq!(checked.unsealed, 2);
            break;
        }
    }
    assert!(looks > 2, "{looks}");
    assert_eq!(found, 573);
    // Up to a place that was published.
    let tenth = store.audit_after(0, 10).await.unwrap().pop().unwrap().0;
    let checked = seal::check(store, seal::Link::start(), tenth).await.unwrap();
    assert_eq!((checked.reached.sequence, checked.records, checked.more), (tenth, 10, false));
}

async fn wakes(store: &impl Store) {
    let mut sequence = store.sequence();
    sequence.mark_unchanged();
    assert!(!sequence.has_changed().unwrap());
    let committed = store.commit(change(put("a", "1", 0, json!({})))).await.unwrap();
    assert!(sequence.has_changed().unwrap());
    assert_eq!(*sequence.borrow_and_update(), committed.sequence);
    // A refused batch, and a mark, wake nobody.
    conflict(store.commit(change(put("a", "1", 0, json!({})))).await);
    store.mark_sent(&[1]).await.unwrap();
    assert!(!sequence.has_changed().unwrap());
}

/// Many writers of one document: each success is one version, and nobody's is lost.
async fn contention(store: &impl Store) {
    let writers = (0..8).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut wrote = 0_u64;
            while wrote < 10 {
                let found = version(&store, "counter", "c").await;
                let body = json!({"writer": writer});
                match store.commit(change(put("counter", "c", found, body))).await {
                    Ok(_) => wrote += 1,
                    Err(Error::Conflict { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(version(store, "counter", "c").await, 80);
}

async fn pruning(store: &impl Store) {
    store.commit(change(put("server", "kept", 0, json!({})))).await.unwrap();
    store.commit(change(put("server", "gone", 0, json!({})))).await.unwrap();
    let (_, before) = read_all(store, "server", None, 10).await;
    store.commit(change(delete("server", "gone", 1))).await.unwrap();
    let events = vec![event("a", 1, "queued"), event("a", 2, "queued")];
    let batch =
        Batch { events, answer: Some(answer("r1", "x")), watermarks: vec![watermark(1)], ..Batch::default() };
    let sent = store.commit(batch).await.unwrap().events;
    store.mark_sent(&[sent[0].sequence]).await.unwrap();
    let days =
        |days: i64| Timestamp::now() + SignedDuration::from_hours(24 * days) + SignedDuration::from_mins(1);

    assert_eq!(store.prune(days(6)).await.unwrap(), 0);
    assert_eq!(store.log(0, 10).await.unwrap().len(), 2);
    // The sent event and the answer; what the broker has not got is kept.
    assert_eq!(store.prune(days(7)).await.unwrap(), 2);
    assert_eq!(store.log(0, 10).await.unwrap(), sent[1..]);
    assert_eq!(store.answer(&"r1".parse().unwrap()).await.unwrap(), None);
    let (entries, last) = read_all(store, "server", Some(&before.cursor), 10).await;
    assert_eq!((ids(&entries), last.full), (vec![("gone", false)], false));

    // Without the tombstone a reader from before it is given the full list, and one from after it is not.
    assert_eq!(store.prune(days(30)).await.unwrap(), 1);
    let (entries, full) = read_all(store, "server", Some(&before.cursor), 10).await;
    assert_eq!((ids(&entries), full.full), (vec![("kept", true)], true));
    assert!(!read_all(store, "server", Some(&last.cursor), 10).await.1.full);
    assert_eq!(version(store, "server", "kept").await, 1);
    assert_eq!(store.watermark("revision", "web").await.unwrap(), 1);
}

async fn reopening<S: Store>(open: &impl AsyncFn(&str) -> S) {
    let store = open("reopening").await;
    let batch = Batch {
        changes: vec![put("server", "web", 0, json!({"n": 1}))],
        watermarks: vec![watermark(4)],
        events: vec![event("a", 1, "queued")],
        audit: vec![record("apply")],
        answer: Some(answer("r1", "x")),
        ..Batch::default()
    };
    let committed = store.commit(batch).await.unwrap();
    let (epoch, document) = (store.epoch().to_owned(), store.get("server", "web").await.unwrap());
    drop(store);
    let store = open("reopening").await;
    assert_eq!(store.epoch(), epoch);
    assert_eq!(*store.sequence().borrow(), committed.sequence);
    assert_eq!(store.get("server", "web").await.unwrap(), document);
    assert_eq!(store.unsent(10).await.unwrap(), committed.events);
    assert_eq!(store.watermark("revision", "web").await.unwrap(), 4);
    assert_eq!(store.audit(0, 10).await.unwrap().len(), 1);
    assert_eq!(store.answer(&"r1".parse().unwrap()).await.unwrap(), Some(answer("r1", "x")));
    let next = store.commit(change(put("server", "web", 1, json!({"n": 2})))).await.unwrap();
    assert!(next.sequence > committed.sequence);
    assert_ne!(open("another").await.epoch(), epoch);
}
