//! The bus on NATS JetStream.

mod consumer;
mod follow;
mod streams;
#[cfg(test)]
mod tests;
mod users;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::{self, Context};
use async_nats::rustls::ClientConfig;
use async_nats::{Auth, AuthError, Client, ConnectOptions, HeaderMap, Server};
use async_trait::async_trait;
use kiln_model::event::{Event, EventType};
use kiln_model::name::{ServerName, SiteName};
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::delivery::Target;
use crate::headers::{check_size, headers};
use crate::subjects::{Stream, filters, report_filter};
use crate::{Bus, Error, Handler, Interest, PUBLISH_TIMEOUT, ReportHandler};

pub use follow::Follow;
use users::Durable;
pub use users::{NewKey, User, accounts_section, new_key};

/// Older ones forget settings that they do not know, without a word.
const OLDEST: (u64, u64) = (2, 10);
const ACK_WAIT: Duration = Duration::from_secs(30);
/// Bound on one question to the broker.
const ASK: Duration = Duration::from_secs(5);
/// How long `connect` waits for a broker before it goes on without.
const FIRST_CONNECT: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub struct NatsOptions {
    /// `tls://127.0.0.1:4222`; those of a cluster with commas between them.
    pub url: String,
    /// Copies of each stream, on as many servers of a cluster.
    pub replicas: usize,
    pub site: SiteName,
    /// Whom the broker is told that this is; also the prefix of the inboxes.
    pub user: User,
    /// The user's nkey seed; none where the broker asks nobody who they are.
    pub seed: Option<Zeroizing<String>>,
    /// With it nothing is said or heard before the handshake, whatever the URL and the other end say: there is no way back
    /// to a connection without. What it shows and believes may change from one connection to the next.
    pub tls: Option<ClientConfig>,
}

impl std::fmt::Debug for NatsOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { url, site, user, .. } = self;
        f.debug_struct("NatsOptions")
            .field("url", url)
            .field("site", site)
            .field("user", user)
            .finish_non_exhaustive()
    }
}

/// Cheap to clone; every clone is the same connection.
#[derive(Debug, Clone)]
pub struct NatsBus {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    site: SiteName,
    url: String,
    client: Client,
    context: Context,
    replicas: usize,
    /// A message whose handler died comes again after this time. A living one says every third of it that it is at
    /// work.
    ack_wait: Duration,
    signs: Arc<Signs>,
}

/// What the connection tells by itself.
#[derive(Debug)]
struct Signs {
    /// Counts connections: whatever waits at the broker must be asked for anew after each.
    connected: watch::Sender<u64>,
    /// The version of the server at the other end was looked at. The next connection may be to another one.
    suitable: AtomicBool,
    /// The last thing that the broker refused. It answers a forbidden publish with silence, and says so only here.
    refusal: Mutex<Option<String>>,
    /// Why the last try to connect failed; none while the connection stands.
    obstacle: Mutex<Option<String>>,
}

impl Signs {
    fn note(&self, event: async_nats::Event, url: &str) {
        use async_nats::Event as E;
        match event {
            E::Connected => {
                tracing::info!(%url, "connected to the broker");
                self.suitable.store(false, Ordering::Relaxed);
                *self.obstacle.lock().unwrap_or_else(PoisonError::into_inner) = None;
                self.connected.send_modify(|count| *count = count.wrapping_add(1));
            }
            E::Disconnected => tracing::warn!(%url, "the broker is away, trying again"),
            E::ServerError(error) => self.refused(error.to_string(), url),
            E::ClientError(error) => self.refused(error.to_string(), url),
            other => tracing::info!(%url, "broker: {other}"),
        }
    }

    /// Once for each reason: tries go on for ever.
    fn failed(&self, servers: &[Server], url: &str) {
        let Some(reason) = servers.iter().find_map(|server| server.last_error.as_ref()) else { return };
        let mut obstacle = self.obstacle.lock().unwrap_or_else(PoisonError::into_inner);
        // What the library says of a server whose first words are no handshake.
        let words = match reason.contains("InvalidContentType") {
            true => {
                format!("it speaks before the TLS handshake, which must come first (deploy/nats): {reason}")
            }
            false => reason.clone(),
        };
        if obstacle.as_ref() != Some(&words) {
            tracing::warn!(%url, reason = %words, "can't connect to the broker");
            *obstacle = Some(words);
        }
    }

