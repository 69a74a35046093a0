//! Peers that say what a test tells them to, and a monitor among them.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use jiff::Timestamp;
use kiln_api::{builder, convert, deployer, engine, events, monitor, types};
use kiln_bus::{Bus, MemoryBus};
use kiln_model::check::{Check, CheckResult};
use kiln_model::digest::Digest;
use kiln_model::event::{Event, EventType, NewEvent, Service};
use kiln_model::name::{InstanceId, ServerName, SiteName};
use kiln_model::release_file::ReleaseFile;
use kiln_model::run::HealthPolicy;
use kiln_model::time::Millis;
use kiln_monitor::engine::Engines;
use kiln_monitor::ports::{Archive, Builder, Deployer, Engine, Git, Listing, Others, Problem};
use kiln_monitor::{Monitor, Ports};
use kiln_service::clock::SystemClock;
use kiln_service::config::Poll;
use kiln_service::members::Members;
use kiln_store::SqlStore;
use prost::Message;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

pub const EPOCH: &str = "epoch-1";
pub const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// What must happen happens within this time on a busy machine.
const AMPLE: Duration = Duration::from_secs(30);

/// Looks until a condition holds.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let give_up = tokio::time::Instant::now() + AMPLE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < give_up, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn away(flag: &AtomicBool, who: &str) -> Result<(), Problem> {
    if flag.load(Ordering::SeqCst) { Err(Problem(format!("the {who} is away"))) } else { Ok(()) }
}

#[derive(Default)]
pub struct FakeDeployer {
    pub instances: Mutex<BTreeMap<String, deployer::Instance>>,
    pub away: AtomicBool,
    pub listed: AtomicU64,
}

#[async_trait]
impl Deployer for FakeDeployer {
    async fn instances(&self) -> Result<Listing<deployer::Instance>, Problem> {
        away(&self.away, "deployer")?;
        let items = self.instances.lock().unwrap().values().cloned().collect();
        self.listed.fetch_add(1, Ordering::SeqCst);
        Ok(Listing { epoch: EPOCH.to_owned(), items })
    }
}

#[derive(Default)]
pub struct FakeBuilder {
    pub servers: Mutex<BTreeMap<String, builder::Server>>,
    pub sources: Mutex<Vec<builder::Source>>,
    pub inspection: Mutex<builder::InspectSourceResponse>,
    pub plan: Mutex<builder::Plan>,
    /// A server whose plan takes for ever.
    pub slow: Mutex<Option<String>>,
    pub away: AtomicBool,
    pub inspected: AtomicU64,
    pub planned: AtomicU64,
}

#[async_trait]
impl Builder for FakeBuilder {
    async fn servers(&self) -> Result<Listing<builder::Server>, Problem> {
        away(&self.away, "builder")?;
        let items = self.servers.lock().unwrap().values().cloned().collect();
        Ok(Listing { epoch: EPOCH.to_owned(), items })
    }

    async fn sources(&self) -> Result<Listing<builder::Source>, Problem> {
        away(&self.away, "builder")?;
        Ok(Listing { epoch: EPOCH.to_owned(), items: self.sources.lock().unwrap().clone() })
    }

    async fn inspect(&self, _: &str) -> Result<builder::InspectSourceResponse, Problem> {
        away(&self.away, "builder")?;
        self.inspected.fetch_add(1, Ordering::SeqCst);
        Ok(self.inspection.lock().unwrap().clone())
    }

    async fn plan(&self, server: &ServerName) -> Result<builder::Plan, Problem> {
        away(&self.away, "builder")?;
        self.planned.fetch_add(1, Ordering::SeqCst);
        let slow = self.slow.lock().unwrap().as_deref() == Some(server.as_str());
        if slow {
            return std::future::pending().await;
        }
        Ok(self.plan.lock().unwrap().clone())
    }
}

pub struct FakeEngine {
    pub instances: Mutex<BTreeMap<String, engine::Instance>>,
    pub changes: broadcast::Sender<Option<engine::Instance>>,
    pub away: AtomicBool,
    /// It has what the deployer says that it runs.
    pub knows: AtomicBool,
    pub watched: AtomicU64,
    pub check: Mutex<Option<CheckResult>>,
}

impl Default for FakeEngine {
    fn default() -> Self {
        Self {
            instances: Mutex::default(),
            changes: broadcast::Sender::new(4096),
            away: AtomicBool::new(false),
            knows: AtomicBool::new(true),
            watched: AtomicU64::new(0),
            check: Mutex::new(None),
        }
    }
}

impl FakeEngine {
    pub fn set(&self, id: &str, state: engine::InstanceState, exit_code: Option<i32>) {
        self.tell(id, engine::Instance { state: state.into(), exit_code, ..engine::Instance::default() });
    }

    pub fn tell(&self, id: &str, instance: engine::Instance) {
        let spec = engine::InstanceSpec { id: id.to_owned(), ..engine::InstanceSpec::default() };
        let instance = engine::Instance { spec: Some(spec), ..instance };
        self.instances.lock().unwrap().insert(id.to_owned(), instance.clone());
        let _ = self.changes.send(Some(instance));
    }

