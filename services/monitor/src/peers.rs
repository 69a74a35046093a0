//! The other services, over gRPC.

use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::deployer::deployer_service_client::DeployerServiceClient;
use kiln_api::engine::engine_service_client::EngineServiceClient;
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::{builder, convert, deployer, engine, monitor, types};
use kiln_model::check::{Check, CheckResult};
use kiln_model::event::Service;
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::time::Millis;
use kiln_service::client::{self, Channel};
use kiln_service::error::describe;
use kiln_service::tls::TlsFiles;
use tonic::{Request, Status};

use crate::ports::{Builder, Deployer, Engine, Listing, Others, Problem};

const PAGE: u32 = 500;
/// A page that changes under the listing begins it anew; a peer that does so without end is wrong.
const MAX_PAGES: u32 = 10_000;
const LIST_TIMEOUT: Duration = Duration::from_secs(10);
/// It fetches a repository.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(120);
/// It asks archives, and resolves.
const PLAN_TIMEOUT: Duration = Duration::from_secs(300);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// What a check may take beyond its own timeout.
const CHECK_SLACK: Duration = Duration::from_secs(2);

fn request<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

fn problem(peer: &'static str) -> impl Fn(Status) -> Problem {
    move |status| Problem(format!("the {peer} said: {}", describe(&status)))
}

/// Turns pages until the last one.
async fn list<T, F>(
    peer: &'static str,
    mut page: impl FnMut(types::ListOptions) -> F,
) -> Result<Listing<T>, Problem>
where
    F: Future<Output = Result<(Vec<T>, Option<types::ListInfo>), Status>>,
{
    let mut listing = Listing { epoch: String::new(), items: Vec::new() };
    let mut page_token = String::new();
    for _ in 0..MAX_PAGES {
        let options = types::ListOptions { since: None, page_size: PAGE, page_token };
        let (items, info) = page(options).await.map_err(problem(peer))?;
        listing.items.extend(items);
        let info = info.unwrap_or_default();
        listing.epoch = info.cursor.unwrap_or_default().epoch;
        page_token = info.next_page_token;
        if page_token.is_empty() {
            return Ok(listing);
        }
    }
    Err(Problem(format!("the {peer}'s list has no end")))
}

#[derive(Debug, Clone)]
pub struct DeployerPeer(DeployerServiceClient<Channel>);

impl DeployerPeer {
    pub fn new(channel: Channel) -> Self {
        Self(DeployerServiceClient::new(channel))
    }
}

#[async_trait]
impl Deployer for DeployerPeer {
    async fn instances(&self) -> Result<Listing<deployer::Instance>, Problem> {
        list("deployer", |options| async {
            let message = deployer::ListInstancesRequest {
                options: Some(options),
                ..deployer::ListInstancesRequest::default()
            };
            let page = self.0.clone().list_instances(request(message, LIST_TIMEOUT)).await?.into_inner();
            Ok((page.instances, page.info))
        })
        .await
    }
}

#[derive(Debug, Clone)]
pub struct BuilderPeer(BuilderServiceClient<Channel>);

impl BuilderPeer {
    pub fn new(channel: Channel) -> Self {
        Self(BuilderServiceClient::new(channel))
    }
}

#[async_trait]
impl Builder for BuilderPeer {
    async fn servers(&self) -> Result<Listing<builder::Server>, Problem> {
        list("builder", |options| async {
            let message = builder::ListServersRequest { options: Some(options) };
            let page = self.0.clone().list_servers(request(message, LIST_TIMEOUT)).await?.into_inner();
            Ok((page.servers, page.info))
        })
        .await
    }

    async fn sources(&self) -> Result<Listing<builder::Source>, Problem> {
        list("builder", |options| async {
            let message = builder::ListSourcesRequest { options: Some(options) };
            let page = self.0.clone().list_sources(request(message, LIST_TIMEOUT)).await?.into_inner();
            Ok((page.sources, page.info))
        })
        .await
    }

    async fn inspect(&self, source: &str) -> Result<builder::InspectSourceResponse, Problem> {
        let message = builder::InspectSourceRequest { source: source.to_owned() };
        let answer = self.0.clone().inspect_source(request(message, INSPECT_TIMEOUT)).await;
        answer.map(tonic::Response::into_inner).map_err(problem("builder"))
    }

