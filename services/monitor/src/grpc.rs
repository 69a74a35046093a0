//! The monitor's API.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use kiln_api::convert;
use kiln_api::events;
use kiln_api::monitor::monitor_service_server::MonitorService;
use kiln_api::monitor::{
    ApproveSignalRequest, ApproveSignalResponse, GetServerStatusRequest, GetServerStatusResponse, Health,
    ListHealthRequest, ListHealthResponse, ListSignalsRequest, ListSignalsResponse, ReportSignalRequest,
    ReportSignalResponse, WatchHealthRequest, WatchHealthResponse,
};
use kiln_model::definition::UpdatePolicy;
use kiln_model::name::ServerName;
use kiln_model::signal::SignalId;
use kiln_monitor_core::signal::{Illegal, Record, reconcile};
use kiln_service::access::actor;
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_service::{list, requests};
use kiln_store::{AuditRecord, Store, decode};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::definitions::Definitions;
use crate::documents::{HEALTH, SCHEMA, SIGNAL, Watched};
use crate::packages::Packages;
use crate::replicas::Replicas;
use crate::reports::Report;
use crate::servers::Servers;
use crate::signals::{Signals, audited, from_document};
use crate::watcher::{Watcher, health_of};

/// Messages that a slow reader may leave unread before its stream waits for it.
const STREAM: usize = 256;

#[derive(Clone)]
pub struct Api<S, C> {
    pub store: S,
    pub clock: C,
    pub watcher: Watcher<S, C>,
    pub servers: Servers<S>,
    pub signals: Signals<S, C>,
    pub definitions: Definitions<S, C>,
    pub packages: Packages<S, C>,
    pub replicas: Arc<Replicas<S, C>>,
    pub stop: watch::Receiver<bool>,
}

fn server_filter(name: &str) -> Result<Option<ServerName>, ApiError> {
    Ok(convert::optional_text("server", name)?)
}

impl<S: Store, C: Clock> Api<S, C> {
    async fn report(&self, message: ReportSignalRequest, by: &str) -> Result<ReportSignalResponse, ApiError> {
        // What it is about may be gone by now: a replaced instance was what the first call asked for.
        if let Some(answer) = requests::answered(&self.store, &message.request_id, &message).await? {
            return Ok(answer);
        }
        let report = Report::read(events::Report {
            server: message.server.clone(),
            reporter: if message.reporter.is_empty() { by.to_owned() } else { message.reporter.clone() },
            id: message.id.clone(),
            summary: message.summary.clone(),
            remedy: message.remedy,
            instance: message.instance.clone(),
            time: None,
        })?;
        let Some(server) = self.servers.get(&report.server) else {
            return Err(ApiError::not_found("server", report.server.as_str()));
        };
        if let Some(instance) = report.instance.as_ref().filter(|instance| !self.watcher.is_watched(instance))
        {
            return Err(ApiError::not_found("instance", instance.to_string()));
        }
        let mut observed = report.observation(server.generation, self.clock.now().wall);
        // What is named is a source of reports; who answers for it is whoever called.
        if observed.reporter != by {
            observed.reporter = format!("{by} for {}", observed.reporter);
        }
        let held = self.signals.hold(&observed.id()).await;
        let answer = requests::once(&self.store, &message.request_id, &message, || async {
            let known = held.read().await?;
            let now = self.clock.now().wall;
            let policy: UpdatePolicy = self.servers.policy(&observed.server);
            let steps = reconcile(known.as_slice(), std::slice::from_ref(&observed), &policy, now);
            let step = steps.into_iter().next();
            let after = step.as_ref().map(|step| step.record.clone());
            let (mut batch, signal) = held.batch(step)?;
            if let Some(after) = after {
                batch.audit.insert(0, self.audit("report_signal", &message.request_id, by, known, &after));
            }
            Ok((batch, ReportSignalResponse { signal: Some(signal) }))
        })
        .await;
        held.done().await?;
        answer
    }

    async fn approve(
        &self,
        message: ApproveSignalRequest,
        by: &str,
    ) -> Result<ApproveSignalResponse, ApiError> {
        let id: SignalId = convert::text("id", &message.id)?;
        let held = self.signals.hold(&id).await;
        let answer = requests::once(&self.store, &message.request_id, &message, || async {
            let record =
                held.read().await?.ok_or_else(|| ApiError::not_found("signal", message.id.as_str()))?;
            let step = record.approve(by, self.clock.now().wall).map_err(|illegal| {
                let what_to_do = match illegal {
                    Illegal::ActsByItself => "nothing is to be done; `kiln status` shows what follows",
                    Illegal::Resolved => "nothing is to be done; `kiln status` shows what is open",
                };
                ApiError::precondition(format!("the signal can't be approved: {illegal}"), what_to_do)
            })?;
            let after = step.record.clone();
            let (mut batch, signal) = held.batch(Some(step))?;
            batch
                .audit
                .insert(0, self.audit("approve_signal", &message.request_id, by, Some(record), &after));
            Ok((batch, ApproveSignalResponse { signal: Some(signal) }))
        })
        .await;
        held.done().await?;
        answer
    }

    fn audit(
        &self,
        action: &str,
        request_id: &str,
        by: &str,
        before: Option<Record>,
        after: &Record,
    ) -> AuditRecord {
        audited(self.clock.now().wall, by, action, before.as_ref(), after).asked(request_id)
    }

    async fn list_signals(&self, message: ListSignalsRequest) -> Result<ListSignalsResponse, ApiError> {
        let server = server_filter(&message.server)?;
        let page = list::page(&self.store, SIGNAL, message.options).await?;
        let mut signals = Vec::new();
        for document in list::documents(&page) {
            let signal = from_document(document)?;
            if server.as_ref().is_none_or(|server| signal.server == server.as_str()) {
                signals.push(signal);
            }
        }
        Ok(ListSignalsResponse { signals, info: Some(list::info(&page)) })
    }

