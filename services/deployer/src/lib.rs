//! The deployer: puts new instances in the place of the old ones.
//!
//! What is decided is in `kiln-deployer-core`; here it is committed and carried out.

mod board;
mod effects;
mod events;
mod grpc;
mod metrics;
mod peers;
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

pub use ports::{Builder, Engine, Launch, Listing, Monitor, Problem, Revisions, Signals};

use std::sync::Arc;
use std::time::Duration;

use kiln_bus::{Bus, NatsBus, User};
use kiln_model::event::Service;
use kiln_service::clock::{Clock, SystemClock};
use kiln_service::run::{Failure, Start};
use kiln_service::server::{ServerOptions, serve};
use kiln_service::{follow, relay, resync};
use kiln_store::{SqliteStore, Store};
use tokio::sync::{Notify, watch as flag};
use tonic::service::Routes;

use crate::effects::Peers;
use crate::events::{DURABLE, Events, INTERESTS};
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
    let store = SqliteStore::open(&paths.store(Service::Deployer)).await?;
    let bus = NatsBus::connect(site.nats(User::Deployer)?).await?;
    let peers = Peers {
        engine: Arc::new(peers::Node::new(&paths.socket(Service::Node))),
        monitor: Arc::new(peers::Watcher::new(&paths.socket(Service::Monitor))),
        builder: Arc::new(peers::Bakery::new(&paths.socket(Service::Builder))),
    };
    let deployer = Deployer::new(store.clone(), SystemClock::new(), peers, stop.clone());
    let routes = Routes::new(grpc::service(deployer.clone()));
    let options = ServerOptions::new(Service::Deployer, &site);
    let loops = run_loops(deployer, bus, site.poll.resync, stop.clone());
    let serving = async { serve(options, routes, stop).await };
    let beside = async {
        loops.await;
        Ok(())
    };
    // A server that can't serve ends the others too.
    tokio::try_join!(serving, beside)?;
    Ok(())
}

/// Everything but the gRPC server: the same loops in production, in tests and in the simulation.
async fn run_loops<S: Store, C: Clock, B: Bus>(
    deployer: Deployer<S, C>,
    bus: B,
    period: Duration,
    stop: flag::Receiver<bool>,
) {
    let store = deployer.store.clone();
    let handler = Events::handler(deployer.clone());
    let resyncing = resync::every(period, stop.clone(), Arc::new(Notify::new()), || watch::resync(&deployer));
    let pruning = resync::every(PRUNE, stop.clone(), Arc::new(Notify::new()), || async {
        watch::prune(&store, deployer.clock.now().wall).await
    });
    tokio::join!(
        follow::events(stop.clone(), || bus.consume(DURABLE, &INTERESTS, handler.clone(), stop.clone())),
        relay::run(store.clone(), bus.clone(), stop.clone()),
        watch::node(deployer.clone()),
        watch::monitor(deployer.clone()),
        resyncing,
        pruning,
    );
}
