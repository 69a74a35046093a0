//! A node, a monitor and a builder in memory, as the loops meet them: they answer, tell, forget, and can be away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use jiff::Timestamp;
use kiln_api::convert::to_timestamp;
use kiln_api::{engine, monitor, types};
use kiln_deployer_core::{Listener, Verdict};
use kiln_model::check::{Check, CheckResult, HttpCheck};
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::run::{HealthPolicy, Limits, Port, RolloutPolicy, RunSpec, Strategy};
use kiln_model::signal::HealthState;
use kiln_model::time::Millis;
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;

use crate::ports::{Builder, Engine, Launch, Listing, Monitor, Problem, Revisions, Signals};
use crate::tests::life::Life;

/// How instances of an image behave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behaviour {
    NeverHealthy,
    Exits,
}

#[derive(Debug, Clone)]
struct Instance {
    launch: Launch,
    state: engine::InstanceState,
    role: types::Role,
    version: u64,
    launched: Instant,
    exit_code: Option<i32>,
}

#[derive(Debug, Default)]
struct State {
    instances: BTreeMap<InstanceId, Instance>,
    retired: BTreeSet<InstanceId>,
    edge: BTreeMap<ServerName, (u64, Vec<Listener>)>,
    fences: BTreeMap<ServerName, u64>,
    behaviours: BTreeMap<Digest, Behaviour>,
    revisions: Vec<types::Revision>,
    signals: Vec<types::Signal>,
    held: BTreeMap<ServerName, BTreeSet<Digest>>,
    node_away: bool,
    others_away: bool,
    /// Most instances that ran at a time.
    most: usize,
    /// Moments at which a server that had served had nobody on the edge.
    outages: usize,
}

#[derive(Clone)]
pub(super) struct World {
    state: Arc<Mutex<State>>,
    changes: broadcast::Sender<engine::Instance>,
    health: broadcast::Sender<monitor::Health>,
}

pub(super) fn run_spec() -> RunSpec {
    RunSpec {
        node: None,
        replicas: 3,
        ports: vec![Port { listen: 8080, target: 80 }],
        writable: Vec::new(),
        env: BTreeMap::new(),
        limits: Limits::default(),
        capabilities: Vec::new(),
        health: Some(HealthPolicy {
            check: Check::Http(HttpCheck { port: 80, path: "/".to_owned(), status: None, body: None }),
            interval: Millis(100),
            timeout: Millis(100),
            healthy: 1,
            unhealthy: 2,
            start: Millis(150),
        }),
        rollout: RolloutPolicy {
            strategy: Strategy::Rolling { max_surge: 1, max_unavailable: 0 },
            soak: Millis(0),
            deadline: Millis::from_secs(30),
        },
        drain: Millis(0),
    }
}

