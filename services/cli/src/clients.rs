//! The services of a site, as clients.

use std::time::Duration;

use kiln_api::audit::audit_service_client::AuditServiceClient;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::builder::{self, Build, Server};
use kiln_api::deployer::deployer_service_client::DeployerServiceClient;
use kiln_api::deployer::{self, Fleet, Instance, Release, Rollout};
use kiln_api::engine::engine_service_client::EngineServiceClient;
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::monitor::{self, Health};
use kiln_api::types::{ListInfo, ListOptions, Revision, Signal};
use kiln_model::event::Service;
use kiln_model::name::{NodeName, SiteName};
use kiln_service::client::{self, Channel};
use kiln_service::config::{Place, Site};
use tonic::Status;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;
use crate::login::Login;
use crate::site;

/// What one page may hold; the services give no more.
const PAGE: u32 = 500;

/// An image's configuration and the definitions of a large repository are over tonic's 4 MiB.
const ANSWER: usize = 68 << 20;

/// A look at what is known takes milliseconds; a service that is stopped or hangs answers never.
const LOOK: Duration = Duration::from_secs(5);

/// Whether a node is the one that every site has. Services of the version before name none.
pub(crate) fn is_own(node: &str) -> bool {
    node.is_empty() || node == NodeName::local().as_str()
}

pub(crate) struct Services {
    name: SiteName,
    /// None where the site is on other machines.
    site: Option<Site>,
    builder: Channel,
    deployer: Channel,
    monitor: Channel,
    node: Channel,
}

impl Services {
    /// Those of the site on this machine; where there is none, or none that this user may see, those of the site that was
    /// logged in to.
    pub(crate) fn open(home: &Home) -> Outcome<Self> {
        match site::load(home) {
            Ok(site) => Self::here(site),
            Err(failure) if failure.is_invalid() => Err(failure),
            Err(failure) => match Login::of(home.name())? {
                Some(login) => Self::of(home.name().clone(), None, |service| login.channel(service, None)),
                None => Err(failure),
            },
        }
    }

    /// By their Unix sockets; those that run elsewhere as whoever logged in.
    fn here(site: Site) -> Outcome<Self> {
        let login = Login::of(&site.name)?;
        Self::of(site.name.clone(), Some(site.clone()), |service| {
            let socket = site.paths().socket(service);
            match (site.place(service), &login) {
                (Place::Tcp(addresses), Some(login)) if !socket.exists() => {
                    login.channel(service, Some(addresses))
                }
                _ => Ok(client::channel(&socket)),
            }
        })
    }

    fn of(
        name: SiteName,
        site: Option<Site>,
        channel: impl Fn(Service) -> Outcome<Channel>,
    ) -> Outcome<Self> {
        Ok(Self {
            builder: channel(Service::Builder)?,
            deployer: channel(Service::Deployer)?,
            monitor: channel(Service::Monitor)?,
            node: channel(Service::Node)?,
            name,
            site,
        })
    }

    pub(crate) fn name(&self) -> &SiteName {
        &self.name
    }

    /// None where the site is on other machines.
    pub(crate) fn site_here(&self) -> Option<&Site> {
        self.site.as_ref()
    }

    /// # Errors
    /// For what only goes on a machine of the site itself.
    pub(crate) fn site(&self, what: &str) -> Outcome<&Site> {
        self.site_here().ok_or_else(|| {
            Failure::new(Code::Refused, what, "the site is on another machine")
                .reason("not_here")
                .todo("do it there; `kiln history` and `kiln why` tell from here what happened")
        })
    }

    pub(crate) fn builder(&self) -> BuilderServiceClient<Channel> {
        BuilderServiceClient::new(self.builder.clone()).max_decoding_message_size(ANSWER)
    }

    pub(crate) fn deployer(&self) -> DeployerServiceClient<Channel> {
        DeployerServiceClient::new(self.deployer.clone()).max_decoding_message_size(ANSWER)
    }

    pub(crate) fn monitor(&self) -> MonitorServiceClient<Channel> {
        MonitorServiceClient::new(self.monitor.clone()).max_decoding_message_size(ANSWER)
    }

