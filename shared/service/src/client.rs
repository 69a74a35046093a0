//! Calls to the services of the site: a channel that connects when it is used, connects again when the other side was
//! away, and carries the trace on. On this machine by Unix socket; to another one with mutual TLS, and anew when a
//! certificate was renewed.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::header::InvalidHeaderValue;
use http::{HeaderValue, Request, Response, header};
use hyper_util::rt::TokioIo;
use kiln_model::event::Service as ServiceName;
use kiln_model::name::NodeName;
use tokio::io::AsyncBufReadExt as _;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tonic::body::Body;
use tonic::transport::Endpoint;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service, ServiceExt as _};
use zeroize::Zeroizing;

use crate::access::Role;
use crate::config::{Address, Addresses, Place, Site};
use crate::tls::{self, ClientTls, TlsFiles};
use crate::trace;

const CONNECT: Duration = Duration::from_secs(2);
/// A peer that stands still, stopped or hung, is found out within twice this time, also in the middle of a stream. Until
/// then a rollout counts the node's silence as time in which nothing got better, so it is short against any deadline.
const ALIVE: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
#[error("can't call the {service} at {addresses} with TLS: {reason}")]
pub struct Error {
    service: ServiceName,
    addresses: Addresses,
    reason: String,
}

/// To be given to a generated client: `EngineServiceClient::new(client::channel(socket))`.
#[derive(Debug, Clone)]
pub struct Channel {
    inner: BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>,
}

impl Channel {
    /// Over whatever carries calls: a connection, or the other service itself where a simulation has both in one process.
    pub fn over<T>(carrier: T) -> Self
    where
        T: Service<Request<Body>, Response = Response<Body>, Future: Send + 'static>,
        T: Clone + Send + Sync + 'static,
        T::Error: Into<BoxError>,
    {
        Self { inner: BoxCloneSyncService::new(carrier.map_err(Into::into)) }
    }
}

/// A service on another machine, or on several.
#[derive(Debug)]
struct Remote {
    addresses: Addresses,
    tls: ClientTls,
    /// Beside TLS only: there is no way to give one to a channel without.
    token: Option<HeaderValue>,
    current: Mutex<Option<(Arc<ClientConfig>, tonic::transport::Channel)>>,
}

fn endpoint() -> Endpoint {
    // The address is a name and nothing else: the connector knows where to go.
    Endpoint::from_static("http://kiln.local")
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(ALIVE)
        .keep_alive_timeout(ALIVE)
}

/// A channel to the service that listens on a Unix socket. Nothing is connected yet.
pub fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(&socket).await.map(TokioIo::new) }
    });
    Channel::over(endpoint().connect_with_connector_lazy(connect))
}

/// A channel from one service of the site to another, wherever that runs.
///
/// # Errors
/// Where it runs on another machine and the files for TLS can't be read.
pub fn to(site: &Site, own: ServiceName, service: ServiceName) -> Result<Channel, Error> {
    match site.place(service) {
        Place::Socket(socket) => Ok(channel(&socket)),
        Place::Tcp(addresses) => remote(addresses, &site.tls(own), service, None),
    }
}

/// Channels from one service of the site to the node of each machine, by its name.
///
/// # Errors
/// Where the files for TLS can't be read.
pub fn nodes(site: &Site, own: ServiceName) -> Result<BTreeMap<NodeName, Channel>, Error> {
    let mut channels = BTreeMap::from([(NodeName::local(), to(site, own, ServiceName::Node)?)]);
    for (name, address) in &site.nodes {
        let channel = remote(address.clone().into(), &site.tls(own), ServiceName::Node, None)?;
        channels.insert(name.clone(), channel);
    }
    Ok(channels)
}

/// Where the other replicas of a service reach this one.
pub fn own_address(site: &Site, service: ServiceName) -> String {
    match site.listen.get(&service) {
        Some(address) => format!("https://{address}"),
        None => format!("{SOCKET}{}", site.paths().socket(service).display()),
    }
}

const SOCKET: &str = "unix:";

/// A channel to a replica of a service where it said that it is, as [`own_address`] does.
///
/// # Errors
/// What is wrong with the address, or with the files for TLS.
pub fn at(address: &str, files: &TlsFiles, service: ServiceName) -> Result<Channel, String> {
    match address.strip_prefix(SOCKET) {
        Some(socket) => Ok(channel(Path::new(socket))),
        None => {
            let address: Address = address.parse()?;
            remote(address.into(), files, service, None).map_err(|error| error.to_string())
        }
    }
}

