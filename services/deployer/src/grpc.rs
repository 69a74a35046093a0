//! The deployer's API.

use std::pin::Pin;

use futures::Stream;
use kiln_api::convert;
use kiln_api::deployer;
use kiln_api::deployer::deployer_service_server::{DeployerService, DeployerServiceServer};
use kiln_api::deployer::{
    AbortRolloutRequest, AbortRolloutResponse, GetFleetRequest, GetFleetResponse, ListFleetsRequest,
    ListFleetsResponse, ListInstancesRequest, ListInstancesResponse, ListReleasesRequest,
    ListReleasesResponse, ListRolloutsRequest, ListRolloutsResponse, RollbackRequest, RollbackResponse,
    WatchFleetRequest, WatchFleetResponse,
};
use kiln_deployer_core::{Commanded, InstanceState, Refused, Release, RollbackAsk, Verdict, abort, rollback};
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::name::{InstanceId, ServerName};
use kiln_service::access::actor;
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_service::shutdown::requested;
use kiln_service::{list, requests, trace};
use kiln_store::{AuditRecord, Batch, Store, decode};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::audit::standing;
use crate::ports::Problem;
use crate::reconcile::{Deployer, nodes_needed};
use crate::record::{
    FLEET, INSTANCE, InstanceRecord, RELEASE, ROLLOUT, RolloutRecord, SCHEMA, server_of_release,
};
use crate::store::{Loaded, Outcome, all_releases, batch, load, read};
use crate::wire;

/// Messages that a slow reader of a watch may be behind.
const WAITING: usize = 8;

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub struct Api<S, C> {
    deployer: Deployer<S, C>,
}

pub(crate) fn service<S: Store, C: Clock>(deployer: Deployer<S, C>) -> DeployerServiceServer<Api<S, C>> {
    DeployerServiceServer::new(Api::new(deployer))
}

#[tonic::async_trait]
impl<S: Store, C: Clock> DeployerService for Api<S, C> {
    type WatchFleetStream = Answers<WatchFleetResponse>;

    async fn rollback(&self, request: Request<RollbackRequest>) -> Answer<RollbackResponse> {
        let by = actor(&request)?;
        let request = request.into_inner();
        let server = server_name(&request.server)?;
        let decide = || self.decide_rollback(&server, &request, &by);
        let answer = requests::once(&self.deployer.store, &request.request_id, &request, decide).await?;
        self.deployer.look_after(&server);
        Ok(Response::new(answer))
    }

    async fn abort_rollout(&self, request: Request<AbortRolloutRequest>) -> Answer<AbortRolloutResponse> {
        let by = actor(&request)?;
        let request = request.into_inner();
        let server = server_name(&request.server)?;
        let decide = || self.decide_abort(&server, &request, &by);
        let answer = requests::once(&self.deployer.store, &request.request_id, &request, decide).await?;
        self.deployer.look_after(&server);
        Ok(Response::new(answer))
    }

    async fn get_fleet(&self, request: Request<GetFleetRequest>) -> Answer<GetFleetResponse> {
        let server = server_name(&request.into_inner().server)?;
        let fleet = self.fleet(&server).await?;
        Ok(Response::new(GetFleetResponse { fleet: Some(fleet) }))
    }

    async fn list_fleets(&self, request: Request<ListFleetsRequest>) -> Answer<ListFleetsResponse> {
        let page = list::page(&self.deployer.store, FLEET, request.into_inner().options).await?;
        let mut fleets = Vec::new();
        for document in list::documents(&page) {
            let server = server_name(&document.id)?;
            fleets.push(self.fleet(&server).await?);
        }
        Ok(Response::new(ListFleetsResponse { fleets, info: Some(list::info(&page)) }))
    }

