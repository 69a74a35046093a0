//! How long a call, a connection and a look at the metrics may last, and how many of each there may be.

use std::path::Path;
use std::time::{Duration, Instant};

use kiln_api::monitor::{ListSignalsRequest, WatchHealthRequest};
use kiln_service::access::{METRICS, Role};
use kiln_service::server::Limits;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tonic::Code;

use crate::limits::{ELSEWHERE, LONG, by_hand, call, look, serves, until};
use crate::site::{LOCALHOST, Site};

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_finds_no_answer_ends_at_its_bound_and_a_stream_that_began_goes_on() {
    let bound = Duration::from_millis(400);
    let site = Site::start_with(Limits { call: bound, ..Limits::default() }).await;
    for mut client in [site.running.client(), site.as_role(Role::Viewer)] {
        let mut stream = client.watch_health(WatchHealthRequest::default()).await.unwrap().into_inner();
        stream.message().await.unwrap().expect("its first answer");
        let begin = Instant::now();
        // Its answer never comes.
        let ended = tokio::time::timeout(LONG, client.list_signals(ListSignalsRequest::default()));
        let status = ended.await.expect("it goes on").unwrap_err();
        assert!(begin.elapsed() >= bound, "{:?}: {status}", begin.elapsed());
        assert_eq!((status.code(), status.message()), (Code::Cancelled, "Timeout expired"), "{status}");
        serves(&client).await;
        let next = tokio::time::timeout(bound * 2, stream.message()).await;
        assert!(next.is_err(), "the stream has ended: {next:?}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_connection_takes_no_new_calls_and_lets_the_old_ones_end() {
    let age = Duration::from_secs(1);
    let site = Site::start_with(Limits { age, ..Limits::default() }).await;
    let client = site.as_role(Role::Viewer);
    serves(&client).await;
    let viewer = site.certificate(Role::Viewer);
    let begin = Instant::now();
    let stream = site.tls(site.address, Some(&viewer), b"h2", ELSEWHERE).await.unwrap();
    let (raw, connection) = by_hand(stream).await;
    let new_call = || {
        let mut raw = raw.clone();
        raw.send_request(call("ListSignals").body(()).unwrap(), false)
    };
    let (_answer, _body) = new_call().expect("a new connection takes calls");
    let mut refused = None;
    until("new calls are refused", async || {
        refused = new_call().err();
        refused.is_some()
    })
    .await;
    assert!(begin.elapsed() >= age, "after {:?}", begin.elapsed());
    let refused = refused.unwrap();
    assert!(refused.is_go_away() && refused.reason() == Some(h2::Reason::NO_ERROR), "{refused:?}");
    assert!(!connection.is_finished(), "the call that began before was cut off");
    // Who calls as Kiln does notices nothing.
    serves(&client).await;
    connection.abort();
    site.stop().await;
}

/// One frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A call's headers, each name and value as it is.
fn headers(stream: u32) -> Vec<u8> {
    let fields = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", "/kiln.monitor.v1.MonitorService/ListSignals"),
        (":authority", "kiln.local"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    const END_HEADERS: u8 = 4;
    frame(1, END_HEADERS, stream, &block)
}

/// Byte for byte: a client's library keeps to the bound by itself, which is told to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_more_than_a_connection_may_have_is_refused() {
    let site = Site::start_with(Limits { streams: 4, ..Limits::default() }).await;
    let client = site.as_role(Role::Viewer);
    let operator = site.certificate(Role::Operator);
    let mut stream = site.tls(site.address, Some(&operator), b"h2", ELSEWHERE).await.unwrap();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    // Streams of clients have odd numbers.
    for number in 0..5 {
        bytes.extend(headers(number * 2 + 1));
    }
    stream.write_all(&bytes).await.unwrap();
    let (mut told, mut refused) = (None, None);
    let read = async {
        while refused.is_none() {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            stream.read_exact(&mut payload).await.unwrap();
            let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            match head[3] {
                // SETTINGS: what MAX_CONCURRENT_STREAMS is.
                4 => {
                    told = told.or((0..payload.len())
                        .step_by(6)
                        .find(|at| payload[*at..at + 2] == [0, 3])
                        .map(|at| number(at + 2)))
                }
                3 => refused = Some((u32::from_be_bytes(head[5..].try_into().unwrap()), number(0))),
                7 => panic!("the connection has ended: {payload:?}"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(LONG, read).await.expect("the fifth call was let in");
    assert_eq!(told, Some(4), "clients are told of the bound");
    assert_eq!(refused, Some((9, h2::Reason::REFUSED_STREAM.into())));
    serves(&client).await;
    assert!(look(&site.as_role(Role::Operator)).await.is_ok(), "on another connection there is a place");
    site.stop().await;
}

async fn scraper(site: &Site, identity: &Path) -> TlsStream<TcpStream> {
    site.tls(site.metrics, Some(identity), b"http/1.1", LOCALHOST).await.unwrap()
}

fn get() -> String {
    format!("GET {METRICS} HTTP/1.1\r\nhost: kiln.local\r\n\r\n")
}

async fn is_answered(stream: &mut TlsStream<TcpStream>) -> bool {
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).await.is_ok() && &begin == b"HTTP/1.1 200"
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_headers_gives_its_place_at_the_metrics_up() {
    let handshake = Duration::from_secs(1);
    let site = Site::start_with(Limits { scrapes: 2, handshake, ..Limits::default() }).await;
    let viewer = site.certificate(Role::Viewer);
    let mut silent = Vec::new();
    for _ in 0..2 {
        let mut stream = scraper(&site, &viewer).await;
        // More than the first bytes of a connection, and no end.
        stream.write_all(format!("GET {METRICS} HTTP/1.1\r\nhost: kiln.local\r\n").as_bytes()).await.unwrap();
        silent.push(stream);
    }
    let begin = Instant::now();
    let mut third = scraper(&site, &viewer).await;
    third.write_all(get().as_bytes()).await.unwrap();
    assert!(tokio::time::timeout(LONG, is_answered(&mut third)).await.expect("nobody gave a place up"));
    // From the first of them, so that the third began later.
    assert!(begin.elapsed() > handshake / 2, "there were more than two places: {:?}", begin.elapsed());
    for mut stream in silent {
        let read = async { while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {} };
        tokio::time::timeout(LONG, read).await.expect("it stays open");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_metrics_again_and_again_gives_its_place_up_too() {
    let scrape = Duration::from_secs(1);
    let site = Site::start_with(Limits { scrapes: 1, scrape, ..Limits::default() }).await;
    let viewer = site.certificate(Role::Viewer);
    let mut greedy = scraper(&site, &viewer).await;
    let begin = Instant::now();
    let ask = async {
        let mut answer = vec![0; 1 << 20];
        while greedy.write_all(get().as_bytes()).await.is_ok()
            && greedy.read(&mut answer).await.is_ok_and(|read| read > 0)
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, ask).await.expect("it is answered without end");
    assert!(begin.elapsed() > scrape / 2, "{:?}", begin.elapsed());
    let mut next = scraper(&site, &viewer).await;
    next.write_all(get().as_bytes()).await.unwrap();
    assert!(tokio::time::timeout(LONG, is_answered(&mut next)).await.expect("there is no place"));
    site.stop().await;
}
