//! What holds for the layouts of every database.

use serde_json::json;

use super::Migration;
use crate::{Batch, Change, Error, SqlStore, Store as _};

fn put(id: &str, expected: u64) -> Batch {
    let (kind, id) = ("server".to_owned(), id.to_owned());
    Batch {
        changes: vec![Change::Put { kind, id, expected, schema: 1, body: json!({}).into() }],
        ..Batch::default()
    }
}

/// Today's steps with one more.
fn with(today: &[Migration], readable_from: u64, statements: &'static str) -> &'static [Migration] {
    let layout = today.len() as u64 + 1;
    let next = Migration { layout, readable_from, statements };
    Vec::leak([today, &[next]].concat())
}

/// `open` gives the store of a name, opened by a program that knows these steps.
pub(crate) async fn go_forward(
    today: &'static [Migration],
    open: impl AsyncFn(&str, &'static [Migration]) -> Result<SqlStore, Error>,
) {
    let adds = "ALTER TABLE documents ADD COLUMN extra TEXT NOT NULL DEFAULT ''";
    let additive = with(today, 1, adds);
    let old = open("additive", today).await.unwrap();
    old.commit(put("web", 0)).await.unwrap();
    // The next program goes forward, and the one that runs still works on beside it.
    let new = open("additive", additive).await.unwrap();
    old.commit(put("web", 1)).await.unwrap();
    new.commit(put("web", 2)).await.unwrap();
    drop((old, new));
    // One version back, by whoever has to go back.
    let back = open("additive", today).await.unwrap();
    back.commit(put("web", 3)).await.unwrap();
    assert_eq!(back.list("server", "", None, 10).await.unwrap()[0].version, 4);
    let again = open("additive", additive).await.unwrap();
    assert_eq!(again.epoch(), back.epoch());
    assert_eq!(again.get("server", "web").await.unwrap().unwrap().version, 4);

    // What an older program can't work with refuses it.
    let breaking = with(today, today.len() as u64 + 1, adds);
    drop(open("breaking", today).await.unwrap());
    open("breaking", breaking).await.unwrap().commit(put("web", 0)).await.unwrap();
    let error = open("breaking", today).await.unwrap_err().to_string();
    let (known, found) = (today.len(), breaking.len());
    assert!(error.contains(&format!("its layout is {found}")), "{error}");
    assert!(error.contains(&format!("this one knows {known}")) && error.contains("newer"), "{error}");
    assert_eq!(
        open("breaking", breaking).await.unwrap().list("server", "", None, 10).await.unwrap().len(),
        1
    );

    // A step that fails leaves nothing of itself.
    let half = with(today, 1, "ALTER TABLE documents ADD COLUMN extra TEXT; SELECT nonsense FROM nowhere");
    let store = open("half", today).await.unwrap();
    assert!(open("half", half).await.is_err());
    store.commit(put("web", 0)).await.unwrap();
    open("half", additive).await.unwrap();
}
