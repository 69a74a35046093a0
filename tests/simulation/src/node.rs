//! Where instances run: it keeps the promises of `kiln.engine.v1`, over its own deaths too.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::Stream;
use kiln_api::convert::to_timestamp;
use kiln_api::engine::engine_service_server::EngineService;
use kiln_api::engine::{
    CheckRequest, CheckResponse, Instance, InstanceSpec, InstanceState, LaunchRequest, LaunchResponse,
    ListInstancesRequest, ListInstancesResponse, Listener, LogsRequest, LogsResponse, RetireRequest,
    RetireResponse, Route, RouteRequest, RouteResponse, VerifyRequest, VerifyResponse, WatchInstancesRequest,
    WatchInstancesResponse,
};
use kiln_api::types;
use kiln_model::digest::Digest;
use kiln_model::name::InstanceId;
use tokio::sync::{OwnedMutexGuard, broadcast, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::invariants::Invariants;
use crate::life::Life;
use crate::nature::Course;
use crate::outside::Outside;
use crate::world::World;

/// One instance, as the machine has it.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) message: Instance,
    pub(crate) course: Course,
    /// Since when it is on the edge, where it is.
    pub(crate) on_edge: Option<Instant>,
    /// When it was last asked whether it is well.
    pub(crate) looked_at: Option<Instant>,
    /// When it said so for the first time, and for the last.
    pub(crate) well: Option<(Instant, Instant)>,
    /// Its process is gone, and the node does not know of it yet.
    gone: bool,
}

impl Held {
    pub(crate) fn spec(&self) -> &InstanceSpec {
        self.message.spec.as_ref().unwrap()
    }

    pub(crate) fn is_fleet(&self) -> bool {
        self.spec().role() == types::Role::Fleet
    }

    /// Something of it is there.
    pub(crate) fn is_there(&self) -> bool {
        use InstanceState::{Launching, Retiring, Running};
        matches!(self.message.state(), Launching | Running | Retiring)
    }

    pub(crate) fn takes_room(&self) -> bool {
        self.is_there() && !self.gone
    }

    pub(crate) fn answers(&self, now: Instant) -> bool {
        self.message.state() == InstanceState::Running && !self.gone && self.course.answers(now)
    }

    /// It answers whenever it is asked.
    pub(crate) fn is_well(&self, now: Instant) -> bool {
        self.answers(now) && self.course.flaps.is_none()
    }
}

/// What outlives the node's processes.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    pub(crate) instances: BTreeMap<InstanceId, Held>,
    pub(crate) edge: BTreeMap<String, (u64, Vec<Listener>)>,
    /// Images that somebody was told the signature of is right.
    pub(crate) verified: BTreeSet<Digest>,
    retired: BTreeSet<InstanceId>,
    fences: BTreeMap<String, u64>,
}

impl Machine {
    pub(crate) fn on_edge(&self, server: &str) -> BTreeSet<InstanceId> {
        let listeners = self.edge.get(server).map(|(_, listeners)| listeners.as_slice()).unwrap_or_default();
        backends(listeners)
    }

    fn fence(&mut self, server: &str, generation: u64) -> Result<(), Status> {
        let fence = self.fences.entry(server.to_owned()).or_default();
        if generation < *fence {
            let why = format!("generation {generation} is lower than {fence}");
            return Err(Status::failed_precondition(why));
        }
        *fence = generation;
        Ok(())
    }

    fn off_edge(&mut self, id: &InstanceId) {
        for (_, listeners) in self.edge.values_mut() {
            for listener in listeners {
                listener.backends.retain(|backend| backend.instance != id.to_string());
            }
        }
    }
}

fn backends(listeners: &[Listener]) -> BTreeSet<InstanceId> {
    listeners.iter().flat_map(|l| &l.backends).map(|backend| backend.instance.parse().unwrap()).collect()
}

/// One process of the node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct SimNode {
    pub(crate) life: Life,
    pub(crate) machine: Arc<Mutex<Machine>>,
    pub(crate) outside: Outside,
    pub(crate) world: World,
    pub(crate) invariants: Invariants,
    changes: broadcast::Sender<Instance>,
    /// Of the node's newest process.
    newest: Arc<Mutex<Life>>,
    turns: Arc<Mutex<BTreeMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>>,
}

