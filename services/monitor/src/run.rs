//! The monitor's loops, put together: generic over what they stand on, and with the real thing below them.

use std::sync::Arc;

use kiln_api::monitor::monitor_service_server::MonitorServiceServer;
use kiln_bus::{Bus, NatsBus, User, interests};
use kiln_model::event::Service;
use kiln_model::name::NodeName;
use kiln_service::audit;
use kiln_service::clock::{Clock, SystemClock};
use kiln_service::config::{Place, Poll, Site};
use kiln_service::members::Members;
use kiln_service::run::{Failure, Start};
use kiln_service::server::{self, ServerOptions};
use kiln_service::{client, follow, members, relay, resync as loops};
use kiln_store::{Error, SqlStore, Store};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{Notify, watch};
use tonic::service::Routes;

use crate::definitions::Definitions;
use crate::download::AptHelper;
use crate::engine::Engines;
use crate::events::Events;
use crate::eyes::Probes;
use crate::grpc::Api;
use crate::packages::Packages;
use crate::peers::{BuilderPeer, DeployerPeer, EnginePeer, OtherMonitors};
use crate::ports::{Archive, Builder, Deployer, Engine, Eyes, Git, Others};
use crate::remote::LocalGit;
use crate::replicas::Replicas;
use crate::resync::{self, Answers};
use crate::servers::Servers;
use crate::signals::Signals;
use crate::watcher::Watcher;

/// Under which the bus knows this service.
const DURABLE: &str = "monitor";

/// What the monitor stands on.
#[derive(Clone)]
pub struct Ports {
    pub deployer: Arc<dyn Deployer>,
    pub builder: Arc<dyn Builder>,
    pub engines: Engines,
    pub git: Arc<dyn Git>,
    pub archive: Arc<dyn Archive>,
    pub others: Arc<dyn Others>,
}

/// A monitor whose state was read, and whose instances are looked at; the other loops begin with [`Monitor::run`].
pub struct Monitor<S, C> {
    store: S,
    clock: C,
    ports: Ports,
    poll: Poll,
    events: Events<S, C>,
    definitions: Definitions<S, C>,
    packages: Packages<S, C>,
    replicas: Arc<Replicas<S, C>>,
}

impl<S: Store, C: Clock> Monitor<S, C> {
    /// # Errors
    /// Where the store can't be read.
    pub async fn load(store: S, clock: C, members: Members, ports: Ports, poll: Poll) -> Result<Self, Error> {
        let eyes: Arc<dyn Eyes> = Arc::new(Probes::new(ports.engines.clone(), clock.clone()));
        let servers = Servers::load(store.clone()).await?;
        let signals = Signals::load(store.clone(), clock.clone(), servers.clone()).await?;
        let watcher =
            Watcher::load(store.clone(), clock.clone(), members.clone(), eyes, signals.clone()).await?;
        let definitions = Definitions::new(
            ports.git.clone(),
            ports.builder.clone(),
            servers.clone(),
            signals.clone(),
            clock.clone(),
            members.clone(),
            poll.git,
        );
        let packages = Packages::new(
            ports.archive.clone(),
            ports.builder.clone(),
            servers.clone(),
            signals.clone(),
            clock.clone(),
            members.clone(),
            poll.archive,
        );
        let replicas = Arc::new(Replicas::new(
            store.clone(),
            clock.clone(),
            members,
            ports.others.clone(),
            watcher.clone(),
            servers.clone(),
            signals.clone(),
        ));
        let events =
            Events { watcher, servers, signals, clock: clock.clone(), builder_changed: Arc::default() };
        Ok(Self { store, clock, ports, poll, events, definitions, packages, replicas })
    }

    pub fn api(&self, stop: watch::Receiver<bool>) -> Api<S, C> {
        Api {
            store: self.store.clone(),
            clock: self.clock.clone(),
            watcher: self.events.watcher.clone(),
            servers: self.events.servers.clone(),
            signals: self.events.signals.clone(),
            definitions: self.definitions.clone(),
            packages: self.packages.clone(),
            replicas: self.replicas.clone(),
            stop,
        }
    }

