//! Answers good and bad, from servers that mean no good: a result always comes back, in time, and says what was seen.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use kiln_model::check::{Check, CheckResult, CommandCheck, HttpCheck, TcpCheck};
use kiln_probe::probe;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Long enough that a good answer on a busy machine is in time.
const AMPLE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

/// A server that reads one request's head, then does as told with the connection.
async fn server<F, Fut>(behave: F) -> u16
where
    F: Fn(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((LOCAL, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => break,
                }
            }
            tokio::spawn(behave(stream));
        }
    });
    port
}

async fn fixed(answer: impl Into<Vec<u8>>) -> u16 {
    let answer = answer.into();
    server(move |mut stream| {
        let answer = answer.clone();
        async move {
            // A prober that has seen enough may have left.
            let _ = stream.write_all(&answer).await;
            let _ = stream.shutdown().await;
        }
    })
    .await
}

fn http(port: u16, status: Option<u16>, body: Option<&str>) -> Check {
    Check::Http(HttpCheck { port, path: "/".to_owned(), status, body: body.map(str::to_owned) })
}

async fn ask(port: u16, status: Option<u16>, body: Option<&str>) -> CheckResult {
    probe(LOCAL, &http(port, status, body), AMPLE).await
}

#[tokio::test]
async fn status_and_body_decide() {
    let ok = fixed("HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nHello world").await;
    let moved =
        fixed("HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n").await;
    let broken = fixed("HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n").await;
    let chunked =
        fixed("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nHe\r\n3\r\nllo\r\n0\r\n\r\n").await;
    let until_closed = fixed("HTTP/1.0 200 OK\r\n\r\nHello").await;
    let early_hints =
        fixed("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;

    for (port, status, body, passes, detail) in [
        (ok, None, None, true, "status 200"),
        (ok, Some(200), Some("Hello"), true, "status 200, body contains `Hello`"),
        (ok, Some(200), Some("o w"), true, "status 200, body contains `o w`"),
        (ok, Some(200), Some(""), true, "status 200"),
        (ok, Some(201), None, false, "status 200, wanted 201"),
        (ok, None, Some("Bye"), false, "status 200, the body of 11 bytes does not contain `Bye`"),
        // Not followed: the place that it names does not answer.
        (moved, None, None, true, "status 302"),
        (moved, Some(200), None, false, "status 302, wanted 200"),
        (broken, None, None, false, "status 502, wanted 200 to 399"),
        (broken, Some(502), None, true, "status 502"),
        (chunked, None, Some("Hello"), true, "status 200, body contains `Hello`"),
        (until_closed, None, Some("Hello"), true, "status 200, body contains `Hello`"),
        (until_closed, None, Some("Bye"), false, "status 200, the body of 5 bytes does not contain `Bye`"),
        (early_hints, Some(200), None, true, "status 200"),
    ] {
        let result = ask(port, status, body).await;
        assert_eq!((result.passed, result.detail.as_str()), (passes, detail), "{status:?} {body:?}");
    }
}

#[tokio::test]
async fn one_request_is_sent_and_names_its_place() {
    let listener = TcpListener::bind((LOCAL, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        (String::from_utf8(head).unwrap(), rest.len())
    });
    let check = Check::Http(HttpCheck { port, path: "/ready?a=1".to_owned(), status: None, body: None });
    assert!(probe(LOCAL, &check, AMPLE).await.passed);
    let (head, more) = server.await.unwrap();
    assert!(head.starts_with("GET /ready?a=1 HTTP/1.1\r\n"), "{head}");
    assert!(head.contains(&format!("host: 127.0.0.1:{port}\r\n")), "{head}");
    assert_eq!(more, 0);
}

#[tokio::test]
async fn what_is_not_http_fails_at_once() {
    let long_head = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "a".repeat(1 << 20));
    let many_headers = format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: 1\r\n".repeat(5000));
    for (answer, said) in [
        (b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), "does not speak HTTP/1"),
        (b"\0\xff\x01garbage\r\n\r\n".to_vec(), "does not speak HTTP/1"),
        (b"HTTP/1.1 999999 OK\r\n\r\n".to_vec(), "does not speak HTTP/1"),
        (b"HTTP/2.0 200 OK\r\n\r\n".to_vec(), "does not speak HTTP/1"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab".to_vec(), "HTTP/1"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n".to_vec(), "HTTP/1"),
        (b"HTTP/1.1 200 OK\r\ncontent".to_vec(), "closed the connection"),
        (b"".to_vec(), "closed the connection"),
        (long_head.into_bytes(), "answered with a head of more than"),
        (many_headers.into_bytes(), "answered with a head of more than"),
    ] {
        let shown = String::from_utf8_lossy(&answer[..answer.len().min(60)]).into_owned();
        let result = ask(fixed(answer).await, None, Some("Hello")).await;
        assert!(!result.passed, "{shown}");
        assert!(result.detail.contains(said), "{shown}: {}", result.detail);
        assert!(result.detail.len() < 300, "{}", result.detail);
    }
}

