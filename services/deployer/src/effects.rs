//! Effects on their way: each runs beside the others, at most once at a time, and its result goes to the board.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kiln_deployer_core::Effect;
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, NodeName, ServerName};
use kiln_model::time::Now;
use kiln_service::clock::Clock;
use kiln_service::trace;
use tokio::task::JoinSet;
use tracing::Instrument as _;

use crate::board::{Board, How};
use crate::metrics;
use crate::ports::{Builder, Launch, Monitor, Nodes, Problem};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const EVIDENCE: Duration = Duration::from_secs(10);

/// The others, as effects reach them.
#[derive(Clone)]
pub struct Peers {
    pub nodes: Nodes,
    pub monitor: Arc<dyn Monitor>,
    pub builder: Arc<dyn Builder>,
}

/// What makes two effects the same one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Verify(Digest),
    Launch(InstanceId),
    Route(NodeName, u64),
    Retire(InstanceId),
    Check(InstanceId),
    Observe,
    Evidence(InstanceId),
    Hold,
}

impl Key {
    fn of(effect: &Effect) -> Self {
        match effect {
            Effect::Verify { image, .. } => Self::Verify(*image),
            Effect::Launch { id, .. } => Self::Launch(id.clone()),
            Effect::Route { node, generation, .. } => Self::Route(node.clone(), *generation),
            Effect::Retire { id, .. } => Self::Retire(id.clone()),
            Effect::Check { id, .. } => Self::Check(id.clone()),
            Effect::Observe { .. } => Self::Observe,
            Effect::Evidence { id, .. } => Self::Evidence(id.clone()),
            Effect::Hold { .. } => Self::Hold,
        }
    }

    const fn word(&self) -> &'static str {
        match self {
            Self::Verify(_) => "verify",
            Self::Launch(_) => "launch",
            Self::Route(..) => "route",
            Self::Retire(_) => "retire",
            Self::Check(_) => "check",
            Self::Observe => "observe",
            Self::Evidence(_) => "evidence",
            Self::Hold => "hold",
        }
    }
}

/// What became of an effect.
enum Outcome {
    Done,
    /// Not before a while.
    Again {
        after: Option<Duration>,
    },
}

#[derive(Debug, Default)]
struct Pause {
    failures: u32,
    until: Duration,
}

/// The effects of one server.
pub(crate) struct Hands<C> {
    server: ServerName,
    peers: Peers,
    board: Board,
    clock: C,
    /// The newest generation that effects were given with.
    generation: Arc<AtomicU64>,
    /// Under way, and since when.
    running: HashMap<tokio::task::Id, (Key, Duration)>,
    pauses: HashMap<Key, Pause>,
    tasks: JoinSet<Outcome>,
}

