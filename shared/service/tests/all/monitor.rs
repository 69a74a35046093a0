//! A small service to call: a monitor that keeps what is reported.

use std::path::{Path, PathBuf};
use std::pin::Pin;

use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::monitor::monitor_service_server::{MonitorService, MonitorServiceServer};
use kiln_api::monitor::{
    ApproveSignalRequest, ApproveSignalResponse, GetServerStatusRequest, GetServerStatusResponse,
    ListHealthRequest, ListHealthResponse, ListSignalsRequest, ListSignalsResponse, ReportSignalRequest,
    ReportSignalResponse, WatchHealthRequest, WatchHealthResponse,
};
use kiln_api::types::Signal;
use kiln_model::event::{EventType, NewEvent, Service};
use kiln_service::error::ApiError;
use kiln_service::server::{Error, ServerOptions, serve};
use kiln_service::{client, requests, trace};
use kiln_store::{Batch, SqlStore};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

pub(crate) type Client = MonitorServiceClient<client::Channel>;

#[derive(Clone)]
pub(crate) struct Monitor {
    pub(crate) store: SqlStore,
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
        let request = request.into_inner();
        let answer = requests::once(&self.store, &request.request_id, &request, || {
            std::future::ready(Ok((
                Batch { events: vec![Self::event()], ..Batch::default() },
                ReportSignalResponse { signal: Some(Signal { id: "s1".to_owned(), ..Signal::default() }) },
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
        _: Request<WatchHealthRequest>,
    ) -> Result<Response<Self::WatchHealthStream>, Status> {
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
}

pub(crate) fn options(folder: &Path) -> ServerOptions {
    ServerOptions {
        service: Service::Monitor,
        socket: folder.join("monitor.sock"),
        metrics: None,
        ready: None,
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
        let routes = tonic::service::Routes::new(MonitorServiceServer::new(Monitor { store: store.clone() }));
        let (stop, stopped) = watch::channel(false);
        let socket = options.socket.clone();
        let task = tokio::spawn(serve(options, routes, stopped));
        // Bound before anything else happens, so connecting tells.
        while tokio::net::UnixStream::connect(&socket).await.is_err() {
            assert!(!task.is_finished(), "{:?}", task.await);
            tokio::task::yield_now().await;
        }
        Self { folder, stop, task, store }
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
