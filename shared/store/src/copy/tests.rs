//! What holds for copies of a store in every database.

use serde_json::json;

use super::*;
use crate::{Batch, Change, Cursor, SqlStore, Store as _, StoredAnswer, Watermark, seal};

fn batch(n: u64) -> Batch {
    let put = |id: String| Change::Put {
        kind: "server".to_owned(),
        id,
        expected: 0,
        schema: 1,
        body: json!({"text": "ü\u{0}'"}).into(),
    };
    Batch {
        changes: vec![put(format!("web{n}"))],
        watermarks: vec![Watermark {
            source_kind: "revision".to_owned(),
            source_id: "web".to_owned(),
            version: n + 1,
        }],
        events: vec![kiln_model::event::NewEvent {
            kind: kiln_model::event::EventType::new(kiln_model::event::Service::Builder, "build", "queued"),
            server: None,
            aggregate_kind: "server".to_owned(),
            aggregate_id: format!("web{n}"),
            aggregate_version: 1,
            payload: vec![0, 255, 7],
            time: Timestamp::UNIX_EPOCH,
            traceparent: String::new(),
        }],
        audit: vec![AuditRecord::new(Timestamp::UNIX_EPOCH, "ada", "apply", format!("web{n}"))],
        answer: Some(StoredAnswer {
            request: format!("r{n}").parse().unwrap(),
            request_digest: kiln_model::digest::Digest::of(b"x"),
            answer: vec![n as u8],
        }),
        ..Batch::default()
    }
}

/// `place` gives a place by its name, with no store in it at first.
pub(crate) async fn copies_are_whole_and_restored_ones_are_new(place: impl Fn(&str) -> Place) {
    let folder = tempfile::tempdir().unwrap();
    let store = SqlStore::open(&place("first")).await.unwrap();
    for n in 0..600 {
        store.commit(batch(n)).await.unwrap();
    }
    let kind = "server".to_owned();
    store
        .commit(Batch {
            changes: vec![Change::Delete { kind, id: "web7".to_owned(), expected: 1 }],
            ..Batch::default()
        })
        .await
        .unwrap();
    while let Some(sealing) = seal::next(&store).await.unwrap() {
        store.commit(sealing.batch).await.unwrap();
    }
    let sent: Vec<u64> = store.unsent(500).await.unwrap().iter().map(|event| event.sequence).collect();
    store.mark_sent(&sent).await.unwrap();
    // While others write.
    let (file, writer) = (folder.path().join("copy.db"), store.clone());
    let load = tokio::spawn(async move {
        for n in 600..700 {
            writer.commit(batch(n)).await.unwrap();
        }
    });
    let copied = copy_out(&place("first"), &file).await.unwrap();
    load.await.unwrap();
    assert_eq!(copied.epoch, store.epoch());
    assert!(copied.sequence > 600 && copied.sequence <= *store.sequence().borrow());
    // A file that is there is not written over.
    assert!(copy_out(&place("first"), &file).await.is_err());

    let renewed = copy_in(&file, &place("second"), "root", Timestamp::UNIX_EPOCH).await.unwrap();
    let again = SqlStore::open(&place("second")).await.unwrap();
    assert_eq!((renewed.before.as_str(), renewed.after.as_str()), (store.epoch(), again.epoch()));
    assert_ne!(again.epoch(), store.epoch());
    // Whoever knows the old epoch is given all of it.
    let old = Cursor { epoch: store.epoch().to_owned(), sequence: copied.sequence };
    assert!(again.changes("server", Some(&old), "", 10).await.unwrap().full);
    assert_eq!(again.get("server", "web9").await.unwrap(), store.get("server", "web9").await.unwrap());
    assert_eq!(again.get("server", "web7").await.unwrap(), None);
    assert_eq!(again.list("server", "", None, 500).await.unwrap().len(), 500);
    assert!(again.watermark("revision", "web").await.unwrap() >= 600);
    assert_eq!(
        again.answer(&"r9".parse().unwrap()).await.unwrap(),
        store.answer(&"r9".parse().unwrap()).await.unwrap()
    );
    let unsent = again.unsent(500).await.unwrap();
    assert!(unsent.len() >= 100 && unsent.iter().all(|event| !sent.contains(&event.sequence)));
    assert_eq!(again.unsent(1).await.unwrap()[0].event, store.unsent(1).await.unwrap()[0].event);
    // The chain goes on over the restore, which is a record of it.
    let checked = seal::check(&again, seal::Link::start(), 0).await.unwrap();
    assert_eq!(checked.fault, None);
    let (sequence, newest) = again.audit(0, 1).await.unwrap().pop().unwrap();
    assert_eq!(
        (newest.actor.as_str(), newest.action.as_str(), sequence),
        ("root", "restore", *again.sequence().borrow())
    );
    assert_eq!(newest.before["epoch"], *store.epoch());
    again.commit(batch(900)).await.unwrap();

    let refused =
        copy_in(&file, &place("second"), "root", Timestamp::UNIX_EPOCH).await.unwrap_err().to_string();
    assert!(refused.contains("a store already"), "{refused}");
    let whole = std::fs::read(&file).unwrap();
    let half = folder.path().join("half.db");
    std::fs::write(&half, &whole[..whole.len() / 2]).unwrap();
    let refused =
        copy_in(&half, &place("third"), "root", Timestamp::UNIX_EPOCH).await.unwrap_err().to_string();
    assert!(refused.contains("damaged"), "{refused}");
}