    async fn list_health(&self, message: ListHealthRequest) -> Result<ListHealthResponse, ApiError> {
        let server = server_filter(&message.server)?;
        let page = list::page(&self.store, HEALTH, message.options).await?;
        let mut health = Vec::new();
        for document in list::documents(&page) {
            let watched: Watched = decode(document, SCHEMA)?;
            if server.as_ref().is_none_or(|server| watched.id.server == *server) {
                // When it was last seen is known in memory alone.
                let newest = self.watcher.newest(&watched.id);
                health.push(newest.unwrap_or_else(|| health_of(&watched, document.version)));
            }
        }
        Ok(ListHealthResponse { health, info: Some(list::info(&page)) })
    }

    async fn server_status(
        &self,
        message: &GetServerStatusRequest,
    ) -> Result<GetServerStatusResponse, ApiError> {
        let name: ServerName = convert::text("server", &message.server)?;
        let health = self.watcher.health(Some(&name));
        let signals = self.signals.of_server(&name);
        let Some(server) = self.servers.get(&name) else {
            // The last instances of one that was removed.
            if health.is_empty() && signals.is_empty() {
                return Err(ApiError::not_found("server", name.as_str()));
            }
            return Ok(GetServerStatusResponse { health, signals, ..GetServerStatusResponse::default() });
        };
        let source = self.definitions.status(&server.source).unwrap_or_default();
        let archive = self.packages.status(&server);
        let mut answer = GetServerStatusResponse {
            health,
            signals,
            source_polled: source.polled.map(convert::to_timestamp),
            source_problem: source.problem_of(name.as_str()),
            archive_polled: archive.polled.map(convert::to_timestamp),
            archive_problem: archive.problem,
        };
        if !message.own {
            let polled = |answer: &GetServerStatusResponse| {
                answer.source_polled.as_ref().map(|polled| (polled.seconds, polled.nanos))
            };
            let newest = self.replicas.ask(&name).await.into_iter().max_by_key(polled);
            // Whoever looks at the repository now.
            if let Some(newest) = newest.filter(|newest| polled(newest) > polled(&answer)) {
                answer.source_polled = newest.source_polled;
                answer.source_problem = newest.source_problem;
            }
        }
        Ok(answer)
    }

    /// The present state, then what is told; a reader that falls behind is given the state again.
    async fn stream(
        self,
        server: Option<ServerName>,
        own: bool,
        to: mpsc::Sender<Result<WatchHealthResponse, Status>>,
    ) {
        let send = |health: Health| to.send(Ok(WatchHealthResponse { health: Some(health) }));
        let is_own = |health: &Health| health.instance.parse().is_ok_and(|id| self.watcher.is_mine(&id));
        let wanted = |health: &Health| {
            server.as_ref().is_none_or(|server| health.server == server.as_str()) && (!own || is_own(health))
        };
        let mut stop = self.stop.clone();
        let mut told = self.watcher.listen();
        let present = || {
            let mut state = self.watcher.health(server.as_ref());
            state.retain(&wanted);
            state
        };
        let mut state = present();
        loop {
            for health in state.drain(..) {
                if send(health).await.is_err() {
                    return;
                }
            }
            let news = tokio::select! {
                biased;
                news = told.recv() => news,
                () = to.closed() => return,
                () = kiln_service::shutdown::requested(&mut stop) => return,
            };
            match news {
                Ok(news) if wanted(&news.0) => state.push((*news.0).clone()),
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => state = present(),
                Err(RecvError::Closed) => return,
            }
        }
    }
}

#[tonic::async_trait]
impl<S: Store, C: Clock> MonitorService for Api<S, C> {
    type WatchHealthStream = Pin<Box<dyn Stream<Item = Result<WatchHealthResponse, Status>> + Send>>;

    async fn report_signal(
        &self,
        request: Request<ReportSignalRequest>,
    ) -> Result<Response<ReportSignalResponse>, Status> {
        let by = actor(&request)?;
        Ok(Response::new(self.report(request.into_inner(), &by).await?))
    }

    async fn approve_signal(
        &self,
        request: Request<ApproveSignalRequest>,
    ) -> Result<Response<ApproveSignalResponse>, Status> {
        let by = actor(&request)?;
        Ok(Response::new(self.approve(request.into_inner(), &by).await?))
    }

    async fn list_signals(
        &self,
        request: Request<ListSignalsRequest>,
    ) -> Result<Response<ListSignalsResponse>, Status> {
        Ok(Response::new(Self::list_signals(self, request.into_inner()).await?))
    }

    async fn list_health(
        &self,
        request: Request<ListHealthRequest>,
    ) -> Result<Response<ListHealthResponse>, Status> {
        Ok(Response::new(Self::list_health(self, request.into_inner()).await?))
    }

    async fn get_server_status(
        &self,
        request: Request<GetServerStatusRequest>,
    ) -> Result<Response<GetServerStatusResponse>, Status> {
        Ok(Response::new(self.server_status(request.get_ref()).await?))
    }

    async fn watch_health(
        &self,
        request: Request<WatchHealthRequest>,
    ) -> Result<Response<Self::WatchHealthStream>, Status> {
        let WatchHealthRequest { server, own } = request.get_ref();
        let server = server_filter(server)?;
        let (to, from) = mpsc::channel(STREAM);
        tokio::spawn(self.clone().stream(server, *own, to));
        Ok(Response::new(Box::pin(ReceiverStream::new(from))))
    }
}
