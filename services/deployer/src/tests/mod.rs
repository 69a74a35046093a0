//! The real loops on a store and a bus in memory, against a world of fakes.

mod board;
mod crash;
mod life;
mod recorded;
mod scenes;
mod unreadable;
mod world;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kiln_api::{events, types};
use kiln_bus::{Bus as _, MemoryBus};
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::definition::{Mode, UpdatePolicy};
use kiln_model::digest::Digest;
use kiln_model::event::{Event, EventType, NewEvent, Service};
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::revision::{ImageRevision, Revision, RevisionContent};
use kiln_model::run::RunSpec;
use kiln_model::signal::{Remedy, Signal, SignalId, SignalState};
use kiln_model::time::Millis;
use kiln_service::clock::SystemClock;
use kiln_store::{SqlStore, Store as _};
use prost::Message as _;
use tokio::sync::watch;

use crate::reconcile::Deployer;
use crate::store::{Loaded, load};
use crate::tests::life::{Life, Mortal};
use crate::tests::world::{FakeBuilder, FakeMonitor, FakeNode, World};
use crate::{Loops, Nodes, Peers};

type TestDeployer = Deployer<Mortal, SystemClock>;

/// Longer than any test: what has to happen happens by events, not by the resync.
const NEVER: Duration = Duration::from_secs(3600);
const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

struct Site {
    world: World,
    store: SqlStore,
    bus: MemoryBus,
    server: ServerName,
}

impl Site {
    async fn new() -> Self {
        Self {
            world: World::new(),
            store: SqlStore::in_memory().await.unwrap(),
            bus: MemoryBus::new("home".parse().unwrap()),
            server: "web".parse().unwrap(),
        }
    }

    /// Starts the deployer's process.
    fn boot(&self, life: &Life, resync: Duration) -> TestDeployer {
        let (world, life) = (self.world.clone(), life.clone());
        let peers = Peers {
            nodes: Nodes::local(FakeNode { world: world.clone(), life: life.clone() }),
            monitor: Arc::new(FakeMonitor { world: world.clone(), life: life.clone() }),
            builder: Arc::new(FakeBuilder { world, life: life.clone() }),
        };
        let store = Mortal { inner: self.store.clone(), life: life.clone() };
        let (never, stop) = watch::channel(false);
        let loops = Loops::new(
            store,
            SystemClock::new(),
            kiln_service::members::Members::alone("deployer-1"),
            peers,
            resync,
            stop,
        );
        let deployer = loops.deployer.clone();
        let loops = loops.run(self.bus.clone());
        tokio::spawn(async move {
            let mut death = life.death();
            tokio::select! {
                () = loops => {}
                _ = death.wait_for(|dead| *dead) => {}
            }
            drop(never);
        });
        deployer
    }

    async fn loaded(&self) -> Loaded {
        load(&self.store, &self.server).await.unwrap()
    }