    /// Of the node that an instance is on.
    ///
    /// # Errors
    /// Where it is another machine's, and nobody logged in, or the site's settings do not name it.
    pub(crate) fn engine(&self, node: &str) -> Outcome<EngineServiceClient<Channel>> {
        if is_own(node) {
            return Ok(EngineServiceClient::new(self.node.clone()));
        }
        let what = format!("calling the node {node}");
        let nodes = &self.site(&what)?.nodes;
        let address = nodes.iter().find(|(name, _)| name.as_str() == node).map(|(_, address)| address);
        let address = address
            .ok_or_else(|| Failure::new(Code::Refused, &what, "`[nodes]` in site.toml does not name it"))?;
        let login = Login::of(&self.name)?.ok_or_else(|| {
            Failure::new(Code::Refused, &what, "it is on another machine, where you have to show who you are")
                .todo("kiln login")
        })?;
        Ok(EngineServiceClient::new(login.channel(Service::Node, Some(address.clone().into()))?))
    }

    /// Of a service's audit records; of the nodes, the site's own.
    pub(crate) fn audit(&self, service: Service) -> AuditServiceClient<Channel> {
        let channel = match service {
            Service::Builder => &self.builder,
            Service::Deployer => &self.deployer,
            Service::Monitor => &self.monitor,
            Service::Node => &self.node,
        };
        AuditServiceClient::new(channel.clone())
    }

    pub(crate) async fn server(&self, name: &str) -> Outcome<Server> {
        let request = builder::GetServerRequest { server: name.to_owned() };
        let answer = look(self.builder().get_server(request))
            .await
            .during(format_args!("asking the builder for {name}"))?;
        answer.into_inner().server.ok_or_else(|| missing("server", name))
    }

    pub(crate) async fn fleet(&self, name: &str) -> Outcome<Fleet> {
        let request = deployer::GetFleetRequest { server: name.to_owned() };
        let answer = look(self.deployer().get_fleet(request))
            .await
            .during(format_args!("asking the deployer for {name}"))?;
        answer.into_inner().fleet.ok_or_else(|| missing("fleet", name))
    }