    async fn watch_fleet(&self, request: Request<WatchFleetRequest>) -> Answer<Self::WatchFleetStream> {
        let server = server_name(&request.into_inner().server)?;
        // Whoever asks for one that does not exist is told so by the call itself.
        self.fleet(&server).await?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let api = Self::new(self.deployer.clone());
        tokio::spawn(async move { api.watch(&server, &sender).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn list_releases(&self, request: Request<ListReleasesRequest>) -> Answer<ListReleasesResponse> {
        let ListReleasesRequest { options, server } = request.into_inner();
        let wanted = server_filter(&server)?;
        let page = list::page(&self.deployer.store, RELEASE, options).await?;
        let mut releases = Vec::new();
        for document in list::documents(&page) {
            let Some(server) = server_of_release(&document.id) else { continue };
            if wanted.as_ref().is_none_or(|wanted| *wanted == server) {
                let release: Release = decode(document, SCHEMA).map_err(ApiError::from)?;
                releases.push(wire::release(&server, &release, document.version));
            }
        }
        Ok(Response::new(ListReleasesResponse { releases, info: Some(list::info(&page)) }))
    }

    async fn list_rollouts(&self, request: Request<ListRolloutsRequest>) -> Answer<ListRolloutsResponse> {
        let ListRolloutsRequest { options, server } = request.into_inner();
        let wanted = server_filter(&server)?;
        let page = list::page(&self.deployer.store, ROLLOUT, options).await?;
        let mut rollouts = Vec::new();
        for document in list::documents(&page) {
            let record: RolloutRecord = decode(document, SCHEMA).map_err(ApiError::from)?;
            if wanted.as_ref().is_none_or(|wanted| *wanted == record.server) {
                rollouts.push(wire::rollout(&record.server, &record.rollout, document.version));
            }
        }
        Ok(Response::new(ListRolloutsResponse { rollouts, info: Some(list::info(&page)) }))
    }

    async fn list_instances(&self, request: Request<ListInstancesRequest>) -> Answer<ListInstancesResponse> {
        let ListInstancesRequest { options, server, all } = request.into_inner();
        let wanted = server_filter(&server)?;
        // Who follows the changes is to learn of those that went.
        let everything = all || options.as_ref().is_some_and(|options| options.since.is_some());
        let page = list::page(&self.deployer.store, INSTANCE, options).await?;
        let mut instances = Vec::new();
        for document in list::documents(&page) {
            let id: InstanceId = document.id.parse().map_err(|error| ApiError::internal(&error))?;
            let record: InstanceRecord = decode(document, SCHEMA).map_err(ApiError::from)?;
            let there = !record.past && record.instance.state != InstanceState::Retired;
            if wanted.as_ref().is_none_or(|wanted| *wanted == id.server) && (there || everything) {
                instances.push(wire::instance(&id, &record, document.version));
            }
        }
        Ok(Response::new(ListInstancesResponse { instances, info: Some(list::info(&page)) }))
    }
}

impl<S: Store, C: Clock> Api<S, C> {
    pub(crate) fn new(deployer: Deployer<S, C>) -> Self {
        Self { deployer }
    }

    async fn existing(&self, server: &ServerName) -> Result<Loaded, ApiError> {
        let loaded = load(&self.deployer.store, server).await?;
        if loaded.version == 0 {
            return Err(ApiError::not_found("server", server.to_string()));
        }
        Ok(loaded)
    }

    async fn decide_rollback(
        &self,
        server: &ServerName,
        request: &RollbackRequest,
        by: &str,
    ) -> Result<(Batch, RollbackResponse), ApiError> {
        let mut loaded = self.existing(server).await?;
        loaded.releases = all_releases(&self.deployer.store, server).await?;
        let now = self.deployer.clock.now();
        let summary = match request.reason.as_str() {
            "" => format!("rolled back by {by}"),
            reason => format!("rolled back by {by}: {reason}"),
        };
        let cause = Cause {
            kind: CauseKind::Rollback,
            id: request.request_id.clone(),
            summary,
            actor: by.to_owned(),
            time: now.wall,
            traceparent: trace::current(),
        };
        let ask = RollbackAsk {
            expected: request.expected_release,
            to: (request.to_release != 0).then_some(request.to_release),
            cause,
        };
        let done = rollback(&loaded.fleet, &loaded.releases, &ask, now).map_err(refused)?;
        if let Some(target) = loaded.releases.get(&done.rollout.target()) {
            self.require_image(server, target).await?;
        }
        let (batch, rollout) = self.command(&loaded, &done, "rollback", by, &request.request_id).await?;
        Ok((batch, RollbackResponse { rollout: Some(rollout) }))
    }

    /// Going back to what can't be launched would end with neither: better refused while something runs.
    async fn require_image(&self, server: &ServerName, target: &Release) -> Result<(), ApiError> {
        let (node, image) = (target.revision.run.node(), target.revision.image_digest);
        let verify = async { self.deployer.peers.nodes.of(&node)?.verify(server, &image).await };
        match verify.await {
            Ok(Verdict::Right) => Ok(()),
            Ok(Verdict::Wrong(why)) | Err(Problem::Refused(why)) => Err(ApiError::precondition(
                format!("{server} r{} can't be launched: {why}", target.number),
                "choose another release; `kiln history` lists them",
            )),
            Err(Problem::Later(why)) => {
                Err(ApiError::Unavailable(format!("the node {node} could not verify {image}: {why}")))
            }
        }
    }

    async fn decide_abort(
        &self,
        server: &ServerName,
        request: &AbortRolloutRequest,
        by: &str,
    ) -> Result<(Batch, AbortRolloutResponse), ApiError> {
        let loaded = self.existing(server).await?;
        let now = self.deployer.clock.now();
        let cause = Cause {
            kind: CauseKind::Manual,
            id: request.request_id.clone(),
            summary: format!("aborted by {by}"),
            actor: by.to_owned(),
            time: now.wall,
            traceparent: trace::current(),
        };
        let done =
            abort(&loaded.fleet, &loaded.releases, request.expected_release, &cause, now).map_err(refused)?;
        let (batch, rollout) = self.command(&loaded, &done, "abort_rollout", by, &request.request_id).await?;
        Ok((batch, AbortRolloutResponse { rollout: Some(rollout) }))
    }

    /// The batch of a command, with its audit record, and the rollout as it is after it.
    async fn command(
        &self,
        before: &Loaded,
        done: &Commanded,
        action: &str,
        actor: &str,
        request_id: &str,
    ) -> Result<(Batch, deployer::Rollout), ApiError> {
        let now = self.deployer.clock.now().wall;
        let outcome = Outcome { fleet: &done.fleet, releases: &done.releases, events: &done.events, now };
        let mut batch = batch(&self.deployer.store, before, &outcome).await?;
        let server = &done.fleet.server;
        let record = AuditRecord::new(now, actor, action, server.as_str()).of_server(server);
        batch
            .audit
            .insert(0, record.asked(request_id).changed(standing(&before.fleet), standing(&done.fleet)));
        let stored = self.deployer.store.get(ROLLOUT, &done.rollout.id).await?;
        let version = stored.map_or(0, |document| document.version) + 1;
        Ok((batch, wire::rollout(&done.fleet.server, &done.rollout, version)))
    }

    async fn fleet(&self, server: &ServerName) -> Result<deployer::Fleet, ApiError> {
        let loaded = self.existing(server).await?;
        let away: Vec<String> = nodes_needed(&loaded)
            .into_iter()
            .filter(|node| !self.deployer.board.is_synced(node))
            .map(|node| format!("`{node}`"))
            .collect();
        let Loaded { fleet, version, releases } = loaded;
        let store = &self.deployer.store;
        let mut instances = Vec::new();
        for id in fleet.instances.keys() {
            if let Some((record, version)) =
                read::<S, InstanceRecord>(store, INSTANCE, &id.to_string()).await?
            {
                instances.push(wire::instance(id, &record, version));
            }
        }
        let rollout = match &fleet.rollout {
            Some(rollout) => {
                let stored = store.get(ROLLOUT, &rollout.id).await?;
                Some(wire::rollout(server, rollout, stored.map_or(0, |document| document.version)))
            }
            None => None,
        };
        let mut message = wire::fleet(&fleet, version, releases.get(&fleet.release), rollout, instances);
        if !away.is_empty() {
            let away = format!(
                "node {} can't be reached: what runs goes on running, and nothing is changed meanwhile",
                away.join(", ")
            );
            let gap = if message.problem.is_empty() { "" } else { "; " };
            message.problem = format!("{away}{gap}{}", message.problem);
        }
        Ok(message)
    }

    /// Gives the fleet, then each change of what is seen of it, until the reader goes away or the service stops.
    async fn watch(&self, server: &ServerName, sender: &mpsc::Sender<Result<WatchFleetResponse, Status>>) {
        let mut stop = self.deployer.stop();
        let mut sequence = self.deployer.store.sequence();
        let mut given: Option<deployer::Fleet> = None;
        loop {
            sequence.mark_unchanged();
            let fleet = match self.fleet(server).await {
                Ok(fleet) => fleet,
                Err(error) => {
                    // Fails where the reader went away.
                    let _ = sender.send(Err(error.into())).await;
                    return;
                }
            };
            // A tick that was written, or another server's change, is none of the reader's.
            let seen = deployer::Fleet { version: 0, ..fleet.clone() };
            if given.as_ref() != Some(&seen) {
                if sender.send(Ok(WatchFleetResponse { fleet: Some(fleet) })).await.is_err() {
                    return;
                }
                given = Some(seen);
            }
            tokio::select! {
                biased;
                () = requested(&mut stop) => return,
                () = sender.closed() => return,
                changed = sequence.changed() => if changed.is_err() { return },
            }
        }
    }
}

fn server_name(text: &str) -> Result<ServerName, ApiError> {
    Ok(convert::text("server", text)?)
}

fn server_filter(text: &str) -> Result<Option<ServerName>, ApiError> {
    Ok(convert::optional_text("server", text)?)
}

fn refused(refused: Refused) -> ApiError {
    let reason = refused.to_string();
    let what_to_do = match refused {
        Refused::NoSuchRelease { server, number } => {
            return ApiError::not_found("release", format!("{server} r{number}"));
        }
        Refused::Removed(_) => "apply its definition again",
        Refused::Moved { .. } => "look at it again, then say which release you expect",
        Refused::GoingBack(_) => "wait for it to end; `kiln status` shows how far it is",
        Refused::NoGood(_) => "change the definition: a new revision goes forward",
        Refused::NotATarget { .. } => "choose another release; `kiln history` lists them",
        Refused::NoRollout(_) => "there is nothing to abort; `kiln rollback` leaves what runs",
    };
    ApiError::precondition(reason, what_to_do)
}
