//! What keeps a store from being opened, said so that a person can do something about it.

use super::*;
use crate::place::Password;

async fn refusal(place: &Database) -> String {
    open(place).await.unwrap_err().to_string()
}

#[tokio::test]
async fn a_password_is_needed_and_never_shown() {
    let server = Private::start(&["fsync=off"]).unwrap();
    let mut place = database(&server, "secret");
    server.ask_for_password("kiln", "hunter2").unwrap();
    place.password = Some(Password::new("hunter3".to_owned()));
    let error = refusal(&place).await;
    assert!(error.contains("refuses this user") && error.contains("pg_hba.conf"), "{error}");
    assert!(!error.contains("hunter"), "{error}");
    place.password = Some(Password::new("hunter2".to_owned()));
    let store = open(&place).await.unwrap();
    assert!(!format!("{place:?} {store:?}").contains("hunter"));
}

#[tokio::test]
async fn each_refusal_says_what_to_do() {
    let server =
        Private::start(&["fsync=off", "max_connections=8", "superuser_reserved_connections=0"]).unwrap();
    let place = database(&server, "words");
    let at = |url: String| Database { url: url.parse().unwrap(), ..place.clone() };
    let socket = server.socket().display();

    let error = refusal(&at(format!("postgres:///nowhere?host={socket}&user=postgres"))).await;
    assert!(error.contains("no such database") && error.contains("createdb"), "{error}");
    let error = refusal(&at(format!("postgres:///kiln?host={socket}/not&user=postgres"))).await;
    assert!(error.contains("can't be reached") && error.contains("/not/kiln"), "{error}");

    server.psql("kiln", "CREATE ROLE weak LOGIN").unwrap();
    let weak = at(format!("postgres:///kiln?host={socket}&user=weak"));
    let error = refusal(&weak).await;
    assert!(error.contains("too few rights") && error.contains("grant"), "{error}");
    // A schema that it is given is enough.
    server.psql("kiln", "CREATE SCHEMA kiln_test_words AUTHORIZATION weak").unwrap();
    open(&weak).await.unwrap();

    server.psql("postgres", "ALTER DATABASE kiln SET default_transaction_read_only = on").unwrap();
    let error = refusal(&place).await;
    assert!(error.contains("read-only") && error.contains("primary"), "{error}");
    server.psql("postgres", "ALTER DATABASE kiln RESET default_transaction_read_only").unwrap();

    server.psql("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0").unwrap();
    let error = refusal(&at(format!("postgres:///latin?host={socket}&user=postgres"))).await;
    assert!(error.contains("LATIN1") && error.contains("UTF8"), "{error}");

    let mut taken = Vec::new();
    while let Ok(one) = connect(&options(&place).unwrap()).await {
        taken.push(one);
        assert!(taken.len() <= 8, "it takes more than it should");
    }
    let error = refusal(&place).await;
    assert!(error.contains("no more connections") && error.contains("max_connections"), "{error}");
}

/// Where commits wait for no disk by the server's settings, these do.
#[tokio::test]
async fn a_commit_waits_for_the_disk_whatever_the_server_says() {
    let server = Private::start(&["synchronous_commit=off"]).unwrap();
    let place = database(&server, "durable");
    let backend = Server {
        place: String::new(),
        schema: place.schema.clone(),
        options: options(&place).unwrap(),
        readers: PgPoolOptions::new().connect_lazy_with(options(&place).unwrap()),
        migrations: MIGRATIONS,
        witness: Witness { path: place.seen.clone(), alone: false },
    };
    let mut connection = backend.connect().await.unwrap();
    let mut session = crate::session::Session::new(&mut *connection, &backend, "read");
    let shown = session.one("SHOW synchronous_commit", &[], |row| {
        crate::rows::text(row, "synchronous_commit").map(str::to_owned)
    });
    assert_eq!(shown.await.unwrap().unwrap(), "on");
}