    /// Runs every loop until told to stop.
    pub async fn run<B: Bus>(&self, bus: &B, stop: watch::Receiver<bool>) {
        let Events { watcher, servers, signals, builder_changed, .. } = &self.events;
        let handler = Arc::new(self.events.clone());
        let period = self.poll.resync;
        let answers = Answers::default();
        let instances = || resync::instances(&*self.ports.deployer, watcher);
        let from_builder = || resync::builder(&*self.ports.builder, servers, &self.definitions);
        let housekeeping = || async {
            let now = self.clock.now().wall;
            answers.find(&*self.ports.builder, signals, now, period).await?;
            signals.forget().await.map_err(|error| crate::ports::Problem(error.to_string()))
        };
        tokio::join!(
            follow::events(stop.clone(), || {
                bus.consume(DURABLE, interests(Service::Monitor), handler.clone(), stop.clone())
            }),
            follow::events(stop.clone(), || bus.consume_reports(DURABLE, handler.clone(), stop.clone())),
            loops::every(period, stop.clone(), Arc::new(Notify::new()), instances),
            loops::every(period, stop.clone(), builder_changed.clone(), from_builder),
            loops::every(period, stop.clone(), Arc::new(Notify::new()), housekeeping),
            self.ports.engines.follow(watcher, &self.clock, &stop),
            self.definitions.run(stop.clone()),
            self.packages.run(stop.clone()),
            self.replicas.run(stop.clone()),
            signals.run(stop.clone()),
            relay::run(self.store.clone(), bus.clone(), stop.clone()),
        );
        watcher.end();
    }
}

/// The monitor of a site.
///
/// # Errors
/// Where its store, socket or bus can't be had.
pub async fn run(start: Start) -> Result<(), Failure> {
    let Start { site, stop } = start;
    more_files();
    let paths = site.paths();
    let folder = paths.service(Service::Monitor);
    std::fs::create_dir_all(&folder)?;
    let store = SqlStore::open(&site.store_of(Service::Monitor)?).await?;
    let bus = NatsBus::connect(site.nats(User::Monitor)?).await?;
    let credentials = site.checked_credentials()?;
    let peer = |service| client::to(&site, Service::Monitor, service);
    let ports = Ports {
        deployer: Arc::new(DeployerPeer::new(peer(Service::Deployer)?)),
        builder: Arc::new(BuilderPeer::new(peer(Service::Builder)?)),
        engines: engines(&site)?,
        git: Arc::new(LocalGit::new(&folder, credentials.git.as_deref())?),
        archive: Arc::new(AptHelper::new(&folder, credentials.archives.as_deref())),
        others: Arc::new(OtherMonitors::new(site.tls(Service::Monitor))),
    };
    let clock = SystemClock::new();
    let (members, heart) = members::of_site(&site, Service::Monitor, store.clone(), clock).await?;
    let (records, refusals, recording) = audit::keep(&store, Service::Monitor, &clock, &stop);
    let monitor = Monitor::load(store, clock, members, ports, site.poll).await?;
    let routes = Routes::new(MonitorServiceServer::new(monitor.api(stop.clone()))).add_service(records);
    let options = ServerOptions { refusals: Some(refusals), ..ServerOptions::new(Service::Monitor, &site) };
    let served = server::serve(options, routes, stop.clone());
    tokio::try_join!(served, async {
        tokio::join!(Box::pin(monitor.run(&bus, stop.clone())), members::stay(heart, stop), recording);
        Ok(())
    })?;
    Ok(())
}

fn engines(site: &Site) -> Result<Engines, client::Error> {
    let is_here =
        |name: &NodeName| *name == NodeName::local() && matches!(site.place(Service::Node), Place::Socket(_));
    let channels = client::nodes(site, Service::Monitor)?;
    Ok(Engines::new(channels.into_iter().map(|(name, channel)| {
        let is_here = is_here(&name);
        (name, Arc::new(EnginePeer::new(channel)) as Arc<dyn Engine>, is_here)
    })))
}

/// Each look may hold a socket: the soft limit of 1,024 files is for programs that use select(2).
fn more_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}