impl SimNode {
    pub(crate) fn new(
        life: Life,
        machine: Arc<Mutex<Machine>>,
        outside: Outside,
        world: World,
        invariants: Invariants,
    ) -> Self {
        let (changes, newest) = (broadcast::Sender::new(4096), Arc::new(Mutex::new(life.clone())));
        Self { life, machine, outside, world, invariants, changes, newest, turns: Arc::default() }
    }

    /// The next process on the same machine.
    pub(crate) fn next(&self, life: Life) -> Self {
        *self.newest.lock().unwrap() = life.clone();
        let node = Self { life, turns: Arc::default(), ..self.clone() };
        node.catch_up();
        node
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    /// What happened while no node was there.
    fn catch_up(&self) {
        let ids: Vec<InstanceId> = self.machine().instances.keys().cloned().collect();
        for id in ids {
            let held = self.machine().instances.get(&id).cloned().unwrap();
            match held.message.state() {
                InstanceState::Launching => self.end(&id, InstanceState::Failed, None, true),
                InstanceState::Running if held.gone => self.end(&id, InstanceState::Exited, None, true),
                InstanceState::Retiring => self.finish_retiring(&id),
                _ => {}
            }
        }
    }

    fn change(&self, id: &InstanceId, change: impl FnOnce(&mut Instance)) {
        let mut machine = self.machine();
        let Some(held) = machine.instances.get_mut(id) else { return };
        change(&mut held.message);
        held.message.version += 1;
        let message = held.message.clone();
        drop(machine);
        // Nobody may listen.
        let _ = self.changes.send(message);
    }

    fn end(&self, id: &InstanceId, state: InstanceState, exit_code: Option<i32>, cut_off: bool) {
        {
            let mut machine = self.machine();
            machine.off_edge(id);
            if let Some(held) = machine.instances.get_mut(id) {
                held.gone = true;
            }
        }
        let ended = Some(to_timestamp(self.world.wall()));
        self.change(id, |instance| {
            instance.set_state(state);
            (instance.exit_code, instance.cut_off, instance.ended) = (exit_code, cut_off, ended);
        });
    }

    /// An instance's process ends by itself, or by a fault. Where the node is away, nobody sees how.
    pub(crate) fn exit(&self, id: &InstanceId, code: i32) {
        let mut machine = self.machine();
        let Some(held) = machine.instances.get_mut(id) else { return };
        if held.message.state() != InstanceState::Running {
            return;
        }
        held.gone = true;
        drop(machine);
        self.world.tell(format!("{id} exits with {code}"));
        let away = self.newest.lock().unwrap().is_dead();
        if !away {
            self.end(id, InstanceState::Exited, Some(code), false);
        }
    }

    fn finish_retiring(&self, id: &InstanceId) {
        self.machine().retired.insert(id.clone());
        let ended = Some(to_timestamp(self.world.wall()));
        self.change(id, |instance| {
            instance.set_state(InstanceState::Retired);
            instance.ended = ended;
        });
    }

    /// Carried out to its end, whether or not the caller waits for it.
    async fn to_the_end<T: Send + 'static>(
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        tokio::spawn(work).await.unwrap()
    }

    /// One launch or retirement of an instance at a time.
    async fn alone(&self, id: &InstanceId) -> OwnedMutexGuard<()> {
        let turn = self.turns.lock().unwrap().entry(id.clone()).or_default().clone();
        turn.lock_owned().await
    }

