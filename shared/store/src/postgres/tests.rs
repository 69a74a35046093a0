//! Each with a server of its own, on a Unix socket.

mod broken;
mod shared;
mod words;

use kiln_test_postgres::Server as Private;
use serde_json::json;

use super::*;
use crate::conformance::conformance;
use crate::layout::tests::go_forward;
use crate::{Batch, Change, Store as _};

fn put(kind: &str, id: &str, expected: u64, body: serde_json::Value) -> Batch {
    let change = Change::Put { kind: kind.to_owned(), id: id.to_owned(), expected, schema: 1, body };
    Batch { changes: vec![change], ..Batch::default() }
}

fn database(server: &Private, schema: &str) -> Database {
    let url = server.database("kiln").unwrap().parse().unwrap();
    Database { url, schema: format!("kiln_test_{schema}"), password: None }
}

#[tokio::test]
async fn it_keeps_every_promise() {
    let server = Private::start(&["fsync=off"]).unwrap();
    conformance(async |name| open(&database(&server, name)).await.unwrap()).await;
}

#[tokio::test]
async fn its_layout_goes_forward() {
    let server = Private::start(&["fsync=off"]).unwrap();
    go_forward(MIGRATIONS, async |name, migrations| start(&database(&server, name), migrations).await).await;
}

#[tokio::test]
async fn many_that_open_a_new_store_at_once_find_one() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let place = database(&server, "many");
    let opened = futures::future::join_all((0..8).map(|_| open(&place))).await;
    let epochs: Vec<_> = opened.into_iter().map(|store| store.unwrap().epoch().to_owned()).collect();
    assert!(epochs.iter().all(|epoch| *epoch == epochs[0]), "{epochs:?}");
}
