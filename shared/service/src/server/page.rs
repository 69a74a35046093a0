//! `/metrics` over HTTPS, for Prometheus: it shows a certificate or a token, as everybody.

use std::convert::Infallible;
use std::sync::Arc;

use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::connection::Connection;
use super::limits::Limits;
use crate::access::{Access, METRICS, Peer};
use crate::error::ApiError;
use crate::metrics;

/// Never returns.
pub(super) async fn serve(
    mut from: mpsc::Receiver<Result<Connection, Infallible>>,
    access: Arc<Access>,
    limits: Limits,
) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= limits.scrapes {
            connections.join_next().await;
        }
        let Some(Ok(connection)) = from.recv().await else {
            // There is no such port.
            return std::future::pending().await;
        };
        let (peer, access) = (connection.peer().clone(), Arc::clone(&access));
        let answer = service_fn(move |request: Request<Incoming>| {
            let answer = answer(&access, &peer, &request);
            std::future::ready(Ok::<_, Infallible>(answer))
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.handshake)
            .max_buf_size(limits.headers as usize)
            .serve_connection(TokioIo::new(connection), answer);
        // How a scraper's connection ends is its own affair.
        let bounded = tokio::time::timeout(limits.scrape, connection);
        connections.spawn(async move { drop(bounded.await) });
    }
}

fn answer(access: &Access, peer: &Peer, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, text) = if request.uri().path() != METRICS {
        (StatusCode::NOT_FOUND, "see /metrics\n".to_owned())
    } else if request.method() != Method::GET {
        (StatusCode::METHOD_NOT_ALLOWED, "GET only\n".to_owned())
    } else {
        page(access, peer, request.headers())
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let content_type = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

fn page(access: &Access, peer: &Peer, headers: &HeaderMap) -> (StatusCode, String) {
    match access.admit(peer, headers, METRICS) {
        Ok(_) => {}
        Err(error) => {
            let status = match error {
                ApiError::UnknownCaller { .. } => StatusCode::UNAUTHORIZED,
                ApiError::Denied { .. } => StatusCode::FORBIDDEN,
                ApiError::Exhausted { .. } => StatusCode::TOO_MANY_REQUESTS,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            return (status, format!("{error}\n"));
        }
    }
    match metrics::render() {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}
