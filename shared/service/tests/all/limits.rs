//! What one caller can take of a server, and that the others have theirs: floods, resets, slow readers, headers.

use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use kiln_api::monitor::{ListHealthRequest, WatchHealthRequest};
use kiln_service::access::{METRICS, Rate, Role};
use kiln_service::error::describe;
use kiln_service::server::Limits;
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use tonic::Code;

use crate::monitor::{Client, FLOOD, report};
use crate::site::{LOCALHOST, Site, connect};

pub(crate) const LONG: Duration = Duration::from_secs(30);
pub(crate) const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Some thousand times what the server takes.
const RESETS: usize = 20_000;

pub(crate) async fn look(client: &Client) -> Result<(), tonic::Status> {
    client.clone().list_health(ListHealthRequest::default()).await.map(drop)
}

/// Others are served, and soon.
pub(crate) async fn serves(client: &Client) {
    let call = tokio::time::timeout(Duration::from_secs(5), look(client)).await;
    call.expect("others wait").expect("others are refused");
}

pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !is_so().await {
        assert!(begin.elapsed() < LONG, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// HTTP/2 by hand, for what no proper client does.
pub(crate) async fn by_hand(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> (SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let (client, connection) = h2::client::handshake(io).await.unwrap();
    (client, tokio::spawn(connection))
}

pub(crate) fn call(method: &str) -> http::request::Builder {
    call_to(&format!("/kiln.monitor.v1.MonitorService/{method}"))
}

pub(crate) fn call_to(path: &str) -> http::request::Builder {
    Request::post(format!("https://kiln.local{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

fn framed(message: &[u8]) -> Bytes {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend(message);
    frame.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_connections_from_one_address_leaves_others_theirs() {
    let handshake = Duration::from_secs(2);
    let limits = Limits { connections: 40, connections_per_address: 10, handshake, ..Limits::default() };
    let site = Site::start_with(limits).await;
    let client = site.as_role(Role::Viewer);
    serves(&client).await;
    let begin = Instant::now();
    let mut flood = Vec::new();
    for _ in 0..300 {
        flood.push(connect(ELSEWHERE, site.address).await.unwrap());
    }
    // Ten sit there and shake no hands; the others are closed at once.
    let mut closed = 0;
    for stream in &mut flood {
        let read = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut [0; 1])).await;
        closed += usize::from(read.is_ok());
        if begin.elapsed() > handshake / 2 {
            break;
        }
    }
    assert!(closed > 20, "{closed}");
    serves(&client).await;
    serves(&site.as_role(Role::Operator)).await;
    serves(&site.running.client()).await;
    // They give their places up after the time for a handshake, and the address is let in again.
    let viewer = site.certificate(Role::Viewer);
    until("the address is let in again", async || {
        let stream = site.tls(site.address, Some(&viewer), b"h2", ELSEWHERE).await;
        let Ok(stream) = stream else { return false };
        h2::client::handshake(stream).await.is_ok()
    })
    .await;
    drop(flood);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_asks_for_nothing_is_closed() {
    let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
    let site = Site::start_with(limits).await;
    let viewer = site.certificate(Role::Viewer);
    // Both with a handshake that was done, and on the Unix socket.
    let mut stream = site.tls(site.address, Some(&viewer), b"h2", LOCALHOST).await.unwrap();
    let read = async { while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {} };
    tokio::time::timeout(LONG, read).await.expect("it stays open");
    let mut stream = tokio::net::UnixStream::connect(site.running.socket()).await.unwrap();
    let read = async { while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {} };
    tokio::time::timeout(LONG, read).await.expect("it stays open");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rapid_resets_end_their_connection_alone() {
    let site = Site::start().await;
    let client = site.as_role(Role::Viewer);
    let attacker = site.certificate(Role::Operator);
    let stream = site.tls(site.address, Some(&attacker), b"h2", ELSEWHERE).await.unwrap();
    let (mut raw, connection) = by_hand(stream).await;
    let mut sent = 0;
    for _ in 0..RESETS {
        let request = call("ListSignals").body(()).unwrap();
        let Ok((_, mut body)) = raw.send_request(request, false) else { break };
        body.send_reset(h2::Reason::CANCEL);
        sent += 1;
        if sent % 100 == 0 {
            tokio::task::yield_now().await;
        }
        if connection.is_finished() {
            break;
        }
    }
    serves(&client).await;
    serves(&site.running.client()).await;
    drop(raw);
    let ended = tokio::time::timeout(LONG, connection).await.expect("it goes on").unwrap();
    println!("{sent} resets sent; the connection ended as {ended:?}");
    // It is told to calm down, and may be at the sending still when the server hangs up.
    let ended = ended.expect_err("the connection was left to end by itself");
    assert!(sent < RESETS, "all of them were taken");
    assert!(ended.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM) || ended.is_io(), "{ended:?}");
    serves(&client).await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_takes_nothing_fills_no_memory_and_is_cut_off() {
    let limits = Limits { alive: Duration::from_millis(500), ..Limits::default() };
    let site = Site::start_with(limits).await;
    let client = site.as_role(Role::Viewer);
    let slow = site.certificate(Role::Operator);
    // Ten streams without end. Nobody drives the connection after that: nothing is read from it at all.
    let stream = site.tls(site.address, Some(&slow), b"h2", ELSEWHERE).await.unwrap();
    let (raw, mut connection) = h2::client::handshake(stream).await.unwrap();
    let mut raw = raw.ready().await.unwrap();
    let flood = WatchHealthRequest { server: "flood".to_owned(), own: false }.encode_to_vec();
    let mut answers = Vec::new();
    for _ in 0..10 {
        let (answer, mut body) = raw.send_request(call("WatchHealth").body(()).unwrap(), false).unwrap();
        body.send_data(framed(&flood), true).unwrap();
        answers.push((answer, body));
    }
    // Until all of it is sent.
    let told = &site.running.told;
    let begin = Instant::now();
    while told.made.load(Ordering::SeqCst) < 10 {
        assert!(begin.elapsed() < LONG, "the streams never began");
        let _ = tokio::time::timeout(Duration::from_millis(5), &mut connection).await;
    }
    until("the connection is cut off", async || {
        serves(&client).await;
        told.left.load(Ordering::SeqCst) == 10
    })
    .await;
    let made = told.made.load(Ordering::SeqCst);
    println!("{made} messages of {FLOOD} bytes were made for 10 streams that nobody read");
    assert!(made * FLOOD < 32 << 20, "{made} messages");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_read_slowly_waits_for_its_reader() {
    let site = Site::start().await;
    let client = site.as_role(Role::Viewer);
    // This one answers pings, and takes no message.
    let request = WatchHealthRequest { server: "flood".to_owned(), own: false };
    let stream = site.as_role(Role::Operator).watch_health(request).await.unwrap().into_inner();
    let told = &site.running.told;
    let mut before = 0;
    let settled = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let made = told.made.load(Ordering::SeqCst);
        if made == before && made > 0 {
            break;
        }
        before = made;
        assert!(settled.elapsed() < LONG, "{made} messages, and no end");
    }
    assert!(before * FLOOD < 8 << 20, "{before} messages for a reader that takes none");
    serves(&client).await;
    drop(stream);
    until("the stream ends with its reader", async || told.left.load(Ordering::SeqCst) == 1).await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_headers_are_refused() {
    let site = Site::start().await;
    let client = site.as_role(Role::Viewer);
    for local in [true, false] {
        let operator = site.certificate(Role::Operator);
        let huge = call("ListHealth").header("x-huge", "x".repeat(60 << 10)).body(()).unwrap();
        let (mut raw, connection) = if local {
            by_hand(tokio::net::UnixStream::connect(site.running.socket()).await.unwrap()).await
        } else {
            by_hand(site.tls(site.address, Some(&operator), b"h2", ELSEWHERE).await.unwrap()).await
        };
        let (answer, mut body) = raw.send_request(huge, false).unwrap();
        // It may have been refused before its body went out.
        let _ = body.send_data(framed(&[]), true);
        let answer = tokio::time::timeout(LONG, answer).await.expect("no answer");
        assert_eq!(answer.expect("an answer in words of HTTP").status(), 431);
        serves(&client).await;
        connection.abort();
    }
    let viewer = site.certificate(Role::Viewer);
    let mut page = site.tls(site.metrics, Some(&viewer), b"http/1.1", ELSEWHERE).await.unwrap();
    let huge = "x".repeat(60 << 10);
    let huge = format!("GET {METRICS} HTTP/1.1\r\nhost: kiln.local\r\nx-huge: {huge}\r\n\r\n");
    // The server hangs up before it has read all of it.
    let _ = page.write_all(huge.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(LONG, page.read_to_end(&mut answer)).await.expect("it stays open");
    assert!(answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_calls_than_one_may_make_are_refused_with_words() {
    let people = Rate { calls_per_second: 5.0, burst: 10.0, under_way: 3 };
    let site = Site::start_with(Limits { people, ..Limits::default() }).await;
    let (ada, service) = (site.as_role(Role::Viewer), site.as_role(Role::Deployer));
    let mut refused = None;
    for _ in 0..20 {
        if let Err(status) = look(&ada).await {
            refused = Some(status);
        }
        look(&service).await.unwrap();
        look(&site.running.client()).await.unwrap();
    }
    let status = refused.expect("twenty calls at once were let in");
    assert_eq!(status.code(), Code::ResourceExhausted);
    let text = describe(&status);
    assert!(text.contains("ada (viewer, by certificate) makes more than 5 calls a second"), "{text}");
    assert!(text.contains("ask less often"), "{text}");
    until("the bucket fills up again", async || look(&ada).await.is_ok()).await;
    // Streams are under way until they end.
    let mut streams = Vec::new();
    while streams.len() < 3 {
        match ada.clone().watch_health(WatchHealthRequest::default()).await {
            Ok(stream) => streams.push(stream),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let status = look(&ada).await.unwrap_err();
    assert!(status.message().contains("has 3 calls under way"), "{status}");
    drop(streams);
    until("the streams are over", async || look(&ada).await.is_ok()).await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_over_the_limit_is_refused_though_its_service_takes_larger_ones() {
    let site = Site::start().await;
    let client = site.as_role(Role::Operator);
    let mut large = report("r1");
    large.summary = "x".repeat(5 << 20);
    let status = client.clone().report_signal(large).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    assert!(status.message().contains("4194304 bytes"), "{status}");
    serves(&client).await;
    // A length that is a lie: four gigabytes are announced, and none comes.
    let operator = site.certificate(Role::Operator);
    let stream = site.tls(site.address, Some(&operator), b"h2", ELSEWHERE).await.unwrap();
    let (mut raw, connection) = by_hand(stream).await;
    let (answer, mut body) = raw.send_request(call("ReportSignal").body(()).unwrap(), false).unwrap();
    body.send_data(Bytes::from_static(b"\0\xff\xff\xff\xff"), true).unwrap();
    let answer = tokio::time::timeout(LONG, answer).await.expect("no answer").unwrap();
    assert_eq!(answer.headers()["grpc-status"], "11", "{answer:?}");
    connection.abort();
    serves(&client).await;
    site.stop().await;
}
