//! The node's life: take over the machine, serve, and look after it now and then.

use std::sync::Arc;

use kiln_api::engine::engine_service_server::EngineServiceServer;
use kiln_model::event::Service;
use kiln_service::audit;
use kiln_service::clock::SystemClock;
use kiln_service::resync;
use kiln_service::run::{Failure, Start};
use kiln_service::server::{ServerOptions, serve};
use kiln_store::SqlStore;
use tokio::sync::Notify;
use tonic::service::Routes;

use crate::grpc::Engine;
use crate::node::Node;

/// Runs the node until it is told to stop. Instances run on.
pub async fn run(Start { site, stop }: Start) -> Result<(), Failure> {
    let store = SqlStore::open(&site.store_of(Service::Node)?).await?;
    let clock = SystemClock::new();
    let (records, refusals, recording) = audit::keep(&store, Service::Node, &clock, &stop);
    let node = Node::open(&site, store).await?;
    node.take_over().await;
    let pool = Arc::clone(&node.pool);
    let filling = pool.keep_full(stop.clone());
    let tending = {
        let node = Arc::clone(&node);
        resync::every(site.poll.resync, stop.clone(), Arc::new(Notify::new()), move || {
            let node = Arc::clone(&node);
            async move { node.tend().await }
        })
    };
    let routes = Routes::new(EngineServiceServer::new(Engine::new(node))).add_service(records);
    let options = ServerOptions { refusals: Some(refusals), ..ServerOptions::new(Service::Node, &site) };
    let serving = async { serve(options, routes, stop).await };
    let beside = async {
        tokio::join!(tending, filling, recording);
        Ok(())
    };
    // A server that can't serve ends the others too.
    tokio::try_join!(serving, beside)?;
    Ok(())
}
