//! A client that asks for one page over and over, with a new connection for each request, and counts every error.
//!
//! Prints one JSON line when its time is over, or on SIGINT or SIGTERM.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

const USAGE: &str = "usage: kiln-load --to ADDRESS:PORT [--path /] [--clients 8] [--rate 300] [--seconds N] [--text T]

--rate     requests a second in all. Each takes a port of this machine until it is forgotten; there are some 28,000
           for one address, kept for up to a minute, so that more than 400 a second would run out of them
--seconds  without it: until SIGINT or SIGTERM
--text     a text that each answer must contain

Exit code 0 where every request was answered with status 200, in full; 1 where not; 2 for a wrong command line.";

/// A stuck request is an error, and no reason to send fewer of the others.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Failures that are kept with their time; the count goes on.
const KEPT: usize = 1000;

struct Options {
    to: SocketAddr,
    path: String,
    clients: u32,
    rate: f64,
    seconds: Option<f64>,
    text: String,
}

fn options() -> Result<Options, String> {
    let (mut to, mut path, mut clients, mut rate) = (None, "/".to_owned(), 8, 300.0);
    let (mut seconds, mut text) = (None, String::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        let wrong = |error: &dyn std::fmt::Display| format!("{name} {value}: {error}");
        match name.as_str() {
            "--to" => to = Some(value.parse().map_err(|error| wrong(&error))?),
            "--path" => path.clone_from(&value),
            "--text" => text.clone_from(&value),
            "--clients" => clients = value.parse().map_err(|error| wrong(&error))?,
            "--rate" => rate = value.parse().map_err(|error| wrong(&error))?,
            "--seconds" => seconds = Some(value.parse().map_err(|error| wrong(&error))?),
            _ => return Err(format!("no option {name}")),
        }
    }
    let sane = clients > 0 && rate > 0.0 && seconds.is_none_or(|seconds: f64| seconds > 0.0);
    let to = to.ok_or("--to is missing")?;
    if sane {
        Ok(Options { to, path, clients, rate, seconds, text })
    } else {
        Err("numbers must be above zero".into())
    }
}

#[derive(Default)]
struct Tally {
    requests: AtomicU64,
    failed: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    failures: Vec<(Timestamp, String)>,
    micros: Vec<u32>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => Arc::new(options),
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let tally = Arc::new(Tally::default());
    let (stop, stopped) = watch::channel(false);
    let begun = Instant::now();
    let clients: Vec<_> = (0..options.clients)
        .map(|_| tokio::spawn(client(Arc::clone(&options), Arc::clone(&tally), stopped.clone())))
        .collect();
    wait(options.seconds).await;
    // Whether anyone still listens is of no interest.
    let _ = stop.send(true);
    for client in clients {
        // What is in flight is waited for: it counts as well. A client that panicked is a failure of its own.
        if client.await.is_err() {
            tally.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (requests, failed) = (tally.requests.load(Ordering::Relaxed), tally.failed.load(Ordering::Relaxed));
    println!("{}", summary(&tally, begun.elapsed()));
    // Nothing asked is nothing shown.
    if requests > 0 && failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn wait(seconds: Option<f64>) {
    let interrupted = async {
        let (Ok(mut interrupt), Ok(mut terminate)) =
            (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            return std::future::pending().await;
        };
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
    };
    match seconds {
        Some(seconds) => {
            let _ = timeout(Duration::from_secs_f64(seconds), interrupted).await;
        }
        None => interrupted.await,
    }
}

async fn client(options: Arc<Options>, tally: Arc<Tally>, mut stopped: watch::Receiver<bool>) {
    let mut beat = interval(Duration::from_secs_f64(f64::from(options.clients) / options.rate));
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = stopped.changed() => return,
            _ = beat.tick() => {}
        }
        let begun = Instant::now();
        let at = Timestamp::now();
        let result = timeout(REQUEST_TIMEOUT, request(&options)).await;
        tally.requests.fetch_add(1, Ordering::Relaxed);
        let problem = match result {
            Ok(Ok(())) => None,
            Ok(Err(problem)) => Some(problem),
            Err(_) => Some("no answer in 5 s".to_owned()),
        };
        let Ok(mut seen) = tally.seen.lock() else { return };
        match problem {
            None => seen.micros.push(u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX)),
            Some(problem) => {
                tally.failed.fetch_add(1, Ordering::Relaxed);
                if seen.failures.len() < KEPT {
                    seen.failures.push((at, problem));
                }
            }
        }
    }
}

async fn request(options: &Options) -> Result<(), String> {
    let mut stream = TcpStream::connect(options.to).await.map_err(|error| format!("connect: {error}"))?;
    let head = format!("GET {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", options.path, options.to);
    stream.write_all(head.as_bytes()).await.map_err(|error| format!("send: {error}"))?;
    let mut answer = Vec::with_capacity(1024);
    stream.read_to_end(&mut answer).await.map_err(|error| format!("receive: {error}"))?;
    check(&answer, &options.text)
}

/// Status 200 and as many bytes as were announced.
fn check(answer: &[u8], text: &str) -> Result<(), String> {
    let answer = String::from_utf8_lossy(answer);
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return Err(if answer.is_empty() {
            "closed without an answer".into()
        } else {
            "half an answer".into()
        });
    };
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(status.to_owned());
    }
    let announced = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, length)| length.trim().parse::<usize>().ok());
    if announced.is_some_and(|length| length != body.len()) {
        return Err(format!("{} bytes of {}", body.len(), announced.unwrap_or_default()));
    }
    if body.contains(text) { Ok(()) } else { Err(format!("the answer does not contain `{text}`")) }
}

fn summary(tally: &Tally, took: Duration) -> serde_json::Value {
    let Ok(mut seen) = tally.seen.lock() else { return serde_json::Value::Null };
    seen.micros.sort_unstable();
    let millis = |part: f64| {
        let last = seen.micros.len().checked_sub(1)?;
        seen.micros.get((last as f64 * part) as usize).map(|micros| f64::from(*micros) / 1000.0)
    };
    let failures: Vec<_> = seen
        .failures
        .iter()
        .map(|(at, problem)| serde_json::json!({ "at": at.to_string(), "problem": problem }))
        .collect();
    serde_json::json!({
        "requests": tally.requests.load(Ordering::Relaxed),
        "failed": tally.failed.load(Ordering::Relaxed),
        "seconds": took.as_secs_f64(),
        "p50_ms": millis(0.5),
        "p99_ms": millis(0.99),
        "max_ms": millis(1.0),
        "failures": failures,
    })
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn only_a_whole_answer_with_status_200_is_none_of_the_failures() {
        assert_eq!(check(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHello", "Hell"), Ok(()));
        for bad in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\nCont",
            b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHel",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nBye",
        ] {
            assert!(check(bad, "Hel").is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