impl World {
    pub(super) fn new() -> Self {
        let world = Self {
            state: Arc::default(),
            changes: broadcast::channel(1024).0,
            health: broadcast::channel(1024).0,
        };
        // The monitor: looks every few milliseconds and tells what changed.
        let watching = world.clone();
        tokio::spawn(async move {
            let mut told: BTreeMap<InstanceId, HealthState> = BTreeMap::new();
            loop {
                watching.end_what_exits();
                for (id, state) in watching.truths() {
                    if told.insert(id.clone(), state) != Some(state) && !watching.lock().others_away {
                        let _ = watching.health.send(health(&id, state));
                    }
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        world
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn behave(&self, image: &str, behaviour: Behaviour) {
        self.lock().behaviours.insert(Digest::of(image.as_bytes()), behaviour);
    }

    pub(super) fn set_node_away(&self, away: bool) {
        self.lock().node_away = away;
    }

    /// Monitor and builder.
    pub(super) fn set_others_away(&self, away: bool) {
        self.lock().others_away = away;
    }

    pub(super) fn revise(&self, revision: types::Revision) {
        self.lock().revisions.push(revision);
    }

    pub(super) fn signal(&self, signal: types::Signal) {
        self.lock().signals.push(signal);
    }

    pub(super) fn held(&self, server: &ServerName) -> BTreeSet<Digest> {
        self.lock().held.get(server).cloned().unwrap_or_default()
    }

    pub(super) fn running(&self) -> Vec<InstanceId> {
        let state = self.lock();
        let up = state.instances.iter().filter(|(_, i)| i.state == engine::InstanceState::Running);
        up.map(|(id, _)| id.clone()).collect()
    }

    pub(super) fn on_edge(&self, server: &ServerName) -> BTreeSet<InstanceId> {
        let state = self.lock();
        let listeners = state.edge.get(server).map(|(_, listeners)| listeners.clone()).unwrap_or_default();
        listeners.into_iter().flat_map(|l| l.backends).map(|backend| backend.instance).collect()
    }

    pub(super) fn most(&self) -> usize {
        self.lock().most
    }

    pub(super) fn outages(&self) -> usize {
        self.lock().outages
    }

    /// As if somebody had launched it by hand.
    pub(super) fn plant(&self, id: &InstanceId, role: types::Role) {
        let launch = Launch { id: id.clone(), image: Digest::of(b"planted"), run: run_spec(), generation: 0 };
        let instance = Instance {
            launch,
            state: engine::InstanceState::Running,
            role,
            version: 1,
            launched: Instant::now(),
            exit_code: None,
        };
        self.lock().instances.insert(id.clone(), instance);
    }

    pub(super) fn exit(&self, id: &InstanceId, code: i32) {
        let mut state = self.lock();
        let Some(instance) = state.instances.get_mut(id) else { return };
        if instance.state != engine::InstanceState::Running {
            return;
        }
        instance.state = engine::InstanceState::Exited;
        instance.exit_code = Some(code);
        instance.version += 1;
        let message = message(instance);
        for (_, listeners) in state.edge.values_mut() {
            for listener in listeners {
                listener.backends.retain(|backend| backend.instance != *id);
            }
        }
        drop(state);
        let _ = self.changes.send(message);
    }

    fn end_what_exits(&self) {
        let doomed: Vec<InstanceId> = {
            let state = self.lock();
            let exits = |i: &&InstanceId| {
                let instance = &state.instances[*i];
                state.behaviours.get(&instance.launch.image) == Some(&Behaviour::Exits)
                    && instance.launched.elapsed() > Duration::from_millis(10)
            };
            state.instances.keys().filter(exits).cloned().collect()
        };
        for id in doomed {
            self.exit(&id, 3);
        }
    }

    fn truths(&self) -> Vec<(InstanceId, HealthState)> {
        let state = self.lock();
        let up = state.instances.iter().filter(|(_, i)| i.state == engine::InstanceState::Running);
        let truths = up.map(|(id, instance)| {
            let age = instance.launched.elapsed();
            let truth = match state.behaviours.get(&instance.launch.image) {
                _ if age < Duration::from_millis(5) => HealthState::Starting,
                Some(Behaviour::NeverHealthy) if age < Duration::from_millis(150) => HealthState::Starting,
                Some(Behaviour::NeverHealthy) => HealthState::Unhealthy,
                _ => HealthState::Healthy,
            };
            (id.clone(), truth)
        });
        truths.collect()
    }

    fn fence(state: &mut State, server: &ServerName, generation: u64) -> Result<(), Problem> {
        let fence = state.fences.entry(server.clone()).or_default();
        if generation < *fence {
            return Err(Problem::Refused(format!("generation {generation} is older than {fence}")));
        }
        *fence = generation;
        Ok(())
    }

    fn reachable(&self) -> Result<MutexGuard<'_, State>, Problem> {
        let state = self.lock();
        if state.node_away { Err(Problem::Later("the node is away".to_owned())) } else { Ok(state) }
    }

    fn others(&self) -> Result<MutexGuard<'_, State>, Problem> {
        let state = self.lock();
        if state.others_away { Err(Problem::Later("away".to_owned())) } else { Ok(state) }
    }
}

fn message(instance: &Instance) -> engine::Instance {
    let id = &instance.launch.id;
    engine::Instance {
        spec: Some(engine::InstanceSpec {
            id: id.to_string(),
            server: id.server.to_string(),
            release: id.release,
            ordinal: id.ordinal,
            attempt: id.attempt,
            role: instance.role.into(),
            image_digest: instance.launch.image.to_string(),
            run: Some(instance.launch.run.clone().into()),
        }),
        state: instance.state.into(),
        address: "10.77.0.2".to_owned(),
        launched: Some(to_timestamp(Timestamp::now())),
        exit_code: instance.exit_code,
        version: instance.version,
        ..engine::Instance::default()
    }
}

fn health(id: &InstanceId, state: HealthState) -> monitor::Health {
    let last = CheckResult {
        passed: state == HealthState::Healthy,
        detail: "status 200".to_owned(),
        took: Millis(1),
        time: Timestamp::now(),
    };
    monitor::Health {
        instance: id.to_string(),
        server: id.server.to_string(),
        release: id.release,
        state: types::HealthState::from(state).into(),
        last_checks: vec![last.into()],
        changed: None,
        observed: Some(to_timestamp(Timestamp::now())),
        version: 1,
        age: None,
    }
}

/// The node, as one process of the deployer sees it: where that process dies after an effect, the effect is done and
/// nobody learns of it.
pub(super) struct FakeNode {
    pub(super) world: World,
    pub(super) life: Life,
}

#[async_trait]
impl Engine for FakeNode {
    async fn verify(&self, _: &ServerName, _: &Digest) -> Result<Verdict, Problem> {
        self.life.alive().await;
        drop(self.world.reachable()?);
        Ok(Verdict::Right)
    }

    async fn launch(&self, launch: &Launch) -> Result<engine::Instance, Problem> {
        self.life.alive().await;
        let id = &launch.id;
        let answer = {
            let mut state = self.world.reachable()?;
            if state.retired.contains(id) {
                return Err(Problem::Refused(format!("{id} was retired")));
            }
            let known = state.instances.get(id).cloned();
            match known {
                Some(known) if known.launch.image != launch.image => {
                    return Err(Problem::Refused(format!("{id} is another one")));
                }
                Some(known) => message(&known),
                None => {
                    World::fence(&mut state, &id.server, launch.generation)?;
                    let instance = Instance {
                        launch: launch.clone(),
                        state: engine::InstanceState::Running,
                        role: types::Role::Fleet,
                        version: 1,
                        launched: Instant::now(),
                        exit_code: None,
                    };
                    let answer = message(&instance);
                    state.instances.insert(id.clone(), instance);
                    let up = state.instances.values().filter(|i| i.state == engine::InstanceState::Running);
                    state.most = state.most.max(up.count());
                    answer
                }
            }
        };
        let _ = self.world.changes.send(answer.clone());
        self.life.step().await;
        Ok(answer)
    }

    async fn route(
        &self,
        server: &ServerName,
        generation: u64,
        listeners: &[Listener],
    ) -> Result<(), Problem> {
        self.life.alive().await;
        {
            let mut state = self.world.reachable()?;
            World::fence(&mut state, server, generation)?;
            for backend in listeners.iter().flat_map(|l| &l.backends) {
                let up = state.instances.get(&backend.instance);
                if up.is_none_or(|i| i.state != engine::InstanceState::Running) {
                    return Err(Problem::Refused(format!("{} does not run", backend.instance)));
                }
            }
            let served = state.edge.get(server).is_some_and(|(_, l)| !l.is_empty());
            if served && listeners.iter().all(|l| l.backends.is_empty()) {
                state.outages += 1;
            }
            state.edge.insert(server.clone(), (generation, listeners.to_vec()));
        }
        self.life.step().await;
        Ok(())
    }

    async fn retire(&self, id: &InstanceId, generation: u64, _: Millis) -> Result<(), Problem> {
        self.life.alive().await;
        let gone = {
            let mut state = self.world.reachable()?;
            if !state.retired.contains(id) {
                World::fence(&mut state, &id.server, generation)?;
            }
            let mut on_edge = state.edge.values().flat_map(|(_, l)| l).flat_map(|l| &l.backends);
            if on_edge.any(|backend| backend.instance == *id) {
                return Err(Problem::Refused(format!("{id} is on the edge")));
            }
            state.retired.insert(id.clone());
            state.instances.get_mut(id).map(|instance| {
                instance.state = engine::InstanceState::Retired;
                instance.version += 1;
                message(instance)
            })
        };
        if let Some(gone) = gone {
            let _ = self.world.changes.send(gone);
        }
        self.life.step().await;
        Ok(())
    }

    async fn check(&self, id: &InstanceId, _: &Check, _: Millis) -> Result<CheckResult, Problem> {
        self.life.alive().await;
        drop(self.world.reachable()?);
        let truth = self.world.truths().into_iter().find(|(known, _)| known == id);
        Ok(CheckResult {
            passed: truth.is_some_and(|(_, state)| state == HealthState::Healthy),
            detail: "asked".to_owned(),
            took: Millis(1),
            time: Timestamp::now(),
        })
    }

    async fn last_log(&self, id: &InstanceId) -> Result<Vec<String>, Problem> {
        self.life.alive().await;
        drop(self.world.reachable()?);
        Ok(vec![format!("{id}: last words")])
    }

    async fn list(&self) -> Result<Listing, Problem> {
        self.life.alive().await;
        let state = self.world.reachable()?;
        let route = |(server, (generation, listeners)): (&ServerName, &(u64, Vec<Listener>))| engine::Route {
            server: server.to_string(),
            generation: *generation,
            listeners: listeners.iter().map(crate::wire::listener).collect(),
        };
        Ok(Listing {
            instances: state.instances.values().map(message).collect(),
            routes: state.edge.iter().map(route).collect(),
        })
    }

    async fn watch(&self) -> Result<BoxStream<'static, engine::Instance>, Problem> {
        self.life.alive().await;
        let changes = self.world.changes.subscribe();
        drop(self.world.reachable()?);
        let world = self.world.clone();
        // Ends when the node goes away.
        let away = async move {
            while !world.lock().node_away {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let stream = BroadcastStream::new(changes).filter_map(|item| std::future::ready(item.ok()));
        Ok(stream.take_until(Box::pin(away)).boxed())
    }
}

pub(super) struct FakeMonitor {
    pub(super) world: World,
    pub(super) life: Life,
}

#[async_trait]
impl Monitor for FakeMonitor {
    async fn health(&self, server: Option<&ServerName>) -> Result<Vec<monitor::Health>, Problem> {
        self.life.alive().await;
        drop(self.world.others()?);
        let truths = self.world.truths().into_iter();
        let asked = truths.filter(|(id, _)| server.is_none_or(|server| id.server == *server));
        Ok(asked.map(|(id, state)| health(&id, state)).collect())
    }

    async fn watch(&self) -> Result<BoxStream<'static, monitor::Health>, Problem> {
        self.life.alive().await;
        drop(self.world.others()?);
        let stream = BroadcastStream::new(self.world.health.subscribe());
        Ok(stream.filter_map(|item| std::future::ready(item.ok())).boxed())
    }

    async fn signals(&self) -> Result<Signals, Problem> {
        self.life.alive().await;
        Ok(Signals { epoch: "e".to_owned(), signals: self.world.others()?.signals.clone() })
    }
}

pub(super) struct FakeBuilder {
    pub(super) world: World,
    pub(super) life: Life,
}

#[async_trait]
impl Builder for FakeBuilder {
    async fn revisions(&self, since: Option<&types::Cursor>) -> Result<Revisions, Problem> {
        self.life.alive().await;
        let state = self.world.others()?;
        let from = since.map_or(0, |cursor| cursor.sequence as usize);
        Ok(Revisions {
            revisions: state.revisions[from..].to_vec(),
            cursor: Some(types::Cursor { epoch: "e".to_owned(), sequence: state.revisions.len() as u64 }),
        })
    }

    async fn hold(&self, server: &ServerName, images: &BTreeSet<Digest>) -> Result<(), Problem> {
        self.life.alive().await;
        self.world.others()?.held.insert(server.clone(), images.clone());
        Ok(())
    }
}
