//! The archives of a snapshot, offered to apt in a sandbox that reaches nothing else: over a socket of the file system, and
//! nothing but what the lists name.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::TryStreamExt as _;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use kiln_image::tar::clean_path;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::io::ReaderStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::LogSink;
use super::apt::Solved;
use super::error::BakeError;
use super::fetch::Transport;
use super::packages::PackageStore;
use super::snapshot::Snapshot;

/// apt opens one for each archive.
const CONNECTIONS: usize = 64;
/// Each is a process.
const FETCHES: usize = 4;
const HEADER_TIME: Duration = Duration::from_secs(30);
const BLOCK: usize = 1 << 17;

type Body = BoxBody<Bytes, io::Error>;

/// What a snapshot has, until this is dropped.
pub(crate) struct Offered {
    serving: JoinHandle<()>,
    /// Ends what is fetched at that moment.
    _ended: DropGuard,
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

struct Archives {
    snapshot: Snapshot,
    store: PackageStore,
    /// Read when the first one is asked for: most runs install nothing.
    packages: OnceCell<HashMap<String, Solved>>,
    /// Bytes that may still be asked for.
    left: AtomicU64,
    fetching: Semaphore,
    credentials: Option<PathBuf>,
    log: LogSink,
    cancel: CancellationToken,
}

impl Offered {
    /// Listens at `socket`, as part of the runtime that this is called in. Packages of at most so many bytes are given.
    pub(crate) fn begin(
        snapshot: Snapshot,
        store: PackageStore,
        socket: &Path,
        bytes: u64,
        transport: Transport<'_>,
    ) -> Result<Self, BakeError> {
        let listener = UnixListener::bind(socket).map_err(BakeError::io("listen at", socket))?;
        // The sandbox's users are others than this process's.
        fs::set_permissions(socket, Permissions::from_mode(0o666))
            .map_err(BakeError::io("open up", socket))?;
        let cancel = transport.cancel.child_token();
        let ended = cancel.clone().drop_guard();
        let archives = Arc::new(Archives {
            snapshot,
            store,
            packages: OnceCell::new(),
            left: bytes.into(),
            fetching: Semaphore::new(FETCHES),
            credentials: transport.credentials.map(Path::to_owned),
            log: Arc::clone(transport.log),
            cancel,
        });
        Ok(Self { serving: tokio::spawn(accept(listener, archives)), _ended: ended })
    }
}

async fn accept(listener: UnixListener, archives: Arc<Archives>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let archives = Arc::clone(&archives);
                // Aborted with the set.
                connections.spawn(async move {
                    serve(stream, archives).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a step's connection to the archives was not taken");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(stream: UnixStream, archives: Arc<Archives>) {
    let answer = service_fn(|request| {
        let archives = Arc::clone(&archives);
        async move { Ok::<_, Infallible>(archives.answer(&request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a step's connection to the archives ended");
    }
}

impl Archives {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        if request.method() != Method::GET {
            return without_body(StatusCode::METHOD_NOT_ALLOWED);
        }
        let asked = request.uri().path().trim_start_matches('/');
        let Ok(path) = percent_encoding::percent_decode_str(asked).decode_utf8() else {
            return without_body(StatusCode::BAD_REQUEST);
        };
        let failed = |why: &dyn std::fmt::Display, status| {
            (self.log)(&format!("{} can't be given to apt: {why}", path.escape_debug()));
            without_body(status)
        };
        match self.find(&path).await {
            Ok(Found::File(file)) => with_file(&file)
                .await
                .unwrap_or_else(|error| failed(&error, StatusCode::INTERNAL_SERVER_ERROR)),
            Ok(Found::Nothing) => without_body(StatusCode::NOT_FOUND),
            Ok(Found::TooMuch) => {
                failed(&"the step has had all that it may", StatusCode::INSUFFICIENT_STORAGE)
            }
            Err(error) => failed(&error, StatusCode::BAD_GATEWAY),
        }
    }

    async fn find(&self, path: &str) -> Result<Found, BakeError> {
        if let Some(file) = self.snapshot.file(path) {
            return Ok(Found::File(file));
        }
        let clean = clean_path(path.as_bytes()).unwrap_or_default();
        let asked = String::from_utf8(clean).unwrap_or_default();
        if !asked.ends_with(".deb") {
            return Ok(Found::Nothing);
        }
        let read = async || tokio::task::block_in_place(|| self.snapshot.packages());
        let packages = self.packages.get_or_try_init(read).await?;
        let Some(solved) = packages.get(&asked) else { return Ok(Found::Nothing) };
        let take = |left: u64| left.checked_sub(solved.package.size);
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return Ok(Found::TooMuch);
        }
        let Ok(_place) = self.fetching.acquire().await else { return Err(BakeError::Cancelled) };
        let fetch = || {
            self.store.remember(std::slice::from_ref(solved))?;
            let credentials = self.credentials.as_deref();
            let transport = Transport { credentials, log: &self.log, cancel: &self.cancel };
            self.store.fetch(std::iter::once(&solved.package), transport)
        };
        tokio::task::block_in_place(fetch)?;
        Ok(Found::File(self.store.path(&solved.package.sha256)))
    }
}

enum Found {
    File(PathBuf),
    Nothing,
    TooMuch,
}

async fn with_file(path: &Path) -> io::Result<Response<Body>> {
    let file = tokio::fs::File::open(path).await?;
    let length = file.metadata().await?.len();
    let blocks = ReaderStream::with_capacity(file, BLOCK).map_ok(Frame::data);
    let mut response = Response::new(StreamBody::new(blocks).boxed());
    response.headers_mut().insert(hyper::header::CONTENT_LENGTH, length.into());
    Ok(response)
}

fn without_body(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Empty::new().map_err(|never: Infallible| match never {}).boxed());
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::super::snapshot::tests::{archives, lists};
    use super::*;

    /// The status and the body of the answer to a request for a path.
    async fn get(socket: &Path, path: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: archive\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_what_the_snapshot_has_is_given_and_only_so_much() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        let key = Snapshot::keep(home, &archives(), &lists(home, "first")).unwrap();
        let snapshot = Snapshot::open(home, &key).unwrap();
        let nginx = snapshot.packages().unwrap()["0/pool/n/nginx_1.22-9_all.deb"].package.clone();
        let store = PackageStore::open(&home.join("packages")).unwrap();
        fs::write(store.path(&nginx.sha256), b"content").unwrap();
        let (socket, log): (_, LogSink) = (home.join("socket"), Arc::new(|_: &str| {}));
        let cancel = CancellationToken::new();
        let transport = Transport { credentials: None, log: &log, cancel: &cancel };
        let offered = Offered::begin(snapshot, store, &socket, 2 * nginx.size, transport).unwrap();

        assert_eq!(get(&socket, "/0/dists/bookworm/InRelease").await, (200, "first".to_owned()));
        for path in
            ["/", "/0/dists/bookworm/", "/0/pool/../../secret.deb", "/0/%2e%2e/x.deb", "/1/pool/last.deb"]
        {
            assert_eq!(get(&socket, path).await.0, 404, "{path}");
        }
        assert_eq!(get(&socket, "/0/%ff.deb").await.0, 400);
        let path = "/0/./pool/n/nginx_1.22-9_all.deb";
        assert_eq!(get(&socket, path).await, (200, "content".to_owned()));
        assert_eq!(get(&socket, path).await.0, 200);
        assert_eq!(get(&socket, path).await.0, 507, "twice is all that the step may have");
        drop(offered);
        let gone = async {
            while UnixStream::connect(&socket).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap();
    }
}