    async fn launch_alone(self, request: LaunchRequest) -> Result<Instance, Status> {
        let spec = request.spec.unwrap();
        let id: InstanceId = spec.id.parse().unwrap();
        let _alone = self.alone(&id).await;
        {
            let mut machine = self.machine();
            if let Some(held) = machine.instances.get(&id) {
                if held.spec() != &spec {
                    if held.is_fleet() {
                        self.world.wrong(8, format!("{id} is launched again, as another one"));
                    }
                    return Err(Status::already_exists("another specification"));
                }
                if !matches!(held.message.state(), InstanceState::Retiring | InstanceState::Retired) {
                    return Ok(held.message.clone());
                }
            }
            if machine.retired.contains(&id) || machine.instances.contains_key(&id) {
                return Err(Status::failed_precondition(format!("{id} was retired")));
            }
            let digest: Digest = spec.image_digest.parse().unwrap();
            if !self.outside.is_signed(&digest) {
                return Err(Status::failed_precondition("its signature is not right"));
            }
            if id.release != 0 {
                machine.fence(&spec.server, request.generation)?;
            }
            let nature = self.outside.image(&digest).unwrap().nature;
            let course = Course::new(nature, Instant::now(), &self.world);
            let message = Instance {
                spec: Some(spec),
                state: InstanceState::Launching.into(),
                address: "10.77.0.2".to_owned(),
                launched: Some(to_timestamp(self.world.wall())),
                version: 1,
                ..Instance::default()
            };
            machine.instances.insert(
                id.clone(),
                Held { message, course, on_edge: None, looked_at: None, well: None, gone: false },
            );
            self.invariants.launched(&machine, &id);
        }
        self.world.tell(format!("the node launches {id} at generation {}", request.generation));
        self.life.step("in the middle of a launch").await;
        tokio::time::sleep(Duration::from_millis(self.world.between(20, 200))).await;
        self.life.here().await;
        self.change(&id, |instance| instance.set_state(InstanceState::Running));
        let held = self.machine().instances.get(&id).cloned().unwrap();
        if let Some(ends) = held.course.ends {
            let (node, id) = (self.clone(), id.clone());
            tokio::spawn(async move {
                tokio::time::sleep_until(ends).await;
                node.exit(&id, 3);
            });
        }
        self.life.step("after a launch").await;
        Ok(held.message)
    }

    async fn retire_alone(self, request: RetireRequest) -> Result<Instance, Status> {
        let id: InstanceId = request.id.parse().unwrap();
        let _alone = self.alone(&id).await;
        {
            let mut machine = self.machine();
            if machine.on_edge(&request.server).contains(&id) {
                let edge = machine.edge.get(&request.server).map(|(generation, _)| *generation);
                // The node would refuse to. It is not to be asked by who knows of this edge.
                if edge.is_some_and(|edge| request.generation >= edge) {
                    self.world.wrong(1, format!("{id} is to be retired, and is on the edge"));
                }
                return Err(Status::failed_precondition(format!("{id} is on the edge")));
            }
            let state = machine.instances.get(&id).map(|held| held.message.state());
            match state {
                Some(InstanceState::Retired) => {
                    return Ok(machine.instances.get(&id).unwrap().message.clone());
                }
                Some(InstanceState::Retiring) => {}
                _ if id.release != 0 => machine.fence(&request.server, request.generation)?,
                _ => {}
            }
            if state.is_none() {
                machine.retired.insert(id);
                return Ok(Instance { state: InstanceState::Retired.into(), ..Instance::default() });
            }
        }
        self.world.tell(format!("the node retires {id} at generation {}", request.generation));
        self.change(&id, |instance| instance.set_state(InstanceState::Retiring));
        self.life.step("in the middle of a retirement").await;
        tokio::time::sleep(Duration::from_millis(self.world.between(50, 1_200))).await;
        self.life.here().await;
        self.finish_retiring(&id);
        self.life.step("after a retirement").await;
        Ok(self.machine().instances.get(&id).unwrap().message.clone())
    }

