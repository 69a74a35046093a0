//! What people ask of the services, and what has to be there once it is acknowledged.

use std::time::Duration;

use kiln_api::builder::apply_request::Source;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::builder::{
    ApplyRequest, ApplyResponse, CancelBuildRequest, CancelBuildResponse, GitSource, RemoveRequest,
    RemoveResponse,
};
use kiln_api::deployer::deployer_service_client::DeployerServiceClient;
use kiln_api::deployer::{
    AbortRolloutRequest, AbortRolloutResponse, GetFleetRequest, RollbackRequest, RollbackResponse, Rollout,
};
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::monitor::{
    ApproveSignalRequest, ApproveSignalResponse, ReportSignalRequest, ReportSignalResponse,
};
use kiln_api::types;
use kiln_builder_core::build::State;
use kiln_model::digest::Digest;
use kiln_model::event::Service;
use kiln_model::signal::SignalState;
use kiln_monitor_core::signal::Record;
use kiln_store::{Store as _, decode};
use tonic::{Code, Status};

use super::Story;
use crate::outside::URL;
use crate::settled::web;

/// A person's patience with one call.
const PATIENCE: Duration = Duration::from_secs(180);

impl Story {
    fn request_id(&mut self) -> String {
        self.calls += 1;
        format!("call-{}", self.calls)
    }