    async fn plan(&self, server: &ServerName) -> Result<builder::Plan, Problem> {
        let message = builder::PlanRequest { server: server.to_string() };
        let planned = async {
            let mut stream = self.0.clone().plan(message).await?.into_inner();
            while let Some(answer) = stream.message().await? {
                if let Some(builder::plan_response::Item::Plan(plan)) = answer.item {
                    return Ok(Some(plan));
                }
            }
            Ok(None)
        };
        // Around it all: a deadline that goes with the call ends with the first answer of a stream.
        let planned = tokio::time::timeout(PLAN_TIMEOUT, planned)
            .await
            .map_err(|_| Problem(format!("the builder did not plan within {PLAN_TIMEOUT:?}")))?;
        planned.map_err(problem("builder"))?.ok_or_else(|| Problem("the builder gave no plan".to_owned()))
    }
}

#[derive(Debug, Clone)]
pub struct EnginePeer(EngineServiceClient<Channel>);

impl EnginePeer {
    pub fn new(channel: Channel) -> Self {
        Self(EngineServiceClient::new(channel))
    }
}

#[async_trait]
impl Engine for EnginePeer {
    async fn watch(&self) -> Result<BoxStream<'static, engine::WatchInstancesResponse>, Problem> {
        let message = engine::WatchInstancesRequest::default();
        let stream = self.0.clone().watch_instances(message).await.map_err(problem("node"))?.into_inner();
        // An error ends the stream as its end does: it is begun anew either way.
        Ok(tokio_stream::StreamExt::map_while(stream, Result::ok).boxed())
    }

    async fn ping(&self) -> Result<(), Problem> {
        let message =
            engine::ListInstancesRequest { page_size: 1, ..engine::ListInstancesRequest::default() };
        let answer = self.0.clone().list_instances(request(message, PING_TIMEOUT)).await;
        answer.map(drop).map_err(problem("node"))
    }

    async fn check(
        &self,
        instance: &InstanceId,
        check: &Check,
        timeout: Millis,
    ) -> Result<CheckResult, Problem> {
        let message = engine::CheckRequest {
            id: instance.to_string(),
            check: Some(check.clone().into()),
            timeout: Some(convert::to_duration(timeout)),
        };
        let request = request(message, timeout.as_duration() + CHECK_SLACK);
        let answer = self.0.clone().check(request).await.map_err(problem("node"))?.into_inner();
        convert::required("result", answer.result)
            .map_err(|invalid| Problem(format!("the node's answer can't be read: {invalid}")))
    }
}

/// The other monitors, each where it says that it is.
#[derive(Debug, Clone)]
pub struct OtherMonitors(TlsFiles);

impl OtherMonitors {
    /// `files` show a monitor who calls from another machine.
    pub const fn new(files: TlsFiles) -> Self {
        Self(files)
    }
}

#[async_trait]
impl Others for OtherMonitors {
    async fn watch(&self, address: &str) -> Result<BoxStream<'static, monitor::Health>, Problem> {
        let channel = client::at(address, &self.0, Service::Monitor).map_err(Problem)?;
        watch(channel).await
    }

    async fn status(
        &self,
        address: &str,
        server: &ServerName,
    ) -> Result<monitor::GetServerStatusResponse, Problem> {
        let channel = client::at(address, &self.0, Service::Monitor).map_err(Problem)?;
        status(channel, server).await
    }
}

/// What a monitor knows of a server by itself.
///
/// # Errors
/// Where it can't be reached, or refuses.
pub async fn status(
    channel: Channel,
    server: &ServerName,
) -> Result<monitor::GetServerStatusResponse, Problem> {
    let message = monitor::GetServerStatusRequest { server: server.to_string(), own: true };
    let asked = MonitorServiceClient::new(channel).get_server_status(request(message, PING_TIMEOUT)).await;
    Ok(asked.map_err(problem("other monitor"))?.into_inner())
}

/// What a monitor sees of the instances that it looks at.
///
/// # Errors
/// Where it can't be reached, or refuses.
pub async fn watch(channel: Channel) -> Result<BoxStream<'static, monitor::Health>, Problem> {
    let message = monitor::WatchHealthRequest { own: true, ..monitor::WatchHealthRequest::default() };
    let watched = MonitorServiceClient::new(channel).watch_health(message).await;
    let stream = watched.map_err(problem("other monitor"))?.into_inner();
    // An error ends the stream as its end does: it is begun anew either way.
    let told = tokio_stream::StreamExt::map_while(stream, Result::ok);
    Ok(told.filter_map(|answer| async { answer.health }).boxed())
}
