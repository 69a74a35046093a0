//! The ways in: the Unix socket, and TCP ports that nothing gets through but TLS. A connection is let in when it has a
//! place and, on TCP, has shaken hands; how long that takes is nobody else's wait.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_model::name::SiteName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::connection::{Connection, Io};
use super::limits::Limits;
use super::seats::{Seat, Seats};
use crate::access::{Caller, Peer, Stranger};
use crate::certificate::Certificate;
use crate::tls::ServerTls;

/// Refusals are told in one line for this long: a flood must not fill the log as well.
const TELL: Duration = Duration::from_secs(10);
/// Out of file descriptors, most likely: they come back.
const PAUSE: Duration = Duration::from_millis(200);

/// How long a client whose certificate was refused may take to hear of it.
const LINGER: Duration = Duration::from_secs(1);

/// What connections go to.
pub(super) type Hall = mpsc::Sender<Result<Connection, std::convert::Infallible>>;

/// Counts what is turned away, and tells it now and then.
struct Refusals {
    place: String,
    count: u64,
    told: Option<Instant>,
}

impl Refusals {
    const fn new(place: String) -> Self {
        Self { place, count: 0, told: None }
    }

    fn add(&mut self, why: &str) {
        self.count += 1;
        if self.told.is_none_or(|told| told.elapsed() >= TELL) {
            tracing::warn!(place = %self.place, count = self.count, why, "connections were refused");
            (self.count, self.told) = (0, Some(Instant::now()));
        }
    }
}

/// Ends when nobody takes connections any more.
pub(super) async fn unix(listener: UnixListener, place: String, limits: Limits, hall: Hall) {
    let seats = Seats::new(limits.connections, limits.connections);
    let mut refusals = Refusals::new(place);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = hall.closed() => return,
        };
        let (stream, seat) = match accepted.map(|(stream, _)| (stream, seats.take(None))) {
            Ok((stream, Ok(seat))) => (stream, seat),
            Ok((_, Err(why))) => {
                refusals.add(&why);
                continue;
            }
            Err(error) => {
                refusals.add(&error.to_string());
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let peer = match local(&stream) {
            Ok(caller) => Peer::Known(caller),
            Err(error) => {
                refusals.add(&format!("the kernel does not say who it is: {error}"));
                continue;
            }
        };
        let connection = Connection::new(Io::Unix(stream), peer, seat, limits.handshake);
        if hall.send(Ok(connection)).await.is_err() {
            return;
        }
    }
}

/// A port, and what it shows to those who connect.
pub(super) struct Port {
    pub(super) address: SocketAddr,
    pub(super) listener: TcpListener,
    pub(super) tls: Arc<ServerTls>,
    pub(super) site: SiteName,
}

/// Ends when nobody takes connections any more.
pub(super) async fn tcp(port: Port, limits: Limits, hall: Hall) {
    let seats = Seats::new(limits.connections, limits.connections_per_address);
    let mut refusals = Refusals::new(port.address.to_string());
    // No more than there are places.
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = port.listener.accept() => accepted,
            Some(_) = handshakes.join_next() => continue,
            () = hall.closed() => return,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                refusals.add(&error.to_string());
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        match seats.take(Some(from.ip())) {
            Ok(seat) => {
                let acceptor = TlsAcceptor::from(port.tls.now());
                let (hall, site) = (hall.clone(), port.site.clone());
                let shake = shake(acceptor, stream, seat, site, limits.handshake);
                handshakes.spawn(async move {
                    match shake.await {
                        // Where nobody takes it, the server ends.
                        Ok(connection) => drop(hall.send(Ok(connection)).await),
                        Err(why) => tracing::debug!(from = %from.ip(), why, "a handshake failed"),
                    }
                });
            }
            Err(why) => refusals.add(&why),
        }
    }
}

/// Takes what the client has sent by now and throws it away. Closed with bytes unread, the kernel resets the connection,
/// and the alert that says what is wrong with the certificate may never arrive.
async fn drain(mut stream: TcpStream) {
    let mut rest = [0; 4096];
    if stream.shutdown().await.is_ok() {
        while stream.read(&mut rest).await.is_ok_and(|read| read > 0) {}
    }
}

async fn shake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    seat: Seat,
    site: SiteName,
    patience: Duration,
) -> Result<Connection, String> {
    // Calls are small and wait for each other's answers.
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let shaken = tokio::time::timeout(patience, acceptor.accept(stream).into_fallible()).await;
    let stream = match shaken.map_err(|_| "it took too long")? {
        Ok(stream) => stream,
        Err((error, stream)) => {
            // The seat is held meanwhile.
            let _ = tokio::time::timeout(LINGER, drain(stream)).await;
            return Err(error.to_string());
        }
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let named = certificate.map(|der| {
        let read = Certificate::read(der)?;
        Ok(Caller::certified(&read.identity(&site)?, read.until))
    });
    let peer = match named.transpose() {
        Ok(Some(caller)) => Peer::Known(caller),
        Ok(None) => Peer::Stranger(Arc::new(Stranger::new(None))),
        Err(why) => Peer::Stranger(Arc::new(Stranger::new(Some(why)))),
    };
    Ok(Connection::new(Io::Tls(Box::new(stream)), peer, seat, patience))
}

/// Whoever is at the other end of a Unix socket, as the kernel says: the person who logged in, where it knows one, for
/// behind sudo that is not root; else the user of the process.
fn local(stream: &UnixStream) -> std::io::Result<Caller> {
    let credentials = stream.peer_cred()?;
    let process = credentials.pid().unwrap_or_default();
    Ok(Caller::local(person_of(&process.to_string(), credentials.uid()), process))
}

/// `process` is an id, or `self`.
pub(crate) fn person_of(process: &str, user: u32) -> String {
    // The process may have ended, and its id be another's: but whoever gets here is the site's own user anyway.
    let login = std::fs::read_to_string(format!("/proc/{process}/loginuid")).ok();
    let login = login.and_then(|text| text.trim().parse().ok()).filter(|uid| *uid != u32::MAX);
    let uid = login.unwrap_or(user);
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    user_name(&users, uid).unwrap_or_else(|| format!("uid {uid}"))
}

fn user_name(users: &str, uid: u32) -> Option<String> {
    let fields = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut names = fields.filter(|it| it.get(2).and_then(|text| text.parse().ok()) == Some(uid));
    names.next()?.first().map(|name| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_named_by_the_list_of_users() {
        let users = "root:x:0:0:root:/root:/bin/bash\nann:x:1000:1000::/home/ann:/bin/sh\nbroken\n";
        assert_eq!(user_name(users, 1000).as_deref(), Some("ann"));
        assert_eq!(user_name(users, 7), None);
    }
}