impl<C: Clock> Hands<C> {
    pub(crate) fn new(server: ServerName, peers: Peers, board: Board, clock: C) -> Self {
        Self {
            server,
            peers,
            board,
            clock,
            generation: Arc::default(),
            running: HashMap::new(),
            pauses: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Begins what is outstanding, not under way, and not to wait. Gives when the next one may begin.
    pub(crate) fn begin(&mut self, effects: Vec<Effect>, generation: u64) -> Option<Duration> {
        let now = self.clock.now();
        self.generation.store(generation, Ordering::SeqCst);
        let keys: Vec<Key> = effects.iter().map(Key::of).collect();
        // What is not wanted any more has no failures to remember.
        self.pauses.retain(|key, _| keys.contains(key));
        let mut next: Option<Duration> = None;
        for (effect, key) in effects.into_iter().zip(keys) {
            if self.running.values().any(|(running, _)| *running == key) {
                continue;
            }
            let until = self.pauses.get(&key).map_or(Duration::ZERO, |pause| pause.until);
            if let Some(wait) = until.checked_sub(now.monotonic).filter(|wait| !wait.is_zero()) {
                next = Some(next.map_or(wait, |next| next.min(wait)));
                continue;
            }
            let task = Task {
                server: self.server.clone(),
                peers: self.peers.clone(),
                board: self.board.clone(),
                clock: self.clock.clone(),
                generation: self.generation.clone(),
            };
            let handle = self.tasks.spawn(async move { task.carry_out(effect).await });
            self.running.insert(handle.id(), (key, now.monotonic));
        }
        next
    }

    /// Waits for the next effect to end; for ever where none is under way.
    pub(crate) async fn ended(&mut self) {
        let (task, outcome) = match self.tasks.join_next_with_id().await {
            Some(Ok(ended)) => ended,
            Some(Err(error)) => {
                tracing::error!(server = %self.server, %error, "an effect broke off");
                (error.id(), Outcome::Again { after: None })
            }
            None => return std::future::pending().await,
        };
        let Some((key, since)) = self.running.remove(&task) else { return };
        let now = self.clock.now();
        let worked = !matches!(outcome, Outcome::Again { after: None });
        metrics::carried_out(key.word(), worked, now.monotonic.saturating_sub(since));
        match outcome {
            Outcome::Done => {
                self.pauses.remove(&key);
            }
            Outcome::Again { after } => {
                let pause = self.pauses.entry(key).or_default();
                let wait = after.unwrap_or_else(|| {
                    LONGEST_PAUSE.min(FIRST_PAUSE * 2_u32.saturating_pow(pause.failures.min(16)))
                });
                pause.failures = if after.is_some() { 0 } else { pause.failures + 1 };
                pause.until = now.monotonic + wait;
            }
        }
    }
}

struct Task<C> {
    server: ServerName,
    peers: Peers,
    board: Board,
    clock: C,
    generation: Arc<AtomicU64>,
}

impl<C: Clock> Task<C> {
    fn now(&self) -> Now {
        self.clock.now()
    }

    async fn carry_out(self, effect: Effect) -> Outcome {
        match effect {
            Effect::Verify { node, image, traceparent } => {
                let span = trace::span_under(&traceparent, "verify");
                self.verify(&node, image).instrument(span).await
            }
            Effect::Launch { node, id, image, run, generation, traceparent } => {
                let span = trace::span_under(&traceparent, "launch");
                self.launch(&node, Launch { id, image, run: *run, generation }).instrument(span).await
            }
            Effect::Route { node, listeners, generation, traceparent } => {
                let span = trace::span_under(&traceparent, "route");
                let route =
                    async { self.peers.nodes.of(&node)?.route(&self.server, generation, &listeners).await };
                match route.instrument(span).await {
                    Ok(()) => {
                        self.board.routed(&self.server, &node, generation);
                        Outcome::Done
                    }
                    Err(problem) => {
                        if let Problem::Refused(why) = &problem {
                            self.board.route_refused(&self.server, &node, generation, why.clone());
                        }
                        self.later("route", &node, &problem)
                    }
                }
            }
            Effect::Retire { node, id, drain, generation, traceparent } => {
                let span = trace::span_under(&traceparent, "retire");
                let retire = async { self.peers.nodes.of(&node)?.retire(&id, generation, drain).await };
                match retire.instrument(span).await {
                    Ok(()) => {
                        self.board.retired(&id);
                        Outcome::Done
                    }
                    Err(problem) => self.later("retire", &id, &problem),
                }
            }
            Effect::Check { node, id, check, timeout } => {
                let checked = async { self.peers.nodes.of(&node)?.check(&id, &check, timeout).await };
                match checked.await {
                    Ok(result) => {
                        self.board.checked(&id, result, self.now().monotonic);
                        Outcome::Done
                    }
                    Err(problem) => self.later("check", &id, &problem),
                }
            }
            Effect::Observe { interval } => self.observe(interval).await,
            Effect::Evidence { node, id } => {
                let log = async { self.peers.nodes.of(&node)?.last_log(&id).await };
                let lines = match tokio::time::timeout(EVIDENCE, log).await {
                    Ok(Ok(lines)) => lines,
                    Ok(Err(Problem::Later(why))) => {
                        return self.later("fetch the log", &id, &Problem::Later(why));
                    }
                    // There is none: it was never launched, or it was forgotten.
                    Ok(Err(Problem::Refused(_))) | Err(_) => Vec::new(),
                };
                self.board.evidence(&id, lines);
                Outcome::Done
            }
            Effect::Hold { images } => match self.peers.builder.hold(&self.server, &images).await {
                Ok(()) => {
                    self.board.held(&self.server, images);
                    Outcome::Done
                }
                Err(problem) => self.later("hold the images", &self.server, &problem),
            },
        }
    }

    async fn verify(&self, node: &NodeName, image: Digest) -> Outcome {
        let verify = async { self.peers.nodes.of(node)?.verify(&self.server, &image).await };
        match verify.await {
            Ok(verdict) => {
                self.board.verdict(&self.server, image, verdict);
                Outcome::Done
            }
            Err(problem) => self.later("verify", &image, &problem),
        }
    }

    async fn launch(&self, node: &NodeName, launch: Launch) -> Outcome {
        let id = launch.id.clone();
        let launched = async { self.peers.nodes.of(node)?.launch(&launch).await };
        match launched.await {
            Ok(instance) => match self.board.engine(node, instance, self.now().monotonic) {
                Ok(()) => Outcome::Done,
                Err(invalid) => self.later("launch", &id, &Problem::Later(invalid.to_string())),
            },
            Err(Problem::Refused(why)) => {
                // For good, unless the edge moved on while this was on its way: the node takes it under the new
                // generation.
                if self.generation.load(Ordering::SeqCst) > launch.generation {
                    return Outcome::Again { after: Some(Duration::ZERO) };
                }
                tracing::warn!(instance = %id, why, "the node refuses a launch");
                self.board.refused(&id, why);
                Outcome::Done
            }
            Err(problem) => self.later("launch", &id, &problem),
        }
    }

    async fn observe(&self, interval: Duration) -> Outcome {
        match self.peers.monitor.health(Some(&self.server)).await {
            Ok(all) => {
                let now = self.now();
                for health in all {
                    if let Err(invalid) = self.board.health(health, How::Asked, now) {
                        tracing::warn!(error = %invalid, "the monitor says something that makes no sense");
                    }
                }
                // It may not have looked again yet: asking at once would be a loop.
                Outcome::Again { after: Some(interval / 2) }
            }
            Err(problem) => self.later("ask the monitor", &self.server, &problem),
        }
    }

    fn later(&self, what: &str, on: &dyn std::fmt::Display, problem: &Problem) -> Outcome {
        tracing::info!(server = %self.server, what, %on, %problem, "will be tried again");
        Outcome::Again { after: None }
    }
}
