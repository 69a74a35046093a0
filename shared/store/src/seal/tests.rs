//! What is changed behind a store's back, and how it comes to light.

use serde_json::json;

use super::*;
use crate::SqlStore;

fn record(action: &str) -> AuditRecord {
    AuditRecord {
        time: "2026-01-02T03:04:05Z".parse().unwrap(),
        actor: "ada".to_owned(),
        action: action.to_owned(),
        subject: "web".to_owned(),
        server: None,
        request_id: None,
        before: json!(null),
        after: json!({"n": 1.5}),
        others: serde_json::Map::new(),
    }
}

/// Four records under a seal and two under another, at the sequences 1 to 4, 6 and 7.
async fn sealed(store: &SqlStore) -> Head {
    for actions in [&["a", "b", "c", "d"][..], &["e", "f"]] {
        let audit = actions.iter().map(|action| record(action)).collect();
        store.commit(Batch { audit, ..Batch::default() }).await.unwrap();
        let sealing = next(store).await.unwrap().unwrap();
        store.commit(sealing.batch).await.unwrap();
    }
    head(store).await.unwrap().0
}

/// What an earlier version sealed is found as it was: neither the form of its documents nor the way to a hash may change.
#[test]
fn what_an_earlier_version_sealed_is_sealed() {
    let link = Link::start().then(7, &record("build.cancel")).unwrap();
    let written = json!({ "link": link, "records": 3 });
    assert_eq!(
        written,
        json!({
            "link": { "sequence": 7, "hash": "sha256:4eacf67700276735171a6b9e4c6135e1f88669a01aa7771f0db75f32c2c3ceca" },
            "records": 3
        })
    );
    let head: Head = serde_json::from_value(written.clone()).unwrap();
    assert_eq!(head, Head { link, records: 3 });
    let seal: Seal = serde_json::from_value(json!({ "links": [written["link"]] })).unwrap();
    assert_eq!(seal.links, [link]);
}

/// Sealed here or there, it is the same.
#[test]
fn what_a_later_version_says_of_a_record_is_sealed_with_it() {
    let mut later = serde_json::to_value(record("apply")).unwrap();
    later["role"] = json!("operator");
    later["way"] = json!({ "token": "1a2b3c4d" });
    let read: AuditRecord = serde_json::from_str(&later.to_string()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), later);
    let start = Link::start();
    let sealed = start.then(7, &read).unwrap().hash;
    assert_eq!(sealed, Digest::of_json(&(start.hash, 7, &later)).unwrap());
    assert_ne!(sealed, start.then(7, &record("apply")).unwrap().hash);
}

async fn fault(store: &SqlStore) -> Option<(u64, FaultKind)> {
    let checked = check(store, Link::start(), 0).await.unwrap();
    assert!(!checked.more);
    checked.fault.map(|fault| (fault.sequence, fault.kind))
}

/// `open` gives a new store of a name, and `run` runs statements on its tables.
pub(crate) async fn what_was_tampered_with_is_named(
    open: impl AsyncFn(&str) -> SqlStore,
    run: impl AsyncFn(&str, &str),
) {
    let copy = "INSERT INTO audit SELECT 5, time, actor, action, subject, request, body FROM audit WHERE sequence = 3";
    let swap =
        "UPDATE audit SET sequence = 99 WHERE sequence = 2; UPDATE audit SET sequence = 2 WHERE sequence = 3;
        UPDATE audit SET sequence = 3 WHERE sequence = 99";
    let alter = "UPDATE audit SET body = replace(body, '\"ada\"', '\"eve\"') WHERE sequence = 3";
    let last_seal = "DELETE FROM documents WHERE kind = 'audit_seal' AND id LIKE '%7'";
    let truncate = format!("DELETE FROM audit WHERE sequence > 4; {last_seal}");
    let first_seal = "DELETE FROM documents WHERE kind = 'audit_seal' AND id LIKE '%4'";
    let seal = "UPDATE documents SET body = replace(body, ':6}', ':5}') WHERE kind = 'audit_seal'";
    for (name, statements, found) in [
        ("intact", "UPDATE audit SET time = time", None),
        ("altered", alter, Some((3, FaultKind::Altered))),
        ("removed", "DELETE FROM audit WHERE sequence = 3", Some((3, FaultKind::Missing))),
        ("removed_last", "DELETE FROM audit WHERE sequence = 7", Some((7, FaultKind::Missing))),
        ("inserted", copy, Some((5, FaultKind::Unsealed))),
        ("reordered", swap, Some((2, FaultKind::Altered))),
        ("truncated", &truncate, Some((7, FaultKind::Missing))),
        ("unsealed", first_seal, Some((1, FaultKind::Unsealed))),
        ("unsealed_last", last_seal, Some((6, FaultKind::Unsealed))),
        ("seal", seal, Some((5, FaultKind::Missing))),
    ] {
        let store = open(name).await;
        sealed(&store).await;
        assert_eq!(fault(&store).await, None, "{name}");
        run(name, statements).await;
        assert_eq!(fault(&store).await, found, "{name}");
    }
}

/// Whoever writes records, seals and head anew is found by what was published before, as is who takes the end away.
#[tokio::test]
async fn a_chain_that_was_made_anew_differs_from_what_was_published() {
    let (store, forged) = (SqlStore::in_memory().await.unwrap(), SqlStore::in_memory().await.unwrap());
    let published = sealed(&store).await;
    let audit = ["a", "b", "x", "d", "e", "f", "g"].map(record).to_vec();
    forged.commit(Batch { audit, ..Batch::default() }).await.unwrap();
    forged.commit(next(&forged).await.unwrap().unwrap().batch).await.unwrap();
    assert_eq!(fault(&forged).await, None);
    let reached = check(&forged, Link::start(), published.link.sequence).await.unwrap().reached;
    assert_eq!(reached.sequence, published.link.sequence);
    assert_ne!(reached.hash, published.link.hash);

    let shorter = SqlStore::in_memory().await.unwrap();
    shorter.commit(Batch { audit: vec![record("a")], ..Batch::default() }).await.unwrap();
    shorter.commit(next(&shorter).await.unwrap().unwrap().batch).await.unwrap();
    let checked = check(&shorter, Link::start(), published.link.sequence).await.unwrap();
    assert_eq!((checked.fault, checked.more, checked.reached.sequence), (None, false, 1));
}