/// A channel to a service at a TCP port, with a certificate or a token. Nothing is connected yet. Of several replicas it
/// takes the first that answers, and stays with that while it does.
///
/// # Errors
/// Where the files for TLS can't be read, or the token is no header.
pub fn remote(
    addresses: Addresses,
    files: &TlsFiles,
    service: ServiceName,
    token: Option<&str>,
) -> Result<Channel, Error> {
    let failed = |reason: String| Error { service, addresses: addresses.clone(), reason };
    let tls = tls::client(files, Role::from(service)).map_err(failed)?;
    let text = |token| Zeroizing::new(["Bearer ", token].concat());
    let token = token.map(|token| sensitive(text(token))).transpose();
    let token = token.map_err(|_| failed("the token has not the form of one".to_owned()))?;
    let remote = Arc::new(Remote { addresses, tls, token, current: Mutex::default() });
    Ok(Channel::over(tower::service_fn(move |mut request: Request<Body>| {
        if let Some(token) = &remote.token {
            request.headers_mut().insert(header::AUTHORIZATION, token.clone());
        }
        // Which connection a call takes shows itself when it is made; it waits for its turn there.
        remote.channel().oneshot(request)
    })))
}

/// Its memory is wiped with the last of the calls that it was given to.
fn sensitive(text: Zeroizing<String>) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut value = HeaderValue::from_maybe_shared(Bytes::from_owner(text))?;
    value.set_sensitive(true);
    Ok(value)
}

impl Remote {
    /// Connected with what the files hold now. Calls under way end on the connection that they began on.
    fn channel(&self) -> tonic::transport::Channel {
        let config = self.tls.get();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match &*current {
            Some((of, channel)) if Arc::ptr_eq(of, &config) => channel.clone(),
            _ => {
                let channel = self.connect(Arc::clone(&config));
                *current = Some((config, channel.clone()));
                channel
            }
        }
    }

    fn connect(&self, config: Arc<ClientConfig>) -> tonic::transport::Channel {
        let addresses: Arc<[Address]> = self.addresses.iter().cloned().collect();
        // One that stands still takes its whole time before the next one has its turn.
        let limit = CONNECT * u32::try_from(addresses.len()).unwrap_or(u32::MAX);
        let connect = tower::service_fn(move |_| {
            let (addresses, connector) = (Arc::clone(&addresses), TlsConnector::from(Arc::clone(&config)));
            async move { first(&addresses, &connector).await.map(TokioIo::new) }
        });
        endpoint().connect_timeout(limit).connect_with_connector_lazy(connect)
    }
}

/// The first of them that answers; why the last did not, where none does.
async fn first(addresses: &[Address], connector: &TlsConnector) -> io::Result<TlsStream<TcpStream>> {
    let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        let connected = tokio::time::timeout(CONNECT, connect(address, connector)).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

async fn connect(address: &Address, connector: &TlsConnector) -> io::Result<TlsStream<TcpStream>> {
    let host = address.host().clone();
    let stream = TcpStream::connect((host.to_str().as_ref(), address.port())).await?;
    stream.set_nodelay(true)?;
    let mut stream = connector.connect(host, stream).await?;
    // A server speaks first, once it has looked at this end's certificate. Without the wait its refusal would race with the
    // first call, which then is told no more than that the connection is gone.
    if stream.fill_buf().await?.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(stream)
}

impl tower::Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // None where the caller is no part of a trace; one that the caller set by hand stays.
        if let Ok(value) = HeaderValue::try_from(trace::current())
            && !value.is_empty()
        {
            request.headers_mut().entry(trace::HEADER).or_insert(value);
        }
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_s_header_is_the_memory_that_is_wiped() {
        fn is_wiped<T: zeroize::ZeroizeOnDrop>(it: T) -> T {
            it
        }
        let text = is_wiped(Zeroizing::new("Bearer kiln_5eed".to_owned()));
        let at = text.as_ptr();
        let value = sensitive(text).unwrap();
        let of_a_call = value.clone();
        assert!(std::ptr::eq(value.as_bytes().as_ptr(), at), "it is a copy");
        assert!(std::ptr::eq(of_a_call.as_bytes().as_ptr(), at), "a call has a copy");
        assert_eq!(format!("{of_a_call:?}"), "Sensitive");
        assert!(sensitive(Zeroizing::new("Bearer two\nlines".to_owned())).is_err());
    }
}