#[tokio::test]
async fn a_body_that_lies_about_its_length_fails() {
    let short = fixed("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nHell").await;
    let result = ask(short, None, Some("Hello")).await;
    assert!(!result.passed && result.detail.contains("before message length reached"), "{}", result.detail);

    let bad_chunk = fixed("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nHello").await;
    assert!(!ask(bad_chunk, None, Some("Hello")).await.passed);
}

#[tokio::test]
async fn an_endless_body_is_read_to_its_bound() {
    let endless = server(|mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(&[b'a'; 65536]).await.is_ok() {}
    })
    .await;
    let result = ask(endless, None, Some("Hello")).await;
    assert_eq!(result.detail, "status 200, the first 1048576 bytes of the body do not contain `Hello`");
    assert!(ask(endless, None, None).await.passed, "without a wanted text the head decides");
}

#[tokio::test]
async fn a_text_across_two_writes_is_found() {
    let port = server(|mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        for byte in b"xxHelHello" {
            let _ = stream.write_all(&[*byte]).await;
            let _ = stream.flush().await;
            tokio::task::yield_now().await;
        }
        // The text was seen: nobody waits for the end that never comes.
        std::future::pending::<()>().await;
    })
    .await;
    assert!(ask(port, None, Some("Hello")).await.passed);
}

#[tokio::test]
async fn the_time_is_kept_whatever_the_server_does() {
    let silent = server(|stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    })
    .await;
    let head_drips = server(|mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
        while stream.write_all(b"x: 1\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let body_drips = server(|mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(b"a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let hints_drip = server(|mut stream| async move {
        while stream.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    for (port, said) in [
        (silent, "did not answer within 300ms"),
        (head_drips, "did not answer within 300ms"),
        (hints_drip, "did not answer within 300ms"),
        (body_drips, "did not end its answer's body within 300ms"),
    ] {
        let started = Instant::now();
        let result = probe(LOCAL, &http(port, None, Some("Hello")), SHORT).await;
        let took = started.elapsed();
        assert!(!result.passed);
        assert!(result.detail.ends_with(said), "{}", result.detail);
        // A busy machine may be late to look; an unbounded wait would be far later.
        assert!(took >= SHORT && took < SHORT * 20, "{took:?}");
        assert!(result.took.as_duration() >= SHORT);
    }
}

#[tokio::test]
async fn a_port_that_nobody_listens_on_is_said_at_once() {
    let listener = TcpListener::bind((LOCAL, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let tcp = Check::Tcp(TcpCheck { port });
    assert!(probe(LOCAL, &tcp, AMPLE).await.passed);
    drop(listener);
    for check in [tcp, http(port, None, None)] {
        let result = probe(LOCAL, &check, AMPLE).await;
        assert!(!result.passed);
        assert_eq!(result.detail, format!("127.0.0.1:{port} refuses connections: nothing listens there"));
    }
}

#[tokio::test]
async fn a_check_that_can_not_be_asked_fails_and_says_why() {
    for path in ["http://127.0.0.1/", "ready", "/a b", "/a\r\nHost: x"] {
        let check = Check::Http(HttpCheck { port: 1, path: path.to_owned(), status: None, body: None });
        let result = probe(LOCAL, &check, AMPLE).await;
        assert!(!result.passed && result.detail.starts_with("the path `"), "{path}: {}", result.detail);
    }
    let command = Check::Command(CommandCheck { run: "true".to_owned(), status: 0, stdout: None });
    assert!(probe(LOCAL, &command, AMPLE).await.detail.contains("run by the node"));
    let unroutable: IpAddr = "255.255.255.255".parse().unwrap();
    assert!(!probe(unroutable, &http(80, None, None), SHORT).await.passed);
}
