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
    let change =
        Change::Put { kind: kind.to_owned(), id: id.to_owned(), expected, schema: 1, body: body.into() };
    Batch { changes: vec![change], ..Batch::default() }
}

fn database(server: &Private, schema: &str) -> Database {
    let url = server.database("kiln").unwrap().parse().unwrap();
    let schema = format!("kiln_test_{schema}");
    let seen = server.socket().join(format!("{schema}.seen"));
    Database { url, schema, password: None, seen }
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
async fn copies_are_whole_and_restored_ones_are_new() {
    let server = Private::start(&["fsync=off"]).unwrap();
    crate::copy::tests::copies_are_whole_and_restored_ones_are_new(|name| {
        crate::Place::Postgres(database(&server, name))
    })
    .await;
}

#[tokio::test]
async fn audit_records_that_were_tampered_with_are_named() {
    let server = Private::start(&["fsync=off"]).unwrap();
    crate::seal::tests::what_was_tampered_with_is_named(
        async |name| open(&database(&server, name)).await.unwrap(),
        async |name, statements| {
            let options = options(&database(&server, name)).unwrap();
            let mut raw = options.connect().await.unwrap();
            sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned())).execute(&mut raw).await.unwrap();
        },
    )
    .await;
}

#[tokio::test]
async fn many_that_open_a_new_store_at_once_find_one() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let place = database(&server, "many");
    let opened = futures::future::join_all((0..8).map(|_| open(&place))).await;
    let epochs: Vec<_> = opened.into_iter().map(|store| store.unwrap().epoch().to_owned()).collect();
    assert!(epochs.iter().all(|epoch| *epoch == epochs[0]), "{epochs:?}");
}

#[tokio::test]
async fn a_database_that_was_put_back_begins_an_epoch_that_every_replica_has() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let place = database(&server, "back");
    let other = Database { seen: server.socket().join("other.seen"), ..place.clone() };
    let store = open(&place).await.unwrap();
    store.commit(put("a", "1", 0, json!({}))).await.unwrap();
    let replica = open(&other).await.unwrap();
    assert_eq!((replica.epoch(), replica.numbers_above()), (store.epoch(), 0), "a replica that is new here");
    let first = store.epoch().to_owned();
    let schema = &place.schema;
    let copied = format!("CREATE TABLE {schema}.copy AS SELECT * FROM {schema}.meta");
    server.psql("kiln", &copied).unwrap();
    for version in 1..=5 {
        store.commit(put("a", "1", version, json!({}))).await.unwrap();
    }
    let lost = *store.sequence().borrow();
    let back = format!("DELETE FROM {schema}.meta; INSERT INTO {schema}.meta SELECT * FROM {schema}.copy");
    server.psql("kiln", &back).unwrap();

    let error = store.commit(put("a", "1", 6, json!({}))).await.unwrap_err().to_string();
    assert!(error.contains("restored while this service ran"), "{error}");
    drop((store, replica));
    let store = open(&place).await.unwrap();
    assert!(store.epoch() != first && store.numbers_above() > lost, "{} after {lost}", store.numbers_above());
    let replica = open(&other).await.unwrap();
    assert_eq!(replica.epoch(), store.epoch());
    assert_eq!(replica.numbers_above(), store.numbers_above());
}
