//! The builder: turns definitions into images and revisions.

pub mod audit;
pub mod bake;
pub mod bakery;
pub mod builder;
pub mod collect;
pub mod context;
pub mod describe;
pub mod differences;
pub mod events;
pub mod git;
pub mod grpc;
pub mod image_tests;
pub mod logs;
pub mod peers;
pub mod reconcile;
pub mod repositories;
pub mod sources;
pub mod store;
#[cfg(test)]
mod tests;
pub mod timings;
pub mod tree;
pub mod wire;
pub mod workers;

use std::sync::Arc;
use std::time::Duration;

use kiln_api::builder::builder_service_server::BuilderServiceServer;
use kiln_bus::{Bus, NatsBus, User, interests};
use kiln_image::ImageStore;
use kiln_model::event::Service;
use kiln_service::audit as audit_records;
use kiln_service::clock::{Clock, SystemClock};
use kiln_service::config::{Signing, Site};
use kiln_service::run::{Failure, Start};
use kiln_service::server::{APPLY_LIMIT, ServerOptions, serve};
use kiln_service::{client, follow, members, relay, resync};
use kiln_store::{SqlStore, Store};
use tokio::sync::{Notify, watch};
use tonic::service::Routes;

use crate::bake::{BakeConfig, BakeLimits, Baker};
use crate::bakery::Bakery;
use crate::builder::Builder;
use crate::collect::Collector;
use crate::context::Contexts;
use crate::events::{EventHandler, Resync};
use crate::grpc::Api;
use crate::image_tests::EngineTester;
use crate::logs::Logs;
use crate::peers::SitePeers;
use crate::repositories::Mirrors;
use crate::sources::Sources;
use crate::store::Documents;
use crate::workers::WorkerOptions;

/// The durable name of this service's consumer.
const CONSUMER: &str = "builder";
/// Between two looks whether the registry has what may be launched.
const SHARE: Duration = Duration::from_secs(3600);

/// Runs the builder of a site until it is told to stop.
///
/// # Errors
/// What keeps it from starting, or from serving on.
pub async fn run(start: Start) -> Result<(), Failure> {
    let Start { site, stop } = start;
    let paths = site.paths();
    let home = paths.service(Service::Builder);
    std::fs::create_dir_all(&home)?;
    let store = SqlStore::open(&site.store_of(Service::Builder)?).await?;
    let bus = NatsBus::connect(site.nats(User::Builder)?).await?;
    let images = ImageStore::open(&paths.images())?;
    let baker = Baker::new(bake_config(&site))?;
    baker.sweep().await?;
    let (records, refusals, recording) =
        audit_records::keep(&store, Service::Builder, &SystemClock::new(), &stop);
    let documents = Documents::new(store.clone());
    let contexts = Contexts::new(home.join("contexts"));
    let git = site.checked_credentials()?.git.clone();
    let mirrors = Arc::new(Mirrors::new(home.join("sources"), git));
    let builder = Builder {
        sources: Sources::new(documents.clone(), contexts, mirrors).with_nodes(site.nodes.keys().cloned()),
        documents,
        bakery: baker,
        logs: Logs::open(home.join("logs"))?,
        clock: SystemClock::new(),
    };
    let (members, heart) = members::of_site(&site, Service::Builder, store, builder.clock).await?;
    workers::recover(&builder, &members).await?;
    let forgotten = builder.forget_lost(&images).await?;
    if forgotten > 0 {
        tracing::warn!(
            count = forgotten,
            "images that are not in the image store, and that nobody needs, were forgotten"
        );
    }

    countersign(&builder, &site.signing).await?;
    let sharing = {
        let (builder, images, stop) = (builder.clone(), images.clone(), stop.clone());
        async move {
            resync::every(SHARE, stop, Arc::default(), || share_needed(&builder, &images)).await;
        }
    };
    let peer = |service| client::to(&site, Service::Builder, service);
    let peers = SitePeers::new(peer(Service::Deployer)?, peer(Service::Monitor)?);
    let following = Resync::new(builder.clone(), peers);
    let collector = Collector::new(builder.clone(), images.clone(), following.heard(), site.builder.unused);
    let api = Api::new(builder.clone(), images.clone(), site.signing.clone(), collector.clone());
    let service = BuilderServiceServer::new(api)
        .max_decoding_message_size(APPLY_LIMIT)
        .max_encoding_message_size(APPLY_LIMIT);
    let loops = Loops {
        builder,
        tester: EngineTester::new(client::nodes(&site, Service::Builder)?),
        following,
        collector,
        options: WorkerOptions { members, workers: site.builder.workers },
        resync: site.poll.resync,
    };
    let options = ServerOptions { refusals: Some(refusals), ..ServerOptions::new(Service::Builder, &site) };
    let serving = serve(options, Routes::new(service).add_service(records), stop.clone());
    let beside = async {
        let staying = members::stay(heart, stop.clone());
        tokio::join!(Box::pin(loops.run(bus, stop.clone())), staying, recording, sharing);
        Ok(())
    };
    // A server that can't serve ends the others too.
    tokio::try_join!(serving, beside)?;
    Ok(())
}

