//! Clients that keep their connections: none may end, whatever happens to Kiln beside an instance that serves on.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::Result;

/// Of one client. nginx ends a connection after a thousand requests: a few minutes.
const PERIOD: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_secs(5);
/// Answers are small pages; what is larger is not ours.
const MAX_ANSWER: usize = 1 << 20;

/// Connections that are open until [`Kept::stop`], with requests on them.
pub struct Kept {
    stop: watch::Sender<bool>,
    clients: Vec<JoinHandle<Result<u64>>>,
}

impl Kept {
    pub fn start(target: SocketAddr, clients: usize) -> Self {
        let (stop, stopped) = watch::channel(false);
        let client = |_| tokio::spawn(client(target, stopped.clone()));
        let clients = (0..clients).map(client).collect();
        Self { stop, clients }
    }

    /// Ends them, and gives how many requests were answered.
    ///
    /// # Errors
    /// How the first connection ended before.
    pub async fn stop(self) -> Result<u64> {
        self.stop.send_replace(true);
        let mut answered = 0;
        for client in self.clients {
            answered += client.await??;
        }
        Ok(answered)
    }
}

async fn client(target: SocketAddr, mut stopped: watch::Receiver<bool>) -> Result<u64> {
    let describe = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let stream = TcpStream::connect(target).await.map_err(|error| describe("connect", error))?;
    let mut stream = BufReader::new(stream);
    let mut answered = 0;
    while !*stopped.borrow() {
        let asked = timeout(TIMEOUT, ask(&mut stream, target)).await;
        asked
            .map_err(|_| format!("no answer within {TIMEOUT:?}"))?
            .map_err(|error| describe(&format!("a kept connection, after {answered} answers"), error))?;
        answered += 1;
        // An error means that nobody can say so any more, which is an end as well.
        let _ = timeout(PERIOD, stopped.wait_for(|stopped| *stopped)).await;
    }
    Ok(answered)
}

/// One GET of `/`, with status 200 and a body of the length that was announced.
async fn ask(stream: &mut BufReader<TcpStream>, target: SocketAddr) -> std::io::Result<()> {
    let wrong = |what: String| std::io::Error::new(std::io::ErrorKind::InvalidData, what);
    let request = format!("GET / HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut length = None;
    let mut first = true;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if std::mem::take(&mut first) && !line.contains(" 200 ") {
            return Err(wrong(line));
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok().filter(|length| *length <= MAX_ANSWER);
        }
    }
    let mut body = vec![0; length.ok_or_else(|| wrong("an answer without a length".to_owned()))?];
    stream.read_exact(&mut body).await.map(drop)
}
