//! One GET over a connection of its own: no redirect is followed, nothing is kept.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use kiln_model::check::HttpCheck;
use memchr::memmem;

use crate::{Verdict, clip, tcp};

/// What a check waits for, one after the other.
const STAGES: [&str; 3] = ["accept a connection", "answer", "end its answer's body"];

/// Of an answer's head; what is longer is refused.
const MAX_HEAD: usize = 64 * 1024;

/// Of an answer's headers, by count.
const MAX_HEADERS: usize = 200;

/// How much of a body is looked at.
const MAX_BODY: usize = 1024 * 1024;

pub(crate) async fn get(address: IpAddr, check: &HttpCheck, timeout: Duration) -> Verdict {
    let place = SocketAddr::new(address, check.port);
    // What was under way when the time was up.
    let stage = AtomicUsize::new(0);
    match tokio::time::timeout(timeout, exchange(place, check, &stage)).await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(why)) => Verdict::failed(why),
        Err(_) => {
            let doing = STAGES[stage.load(Ordering::Relaxed)];
            Verdict::failed(format!("{place} did not {doing} within {timeout:?}"))
        }
    }
}

async fn exchange(place: SocketAddr, check: &HttpCheck, stage: &AtomicUsize) -> Result<Verdict, String> {
    let request = request(place, &check.path)?;
    let stream = tcp::open(place).await?;
    stage.store(1, Ordering::Relaxed);
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| bad_answer(place, &error))?;

    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| bad_answer(place, &error))?;
        if let Some(why) = wrong_status(response.status(), check.status) {
            return Ok(Verdict::failed(why));
        }
        let status = response.status().as_u16();
        let Some(wanted) = check.body.as_deref().filter(|text| !text.is_empty()) else {
            return Ok(Verdict::passed(format!("status {status}")));
        };
        stage.store(2, Ordering::Relaxed);
        look_for(wanted, response.into_body(), status).await.map_err(|error| bad_answer(place, &error))
    };
    tokio::pin!(answer, connection);
    // The connection is driven here and not by a task: when the time is up, it is gone with this future.
    tokio::select! {
        biased;
        verdict = &mut answer => verdict,
        // It ends with the last byte, while the answer may still lie in its channel; where it failed, the answer
        // was told the reason.
        _ = &mut connection => answer.await,
    }
}

fn request(place: SocketAddr, path: &str) -> Result<Request<Empty<Bytes>>, String> {
    // An absolute form (`http://…`) would name another host to a proxy.
    if !path.starts_with('/') {
        return Err(format!("the path `{}` does not begin with `/`", clip(path)));
    }
    Request::get(path)
        .header(header::HOST, place.to_string())
        .header(header::USER_AGENT, concat!("kiln-probe/", env!("CARGO_PKG_VERSION")))
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close")
        .body(Empty::new())
        .map_err(|error| format!("the path `{}` can't be asked for: {error}", clip(path)))
}

fn wrong_status(status: StatusCode, wanted: Option<u16>) -> Option<String> {
    let status = status.as_u16();
    match wanted {
        Some(wanted) if status != wanted => Some(format!("status {status}, wanted {wanted}")),
        None if !(200..400).contains(&status) => Some(format!("status {status}, wanted 200 to 399")),
        _ => None,
    }
}

/// Reads until the text was seen, the body ends, or [`MAX_BODY`] was read.
async fn look_for(wanted: &str, mut body: Incoming, status: u16) -> Result<Verdict, hyper::Error> {
    let finder = memmem::Finder::new(wanted);
    let mut seen: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        // Only what is new, and as much before it as an occurrence could begin in: a body that drips is not searched
        // again for each drop.
        let from = seen.len().saturating_sub(wanted.len() - 1);
        let room = MAX_BODY - seen.len();
        seen.extend_from_slice(&data[..data.len().min(room)]);
        if finder.find(&seen[from..]).is_some() {
            return Ok(Verdict::passed(format!("status {status}, body contains `{}`", clip(wanted))));
        }
        if seen.len() == MAX_BODY {
            return Ok(Verdict::failed(format!(
                "status {status}, the first {MAX_BODY} bytes of the body do not contain `{}`",
                clip(wanted)
            )));
        }
    }
    Ok(Verdict::failed(format!(
        "status {status}, the body of {} bytes does not contain `{}`",
        seen.len(),
        clip(wanted)
    )))
}

fn bad_answer(place: SocketAddr, error: &hyper::Error) -> String {
    if error.is_parse_too_large() {
        return format!(
            "{place} answered with a head of more than {MAX_HEAD} bytes or {MAX_HEADERS} headers"
        );
    }
    if error.is_parse() {
        return format!("{place} does not speak HTTP/1: {error}");
    }
    if error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
        return format!("{place} closed the connection before its answer was complete");
    }
    match std::error::Error::source(error) {
        Some(source) => format!("{place} broke off: {error}: {source}"),
        None => format!("{place} broke off: {error}"),
    }
}