    /// What is to be said where there is no connection.
    fn away(&self) -> String {
        match &*self.obstacle.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(obstacle) => format!("the broker is away: {obstacle}"),
            None => "the broker is away".to_owned(),
        }
    }

    fn refused(&self, reason: String, url: &str) {
        tracing::warn!(%url, %reason, "the broker refused something");
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    fn take_refusal(&self) -> Option<String> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What the broker is shown: the public key, and its word given back signed.
fn proof(seed: &str, nonce: &[u8]) -> Result<Auth, AuthError> {
    let pair = nkeys::KeyPair::from_seed(seed.trim()).map_err(AuthError::new)?;
    let mut auth = Auth::new();
    auth.signature = Some(pair.sign(nonce).map_err(AuthError::new)?);
    auth.nkey = Some(pair.public_key());
    Ok(auth)
}

impl NatsBus {
    /// Connects, and goes on connecting for ever: a broker that is away is no error here.
    ///
    /// # Errors
    /// [`Error::Unsuitable`] for a broker that is too old, or a seed that is none.
    pub async fn connect(options: NatsOptions) -> Result<Self, Error> {
        Self::connect_with(options, ACK_WAIT).await
    }

    async fn connect_with(options: NatsOptions, ack_wait: Duration) -> Result<Self, Error> {
        let NatsOptions { url, replicas, site, user, seed, tls } = options;
        let unsuitable = |reason: String| Error::Unsuitable { place: url.clone(), reason };
        let (connected, mut connections) = watch::channel(0);
        let signs = Arc::new(Signs {
            connected,
            suitable: AtomicBool::new(false),
            refusal: Mutex::default(),
            obstacle: Mutex::default(),
        });
        let connect = match seed {
            Some(seed) => {
                // Looked at here, since the client would try for ever with a wrong one.
                nkeys::KeyPair::from_seed(seed.trim())
                    .map_err(|error| unsuitable(format!("the seed of user {user} is none: {error}")))?;
                // The client would keep a copy that nobody wipes.
                ConnectOptions::with_auth_callback(move |nonce| std::future::ready(proof(&seed, &nonce)))
            }
            None => ConnectOptions::new(),
        };
        let connect = match tls {
            Some(tls) => connect.tls_first().tls_client_config(tls),
            // A server names others of its cluster, which can be anywhere.
            None => connect.ignore_discovered_servers(),
        };
        let connect = connect
            .name(format!("kiln-{user}"))
            .custom_inbox_prefix(user.inbox())
            .retry_on_initial_connect()
            .max_reconnects(None)
            // Half a second at most: after a restart of the broker events flow again at once.
            .reconnect_delay_callback(|attempts| Duration::from_millis(50 * (attempts as u64).min(10)))
            .connection_timeout(ASK)
            .ping_interval(Duration::from_secs(10))
            .request_timeout(Some(ASK))
            // It chooses none: what it is shown of the servers is why the last try failed.
            .reconnect_to_server_callback({
                let (signs, url) = (signs.clone(), url.clone());
                move |servers, _| {
                    signs.failed(&servers, &url);
                    std::future::ready(None)
                }
            })
            .event_callback({
                let (signs, url) = (signs.clone(), url.clone());
                move |event| {
                    signs.note(event, &url);
                    std::future::ready(())
                }
            });
        let servers: Vec<_> = url.split(',').collect();
        let client =
            connect.connect(servers.as_slice()).await.map_err(|error| unsuitable(error.to_string()))?;
        let mut context = jetstream::with_prefix(client.clone(), user.api());
        context.set_timeout(ASK);
        let bus = Self { inner: Arc::new(Inner { site, url, client, context, replicas, ack_wait, signs }) };
        // Either it is there now, which is the rule, or the first use finds out.
        let _ = tokio::time::timeout(FIRST_CONNECT, connections.wait_for(|count| *count > 0)).await;
        bus.check_version()?;
        Ok(bus)
    }

    /// Makes the streams of the site and the consumers of its services, or brings them to the wanted settings. Only the
    /// admin may.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where the broker is away or refuses, [`Error::Unsuitable`] where it is too old or made
    /// something else.
    pub async fn ensure_streams(options: NatsOptions) -> Result<(), Error> {
        Self::ensure_with(options, ACK_WAIT).await
    }

    async fn ensure_with(options: NatsOptions, ack_wait: Duration) -> Result<(), Error> {
        let bus = Self::connect_with(options, ack_wait).await?;
        for stream in Stream::ALL {
            streams::ensure(&bus, stream).await?;
        }
        for Durable { stream, user, filters } in users::consumers(&bus.inner.site) {
            consumer::ensure(&bus, stream, user.as_str(), filters).await?;
        }
        Ok(())
    }

    /// Publishes a report on `kiln.in.v1.<site>.<tail>`, as other systems do.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where the broker did not store it.
    pub async fn report(
        &self,
        tail: &str,
        id: &str,
        payload: Vec<u8>,
        traceparent: &str,
    ) -> Result<(), Error> {
        let mut headers = HeaderMap::new();
        headers.insert(crate::headers::ID, id);
        headers.insert(crate::headers::MESSAGE_ID, id);
        if !traceparent.is_empty() {
            headers.insert(crate::headers::TRACEPARENT, traceparent);
        }
        let prefix = report_filter(&self.inner.site);
        self.store(format!("{}{tail}", prefix.trim_end_matches('>')), headers, payload).await
    }

    /// Events of the site from now on, as the broker gets them; what is missed while it is away is not made up for.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where the subscription fails.
    pub async fn follow(&self) -> Result<Follow, Error> {
        Follow::open(self).await
    }

    /// Events of the site that the broker keeps from a moment on, with [`Error::Undecodable`] in the place of a message
    /// that is none.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where it is away or refuses.
    pub async fn past(&self, since: jiff::Timestamp) -> Result<Vec<Result<Event, Error>>, Error> {
        follow::past(self, since).await
    }

    /// Every event of a type and a server that the broker keeps, oldest first.
    ///
    /// # Errors
    /// As [`NatsBus::past`].
    pub async fn all_of(
        &self,
        kind: &EventType,
        server: Option<&ServerName>,
    ) -> Result<Vec<Result<Event, Error>>, Error> {
        follow::all_of(self, &kind.subject(&self.inner.site, server)).await
    }

    /// True while the connection stands.
    pub fn connected(&self) -> bool {
        self.inner.client.connection_state() == State::Connected
    }

    /// That there is no connection, and why, for people.
    pub fn away(&self) -> String {
        self.inner.signs.away()
    }

    /// Connections so far, the one that stands now included.
    fn connections(&self) -> u64 {
        self.inner.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Whether the broker has taken everything that was sent; for a clean end of a short-lived program.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where it did not in time.
    pub async fn flush(&self) -> Result<(), Error> {
        let flushed = tokio::time::timeout(ASK, self.inner.client.flush()).await;
        match flushed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.unavailable("flush", &error)),
            Err(_) => Err(self.unavailable("flush", &"no answer in time")),
        }
    }

    fn unavailable(&self, what: &'static str, reason: &dyn std::fmt::Display) -> Error {
        let refusal = self.inner.signs.take_refusal();
        let away = if self.connected() { String::new() } else { format!("; {}", self.away()) };
        let reason = match refusal {
            Some(refusal) => format!("{reason}{away}; the broker said: {refusal}"),
            None => format!("{reason}{away}"),
        };
        Error::Unavailable { what, place: self.inner.url.clone(), reason }
    }

    /// Ok also while nothing is known of the broker.
    fn check_version(&self) -> Result<(), Error> {
        if self.inner.signs.suitable.load(Ordering::Relaxed) || !self.connected() {
            return Ok(());
        }
        let version = self.inner.client.server_info().version;
        let mut parts = version.split('.').map(str::parse::<u64>);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= OLDEST => {
                self.inner.signs.suitable.store(true, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(Error::Unsuitable {
                place: self.inner.url.clone(),
                reason: format!(
                    "nats-server is {version}, at least {}.{} is needed: install a newer one",
                    OLDEST.0, OLDEST.1
                ),
            }),
        }
    }

    /// Returns once the stream has it on disk.
    async fn store(&self, subject: String, headers: HeaderMap, payload: Vec<u8>) -> Result<(), Error> {
        // What the client would keep back until the broker is there is kept better in the outbox.
        if !self.connected() {
            return Err(self.unavailable("publish", &"no connection"));
        }
        self.check_version()?;
        let stored = async {
            let sent = self.inner.context.publish_with_headers(subject, headers, payload.into()).await?;
            // Sent is not stored.
            sent.await
        };
        match tokio::time::timeout(PUBLISH_TIMEOUT, stored).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(self.unavailable("publish", &error)),
            Err(_) => Err(self.unavailable("publish", &"no acknowledgement in time")),
        }
    }
}

#[async_trait]
impl Bus for NatsBus {
    async fn publish(&self, event: &Event) -> Result<(), Error> {
        let subject = event.event.kind.subject(&self.inner.site, event.event.server.as_ref());
        check_size(&subject, event)?;
        self.store(subject, headers(&self.inner.site, event), event.event.payload.clone()).await
    }

    async fn consume(
        &self,
        durable: &str,
        interests: &[Interest],
        handler: Arc<dyn Handler>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let filters = filters(&self.inner.site, interests);
        consumer::run(self, Stream::Events, durable, filters, Target::Events(handler), stop).await
    }

    async fn consume_reports(
        &self,
        durable: &str,
        handler: Arc<dyn ReportHandler>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let filters = vec![report_filter(&self.inner.site)];
        consumer::run(self, Stream::Reports, durable, filters, Target::Reports(handler), stop).await
    }
}
