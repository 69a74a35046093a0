//! The deployer: puts new instances in the place of the old ones.
//!
//! What is decided is in `kiln-deployer-core`; here it is committed and carried out.

mod audit;
mod board;
mod effects;
mod events;
mod grpc;
mod metrics;
pub mod peers;
mod ports;
mod reconcile;
mod record;
mod revisions;
mod store;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests;
mod watch;
mod wire;

pub use effects::Peers;
pub use ports::{Builder, Engine, Launch, Listing, Monitor, Nodes, Problem, Revisions, Signals};

use std::sync::Arc;
use std::time::Duration;

use kiln_api::deployer::deployer_service_server::DeployerServiceServer;
use kiln_bus::{Bus, NatsBus, User, interests};
use kiln_model::event::Service;
use kiln_service::audit as audit_records;
use kiln_service::clock::{Clock, SystemClock};
use kiln_service::members::Members;
use kiln_service::run::{Failure, Start};
use kiln_service::server::{ServerOptions, serve};
use kiln_service::{client, follow, members, relay, resync};
use kiln_store::{SqlStore, Store};
use tokio::sync::{Notify, watch as flag};
use tonic::service::Routes;

use crate::events::{DURABLE, Events};
use crate::reconcile::Deployer;

const PRUNE: Duration = Duration::from_secs(3600);

/// Runs the deployer of a site until it is told to stop.
///
/// # Errors
/// Where the store, the socket or the broker's credentials can't be had.
pub async fn run(start: Start) -> Result<(), Failure> {
    let Start { site, stop } = start;
    let paths = site.paths();
    std::fs::create_dir_all(paths.service(Service::Deployer))?;
    let store = SqlStore::open(&site.store_of(Service::Deployer)?).await?;
    let bus = NatsBus::connect(site.nats(User::Deployer)?).await?;
    let peer = |service| client::to(&site, Service::Deployer, service);
    let engine = |(name, channel)| (name, Arc::new(peers::Node::new(channel)) as Arc<dyn Engine>);
    let peers = Peers {
        nodes: Nodes::new(client::nodes(&site, Service::Deployer)?.into_iter().map(engine).collect()),
        monitor: Arc::new(peers::Watcher::new(peer(Service::Monitor)?)),
        builder: Arc::new(peers::Bakery::new(peer(Service::Builder)?)),
    };
    let clock = SystemClock::new();
    let (members, heart) = members::of_site(&site, Service::Deployer, store.clone(), clock).await?;
    let (records, refusals, recording) = audit_records::keep(&store, Service::Deployer, &clock, &stop);
    let loops = Loops::new(store, clock, members, peers, site.poll.resync, stop.clone());
    let options = ServerOptions { refusals: Some(refusals), ..ServerOptions::new(Service::Deployer, &site) };
    let serving = serve(options, Routes::new(loops.service()).add_service(records), stop.clone());
    let beside = async {
        tokio::join!(loops.run(bus), members::stay(heart, stop), recording);
        Ok(())
    };
    // A server that can't serve ends the others too.
    tokio::try_join!(serving, beside)?;
    Ok(())
}

/// Everything but the gRPC server: the same loops in production, in tests and in the simulation.
pub struct Loops<S, C> {
    deployer: Deployer<S, C>,
    resync: Duration,
}

impl<S: Store, C: Clock> Loops<S, C> {
    /// `resync` is the time between two looks at everything that events may have failed to tell.
    pub fn new(
        store: S,
        clock: C,
        members: Members,
        peers: Peers,
        resync: Duration,
        stop: flag::Receiver<bool>,
    ) -> Self {
        Self { deployer: Deployer::new(store, clock, members, peers, stop), resync }
    }

    pub fn service(&self) -> DeployerServiceServer<grpc::Api<S, C>> {
        grpc::service(self.deployer.clone())
    }

    /// Runs until told to stop.
    pub async fn run<B: Bus>(self, bus: B) {
        let Self { deployer, resync: period } = self;
        let (store, stop) = (deployer.store.clone(), deployer.stop());
        let handler = Events::handler(deployer.clone());
        let resyncing =
            resync::every(period, stop.clone(), Arc::new(Notify::new()), || watch::resync(&deployer));
        let pruning = resync::every(PRUNE, stop.clone(), Arc::new(Notify::new()), || async {
            watch::prune(&store, deployer.clock.now().wall).await
        });
        let interests = interests(Service::Deployer);
        tokio::join!(
            follow::events(stop.clone(), || bus.consume(DURABLE, interests, handler.clone(), stop.clone())),
            relay::run(store.clone(), bus.clone(), stop.clone()),
            watch::nodes(deployer.clone()),
            watch::monitor(deployer.clone()),
            watch::replicas(deployer.clone()),
            resyncing,
            pruning,
        );
    }
}
