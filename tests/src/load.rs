//! A client with a connection for each request: every error counts, with the moments at which it began and was seen.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// A request that is not answered by then has failed; a stuck one is no reason to send fewer of the others.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Answers are small pages; what is larger is not ours.
const MAX_ANSWER: u64 = 1 << 20;

/// Failures that are kept with their times; the count goes on.
const KEPT: usize = 1000;

/// What is asked for, by how many, how often.
#[derive(Debug, Clone)]
pub struct Options {
    pub target: SocketAddr,
    pub path: String,
    pub clients: u32,
    /// Requests a second of all clients together. Each takes a port of this machine until it is forgotten; there are
    /// some 28,000 for one address, kept for up to a minute, so that more than 400 a second would run out of them.
    pub rate: f64,
    /// An answer is good with status 200 and this text in its body.
    pub wanted: String,
}

/// What a load saw.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub requests: u64,
    pub failed: u64,
    pub seconds: f64,
    /// Of good answers; `None` where there was none.
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub max_ms: Option<f64>,
    pub failures: Vec<Failure>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub began: Timestamp,
    pub ended: Timestamp,
    pub problem: String,
}

impl Summary {
    /// # Errors
    /// Where a request failed, or there were fewer than `least`. The first and the last of what is kept say from when to when.
    pub fn unfailing(&self, least: u64) -> crate::Result<()> {
        if self.failed == 0 && self.requests >= least {
            return Ok(());
        }
        let mut kept = self.failures.iter();
        let ends: Vec<_> = kept.next().into_iter().chain(kept.next_back()).collect();
        let Self { failed, requests, .. } = self;
        Err(format!("{failed} of {requests} requests failed, of at least {least}; the first and the last kept: {ends:?}").into())
    }
}

/// Requests under way until [`Load::stop`].
pub struct Load {
    tally: Arc<Tally>,
    begun: Instant,
    stop: watch::Sender<bool>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

#[derive(Default)]
struct Tally {
    requests: AtomicU64,
    failed: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    failures: Vec<Failure>,
    micros: Vec<u32>,
}

impl Load {
    pub fn start(options: Options) -> Self {
        let (tally, options) = (Arc::new(Tally::default()), Arc::new(options));
        let (stop, stopped) = watch::channel(false);
        let client = |_| tokio::spawn(client(Arc::clone(&options), Arc::clone(&tally), stopped.clone()));
        let clients = (0..options.clients).map(client).collect();
        Self { tally, begun: Instant::now(), stop, clients }
    }

    /// Requests that were answered or failed so far.
    pub fn requests(&self) -> u64 {
        self.tally.requests.load(Ordering::Relaxed)
    }

    /// Ends all clients after the request that each has under way: it counts as well.
    pub async fn stop(self) -> Summary {
        self.stop.send_replace(true);
        for client in self.clients {
            // A client that panicked would hide failures: count it as one.
            if client.await.is_err() {
                self.tally.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut seen = self.tally.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.micros.sort_unstable();
        let millis = |part: f64| {
            let last = seen.micros.len().checked_sub(1)?;
            seen.micros.get((last as f64 * part) as usize).map(|micros| f64::from(*micros) / 1000.0)
        };
        Summary {
            requests: self.tally.requests.load(Ordering::Relaxed),
            failed: self.tally.failed.load(Ordering::Relaxed),
            seconds: self.begun.elapsed().as_secs_f64(),
            p50_ms: millis(0.5),
            p99_ms: millis(0.99),
            max_ms: millis(1.0),
            failures: seen.failures.clone(),
        }
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
        let (start, began) = (Instant::now(), Timestamp::now());
        let answer = timeout(TIMEOUT, fetch(options.target, &options.path)).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {TIMEOUT:?}")));
        let result = answer.and_then(|answer| check(&answer, &options.wanted));
        tally.requests.fetch_add(1, Ordering::Relaxed);
        let mut seen = tally.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => seen.micros.push(u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX)),
            Err(problem) => {
                tally.failed.fetch_add(1, Ordering::Relaxed);
                if seen.failures.len() < KEPT {
                    seen.failures.push(Failure { began, ended: Timestamp::now(), problem });
                }
            }
        }
    }
}

/// One GET of `/` on a connection of its own.
///
/// # Errors
/// What failed, or what was wrong with the answer.
pub async fn get(target: SocketAddr, wanted: &str) -> Result<(), String> {
    check(&fetch(target, "/").await?, wanted)
}

/// The answer to one GET, head and body, whatever it says.
///
/// # Errors
/// What failed, for people.
pub async fn fetch(target: SocketAddr, path: &str) -> Result<String, String> {
    let describe = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let mut stream = TcpStream::connect(target).await.map_err(|error| describe("connect", error))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| describe("send", error))?;
    let mut answer = Vec::with_capacity(1024);
    stream.take(MAX_ANSWER).read_to_end(&mut answer).await.map_err(|error| describe("receive", error))?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Status 200, as many bytes as were announced, and the wanted text among them.
fn check(answer: &str, wanted: &str) -> Result<(), String> {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return Err(if answer.is_empty() { "closed without an answer" } else { "half an answer" }.to_owned());
    };
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("answered {status:?}"));
    }
    let announced = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, length)| length.trim().parse::<usize>().ok());
    match announced {
        Some(length) if length != body.len() => Err(format!("{} bytes of {length}", body.len())),
        _ if body.contains(wanted) => Ok(()),
        _ => Err(format!("the answer holds no {wanted:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn only_a_whole_answer_with_status_200_and_the_text_is_no_failure() {
        assert_eq!(check("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHello", "Hell"), Ok(()));
        for bad in [
            "",
            "HTTP/1.1 200 OK\r\nCont",
            "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHel",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nBye",
        ] {
            assert!(check(bad, "Hel").is_err(), "{bad}");
        }
    }
}