    /// Ends every stream, and answers nothing until it is back.
    pub fn set_away(&self, is_away: bool) {
        self.away.store(is_away, Ordering::SeqCst);
        let _ = self.changes.send(None);
    }
}

#[async_trait]
impl Engine for FakeEngine {
    async fn watch(&self) -> Result<BoxStream<'static, engine::WatchInstancesResponse>, Problem> {
        away(&self.away, "engine")?;
        let changes = self.changes.subscribe();
        let message = |instance, synced| engine::WatchInstancesResponse { instance, synced };
        let mut first: Vec<_> = self
            .instances
            .lock()
            .unwrap()
            .values()
            .cloned()
            .map(|instance| message(Some(instance), false))
            .collect();
        first.push(message(None, true));
        self.watched.fetch_add(1, Ordering::SeqCst);
        let changes = stream::unfold(changes, move |mut changes| async move {
            let instance = changes.recv().await.ok()??;
            Some((message(Some(instance), true), changes))
        });
        Ok(stream::iter(first).chain(changes).boxed())
    }

    async fn ping(&self) -> Result<(), Problem> {
        away(&self.away, "engine")
    }

    async fn check(&self, _: &InstanceId, _: &Check, _: Millis) -> Result<CheckResult, Problem> {
        away(&self.away, "engine")?;
        self.check.lock().unwrap().clone().ok_or_else(|| Problem("nothing to say".to_owned()))
    }
}

/// No repository, no archive, and no other monitor.
pub struct Nowhere;

#[async_trait]
impl Git for Nowhere {
    async fn head(&self, _: &str, _: &str) -> Result<String, Problem> {
        Err(Problem("there is no repository".to_owned()))
    }
}

#[async_trait]
impl Archive for Nowhere {
    async fn release_file(&self, _: &str) -> Result<ReleaseFile, Problem> {
        Err(Problem("there is no archive".to_owned()))
    }
}

#[async_trait]
impl Others for Nowhere {
    async fn watch(&self, _: &str) -> Result<BoxStream<'static, monitor::Health>, Problem> {
        Err(Problem("there is no other monitor".to_owned()))
    }

    async fn status(&self, _: &str, _: &ServerName) -> Result<monitor::GetServerStatusResponse, Problem> {
        Err(Problem("there is no other monitor".to_owned()))
    }
}

/// Everything around a monitor, which outlives the monitor.
pub struct World {
    pub store: SqlStore,
    pub bus: MemoryBus,
    pub deployer: Arc<FakeDeployer>,
    pub builder: Arc<FakeBuilder>,
    pub engine: Arc<FakeEngine>,
    pub git: Arc<dyn Git>,
    pub archive: Arc<dyn Archive>,
    pub others: Arc<dyn Others>,
    pub members: Members,
    pub poll: Poll,
    versions: Mutex<HashMap<String, u64>>,
}

impl World {
    pub async fn new() -> Self {
        let site: SiteName = "test".parse().unwrap();
        Self {
            store: SqlStore::in_memory().await.unwrap(),
            bus: MemoryBus::new(site),
            deployer: Arc::default(),
            builder: Arc::default(),
            engine: Arc::default(),
            git: Arc::new(Nowhere),
            archive: Arc::new(Nowhere),
            others: Arc::new(Nowhere),
            members: Members::alone("monitor-1"),
            poll: Poll {
                git: Duration::from_millis(200),
                archive: Duration::from_millis(300),
                resync: Duration::from_millis(150),
            },
            versions: Mutex::default(),
        }
    }

    pub async fn start(&self) -> Running {
        let ports = Ports {
            deployer: self.deployer.clone(),
            builder: self.builder.clone(),
            engines: Engines::local(self.engine.clone()),
            git: self.git.clone(),
            archive: self.archive.clone(),
            others: self.others.clone(),
        };
        let (store, members) = (self.store.clone(), self.members.clone());
        let monitor = Monitor::load(store, SystemClock::new(), members, ports, self.poll).await.unwrap();
        let (stop, stopped) = watch::channel(false);
        let api = monitor.api(stopped.clone());
        let bus = self.bus.clone();
        let task = tokio::spawn(async move { Box::pin(monitor.run(&bus, stopped)).await });
        Running { api, stop, task }
    }

    fn version(&self, id: &str) -> u64 {
        let mut versions = self.versions.lock().unwrap();
        let version = versions.entry(id.to_owned()).or_default();
        *version += 1;
        *version
    }