    async fn route_alone(self, request: RouteRequest) -> Result<RouteResponse, Status> {
        let RouteRequest { server, generation, listeners, .. } = request;
        let unchanged = {
            let mut machine = self.machine();
            machine.fence(&server, generation)?;
            for id in backends(&listeners) {
                let state = machine.instances.get(&id).map(|held| held.message.state());
                if state != Some(InstanceState::Running) {
                    return Err(Status::failed_precondition(format!("{id} does not run")));
                }
            }
            let before = machine.on_edge(&server);
            let known = machine.edge.insert(server.clone(), (generation, listeners.clone()));
            self.invariants.routed(&machine, &server, &before);
            let on_edge = machine.on_edge(&server);
            for (id, held) in machine.instances.iter_mut().filter(|(_, held)| held.spec().server == server) {
                let since = held.on_edge.unwrap_or_else(Instant::now);
                held.on_edge = on_edge.contains(id).then_some(since);
            }
            known.is_some_and(|(_, known)| known == listeners)
        };
        let on_edge: Vec<String> = backends(&listeners).iter().map(ToString::to_string).collect();
        self.world.tell(format!("the edge of {server} at generation {generation}: [{}]", on_edge.join(" ")));
        self.life.step("after the edge was changed").await;
        Ok(RouteResponse { unchanged })
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl EngineService for SimNode {
    type WatchInstancesStream = Pin<Box<dyn Stream<Item = Result<WatchInstancesResponse, Status>> + Send>>;
    type LogsStream = Pin<Box<dyn Stream<Item = Result<LogsResponse, Status>> + Send>>;

    async fn launch(&self, request: Request<LaunchRequest>) -> Answer<LaunchResponse> {
        let instance = Self::to_the_end(self.clone().launch_alone(request.into_inner())).await?;
        Ok(Response::new(LaunchResponse { instance: Some(instance) }))
    }

    async fn retire(&self, request: Request<RetireRequest>) -> Answer<RetireResponse> {
        let instance = Self::to_the_end(self.clone().retire_alone(request.into_inner())).await?;
        Ok(Response::new(RetireResponse { instance: Some(instance) }))
    }

    async fn route(&self, request: Request<RouteRequest>) -> Answer<RouteResponse> {
        let response = Self::to_the_end(self.clone().route_alone(request.into_inner())).await?;
        Ok(Response::new(response))
    }

    async fn list_instances(&self, request: Request<ListInstancesRequest>) -> Answer<ListInstancesResponse> {
        let wanted = request.into_inner().server;
        let machine = self.machine();
        let instances = machine.instances.values().map(|held| held.message.clone());
        let instances = instances
            .filter(|instance| wanted.is_empty() || instance.spec.as_ref().unwrap().server == wanted)
            .collect();
        let routes = machine.edge.iter().map(|(server, (generation, listeners))| Route {
            server: server.clone(),
            generation: *generation,
            listeners: listeners.clone(),
        });
        let routes = routes.collect();
        Ok(Response::new(ListInstancesResponse { instances, routes, next_page_token: String::new() }))
    }

    async fn watch_instances(&self, _: Request<WatchInstancesRequest>) -> Answer<Self::WatchInstancesStream> {
        let mut changes = self.changes.subscribe();
        let present: Vec<Instance> = self.machine().instances.values().map(|h| h.message.clone()).collect();
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(async move {
            let told = |instance, synced| Ok(WatchInstancesResponse { instance, synced });
            for instance in present {
                if sender.send(told(Some(instance), false)).await.is_err() {
                    return;
                }
            }
            if sender.send(told(None, true)).await.is_err() {
                return;
            }
            loop {
                tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    change = changes.recv() => {
                        let Ok(instance) = change else { return };
                        if sender.send(told(Some(instance), true)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn check(&self, request: Request<CheckRequest>) -> Answer<CheckResponse> {
        let CheckRequest { id, timeout, .. } = request.into_inner();
        let timeout = timeout.map(|timeout| Duration::try_from(timeout).unwrap());
        let instance: InstanceId = id.parse().unwrap();
        let held = {
            let mut machine = self.machine();
            let held = machine.instances.get_mut(&instance).ok_or_else(|| Status::not_found(id.clone()))?;
            held.looked_at = Some(Instant::now());
            held.clone()
        };
        if held.message.state() != InstanceState::Running {
            return Err(Status::failed_precondition(format!("{id} does not run")));
        }
        if held.course.hangs {
            tokio::time::sleep(timeout.unwrap_or(Duration::from_secs(10))).await;
        }
        let now = Instant::now();
        let passed = held.answers(now);
        if let Some(held) = self.machine().instances.get_mut(&instance).filter(|_| passed) {
            held.well = Some((held.well.map_or(now, |(first, _)| first), now));
        }
        let result = types::CheckResult {
            passed,
            detail: if passed { "it answers" } else { "it does not answer" }.to_owned(),
            took: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
            time: Some(to_timestamp(self.world.wall())),
        };
        Ok(Response::new(CheckResponse { result: Some(result) }))
    }

    async fn verify(&self, request: Request<VerifyRequest>) -> Answer<VerifyResponse> {
        let digest: Digest = request.into_inner().image_digest.parse().unwrap();
        let verified = self.outside.is_signed(&digest);
        if verified {
            self.machine().verified.insert(digest);
        }
        Ok(Response::new(VerifyResponse { verified, key_id: "key".to_owned(), detail: String::new() }))
    }

    async fn logs(&self, _: Request<LogsRequest>) -> Answer<Self::LogsStream> {
        Ok(Response::new(Box::pin(futures::stream::iter([]))))
    }
}