    pub(super) async fn apply(&mut self) {
        let git = GitSource { url: URL.to_owned(), branch: "main".to_owned() };
        let (request_id, source) = (self.request_id(), Some(Source::Git(git)));
        let request = ApplyRequest { request_id, source };
        let client = BuilderServiceClient::new(self.site.channel(Service::Builder));
        let there = async |answer: &ApplyResponse| {
            for server in &answer.servers {
                self.written(Service::Builder, "server", &server.name, server.version).await?;
            }
            Ok(())
        };
        let call = || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.apply(request).await }
        };
        self.insist("apply", call, there).await;
    }

    pub(super) async fn roll_back(&mut self) {
        let Some(expected) = self.release().await else { return };
        self.site.invariants.excuse(&web(), expected);
        let (request_id, server) = (self.request_id(), "web".to_owned());
        let request = RollbackRequest {
            request_id,
            server,
            expected_release: expected,
            reason: "somebody said so".to_owned(),
            ..RollbackRequest::default()
        };
        let client = DeployerServiceClient::new(self.site.channel(Service::Deployer));
        let there = async |answer: &RollbackResponse| self.begun(answer.rollout.as_ref()).await;
        let call = || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.rollback(request).await }
        };
        self.insist(&format!("rollback from {expected}"), call, there).await;
    }

    pub(super) async fn abort(&mut self) {
        let Some(expected) = self.release().await else { return };
        self.site.invariants.excuse(&web(), expected);
        let (request_id, server) = (self.request_id(), "web".to_owned());
        let request = AbortRolloutRequest { request_id, server, expected_release: expected };
        let client = DeployerServiceClient::new(self.site.channel(Service::Deployer));
        let there = async |answer: &AbortRolloutResponse| self.begun(answer.rollout.as_ref()).await;
        let call = || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.abort_rollout(request).await }
        };
        self.insist("abort", call, there).await;
    }

    pub(super) async fn report(&mut self) {
        let (request_id, server) = (self.request_id(), "web".to_owned());
        let request = ReportSignalRequest {
            id: request_id.clone(),
            request_id,
            server,
            reporter: "scanner".to_owned(),
            summary: "found something".to_owned(),
            remedy: types::Remedy::Rebuild.into(),
            ..ReportSignalRequest::default()
        };
        let client = MonitorServiceClient::new(self.site.channel(Service::Monitor));
        let there = async |answer: &ReportSignalResponse| self.noted(answer.signal.as_ref()).await;
        let call = || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.report_signal(request).await }
        };
        self.insist("report", call, there).await;
    }

    /// What the fleet is on, or going to.
    async fn release(&self) -> Option<u64> {
        let mut client = DeployerServiceClient::new(self.site.channel(Service::Deployer));
        let request = GetFleetRequest { server: "web".to_owned() };
        let fleet = client.get_fleet(request).await.ok()?.into_inner().fleet?;
        let rollout = fleet.rollout.filter(|rollout| rollout.ended.is_none());
        Some(rollout.map_or(fleet.release, |rollout| rollout.to_release))
    }

    /// Makes a call until it is answered, one way or the other; each try is the same call. What was acknowledged is there,
    /// and is acknowledged again in the same words. None where it is refused.
    async fn insist<T, F>(
        &self,
        what: &str,
        call: impl Fn() -> F,
        there: impl AsyncFn(&T) -> Result<(), String>,
    ) -> Option<T>
    where
        T: std::fmt::Debug + PartialEq,
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let world = self.world();
        let give_up = world.elapsed() + PATIENCE;
        let answer = loop {
            match call().await {
                Ok(answer) => break answer.into_inner(),
                Err(status) => {
                    let passes = matches!(
                        status.code(),
                        Code::Unavailable
                            | Code::DeadlineExceeded
                            | Code::Aborted
                            | Code::Cancelled
                            | Code::Unknown
                            | Code::Internal
                    );
                    if !passes || world.elapsed() > give_up {
                        world.tell(format!("{what} is refused: {}", status.message()));
                        return None;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(world.between(100, 3_000))).await;
        };
        world.tell(format!("{what} is acknowledged"));
        if let Err(missing) = there(&answer).await {
            world.wrong(16, format!("{what} was acknowledged, and {missing}"));
        }
        if let Ok(again) = call().await
            && again.get_ref() != &answer
        {
            world.wrong(16, format!("{what} was answered {answer:?}, and then {again:?}"));
        }
        Some(answer)
    }

    /// A service has a document at least at a version.
    async fn written(&self, service: Service, kind: &str, id: &str, version: u64) -> Result<(), String> {
        let document = self.site.disk(service).store.get(kind, id).await.unwrap();
        let found = document.map_or(0, |document| document.version);
        if found >= version { Ok(()) } else { Err(format!("{kind} {id} is at {found}, not at {version}")) }
    }

    async fn begun(&self, rollout: Option<&Rollout>) -> Result<(), String> {
        let rollout = rollout.ok_or("there is no rollout in the answer")?;
        self.written(Service::Deployer, "rollout", &rollout.id, 1).await
    }

    async fn noted(&self, signal: Option<&types::Signal>) -> Result<(), String> {
        let signal = signal.ok_or("there is no signal in the answer")?;
        let id: Digest = signal.id.parse().unwrap();
        self.written(Service::Monitor, "signal", &id.hex(), signal.version).await
    }

    /// Whatever it is at, it ends so, or has ended otherwise before.
    pub(super) async fn cancel(&mut self) {
        let builds = self.site.invariants.builds();
        let going: Vec<_> = builds.iter().filter(|build| !build.state.has_ended()).collect();
        let Some(build) = self.world().more().pick(&going).copied().or(builds.last()) else { return };
        let id = build.id.to_string();
        let request = CancelBuildRequest { request_id: self.request_id(), build: id.clone() };
        let client = BuilderServiceClient::new(self.site.channel(Service::Builder));
        let there = async |_: &CancelBuildResponse| {
            let builds = self.site.invariants.builds();
            let build = builds.into_iter().find(|build| build.id.to_string() == id).ok_or("it is gone")?;
            let cancelled = matches!(build.state, State::Cancelled { .. });
            if cancelled { Ok(()) } else { Err(format!("it is {}", build.state.as_str())) }
        };
        let call = || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.cancel_build(request).await }
        };
        let began = self.world().elapsed();
        let cancelled = self.insist(&format!("cancelling {id}"), call, there).await.is_some();
        let build = self.site.invariants.builds().into_iter().find(|build| build.id.to_string() == id);
        // Refused at once: not since nobody was there for as long as somebody waits.
        let refused = !cancelled && self.world().elapsed() - began < PATIENCE;
        if refused && build.is_some_and(|build| !build.state.has_ended()) {
            self.world().wrong(19, format!("cancelling {id} is refused, and it goes on"));
        }
        self.cancelled |= cancelled;
    }

    /// It goes, and is applied again some time later.
    pub(super) async fn remove(&mut self) {
        let request = RemoveRequest { request_id: self.request_id(), server: "web".to_owned() };
        let client = BuilderServiceClient::new(self.site.channel(Service::Builder));
        let there = async |_: &RemoveResponse| {
            let server = self.site.disk(Service::Builder).store.get("server", "web").await.unwrap();
            let removed = server.is_some_and(|server| server.body["removed"] == true);
            if removed { Ok(()) } else { Err("it is there".to_owned()) }
        };
        let call = || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.remove(request).await }
        };
        if self.insist("removing", call, there).await.is_none() {
            return;
        }
        let wait = self.world().more().between(0, 60_000);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        // What can't be read is refused until somebody mends it.
        if self.site.outside.definition().is_none() {
            let former = self.former.last().cloned().unwrap();
            self.commit(former);
        }
        self.apply().await;
    }

    /// Says yes to all that waits for it.
    pub(super) async fn approve(&mut self) {
        let documents = self.site.disk(Service::Monitor).store.list("signal", "", None, 500).await.unwrap();
        let records = documents.iter().map(|document| decode::<Record>(document, u32::MAX).unwrap());
        let waiting: Vec<_> = records
            .filter(|record| record.signal.state == SignalState::Waiting)
            .map(|record| record.signal.id.to_string())
            .collect();
        for id in waiting {
            let request = ApproveSignalRequest { request_id: self.request_id(), id };
            let client = MonitorServiceClient::new(self.site.channel(Service::Monitor));
            let there = async |answer: &ApproveSignalResponse| self.noted(answer.signal.as_ref()).await;
            let call = || {
                let (mut client, request) = (client.clone(), request.clone());
                async move { client.approve_signal(request).await }
            };
            self.insist("approving", call, there).await;
        }
    }
}
