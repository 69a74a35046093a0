//! `kiln.engine.v1`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use kiln_api::convert::{self, to_timestamp};
use kiln_api::engine::engine_service_server::EngineService;
use kiln_api::engine::{
    CheckRequest, CheckResponse, Instance, LaunchRequest, LaunchResponse, ListInstancesRequest,
    ListInstancesResponse, LogsRequest, LogsResponse, RetireRequest, RetireResponse, RouteRequest,
    RouteResponse, VerifyRequest, VerifyResponse, WatchInstancesRequest, WatchInstancesResponse,
};
use kiln_model::name::{InstanceId, RequestId, ServerName};
use kiln_service::error::ApiError;
use kiln_service::trace;
use kiln_store::Store;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use crate::launch::Launch;
use crate::logs::{Line, Reader};
use crate::node::{Node, blocking};
use crate::record::Spec;
use crate::retire::Retire;
use crate::routes::Plan;

/// Messages that wait for a slow reader.
const WAITING: usize = 64;
const PAGE: usize = 500;
/// How long a check may take where its caller does not say.
const CHECK: Duration = Duration::from_secs(10);
/// Between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(100);

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The node's service. Cheap to clone.
#[derive(Debug)]
pub struct Engine<S> {
    node: Arc<Node<S>>,
}

impl<S: Store> Engine<S> {
    pub fn new(node: Arc<Node<S>>) -> Self {
        Self { node }
    }
}

fn server_filter(server: &str) -> Result<Option<ServerName>, ApiError> {
    Ok(convert::optional_text("server", server)?)
}

/// Launching and retiring are told apart by the instance; the call's own id is for those who follow it.
fn check_request_id(id: &str) -> Result<(), ApiError> {
    Ok(convert::text::<RequestId>("request_id", id).map(drop)?)
}

fn instance_id(id: &str) -> Result<InstanceId, ApiError> {
    Ok(convert::text("id", id)?)
}

/// Under the cause that the request names, else under the call itself.
fn span(traceparent: &str, name: &str, subject: &str) -> tracing::Span {
    let span = tracing::info_span!("work", otel.name = name, subject);
    trace::follow(&span, traceparent);
    span
}

#[tonic::async_trait]
impl<S: Store + std::fmt::Debug> EngineService for Engine<S> {
    type WatchInstancesStream = Answers<WatchInstancesResponse>;
    type LogsStream = Answers<LogsResponse>;

    async fn launch(&self, request: Request<LaunchRequest>) -> Answer<LaunchResponse> {
        let LaunchRequest { request_id, spec, generation, traceparent } = request.into_inner();
        check_request_id(&request_id)?;
        let spec: Spec = convert::required("spec", spec).map_err(ApiError::from)?;
        let span = span(&traceparent, "launch", &spec.id.to_string());
        let launch = Launch { spec, generation, traceparent };
        let instance = self.node.launch(launch).instrument(span).await?;
        Ok(Response::new(LaunchResponse { instance: Some(instance) }))
    }

    async fn retire(&self, request: Request<RetireRequest>) -> Answer<RetireResponse> {
        let RetireRequest { request_id, id, server, generation, drain, traceparent } = request.into_inner();
        check_request_id(&request_id)?;
        let id = instance_id(&id)?;
        if server != id.server.as_str() {
            let why = format!("is `{server}`, but instance {id} is one of {}", id.server);
            return Err(ApiError::invalid("server", why, "").into());
        }
        let drain = match drain {
            Some(drain) => convert::from_duration("drain", Some(drain)).map_err(ApiError::from)?,
            None => kiln_model::time::Millis(0),
        };
        let span = span(&traceparent, "retire", &id.to_string());
        let instance = self.node.retire(Retire { id, generation, drain }).instrument(span).await?;
        Ok(Response::new(RetireResponse { instance: Some(instance) }))
    }

    async fn route(&self, request: Request<RouteRequest>) -> Answer<RouteResponse> {
        let request = request.into_inner();
        let span = span(&request.traceparent, "route", &request.server);
        let plan = Plan::try_from(request).map_err(ApiError::from)?;
        let changed = self.node.route(plan).instrument(span).await?;
        Ok(Response::new(RouteResponse { unchanged: !changed }))
    }

    async fn list_instances(&self, request: Request<ListInstancesRequest>) -> Answer<ListInstancesResponse> {
        let ListInstancesRequest { server, page_size, page_token } = request.into_inner();
        let server = server_filter(&server)?;
        let after =
            convert::optional_text::<InstanceId>("page_token", &page_token).map_err(ApiError::from)?;
        let limit = match usize::try_from(page_size).unwrap_or(PAGE) {
            0 => PAGE,
            size => size.min(PAGE),
        };
        let mut all = self.node.book.all();
        all.retain(|held| {
            let id = &held.value.spec.id;
            server.as_ref().is_none_or(|server| id.server == *server)
                && after.as_ref().is_none_or(|after| id > after)
        });
        let more = all.len() > limit;
        all.truncate(limit);
        let next_page_token = match all.last() {
            Some(last) if more => last.value.spec.id.to_string(),
            _ => String::new(),
        };
        let instances = all.into_iter().map(|held| held.value.to_message(held.version)).collect();
        let routes = self.node.routes.lock().await;
        let routes = routes.iter().filter(|(name, _)| server.as_ref().is_none_or(|server| *name == server));
        let routes = routes.map(|(name, route)| route.to_message(name)).collect();
        Ok(Response::new(ListInstancesResponse { instances, next_page_token, routes }))
    }

