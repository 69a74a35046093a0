//! A client with a connection for each request: every error counts, with the moment at which it was seen.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

/// A request that is not answered by then has failed.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Answers are small pages; what is larger is not ours.
const MAX_ANSWER: usize = 1 << 20;

/// What a load saw. Times are since its start, in milliseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Summary {
    pub requests: u64,
    pub failed: u64,
    pub failures: Vec<Failure>,
    pub elapsed_ms: u64,
    /// The slowest answer.
    pub slowest_ms: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// When the request began and when it had failed.
    pub began_ms: u64,
    pub ended_ms: u64,
    pub reason: String,
}

/// Requests under way until [`Load::stop`].
pub struct Load {
    shared: Arc<Shared>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

struct Shared {
    target: SocketAddr,
    wanted: String,
    start: Instant,
    stop: AtomicBool,
    requests: AtomicU64,
    slowest_ms: AtomicU64,
    failures: Mutex<Vec<Failure>>,
}

impl Load {
    /// Starts `clients` loops of GET requests; an answer is good with status 200 and `wanted` in its body. Each pauses
    /// for `pause` between two requests.
    pub fn start(target: SocketAddr, clients: usize, pause: Duration, wanted: &str) -> Self {
        let shared = Arc::new(Shared {
            target,
            wanted: wanted.to_owned(),
            start: Instant::now(),
            stop: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            slowest_ms: AtomicU64::new(0),
            failures: Mutex::new(Vec::new()),
        });
        let clients = (0..clients).map(|_| tokio::spawn(Arc::clone(&shared).client(pause))).collect();
        Self { shared, clients }
    }

    /// Requests that were answered or failed so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Since the start, in milliseconds: the clock of [`Failure`].
    pub fn now_ms(&self) -> u64 {
        self.shared.elapsed_ms()
    }

    /// Failures so far.
    pub async fn failures(&self) -> Vec<Failure> {
        self.shared.failures.lock().await.clone()
    }

    /// Ends all loops after the request that each has under way.
    pub async fn stop(self) -> Summary {
        self.shared.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            // A client that panicked would hide failures: count it as one.
            if let Err(error) = client.await {
                self.shared.failed(0, error.to_string()).await;
            }
        }
        let failures = self.shared.failures.lock().await.clone();
        Summary {
            requests: self.shared.requests.load(Ordering::Relaxed),
            failed: failures.len() as u64,
            failures,
            elapsed_ms: self.shared.elapsed_ms(),
            slowest_ms: self.shared.slowest_ms.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn failed(&self, began_ms: u64, reason: String) {
        self.failures.lock().await.push(Failure { began_ms, ended_ms: self.elapsed_ms(), reason });
    }

    async fn client(self: Arc<Self>, pause: Duration) {
        while !self.stop.load(Ordering::Relaxed) {
            let began_ms = self.elapsed_ms();
            match tokio::time::timeout(TIMEOUT, get(self.target, &self.wanted)).await {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => self.failed(began_ms, reason).await,
                Err(_) => self.failed(began_ms, format!("no answer within {TIMEOUT:?}")).await,
            }
            self.requests.fetch_add(1, Ordering::Relaxed);
            self.slowest_ms.fetch_max(self.elapsed_ms() - began_ms, Ordering::Relaxed);
            tokio::time::sleep(pause).await;
        }
    }
}

/// One GET of `/` on a connection of its own.
///
/// # Errors
/// What failed, or what was wrong with the answer.
pub async fn get(target: SocketAddr, wanted: &str) -> Result<(), String> {
    let answer = fetch(target, "/").await?;
    if !answer.starts_with("HTTP/1.1 200 ") {
        return Err(format!("answer {:?}", answer.lines().next().unwrap_or_default()));
    }
    if !answer.contains(wanted) {
        return Err(format!("the answer holds no {wanted:?}"));
    }
    Ok(())
}

/// The whole answer to one GET, head and body.
///
/// # Errors
/// What failed, for people.
pub async fn fetch(target: SocketAddr, path: &str) -> Result<String, String> {
    let describe = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let mut stream = TcpStream::connect(target).await.map_err(|error| describe("connect", error))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| describe("send", error))?;
    let mut answer = Vec::new();
    let limit = u64::try_from(MAX_ANSWER).unwrap_or(u64::MAX);
    stream.take(limit).read_to_end(&mut answer).await.map_err(|error| describe("receive", error))?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let whole = text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
        let length = head
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned));
        length.and_then(|length| length.parse::<usize>().ok()).is_none_or(|length| length <= body.len())
    });
    if whole { Ok(text) } else { Err(format!("the answer ended after {} bytes", answer.len())) }
}