    /// The deployer has an instance in a state; nobody is told.
    pub fn has(&self, instance: deployer::Instance) -> deployer::Instance {
        let instance = deployer::Instance { version: self.version(&instance.id), ..instance };
        let retired = instance.state == deployer::InstanceState::Retired as i32;
        let running = instance.state == deployer::InstanceState::Running as i32;
        if running && self.engine.knows.load(Ordering::SeqCst) {
            self.engine.set(&instance.id, engine::InstanceState::Running, None);
        }
        let mut instances = self.deployer.instances.lock().unwrap();
        if retired {
            instances.remove(&instance.id);
        } else {
            instances.insert(instance.id.clone(), instance.clone());
        }
        instance
    }

    /// The same, told in an event.
    pub async fn tells(&self, instance: deployer::Instance) {
        let instance = self.has(instance);
        let (id, version) = (instance.id.clone(), instance.version);
        let payload = events::InstanceChanged { instance: Some(instance) }.encode_to_vec();
        self.publish(Service::Deployer, "instance", "launched", &id, version, payload).await;
    }

    pub async fn publish(
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
            server: Some("web".parse().unwrap()),
            aggregate_kind: entity.to_owned(),
            aggregate_id: id.to_owned(),
            aggregate_version: version,
            payload,
            time: Timestamp::now(),
            traceparent: TRACE.to_owned(),
        };
        let id = Event::id_of(EPOCH, &event, 0);
        self.bus.publish(&Event { id, sequence: version, epoch: EPOCH.to_owned(), event }).await.unwrap();
    }

    /// The builder has a server; nobody is told.
    pub fn has_server(&self, server: builder::Server) -> builder::Server {
        let version = self.version(&format!("server {}", server.name));
        let server = builder::Server { version, ..server };
        self.builder.servers.lock().unwrap().insert(server.name.clone(), server.clone());
        server
    }

    /// What the monitor said so far: `healthy web-r1-0-a1`, `needs_update gone web-r1-0-a1`.
    pub fn said(&self) -> Vec<String> {
        let events =
            self.bus.published().into_iter().filter(|event| event.event.kind.service == Service::Monitor);
        events.map(|event| words(&event.event)).collect()
    }

    pub async fn hears(&self, line: &str) {
        until(line, async || self.said().iter().any(|said| said == line).then_some(())).await;
    }

    pub fn signals_said(&self) -> Vec<types::Signal> {
        let events = self.bus.published().into_iter().filter(|event| event.event.kind.entity == "server");
        events
            .filter_map(|e| events::NeedsUpdate::decode(e.event.payload.as_slice()).unwrap().signal)
            .collect()
    }
}

fn words(event: &NewEvent) -> String {
    let verb = &event.kind.verb;
    if event.kind.entity == "instance" {
        let health = events::HealthChanged::decode(event.payload.as_slice()).unwrap().health.unwrap();
        assert_eq!(health.version, event.aggregate_version);
        return format!("{verb} {}", health.instance);
    }
    let signal = events::NeedsUpdate::decode(event.payload.as_slice()).unwrap().signal.unwrap();
    assert_eq!(signal.version, event.aggregate_version);
    let about = if signal.instance.is_empty() { &signal.server } else { &signal.instance };
    format!("{verb} {} {about}", signal.cause)
}

pub struct Running {
    pub api: kiln_monitor::grpc::Api<SqlStore, SystemClock>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Running {
    /// As by SIGTERM: everything ends by itself.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        tokio::time::timeout(AMPLE, self.task).await.expect("the monitor did not stop").unwrap();
    }
}

pub fn policy(check: Check, interval: u64, start: u64) -> HealthPolicy {
    HealthPolicy {
        check,
        interval: Millis(interval),
        timeout: Millis(1000.min(interval * 4)),
        healthy: 2,
        unhealthy: 2,
        start: Millis(start),
    }
}

pub fn instance(id: &str, policy: Option<HealthPolicy>) -> deployer::Instance {
    let parsed: InstanceId = id.parse().unwrap();
    deployer::Instance {
        id: id.to_owned(),
        server: parsed.server.to_string(),
        release: parsed.release,
        ordinal: parsed.ordinal,
        attempt: parsed.attempt,
        state: deployer::InstanceState::Running.into(),
        address: "127.0.0.1".to_owned(),
        health_policy: policy.map(Into::into),
        launched: Some(convert::to_timestamp(Timestamp::now())),
        cause: Some(types::Cause { traceparent: TRACE.to_owned(), ..types::Cause::default() }),
        ..deployer::Instance::default()
    }
}

pub fn in_state(instance: &deployer::Instance, state: deployer::InstanceState) -> deployer::Instance {
    deployer::Instance { state: state.into(), ..instance.clone() }
}

pub fn server(name: &str, mode: types::Mode) -> builder::Server {
    builder::Server {
        name: name.to_owned(),
        source: "git-1".to_owned(),
        definition_digest: digest("old"),
        generation: 1,
        update: Some(types::UpdatePolicy {
            definition: mode.into(),
            packages: mode.into(),
            unhealthy: types::Mode::Auto.into(),
            debounce: Some(prost_types::Duration::default()),
        }),
        ..builder::Server::default()
    }
}

pub fn digest(text: &str) -> String {
    Digest::of(text.as_bytes()).to_string()
}
