//! A site: its processes, which are started again when they die, and what outlives them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use kiln_api::builder::builder_service_server::BuilderServiceServer;
use kiln_api::engine::engine_service_server::EngineServiceServer;
use kiln_api::monitor::monitor_service_server::MonitorServiceServer;
use kiln_api::monitor::{GetServerStatusResponse, Health};
use kiln_builder::builder::Builder;
use kiln_builder::collect::{Collector, How};
use kiln_builder::context::Contexts;
use kiln_builder::events::Resync;
use kiln_builder::image_tests::EngineTester;
use kiln_builder::logs::Logs;
use kiln_builder::peers::SitePeers;
use kiln_builder::sources::Sources;
use kiln_builder::store::Documents;
use kiln_builder::workers::{self, WorkerOptions};
use kiln_image::ImageStore;
use kiln_model::event::Service;
use kiln_model::name::ServerName;
use kiln_monitor::engine::Engines;
use kiln_monitor::peers::{BuilderPeer, DeployerPeer, EnginePeer};
use kiln_monitor::ports::{Others, Problem};
use kiln_monitor::{Monitor, Ports};
use kiln_service::client::Channel;
use kiln_service::config::{Poll, Signing};
use kiln_service::members::{Member, Members};
use tokio::sync::watch;
use tower::util::BoxCloneSyncService;

use crate::bakery::SimBakery;
use crate::bus::{Broker, SimBus};
use crate::calls::{Directory, To};
use crate::invariants::Invariants;
use crate::life::Life;
use crate::node::SimNode;
use crate::outside::{Outside, Reach};
use crate::store::{Disk, SimStore};
use crate::world::{SimClock, World};

pub(crate) const RESYNC: Duration = Duration::from_secs(30);
const UNUSED_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Cheap to clone; every clone is the same.
#[derive(Clone)]
pub(crate) struct Site {
    pub(crate) world: World,
    pub(crate) outside: Outside,
    pub(crate) broker: Broker,
    pub(crate) directory: Directory,
    pub(crate) invariants: Invariants,
    pub(crate) node: SimNode,
    disks: Arc<BTreeMap<Service, Disk>>,
    /// Of each replica of each service.
    lives: Arc<Mutex<BTreeMap<(Service, u64), Life>>>,
    /// All that ever ran, by name.
    processes: Arc<Mutex<BTreeMap<String, Life>>>,
    /// Services that several processes share for good.
    shared: Arc<BTreeMap<Service, u64>>,
    numbers: Arc<Mutex<BTreeMap<Service, u64>>>,
    folder: Arc<PathBuf>,
}

impl Site {
    /// Its services begin to run.
    pub(crate) fn new(world: &World, folder: PathBuf) -> Self {
        let outside = Outside::new(world.extras());
        let invariants = Invariants::new(world, &outside);
        let disk = |service: Service| (service, Disk::new(service.as_str()));
        let first = Life::new(Service::Node, 0, 0, world);
        let machine = invariants.machine.clone();
        let node = SimNode::new(first, machine, outside.clone(), world.clone(), invariants.clone());
        let site = Self {
            world: world.clone(),
            outside,
            broker: Broker::new(),
            directory: Directory::default(),
            invariants,
            node,
            disks: Arc::new(Service::ALL.map(disk).into()),
            lives: Arc::default(),
            processes: Arc::default(),
            shared: Arc::new(world.replicas()),
            numbers: Arc::default(),
            folder: Arc::new(folder),
        };
        for service in Service::ALL {
            for replica in 0..site.shared.get(&service).copied().unwrap_or(1) {
                site.start(service, replica);
            }
        }
        site
    }

    pub(crate) fn disk(&self, service: Service) -> &Disk {
        self.disks.get(&service).unwrap()
    }

    /// The newest process of a replica.
    pub(crate) fn life(&self, service: Service, replica: u64) -> Option<Life> {
        self.lives.lock().unwrap().get(&(service, replica)).cloned()
    }

    pub(crate) fn lives(&self) -> Vec<Life> {
        self.lives.lock().unwrap().values().cloned().collect()
    }

    pub(crate) fn process(&self, name: &str) -> Option<Life> {
        self.processes.lock().unwrap().get(name).cloned()
    }

    /// A service's process: one of several where it has them.
    pub(crate) fn any_life(&self, service: Service) -> Option<Life> {
        let replicas = self.shared.get(&service).copied().unwrap_or(1);
        let replica = if replicas > 1 { self.world.between(0, replicas - 1) } else { 0 };
        self.life(service, replica)
    }

