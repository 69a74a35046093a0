//! The builder: turns definitions into images and revisions.

pub mod bake;
pub mod bakery;
pub mod builder;
pub mod collect;
pub mod context;
pub mod differences;
pub mod events;
pub mod git;
pub mod grpc;
pub mod image_tests;
pub mod logs;
pub mod peers;
pub mod reconcile;
pub mod sources;
pub mod store;
#[cfg(test)]
mod tests;
pub mod tree;
pub mod wire;
pub mod workers;

use std::sync::Arc;

use kiln_api::builder::builder_service_server::BuilderServiceServer;
use kiln_bus::{Interest, NatsBus, User};
use kiln_image::ImageStore;
use kiln_model::event::Service;
use kiln_service::clock::SystemClock;
use kiln_service::config::Site;
use kiln_service::run::{Failure, Start};
use kiln_service::server::{APPLY_LIMIT, ServerOptions, serve};
use kiln_service::{client, follow, relay, requests, resync};
use kiln_store::SqliteStore;
use tokio::sync::Notify;
use tonic::service::Routes;

use crate::bake::{BakeConfig, BakeLimits, Baker};
use crate::builder::Builder;
use crate::context::Contexts;
use crate::events::{EventHandler, Resync};
use crate::grpc::Api;
use crate::image_tests::EngineTester;
use crate::logs::Logs;
use crate::peers::SitePeers;
use crate::sources::Sources;
use crate::store::Documents;
use crate::workers::WorkerOptions;

/// The durable name of this service's consumer.
const CONSUMER: &str = "builder";

/// Runs the builder of a site until it is told to stop.
///
/// # Errors
/// What keeps it from starting, or from serving on.
pub async fn run(start: Start) -> Result<(), Failure> {
    let Start { site, stop } = start;
    let paths = site.paths();
    let home = paths.service(Service::Builder);
    std::fs::create_dir_all(&home)?;
    let store = SqliteStore::open(&paths.store(Service::Builder)).await?;
    let bus = NatsBus::connect(site.nats(User::Builder)?).await?;
    let images = ImageStore::open(&paths.images())?;
    let baker = Baker::new(bake_config(&site))?;
    baker.sweep().await?;
    let documents = Documents::new(store.clone());
    let builder = Builder {
        sources: Sources::new(documents.clone(), Contexts::new(home.join("contexts")), home.join("sources")),
        documents,
        bakery: baker,
        logs: Logs::open(home.join("logs"))?,
        clock: SystemClock::new(),
    };
    let owner = requests::new_id();
    workers::recover(&builder, &owner).await?;

    let node = client::channel(&paths.socket(Service::Node));
    let peers = SitePeers::new(
        client::channel(&paths.socket(Service::Deployer)),
        client::channel(&paths.socket(Service::Monitor)),
    );
    let wake = Arc::new(Notify::new());
    let handler = Arc::new(EventHandler::new(builder.clone(), wake.clone()));
    let following = Resync::new(builder.clone(), peers);
    let interests = [
        Interest { service: Service::Monitor, entity: "server" },
        Interest { service: Service::Deployer, entity: "rollout" },
    ];
    let api = Api::new(builder.clone(), images.clone(), paths.signing_pub());
    let service = BuilderServiceServer::new(api)
        .max_decoding_message_size(APPLY_LIMIT)
        .max_encoding_message_size(APPLY_LIMIT);
    let routes = Routes::new(service);
    let options = WorkerOptions { owner, workers: site.builder.workers };

    let tester = EngineTester::new(node);

    use kiln_bus::Bus as _;
    let serving = serve(ServerOptions::new(Service::Builder, &site), routes, stop.clone());
    let beside = async {
        tokio::join!(
            relay::run(store, bus.clone(), stop.clone()),
            reconcile::run(builder.clone(), stop.clone()),
            workers::run(builder.clone(), tester.clone(), options, stop.clone()),
            collect::run(builder.clone(), images, following.heard(), stop.clone()),
            resync::every(site.poll.resync, stop.clone(), Arc::default(), || async {
                tester.retire_leftovers(&builder).await.map(drop)
            }),
            resync::every(site.poll.resync, stop.clone(), wake, || following.run()),
            follow::events(stop.clone(), || bus.consume(CONSUMER, &interests, handler.clone(), stop.clone())),
        );
        Ok(())
    };
    // A server that can't serve ends the others too.
    tokio::try_join!(serving, beside)?;
    Ok(())
}

/// How bakes of a site are done.
pub fn bake_config(site: &Site) -> BakeConfig {
    let paths = site.paths();
    BakeConfig {
        site: site.id.clone(),
        home: paths.service(Service::Builder),
        packages: site.builder.packages.clone(),
        layer_cache: site.builder.layers.clone(),
        images: paths.images(),
        signing_key: paths.signing_key(),
        runtime: "runc".into(),
        archives: Vec::new(),
        limits: BakeLimits::default(),
    }
}
