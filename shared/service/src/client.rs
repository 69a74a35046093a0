//! Calls to the other services of the site: a channel that connects when it is used, connects again when the other
//! side was away, and carries the trace on.

use std::path::Path;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::transport::Endpoint;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service, ServiceExt as _};

use crate::trace;

const CONNECT: Duration = Duration::from_secs(2);
/// A peer that stands still, stopped or hung, is found out within twice this time, also in the middle of a stream.
const ALIVE: Duration = Duration::from_secs(10);

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

/// A channel to the service that listens on a Unix socket. Nothing is connected yet.
pub fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(&socket).await.map(TokioIo::new) }
    });
    // The address is a name and nothing else: the connector knows where to go.
    let connection = Endpoint::from_static("http://kiln.local")
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(ALIVE)
        .keep_alive_timeout(ALIVE)
        .connect_with_connector_lazy(connect);
    Channel::over(connection)
}

impl Service<Request<Body>> for Channel {
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