    /// A person's way to a service.
    pub(crate) fn channel(&self, to: Service) -> Channel {
        self.directory.channel(None, To::Service(to), &self.world)
    }

    /// Starts a service again when its newest process has died.
    async fn supervise(&self, life: &Life) {
        life.died().await;
        tokio::time::sleep(Duration::from_millis(self.world.between(100, 8_000))).await;
        let is_gone = |newest: Life| newest.is_dead() && newest.name() == life.name();
        if self.life(life.service, life.replica).is_some_and(is_gone) {
            self.start(life.service, life.replica);
        }
    }

    /// Starts one more process of a replica; from now on it is the one that answers.
    pub(crate) fn start(&self, service: Service, replica: u64) -> Life {
        let number = {
            let mut numbers = self.numbers.lock().unwrap();
            let number = numbers.entry(service).or_default();
            *number += 1;
            *number
        };
        let life = Life::new(service, replica, number, &self.world);
        self.world.tell(format!("{} starts", life.name()));
        self.lives.lock().unwrap().insert((service, replica), life.clone());
        self.processes.lock().unwrap().insert(life.name().to_owned(), life.clone());
        let (site, process) = (self.clone(), life.clone());
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = process.died() => {}
                failed = site.run(service, &process) => process.kill(&format!("of {failed}")),
            }
            site.supervise(&process).await;
        });
        life
    }

    /// Runs a process for as long as it lives, and says what it failed of.
    async fn run(&self, service: Service, life: &Life) -> String {
        match service {
            Service::Builder => Box::pin(self.builder(life)).await,
            Service::Deployer => self.deployer(life).await,
            Service::Monitor => self.monitor(life).await,
            Service::Node => {
                let node = self.node.next(life.clone());
                self.directory.serve(life, BoxCloneSyncService::new(EngineServiceServer::new(node)));
                std::future::pending().await
            }
        }
    }

    fn store(&self, life: &Life) -> SimStore {
        SimStore::new(self.disk(life.service), life, &self.world, &self.invariants)
    }

    fn bus(&self, life: &Life) -> SimBus {
        SimBus {
            broker: self.broker.clone(),
            disk: self.disk(life.service).clone(),
            life: life.clone(),
            world: self.world.clone(),
            invariants: self.invariants.clone(),
        }
    }

    fn reach(&self, life: &Life) -> Arc<Reach> {
        Arc::new(Reach { outside: self.outside.clone(), life: life.clone() })
    }

    /// Those that share a service with a process, which stays among them for as long as it lives.
    async fn members(&self, life: &Life) -> Result<Members, kiln_store::Error> {
        let id = life.name().to_owned();
        if !self.shared.contains_key(&life.service) {
            return Ok(Members::alone(&id));
        }
        let me = Member { address: id.clone(), id };
        let (members, heart) = Members::join(self.store(life), self.world.clock(), me).await?;
        let life = life.clone();
        tokio::spawn(async move {
            let (_stop, stopped) = watch::channel(false);
            tokio::select! {
                biased;
                () = life.died() => {}
                () = heart.run(stopped) => {}
            }
        });
        Ok(members)
    }

    fn to(&self, life: &Life, service: Service) -> Channel {
        self.directory.channel(Some(life), To::Service(service), &self.world)
    }

    fn decides(&self, life: &Life) -> Builder<SimStore, SimBakery, SimClock> {
        let documents = Documents::new(self.store(life));
        let contexts = Contexts::new(self.folder.join("contexts"));
        let bakery = SimBakery {
            outside: self.outside.clone(),
            disk: self.disk(life.service).clone(),
            life: life.clone(),
            world: self.world.clone(),
        };
        Builder {
            sources: Sources::new(documents.clone(), contexts, self.reach(life)),
            documents,
            bakery,
            logs: Logs::open(self.folder.join("logs")).unwrap(),
            clock: self.world.clock(),
        }
    }

    fn images(&self) -> ImageStore {
        ImageStore::open(&self.folder.join("images")).unwrap()
    }

    /// A builder removes the images that nobody needs, as it does once an hour. The deployer was just heard of.
    pub(crate) async fn collect(&self) {
        let Some(life) = self.any_life(Service::Builder) else { return };
        let (builder, images, now) = (self.decides(&life), self.images(), self.world.wall());
        let collected = tokio::select! {
            biased;
            () = life.died() => return,
            collected = builder.collect(&images, Some(now), How::Remove) => collected,
            () = tokio::time::sleep(RESYNC) => return,
        };
        self.world.tell(format!("{} collects images: {collected:?}", life.name()));
    }

    async fn builder(&self, life: &Life) -> String {
        let to = |service| self.to(life, service);
        let builder = self.decides(life);
        let members = match self.members(life).await {
            Ok(members) => members,
            Err(error) => return error.to_string(),
        };
        if let Err(error) = workers::recover(&builder, &members).await {
            return error.to_string();
        }
        let images = self.images();
        let signing = Signing::with_one_key(self.folder.join("signing.key"), self.folder.join("signing.pub"));
        let peers = SitePeers::new(to(Service::Deployer), to(Service::Monitor));
        let following = Resync::new(builder.clone(), peers);
        let collector = Collector::new(builder.clone(), images.clone(), following.heard(), UNUSED_KEPT);
        let api = kiln_builder::grpc::Api::new(builder.clone(), images, signing, collector.clone());
        self.directory.serve(life, BoxCloneSyncService::new(BuilderServiceServer::new(api)));
        let loops = kiln_builder::Loops {
            builder,
            tester: EngineTester::local(to(Service::Node)),
            following,
            collector,
            options: WorkerOptions { members, workers: 2 },
            resync: RESYNC,
        };
        let (_stop, stopped) = watch::channel(false);
        Box::pin(loops.run(self.bus(life), stopped)).await;
        "the end of its loops".to_owned()
    }

    async fn deployer(&self, life: &Life) -> String {
        let to = |service| self.to(life, service);
        let peers = kiln_deployer::Peers {
            nodes: kiln_deployer::Nodes::local(kiln_deployer::peers::Node::new(to(Service::Node))),
            monitor: Arc::new(kiln_deployer::peers::Watcher::new(to(Service::Monitor))),
            builder: Arc::new(kiln_deployer::peers::Bakery::new(to(Service::Builder))),
        };
        let members = match self.members(life).await {
            Ok(members) => members,
            Err(error) => return error.to_string(),
        };
        let (_stop, stopped) = watch::channel(false);
        let clock = self.world.clock();
        let loops = kiln_deployer::Loops::new(self.store(life), clock, members, peers, RESYNC, stopped);
        self.directory.serve(life, BoxCloneSyncService::new(loops.service()));
        loops.run(self.bus(life)).await;
        "the end of its loops".to_owned()
    }

    async fn monitor(&self, life: &Life) -> String {
        let to = |service| self.to(life, service);
        let ports = Ports {
            deployer: Arc::new(DeployerPeer::new(to(Service::Deployer))),
            builder: Arc::new(BuilderPeer::new(to(Service::Builder))),
            engines: Engines::local(Arc::new(EnginePeer::new(to(Service::Node)))),
            git: self.reach(life),
            archive: self.reach(life),
            others: Arc::new(SimOthers { site: self.clone(), life: life.clone() }),
        };
        let members = match self.members(life).await {
            Ok(members) => members,
            Err(error) => return error.to_string(),
        };
        let poll = Poll { git: Duration::from_secs(5), archive: Duration::from_secs(20), resync: RESYNC };
        let loaded = Monitor::load(self.store(life), self.world.clock(), members, ports, poll).await;
        let monitor = match loaded {
            Ok(monitor) => monitor,
            Err(error) => return error.to_string(),
        };
        let (_stop, stopped) = watch::channel(false);
        let server = MonitorServiceServer::new(monitor.api(stopped.clone()));
        self.directory.serve(life, BoxCloneSyncService::new(server));
        Box::pin(monitor.run(&self.bus(life), stopped)).await;
        "the end of its loops".to_owned()
    }
}

/// A monitor's way to the others, which say by what name they are reached.
struct SimOthers {
    site: Site,
    life: Life,
}

#[async_trait]
impl Others for SimOthers {
    async fn watch(&self, address: &str) -> Result<BoxStream<'static, Health>, Problem> {
        let Site { directory, world, .. } = &self.site;
        let channel = directory.channel(Some(&self.life), To::Process(address.to_owned()), world);
        kiln_monitor::peers::watch(channel).await
    }

    async fn status(&self, address: &str, server: &ServerName) -> Result<GetServerStatusResponse, Problem> {
        let Site { directory, world, .. } = &self.site;
        let channel = directory.channel(Some(&self.life), To::Process(address.to_owned()), world);
        kiln_monitor::peers::status(channel, server).await
    }
}