/// What may be launched again after keys were changed has the signatures of all that sign now.
async fn countersign<S: Store, C: Clock>(
    builder: &Builder<S, Baker, C>,
    signing: &Signing,
) -> Result<(), builder::Error> {
    for (image, server) in builder.documents.needed_of_servers().await? {
        let Some(trust) = signing.trust(server.as_str()) else { continue };
        match builder.bakery.countersign(image, trust.clone()).await {
            Ok(false) => {}
            Ok(true) => tracing::info!(%image, %server, "was signed by another key as well"),
            // It is not launched, and whoever wants to says why.
            Err(error) => tracing::warn!(%image, %server, %error, "was not signed anew"),
        }
    }
    Ok(())
}

/// Puts what may be launched where other machines find it, if the site has such a place: also what was made or signed
/// while there was none, or another one. What lies with another builder is that one's to share.
async fn share_needed<S: Store, K: Bakery, C: Clock>(
    builder: &Builder<S, K, C>,
    images: &ImageStore,
) -> Result<(), String> {
    let needed = builder.documents.needed_images().await.map_err(|error| error.to_string())?;
    let mut failed = Vec::new();
    for image in needed.into_iter().filter(|image| images.has_blob(image)) {
        match builder.bakery.share(image).await {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => failed.push(error.to_string()),
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
}

/// Everything but the gRPC server: the same loops in production and in the simulation.
pub struct Loops<S, K, C> {
    pub builder: Builder<S, K, C>,
    pub tester: EngineTester,
    pub following: Resync<S, K, C, SitePeers>,
    pub collector: Collector<S, K, C>,
    pub options: WorkerOptions,
    /// Between two looks at everything that events may have failed to tell.
    pub resync: Duration,
}

impl<S: Store, K: Bakery, C: Clock> Loops<S, K, C> {
    /// Runs until told to stop.
    pub async fn run<B: Bus>(self, bus: B, stop: watch::Receiver<bool>) {
        let Self { builder, tester, following, collector, options, resync: period } = self;
        let wake = Arc::new(Notify::new());
        let handler = Arc::new(EventHandler::new(builder.clone(), wake.clone()));
        let interests = interests(Service::Builder);
        tokio::join!(
            relay::run(builder.documents.store().clone(), bus.clone(), stop.clone()),
            reconcile::run(builder.clone(), options.members.clone(), stop.clone()),
            workers::run(builder.clone(), tester.clone(), options, stop.clone()),
            collector.run(stop.clone()),
            resync::every(period, stop.clone(), Arc::default(), || async {
                tester.retire_leftovers(&builder).await.map(drop)
            }),
            resync::every(period, stop.clone(), wake, || following.run()),
            follow::events(stop.clone(), || bus.consume(CONSUMER, interests, handler.clone(), stop.clone())),
        );
    }
}

/// How bakes of a site are done.
pub fn bake_config(site: &Site) -> BakeConfig {
    let paths = site.paths();
    BakeConfig {
        site: site.id.clone(),
        home: paths.service(Service::Builder),
        packages: site.builder.packages.clone(),
        secrets: site.secrets.clone(),
        archive_credentials: site.credentials.archives.clone(),
        layer_cache: site.builder.layers.clone(),
        images: paths.images(),
        signing_keys: site.signing.keys.clone(),
        registry: site.registry.clone(),
        runtime: "runc".into(),
        archives: Vec::new(),
        limits: BakeLimits::default(),
    }
}
