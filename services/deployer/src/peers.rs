//! The other services, over gRPC.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::builder::{HoldRequest, ListRevisionsRequest};
use kiln_api::convert;
use kiln_api::engine::engine_service_client::EngineServiceClient;
use kiln_api::engine::{self, InstanceSpec};
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::monitor::{self, ListHealthRequest, ListSignalsRequest, WatchHealthRequest};
use kiln_api::types::{self, ListOptions};
use kiln_deployer_core::{Listener, Verdict};
use kiln_model::check::{Check, CheckResult};
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::time::Millis;
use kiln_service::client::Channel;
use kiln_service::error::describe;
use kiln_service::requests::new_id;
use kiln_service::trace;
use tonic::{Code, Request, Status};

use crate::ports::{Builder, Engine, Launch, Listing, Monitor, Problem, Revisions, Signals};
use crate::wire;

const ASK: Duration = Duration::from_secs(5);
/// Hashing a large image for the first time reads all of it from the disk.
const VERIFY: Duration = Duration::from_secs(300);
const LAUNCH: Duration = Duration::from_secs(60);
/// On top of the drain: the instance's own way to stop, and the kernel's.
const STOP: Duration = Duration::from_secs(40);
const LOG_LINES: u32 = 40;
/// Bytes of a line that are kept. It lies in the record of a rollout, and a list gives hundreds of those at once.
const LOG_LINE: usize = 1 << 10;
const PAGE: u32 = 500;

impl From<Status> for Problem {
    fn from(status: Status) -> Self {
        let text = describe(&status);
        match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented => Self::Refused(text),
            _ => Self::Later(text),
        }
    }
}

impl From<convert::Invalid> for Problem {
    fn from(invalid: convert::Invalid) -> Self {
        Self::Later(format!("the answer can't be read: {invalid}"))
    }
}

fn kept_line(line: &[u8]) -> String {
    let mut text = String::from_utf8_lossy(line).trim_end().to_owned();
    if text.len() > LOG_LINE {
        text.truncate(text.floor_char_boundary(LOG_LINE));
        text.push('…');
    }
    text
}

fn request<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

/// A stream whose messages are `T`s. An error is its end: whoever watches begins anew.
fn watched<T: Send + 'static, U: Send + 'static>(
    stream: tonic::Streaming<T>,
    take: impl Fn(T) -> Option<U> + Send + 'static,
) -> BoxStream<'static, U> {
    let items = stream.take_while(|item| std::future::ready(item.is_ok()));
    items.filter_map(move |item| std::future::ready(item.ok().and_then(&take))).boxed()
}

#[derive(Debug, Clone)]
pub struct Node {
    client: EngineServiceClient<Channel>,
}

impl Node {
    pub fn new(channel: Channel) -> Self {
        Self { client: EngineServiceClient::new(channel) }
    }
}

#[async_trait]
impl Engine for Node {
    async fn verify(&self, server: &ServerName, image: &Digest) -> Result<Verdict, Problem> {
        let message = engine::VerifyRequest { image_digest: image.to_string(), server: server.to_string() };
        match self.client.clone().verify(request(message, VERIFY)).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                Ok(if answer.verified { Verdict::Right } else { Verdict::Wrong(answer.detail) })
            }
            Err(status) => match Problem::from(status) {
                Problem::Refused(why) => Ok(Verdict::Wrong(why)),
                later => Err(later),
            },
        }
    }

    async fn launch(&self, launch: &Launch) -> Result<engine::Instance, Problem> {
        let Launch { id, image, run, generation } = launch;
        let spec = InstanceSpec {
            id: id.to_string(),
            server: id.server.to_string(),
            release: id.release,
            ordinal: id.ordinal,
            attempt: id.attempt,
            role: types::Role::Fleet.into(),
            image_digest: image.to_string(),
            run: Some(run.clone().into()),
        };
        let message = engine::LaunchRequest {
            request_id: new_id(),
            spec: Some(spec),
            generation: *generation,
            traceparent: trace::current(),
        };
        let answer = self.client.clone().launch(request(message, LAUNCH)).await?.into_inner();
        answer.instance.ok_or_else(|| Problem::Later("the node's answer has no instance".to_owned()))
    }

    async fn route(
        &self,
        server: &ServerName,
        generation: u64,
        listeners: &[Listener],
    ) -> Result<(), Problem> {
        let message = engine::RouteRequest {
            request_id: new_id(),
            server: server.to_string(),
            generation,
            listeners: listeners.iter().map(wire::listener).collect(),
            traceparent: trace::current(),
        };
        self.client.clone().route(request(message, ASK)).await?;
        Ok(())
    }

    async fn retire(&self, id: &InstanceId, generation: u64, drain: Millis) -> Result<(), Problem> {
        let message = engine::RetireRequest {
            request_id: new_id(),
            id: id.to_string(),
            server: id.server.to_string(),
            generation,
            drain: Some(convert::to_duration(drain)),
            traceparent: trace::current(),
        };
        self.client.clone().retire(request(message, drain.as_duration() + STOP)).await?;
        Ok(())
    }

    async fn check(&self, id: &InstanceId, check: &Check, timeout: Millis) -> Result<CheckResult, Problem> {
        let message = engine::CheckRequest {
            id: id.to_string(),
            check: Some(check.clone().into()),
            timeout: Some(convert::to_duration(timeout)),
        };
        let answer = self.client.clone().check(request(message, timeout.as_duration() + ASK)).await?;
        Ok(convert::required("result", answer.into_inner().result)?)
    }

    async fn last_log(&self, id: &InstanceId) -> Result<Vec<String>, Problem> {
        let message = engine::LogsRequest { id: id.to_string(), tail: LOG_LINES, follow: false };
        let mut stream = self.client.clone().logs(request(message, ASK)).await?.into_inner();
        let mut lines = Vec::new();
        while let Some(line) = stream.message().await? {
            // The node ends the stream; this is against one that does not.
            if lines.len() >= LOG_LINES as usize {
                break;
            }
            lines.push(kept_line(&line.line));
        }
        Ok(lines)
    }

    async fn list(&self) -> Result<Listing, Problem> {
        let mut listing = Listing::default();
        let mut page_token = String::new();
        loop {
            let message = engine::ListInstancesRequest {
                server: String::new(),
                page_size: PAGE,
                page_token: std::mem::take(&mut page_token),
            };
            let page = self.client.clone().list_instances(request(message, ASK)).await?.into_inner();
            listing.instances.extend(page.instances);
            if !page.routes.is_empty() {
                listing.routes = page.routes;
            }
            if page.next_page_token.is_empty() {
                return Ok(listing);
            }
            page_token = page.next_page_token;
        }
    }

    async fn watch(&self) -> Result<BoxStream<'static, engine::Instance>, Problem> {
        let message = engine::WatchInstancesRequest { server: String::new() };
        let stream = self.client.clone().watch_instances(message).await?.into_inner();
        Ok(watched(stream, |item| item.instance))
    }
}