    /// As [`Services::fleet`]; none where no release was made yet.
    pub(crate) async fn fleet_if_any(&self, name: &str) -> Outcome<Option<Fleet>> {
        match self.fleet(name).await {
            Ok(fleet) => Ok(Some(fleet)),
            Err(failure) if failure.is_not_found() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// As [`Services::fleet`]; a server that has no release yet is told from one that does not exist.
    pub(crate) async fn released(&self, name: &str) -> Outcome<Fleet> {
        if let Some(fleet) = self.fleet_if_any(name).await? {
            return Ok(fleet);
        }
        self.server(name).await?;
        Err(Failure::new(Code::Refused, format!("{name} has no release yet"), "")
            .reason("no_release")
            .todo(format!("kiln status {name}")))
    }

    pub(crate) async fn build(&self, id: &str) -> Outcome<Build> {
        let request = builder::GetBuildRequest { build: id.to_owned() };
        let answer = look(self.builder().get_build(request))
            .await
            .during(format_args!("asking the builder for {id}"))?;
        answer.into_inner().build.ok_or_else(|| missing("build", id))
    }

    pub(crate) async fn servers(&self) -> Outcome<Vec<Server>> {
        all(async |options| {
            let request = builder::ListServersRequest { options };
            let page =
                look(self.builder().list_servers(request)).await.during("listing the servers")?.into_inner();
            Ok((page.servers, page.info))
        })
        .await
    }

    /// Oldest first; all servers' where `server` is empty.
    pub(crate) async fn builds(&self, server: &str) -> Outcome<Vec<Build>> {
        let mut builds = all(async |options| {
            let request = builder::ListBuildsRequest { options, server: server.to_owned() };
            let page =
                look(self.builder().list_builds(request)).await.during("listing the builds")?.into_inner();
            Ok((page.builds, page.info))
        })
        .await?;
        builds.sort_by_key(|build| stamp(build.created.as_ref()));
        Ok(builds)
    }

    /// Oldest first.
    pub(crate) async fn revisions(&self, server: &str) -> Outcome<Vec<Revision>> {
        let mut revisions = all(async |options| {
            let request = builder::ListRevisionsRequest { options, server: server.to_owned() };
            let page = look(self.builder().list_revisions(request))
                .await
                .during("listing the revisions")?
                .into_inner();
            Ok((page.revisions, page.info))
        })
        .await?;
        revisions.sort_by_key(|revision| revision.generation);
        Ok(revisions)
    }

    pub(crate) async fn fleets(&self) -> Outcome<Vec<Fleet>> {
        all(async |options| {
            let request = deployer::ListFleetsRequest { options };
            let page =
                look(self.deployer().list_fleets(request)).await.during("listing the fleets")?.into_inner();
            Ok((page.fleets, page.info))
        })
        .await
    }

    /// Oldest first.
    pub(crate) async fn releases(&self, server: &str) -> Outcome<Vec<Release>> {
        let mut releases = all(async |options| {
            let request = deployer::ListReleasesRequest { options, server: server.to_owned() };
            let page = look(self.deployer().list_releases(request))
                .await
                .during("listing the releases")?
                .into_inner();
            Ok((page.releases, page.info))
        })
        .await?;
        releases.sort_by_key(|release| release.number);
        Ok(releases)
    }

    /// Oldest first.
    pub(crate) async fn rollouts(&self, server: &str) -> Outcome<Vec<Rollout>> {
        let mut rollouts = all(async |options| {
            let request = deployer::ListRolloutsRequest { options, server: server.to_owned() };
            let page = look(self.deployer().list_rollouts(request))
                .await
                .during("listing the rollouts")?
                .into_inner();
            Ok((page.rollouts, page.info))
        })
        .await?;
        rollouts.sort_by_key(|rollout| stamp(rollout.started.as_ref()));
        Ok(rollouts)
    }

    pub(crate) async fn instances(&self, server: &str, with_retired: bool) -> Outcome<Vec<Instance>> {
        let mut instances = all(async |options| {
            let request =
                deployer::ListInstancesRequest { options, server: server.to_owned(), all: with_retired };
            let page = look(self.deployer().list_instances(request))
                .await
                .during("listing the instances")?
                .into_inner();
            Ok((page.instances, page.info))
        })
        .await?;
        instances.sort_by(|a, b| {
            (&a.server, a.ordinal, a.release, a.attempt).cmp(&(&b.server, b.ordinal, b.release, b.attempt))
        });
        Ok(instances)
    }

    /// Oldest first.
    pub(crate) async fn signals(&self, server: &str) -> Outcome<Vec<Signal>> {
        let mut signals = all(async |options| {
            let request = monitor::ListSignalsRequest { options, server: server.to_owned() };
            let page =
                look(self.monitor().list_signals(request)).await.during("listing the signals")?.into_inner();
            Ok((page.signals, page.info))
        })
        .await?;
        signals.sort_by_key(|signal| stamp(signal.raised.as_ref()));
        Ok(signals)
    }

    pub(crate) async fn health(&self, server: &str) -> Outcome<Vec<Health>> {
        all(async |options| {
            let request = monitor::ListHealthRequest { options, server: server.to_owned() };
            let page =
                look(self.monitor().list_health(request)).await.during("listing the health")?.into_inner();
            Ok((page.health, page.info))
        })
        .await
    }
}

/// A call that only reads, with a bound on its time.
pub(crate) async fn look<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Err(Status::unavailable(format!("no answer within {} s", LOOK.as_secs())));
    tokio::time::timeout(LOOK, call).await.unwrap_or_else(late)
}

/// What a service answered; where it is away, what it knows is left out and its absence is said.
pub(crate) fn or_away<T: Default>(
    answer: Outcome<T>,
    service: &'static str,
    away: &mut Vec<&'static str>,
) -> Outcome<T> {
    match answer {
        Err(failure) if failure.is_unavailable() => {
            away.push(service);
            Ok(T::default())
        }
        other => other,
    }
}

/// All pages of a list.
async fn all<T>(
    page: impl AsyncFn(Option<ListOptions>) -> Outcome<(Vec<T>, Option<ListInfo>)>,
) -> Outcome<Vec<T>> {
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let options = ListOptions { since: None, page_size: PAGE, page_token: token };
        let (items, info) = page(Some(options)).await?;
        found.extend(items);
        token = info.map(|info| info.next_page_token).unwrap_or_default();
        if token.is_empty() {
            return Ok(found);
        }
    }
}

fn stamp(time: Option<&prost_types::Timestamp>) -> (i64, i32) {
    time.map_or((0, 0), |time| (time.seconds, time.nanos))
}

fn missing(kind: &str, id: &str) -> Failure {
    Failure::new(Code::NotFound, format!("there is no {kind} {id}"), "")
}

/// A new id for a call that changes something: a retried call is carried out once.
pub(crate) fn request_id() -> String {
    ulid::Ulid::generate().to_string()
}