    /// Waits for something that is bound to happen.
    async fn until<F: Future<Output = bool>>(&self, what: &str, mut so: impl FnMut() -> F) {
        let wait = async {
            while !so().await {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(20), wait).await.is_err() {
            let fleet = self.loaded().await.fleet;
            panic!("{what} did not come: {fleet:#?}\nrunning: {:?}", self.world.running());
        }
    }

    /// Waits until a release runs with all of its instances, and no rollout is under way.
    async fn until_at(&self, release: u64) {
        self.until(&format!("release {release}"), || async {
            let Loaded { fleet, releases, .. } = self.loaded().await;
            let wanted = releases.get(&release).map(|r| r.content());
            let instances = fleet.instances.values();
            fleet.release == release
                && fleet.rollout.is_none()
                && fleet.instances.len() == 3
                && instances.into_iter().all(|i| i.is_up() && Some(i.content) == wanted)
                && self.world.running().len() == 3
                && self.world.on_edge(&self.server).len() == 3
        })
        .await;
    }

    /// Nothing runs that is not meant to, and everything that is meant to run is on the edge.
    async fn assert_tidy(&self) {
        let fleet = self.loaded().await.fleet;
        let meant: Vec<InstanceId> = fleet.instances.keys().cloned().collect();
        assert_eq!(self.world.running(), meant);
        assert_eq!(self.world.on_edge(&self.server).into_iter().collect::<Vec<_>>(), meant);
        assert_eq!(self.world.outages(), 0);
        assert!(self.world.most() <= 4, "{} ran at a time", self.world.most());
    }

    async fn tell_revision(&self, revision: &types::Revision) {
        let message = events::RevisionCreated { revision: Some(revision.clone()) };
        let id = format!("web-g{}", revision.generation);
        self.tell(Service::Builder, "revision", "created", &id, 1, message.encode_to_vec()).await;
    }

    async fn tell_signal(&self, signal: &types::Signal) {
        let message = events::NeedsUpdate { signal: Some(signal.clone()) };
        self.tell(Service::Monitor, "server", "needs_update", &signal.id, 1, message.encode_to_vec()).await;
    }

    async fn tell(
        &self,
        service: Service,
        entity: &'static str,
        verb: &'static str,
        id: &str,
        version: u64,
        payload: Vec<u8>,
    ) {
        let event = NewEvent {
            kind: EventType::new(service, entity, verb),
            server: Some(self.server.clone()),
            aggregate_kind: entity.to_owned(),
            aggregate_id: id.to_owned(),
            aggregate_version: version,
            payload,
            time: Timestamp::now(),
            traceparent: TRACE.to_owned(),
        };
        let id = Event::id_of("e", &event, 0);
        self.bus.publish(&Event { id, sequence: 1, epoch: "e".to_owned(), event }).await.unwrap();
    }

    /// Types of the events that the deployer published, in order.
    fn told(&self) -> Vec<String> {
        let published = self.bus.published().into_iter();
        let own = published.filter(|event| event.event.kind.service == Service::Deployer);
        own.map(|event| format!("{}.{}", event.event.kind.entity, event.event.kind.verb)).collect()
    }

    fn count(&self, kind: &str) -> usize {
        self.told().iter().filter(|told| *told == kind).count()
    }
}

fn revision(generation: u64, definition: &str, image: &str, run: RunSpec) -> types::Revision {
    let server: ServerName = "web".parse().unwrap();
    let content = ImageRevision {
        definition_digest: Digest::of(definition.as_bytes()),
        image_digest: Digest::of(image.as_bytes()),
        run_digest: run.digest().unwrap(),
        run,
        update: UpdatePolicy {
            definition: Mode::Auto,
            packages: Mode::Auto,
            unhealthy: Mode::Auto,
            debounce: Millis(0),
        },
        build: "web-b1".parse().unwrap(),
        commit: "c0ffee".to_owned(),
        packages: Default::default(),
        cause: Cause {
            kind: CauseKind::DefinitionChanged,
            id: "s1".to_owned(),
            summary: "a commit".to_owned(),
            actor: "monitor".to_owned(),
            time: Timestamp::now(),
            traceparent: TRACE.to_owned(),
        },
    };
    let content = RevisionContent::Image(Box::new(content));
    Revision { server, generation, content, created: Timestamp::now() }.into()
}

fn gone(id: &InstanceId) -> types::Signal {
    let fingerprint = id.to_string();
    let signal = Signal {
        id: SignalId::new(&id.server, CauseKind::Gone, &fingerprint),
        server: id.server.clone(),
        cause: CauseKind::Gone,
        fingerprint,
        remedy: Remedy::Replace,
        evidence: vec![format!("{id} exited with 137")],
        instance: Some(id.clone()),
        state: SignalState::Open,
        since: Timestamp::now(),
        raised: Timestamp::now(),
        reporter: "monitor".to_owned(),
        traceparent: TRACE.to_owned(),
    };
    types::Signal { version: 1, ..signal.into() }
}