#[derive(Debug, Clone)]
pub struct Watcher {
    client: MonitorServiceClient<Channel>,
}

impl Watcher {
    pub fn new(channel: Channel) -> Self {
        Self { client: MonitorServiceClient::new(channel) }
    }
}

fn page(page_token: &mut String, since: Option<&types::Cursor>) -> Option<ListOptions> {
    Some(ListOptions { since: since.cloned(), page_size: PAGE, page_token: std::mem::take(page_token) })
}

#[async_trait]
impl Monitor for Watcher {
    async fn health(&self, server: Option<&ServerName>) -> Result<Vec<monitor::Health>, Problem> {
        let mut all = Vec::new();
        let mut token = String::new();
        loop {
            let message = ListHealthRequest {
                options: page(&mut token, None),
                server: server.map(ToString::to_string).unwrap_or_default(),
            };
            let answer = self.client.clone().list_health(request(message, ASK)).await?.into_inner();
            all.extend(answer.health);
            token = answer.info.unwrap_or_default().next_page_token;
            if token.is_empty() {
                return Ok(all);
            }
        }
    }

    async fn watch(&self) -> Result<BoxStream<'static, monitor::Health>, Problem> {
        let message = WatchHealthRequest::default();
        let stream = self.client.clone().watch_health(message).await?.into_inner();
        Ok(watched(stream, |item| item.health))
    }

    async fn signals(&self) -> Result<Signals, Problem> {
        let mut all = Signals::default();
        let mut token = String::new();
        loop {
            let message = ListSignalsRequest { options: page(&mut token, None), server: String::new() };
            let answer = self.client.clone().list_signals(request(message, ASK)).await?.into_inner();
            all.signals.extend(answer.signals);
            let info = answer.info.unwrap_or_default();
            token = info.next_page_token;
            if token.is_empty() {
                all.epoch = info.cursor.unwrap_or_default().epoch;
                return Ok(all);
            }
        }
    }
}

#[derive(Debug, Clone)]
pub struct Bakery {
    client: BuilderServiceClient<Channel>,
}

impl Bakery {
    pub fn new(channel: Channel) -> Self {
        Self { client: BuilderServiceClient::new(channel) }
    }
}

#[async_trait]
impl Builder for Bakery {
    async fn revisions(&self, since: Option<&types::Cursor>) -> Result<Revisions, Problem> {
        let mut all = Revisions::default();
        let mut token = String::new();
        loop {
            let message = ListRevisionsRequest { options: page(&mut token, since), server: String::new() };
            let answer = self.client.clone().list_revisions(request(message, ASK)).await?.into_inner();
            all.revisions.extend(answer.revisions);
            let info = answer.info.unwrap_or_default();
            token = info.next_page_token;
            if token.is_empty() {
                all.cursor = info.cursor;
                return Ok(all);
            }
        }
    }

    async fn hold(&self, server: &ServerName, images: &BTreeSet<Digest>) -> Result<(), Problem> {
        let message = HoldRequest {
            request_id: new_id(),
            holder: format!("deployer/{server}"),
            image_digests: images.iter().map(ToString::to_string).collect(),
        };
        self.client.clone().hold(request(message, ASK)).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_line_of_a_log_is_bounded() {
        assert_eq!(kept_line(b"ready \r\n"), "ready");
        let long = kept_line("ä".repeat(LOG_LINE).as_bytes());
        assert!(long.ends_with("ä…") && long.len() <= LOG_LINE + '…'.len_utf8(), "{} bytes", long.len());
    }
}
