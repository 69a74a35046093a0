//! What other replicas commit: heard by LISTEN, and looked for where nothing is heard.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::{CONNECT, Server};
use crate::Error;
use crate::session::{Backend as _, Session, failure};
use crate::writer::advance;

/// How late a commit of another replica is seen whose notification is lost.
const LOOK: Duration = Duration::from_secs(1);

/// Ends when nobody watches the sequence, which every handle of the store does.
pub(super) async fn run(server: Arc<Server>, announce: Arc<watch::Sender<u64>>) {
    let mut listener = None;
    let following = async {
        loop {
            match timeout(LOOK, hear(&server, &mut listener)).await {
                Ok(Ok(sequence)) => {
                    advance(&announce, sequence);
                    continue;
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, "not told of what other replicas commit");
                    listener = None;
                    sleep(LOOK).await;
                }
                Err(_) => {}
            }
            match look(&server).await {
                // A connection that says nothing of a commit may be dead without knowing it.
                Ok(sequence) if sequence > *announce.borrow() => {
                    listener = None;
                    advance(&announce, sequence);
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "what other replicas commit is not seen"),
            }
        }
    };
    tokio::select! {
        () = announce.closed() => {}
        () = following => {}
    }
}

async fn hear(server: &Server, listener: &mut Option<PgListener>) -> Result<u64, sqlx::Error> {
    let listener = match listener {
        Some(listener) => listener,
        None => {
            let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(CONNECT);
            let mut new = PgListener::connect_with(&pool.connect_lazy_with(server.options.clone())).await?;
            new.eager_reconnect(false);
            new.listen(&server.schema).await?;
            listener.insert(new)
        }
    };
    let heard = listener.try_recv().await?;
    let heard = heard.ok_or_else(|| sqlx::Error::Protocol("the connection is lost".to_owned()))?;
    heard
        .payload()
        .parse()
        .map_err(|_| sqlx::Error::Protocol(format!("`{}` is no sequence", heard.payload())))
}

async fn look(server: &Server) -> Result<u64, Error> {
    let connected = server.reader().await;
    let mut connection = connected.map_err(|error| failure(server, "read", &error))?;
    Session::new(&mut *connection, server, "read").meta_number("sequence").await
}
