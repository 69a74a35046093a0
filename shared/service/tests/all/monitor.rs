//! A small service to call: a monitor that keeps what is reported.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::monitor::monitor_service_server::{MonitorService, MonitorServiceServer};
use kiln_api::monitor::{
    ApproveSignalRequest, ApproveSignalResponse, GetServerStatusRequest, GetServerStatusResponse, Health,
    ListHealthRequest, ListHealthResponse, ListSignalsRequest, ListSignalsResponse, ReportSignalRequest,
    ReportSignalResponse, WatchHealthRequest, WatchHealthResponse,
};
use kiln_api::types::Signal;
use kiln_model::event::{EventType, NewEvent, Service};
use kiln_service::error::ApiError;
use kiln_service::server::{APPLY_LIMIT, Error, Limits, ServerOptions, serve};
use kiln_service::tls::TlsFiles;
use kiln_service::{access, client, requests, trace};
use kiln_store::{Batch, SqlStore};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

pub(crate) type Client = MonitorServiceClient<client::Channel>;

/// Bytes of one message of a stream that never ends.
pub(crate) const FLOOD: usize = 64 << 10;

/// What a stream that never ends came to.
#[derive(Debug, Default)]
pub(crate) struct Flood {
    pub(crate) made: AtomicUsize,
    pub(crate) left: AtomicUsize,
}

struct Told(Arc<Flood>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Clone)]
pub(crate) struct Monitor {
    pub(crate) store: SqlStore,
    pub(crate) told: Arc<Flood>,
}

impl Monitor {
    fn event() -> NewEvent {
        NewEvent {
            kind: EventType::new(Service::Monitor, "server", "needs_update"),
            server: None,
            aggregate_kind: "signal".to_owned(),
            aggregate_id: "s1".to_owned(),
            aggregate_version: 1,
            payload: Vec::new(),
            time: jiff::Timestamp::now(),
            traceparent: trace::current(),
        }
    }
}

#[tonic::async_trait]
impl MonitorService for Monitor {
    async fn report_signal(
        &self,
        request: Request<ReportSignalRequest>,
    ) -> Result<Response<ReportSignalResponse>, Status> {
        let by = access::actor(&request)?;
        let request = request.into_inner();
        let answer = requests::once(&self.store, &request.request_id, &request, || {
            std::future::ready(Ok((
                Batch { events: vec![Self::event()], ..Batch::default() },
                ReportSignalResponse {
                    signal: Some(Signal { id: "s1".to_owned(), reporter: by.clone(), ..Signal::default() }),
                },
            )))
        })
        .await?;
        Ok(Response::new(answer))
    }

    async fn approve_signal(
        &self,
        request: Request<ApproveSignalRequest>,
    ) -> Result<Response<ApproveSignalResponse>, Status> {
        Err(ApiError::not_found("signal", request.into_inner().id).into())
    }

    async fn list_signals(
        &self,
        _: Request<ListSignalsRequest>,
    ) -> Result<Response<ListSignalsResponse>, Status> {
        // Longer than any patience of the tests.
        std::future::pending().await
    }

    async fn list_health(
        &self,
        _: Request<ListHealthRequest>,
    ) -> Result<Response<ListHealthResponse>, Status> {
        Ok(Response::new(Default::default()))
    }

    async fn get_server_status(
        &self,
        _: Request<GetServerStatusRequest>,
    ) -> Result<Response<GetServerStatusResponse>, Status> {
        Ok(Response::new(Default::default()))
    }

    type WatchHealthStream = Pin<Box<dyn futures::Stream<Item = Result<WatchHealthResponse, Status>> + Send>>;

    async fn watch_health(
        &self,
        request: Request<WatchHealthRequest>,
    ) -> Result<Response<Self::WatchHealthStream>, Status> {
        if request.get_ref().server == "flood" {
            let told = Told(self.told.clone());
            let health = Health { instance: "x".repeat(FLOOD), ..Health::default() };
            let answer = WatchHealthResponse { health: Some(health) };
            let flood = futures::stream::repeat_with(move || {
                told.0.made.fetch_add(1, Ordering::SeqCst);
                Ok(answer.clone())
            });
            return Ok(Response::new(Box::pin(flood)));
        }
        let first = futures::stream::iter([Ok(WatchHealthResponse::default())]);
        Ok(Response::new(Box::pin(futures::StreamExt::chain(first, futures::stream::pending()))))
    }
}

/// The monitor at work on a socket of its own.
pub(crate) struct Running {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) task: JoinHandle<Result<(), Error>>,
    pub(crate) store: SqlStore,
    pub(crate) told: Arc<Flood>,
}

pub(crate) fn options(folder: &Path) -> ServerOptions {
    ServerOptions {
        service: Service::Monitor,
        socket: folder.join("monitor.sock"),
        listen: None,
        metrics: None,
        tls: TlsFiles {
            site: "home".parse().unwrap(),
            authority: folder.join("authority.pem"),
            identity: Some(folder.join("monitor.pem")),
        },
        tokens: folder.join("tokens.toml"),
        limits: Limits::default(),
        ready: None,
        refusals: None,
    }
}

impl Running {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path());
        Self::start_with(folder, options).await
    }

    pub(crate) async fn start_with(folder: tempfile::TempDir, options: ServerOptions) -> Self {
        let store = SqlStore::in_memory().await.unwrap();
        let told = Arc::new(Flood::default());
        let monitor = Monitor { store: store.clone(), told: Arc::clone(&told) };
        // As a service that takes packed folders: the bound for all else is the layer's.
        let routes = MonitorServiceServer::new(monitor).max_decoding_message_size(APPLY_LIMIT);
        let routes = tonic::service::Routes::new(routes).add_service(crate::large::Applies);
        let (stop, stopped) = watch::channel(false);
        let socket = options.socket.clone();
        let task = tokio::spawn(serve(options, routes, stopped));
        // Bound before anything else happens, so connecting tells.
        while tokio::net::UnixStream::connect(&socket).await.is_err() {
            assert!(!task.is_finished(), "{:?}", task.await);
            tokio::task::yield_now().await;
        }
        Self { folder, stop, task, store, told }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("monitor.sock")
    }

    pub(crate) fn client(&self) -> Client {
        MonitorServiceClient::new(client::channel(&self.socket()))
    }

    pub(crate) async fn stop(self) -> tempfile::TempDir {
        self.stop.send_replace(true);
        self.task.await.unwrap().unwrap();
        self.folder
    }
}

pub(crate) fn report(request_id: &str) -> ReportSignalRequest {
    ReportSignalRequest { request_id: request_id.to_owned(), ..ReportSignalRequest::default() }
}
