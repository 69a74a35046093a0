//! `/metrics` over HTTP, for Prometheus.

use std::convert::Infallible;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::metrics;

const CONNECTIONS: usize = 16;
/// A scrape is over long before; one that stands still gives its place up.
const LONGEST: Duration = Duration::from_secs(60);
const HEADERS: Duration = Duration::from_secs(5);

/// Never returns.
pub(super) async fn serve(listener: Option<TcpListener>) {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, _)) => {
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADERS)
                    .serve_connection(TokioIo::new(stream), service_fn(answer));
                // How a scraper's connection ends is its own affair.
                connections.spawn(async move { drop(tokio::time::timeout(LONGEST, connection).await) });
            }
            Err(error) => {
                // Out of file descriptors, most likely: they come back.
                tracing::warn!(%error, "can't accept a connection for metrics");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = if request.uri().path() != "/metrics" {
        (StatusCode::NOT_FOUND, "see /metrics\n".to_owned())
    } else if request.method() != Method::GET {
        (StatusCode::METHOD_NOT_ALLOWED, "GET only\n".to_owned())
    } else {
        match metrics::render() {
            Ok(text) => (StatusCode::OK, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let content_type = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    Ok(response)
}