    async fn watch_instances(
        &self,
        request: Request<WatchInstancesRequest>,
    ) -> Answer<Self::WatchInstancesStream> {
        let server = server_filter(&request.into_inner().server)?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let node = Arc::clone(&self.node);
        // Ends with the reader: its channel is closed then.
        tokio::spawn(async move {
            let _ = watch(&node, server.as_ref().map(ServerName::as_str), &sender).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn check(&self, request: Request<CheckRequest>) -> Answer<CheckResponse> {
        let CheckRequest { id, check, timeout } = request.into_inner();
        let id = instance_id(&id)?;
        let check = convert::required("check", check).map_err(ApiError::from)?;
        let limit = match timeout {
            Some(timeout) => {
                convert::from_duration("timeout", Some(timeout)).map_err(ApiError::from)?.as_duration()
            }
            None => CHECK,
        };
        let result = self.node.check(&id, check, limit).await?;
        Ok(Response::new(CheckResponse { result: Some(result.into()) }))
    }

    async fn verify(&self, request: Request<VerifyRequest>) -> Answer<VerifyResponse> {
        let VerifyRequest { image_digest, server } = request.into_inner();
        let digest = convert::text("image_digest", &image_digest).map_err(ApiError::from)?;
        let answer = match self.node.verifier.verify(&self.node.book, digest, &server).await {
            Ok(verified) => VerifyResponse { verified: true, key_id: verified.key_id, detail: String::new() },
            Err(ApiError::Precondition { reason, .. }) => {
                VerifyResponse { verified: false, key_id: String::new(), detail: reason }
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Response::new(answer))
    }

    async fn logs(&self, request: Request<LogsRequest>) -> Answer<Self::LogsStream> {
        let LogsRequest { id, tail, follow } = request.into_inner();
        let id = instance_id(&id)?;
        if self.node.book.get(&id).is_none() {
            return Err(ApiError::not_found("instance", id.to_string()).into());
        }
        let path = self.node.names.log_file(&id.to_string());
        let tail = usize::try_from(tail).unwrap_or(usize::MAX);
        let reader = blocking(move || Reader::open(&path, tail)).await?;
        let reader = reader
            .map_err(|error| ApiError::Unavailable(format!("the log of {id} can't be read: {error}")))?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let node = Arc::clone(&self.node);
        tokio::spawn(async move {
            if let Err(error) = give_log(&node, &id, reader, follow, &sender).await {
                let _ = sender.send(Err(error.into())).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// The reader went away.
struct Gone;

async fn watch<S: Store>(
    node: &Node<S>,
    server: Option<&str>,
    sender: &mpsc::Sender<Result<WatchInstancesResponse, Status>>,
) -> Result<(), Gone> {
    let fits = |instance: &Instance| {
        let of = instance.spec.as_ref().map(|spec| spec.server.as_str());
        server.is_none() || server == of
    };
    let send = async |instance: Option<Instance>, synced: bool| {
        sender.send(Ok(WatchInstancesResponse { instance, synced })).await.map_err(|_| Gone)
    };
    loop {
        // Subscribed before the state is read: a change in between is told twice rather than not at all.
        let mut changes = node.book.watch();
        for held in node.book.all() {
            let instance = held.value.to_message(held.version);
            if fits(&instance) {
                send(Some(instance), false).await?;
            }
        }
        send(None, true).await?;
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = sender.closed() => return Err(Gone),
            };
            match change {
                Ok(instance) if fits(&instance) => send(Some(instance), true).await?,
                Ok(_) => {}
                // Too far behind to know what was missed: everything anew.
                Err(RecvError::Lagged(_)) => break,
                Err(RecvError::Closed) => return Ok(()),
            }
        }
    }
}

async fn give_log<S: Store>(
    node: &Node<S>,
    id: &InstanceId,
    mut reader: Reader,
    follow: bool,
    sender: &mpsc::Sender<Result<LogsResponse, Status>>,
) -> Result<(), ApiError> {
    let message =
        |line: Line| LogsResponse { time: line.time.map(to_timestamp), stream: line.stream, line: line.text };
    loop {
        // Asked before the last look: what it wrote before its end is in the file by then.
        let goes_on = follow && node.book.get(id).is_some_and(|held| !held.value.is_over());
        let (lines, back) = blocking(move || (reader.next(), reader)).await?;
        reader = back;
        let lines = lines
            .map_err(|error| ApiError::Unavailable(format!("the log of {id} can't be read: {error}")))?;
        let at_end = lines.is_empty();
        for line in lines {
            if sender.send(Ok(message(line))).await.is_err() {
                return Ok(());
            }
        }
        if at_end && !goes_on {
            return Ok(());
        }
        if at_end {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = sender.closed() => return Ok(()),
            }
        }
    }
}
