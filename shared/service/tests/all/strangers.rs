//! Those who show no certificate: what a good token is worth and for how long, and how long a connection without one lasts.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use jiff::Timestamp;
use kiln_api::monitor::{ListSignalsRequest, WatchHealthRequest, WatchHealthResponse};
use kiln_service::access::{Role, Secret};
use kiln_service::error::chain;
use kiln_service::server::Limits;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Status, Streaming};

use crate::limits::{ELSEWHERE, LONG, by_hand, call, look, serves, until};
use crate::site::{LOCALHOST, Site, in_an_hour, replace, token};

type Watched = Streaming<WatchHealthResponse>;

async fn watch(site: &Site, secret: &Secret, server: &str) -> Watched {
    let request = WatchHealthRequest { server: server.to_owned(), own: false };
    let mut client = site.client(None, Some(secret.reveal()));
    let mut stream = client.watch_health(request).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    stream
}

/// How a stream ends that is read to its end.
async fn end(stream: &mut Watched) -> Status {
    let read = async {
        loop {
            match stream.message().await {
                Ok(message) => assert!(message.is_some(), "it ends as if all was said"),
                Err(status) => return status,
            }
        }
    };
    tokio::time::timeout(LONG, read).await.expect("it goes on")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_ends_when_its_token_is_revoked() {
    let site = Site::start().await;
    let (taken_back, of_taken_back) = token(1, Role::Viewer, &in_an_hour());
    let (good, of_good) = token(2, Role::Viewer, &in_an_hour());
    site.keep(&[&of_taken_back, &of_good]);
    let mut client = site.client(None, Some(taken_back.reveal()));
    look(&client).await.unwrap();
    // A call whose answer never comes, a stream with nothing to say, and one with always something.
    let waiting = tokio::spawn(async move { client.list_signals(ListSignalsRequest::default()).await });
    let mut idle = watch(&site, &taken_back, "").await;
    let mut busy = watch(&site, &taken_back, "flood").await;
    let mut other = watch(&site, &good, "").await;
    let mut certified = site.as_role(Role::Viewer);
    let mut by_certificate =
        certified.watch_health(WatchHealthRequest::default()).await.unwrap().into_inner();
    by_certificate.message().await.unwrap().expect("its first answer");
    site.keep(&[&of_good]);
    let revoked = Instant::now();
    let of_busy = tokio::spawn(async move { end(&mut busy).await });
    let of_idle = end(&mut idle).await;
    let of_waiting = tokio::time::timeout(LONG, waiting).await.expect("it waits still").unwrap().unwrap_err();
    let ended = [of_idle, of_busy.await.unwrap(), of_waiting];
    println!("all had ended after {:?}", revoked.elapsed());
    assert!(revoked.elapsed() < Duration::from_secs(5), "{:?}", revoked.elapsed());
    for status in ended {
        assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
        assert!(status.message().contains("unknown or was revoked"), "{status}");
    }
    // What was at work for them has ended too, and the others' streams go on.
    let told = &site.running.told;
    until("the flood ends", async || told.left.load(Ordering::SeqCst) == 1).await;
    for stream in [&mut other, &mut by_certificate] {
        let next = tokio::time::timeout(Duration::from_secs(2), stream.message()).await;
        assert!(next.is_err(), "another one's stream has ended: {next:?}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_its_token_expires() {
    let site = Site::start().await;
    let expires = Timestamp::now().checked_add(Duration::from_secs(4)).unwrap();
    let (secret, kept) = token(1, Role::Viewer, &expires.to_string());
    site.keep(&[&kept]);
    let mut stream = watch(&site, &secret, "").await;
    let status = end(&mut stream).await;
    assert!(Timestamp::now() >= expires, "it ended too early: {status}");
    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    assert!(status.message().contains("has expired"), "{status}");
    site.stop().await;
}

/// The gRPC status of a call that shows nothing; none where the connection ends.
async fn ask(raw: &mut SendRequest<Bytes>) -> Option<String> {
    let (answer, _) = raw.send_request(call("ListHealth").body(()).unwrap(), true).ok()?;
    let answer = tokio::time::timeout(LONG, answer).await.expect("no answer").ok()?;
    Some(answer.headers()["grpc-status"].to_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_give_their_places_up() {
    let handshake = Duration::from_secs(3);
    let limits = Limits { connections_per_address: 2, handshake, ..Limits::default() };
    let site = Site::start_with(limits).await;
    let (secret, kept) = token(1, Role::Viewer, &in_an_hour());
    site.keep(&[&kept]);
    let person = site.client(None, Some(secret.reveal()));
    let mut stream = person.clone().watch_health(WatchHealthRequest::default()).await.unwrap().into_inner();
    stream.message().await.unwrap().expect("its first answer");
    let stranger = async || by_hand(site.tls(site.address, None, b"h2", ELSEWHERE).await.unwrap()).await;
    let (quiet, end_of_quiet) = stranger().await;
    let (mut refused, end_of_refused) = stranger().await;
    assert_eq!(ask(&mut refused).await.as_deref(), Some("16"));
    let viewer = site.certificate(Role::Viewer);
    let third = site.tls(site.address, Some(&viewer), b"h2", ELSEWHERE).await;
    assert!(third.is_err(), "there are more than two places");
    for end in [end_of_quiet, end_of_refused] {
        let _ = tokio::time::timeout(LONG, end).await.expect("a stranger keeps the place").unwrap();
    }
    until("the address is let in again", async || {
        let stream = site.tls(site.address, Some(&viewer), b"h2", ELSEWHERE).await;
        let Ok(stream) = stream else { return false };
        h2::client::handshake(stream).await.is_ok()
    })
    .await;
    drop((quiet, refused));
    // Whoever was let in stays.
    serves(&person).await;
    let next = tokio::time::timeout(handshake, stream.message()).await;
    assert!(next.is_err(), "the stream has ended: {next:?}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_who_is_refused_again_and_again_loses_the_connection() {
    // Not for having waited.
    let site = Site::start_with(Limits { handshake: 4 * LONG, ..Limits::default() }).await;
    let (secret, kept) = token(1, Role::Viewer, &in_an_hour());
    site.keep(&[&kept]);
    let (mut raw, end) = by_hand(site.tls(site.address, None, b"h2", ELSEWHERE).await.unwrap()).await;
    let mut told = 0;
    while let Some(status) = ask(&mut raw).await {
        assert_eq!(status, "16");
        told += 1;
        assert!(told <= 10, "it is refused without end");
    }
    // The last answer may be lost with the connection.
    assert!(told >= 9, "{told}");
    let _ = tokio::time::timeout(LONG, end).await.expect("the connection stays").unwrap();
    let person = site.client(None, Some(secret.reveal()));
    for _ in 0..50 {
        look(&person).await.unwrap();
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_are_no_tokens_the_handshake_demands_a_certificate() {
    let site = Site::start().await;
    let (secret, kept) = token(1, Role::Viewer, &in_an_hour());
    let demands = async || {
        for shown in [None, Some(secret.reveal())] {
            let status = look(&site.client(None, shown)).await.unwrap_err();
            assert!(chain(&status).contains("CertificateRequired"), "{}", chain(&status));
        }
        let mut page = site.tls(site.metrics, None, b"http/1.1", LOCALHOST).await.unwrap();
        let _ = page.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        let mut answer = Vec::new();
        let _ = page.read_to_end(&mut answer).await;
        assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
        look(&site.as_role(Role::Viewer)).await.unwrap();
    };
    demands().await;
    // From its making on, and until the last one is gone.
    site.keep(&[&kept]);
    look(&site.client(None, Some(secret.reveal()))).await.unwrap();
    let status = look(&site.client(None, None)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    site.keep(&[]);
    demands().await;
    site.keep(&[&kept]);
    replace(&site.path("tokens.toml"), "nonsense");
    demands().await;
    site.stop().await;
}
