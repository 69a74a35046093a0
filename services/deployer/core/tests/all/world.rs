//! A node, a monitor and a builder in a few lines, with a clock that jumps to whatever is due next.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use kiln_deployer_core::*;
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::check::{Check, CheckResult, HttpCheck};
use kiln_model::definition::{Mode, UpdatePolicy};
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, NodeName};
use kiln_model::revision::{ImageRevision, PackageVersions, Revision, RevisionContent};
use kiln_model::run::{HealthPolicy, Limits, Port, RolloutPolicy, RunSpec, Strategy};
use kiln_model::signal::HealthState;
use kiln_model::time::{Millis, Now};

/// How instances of an image behave. Times are in milliseconds after the launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// Healthy at the first probe, 100 ms after the launch.
    Good,
    /// Unhealthy when its start period is over.
    NeverHealthy,
    Exits {
        after: u64,
    },
    /// Healthy, then not any more.
    Sickens {
        after: u64,
    },
    /// Healthy, then its answers fail; the monitor waits for another one before it calls it unhealthy.
    Falters {
        after: u64,
    },
    /// The node can't launch it.
    Refused,
    /// The node ends in the middle of the launch, and starts again.
    CutOff,
    /// Somebody changed a blob of it.
    Tampered,
}

/// What a revision is made of; equal texts are equal digests.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) definition: &'static str,
    pub(crate) image: &'static str,
    pub(crate) packages: Vec<(&'static str, &'static str)>,
    pub(crate) run: RunSpec,
    pub(crate) unhealthy: Mode,
}

pub(crate) fn run() -> RunSpec {
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
            interval: Millis(1000),
            timeout: Millis(500),
            healthy: 1,
            unhealthy: 3,
            start: Millis(10_000),
        }),
        rollout: RolloutPolicy {
            strategy: Strategy::Rolling { max_surge: 1, max_unavailable: 0 },
            soak: Millis(0),
            deadline: Millis::from_secs(60),
        },
        drain: Millis(5000),
    }
}

impl Made {
    pub(crate) fn new(definition: &'static str, image: &'static str) -> Self {
        Self { definition, image, packages: Vec::new(), run: run(), unhealthy: Mode::Auto }
    }

    pub(crate) fn packages(mut self, packages: &[(&'static str, &'static str)]) -> Self {
        self.packages = packages.to_vec();
        self
    }

    pub(crate) fn with(mut self, change: impl FnOnce(&mut RunSpec)) -> Self {
        change(&mut self.run);
        self
    }
}

#[derive(Debug, Clone)]
struct Running {
    seen: Seen,
    image: Digest,
    at: u64,
    start: u64,
}

pub(crate) struct World {
    pub(crate) fleet: Fleet,
    pub(crate) releases: Releases,
    pub(crate) view: View,
    /// Milliseconds.
    pub(crate) now: u64,
    behaviours: BTreeMap<Digest, Behaviour>,
    node: BTreeMap<InstanceId, Running>,
    /// Of each node: the generation, and what it has on the edge.
    edges: BTreeMap<NodeName, (u64, Vec<Listener>)>,
    pub(crate) monitor_up: bool,
    /// Instances that run, and that the monitor holds for gone.
    held_for_gone: BTreeSet<InstanceId>,
    /// When the view was filled in with what the monitor said of an instance.
    told_at: BTreeMap<InstanceId, u64>,
    /// When each answered first and last, as the monitor saw it.
    pub(crate) answered: BTreeMap<InstanceId, (u64, u64)>,
    checked_at: BTreeMap<InstanceId, u64>,
    committed_at: u64,
    /// A port that somebody else holds.
    pub(crate) refuse_edge_with: Option<u16>,
    generation: u64,
    /// How long users may stay with what was retired.
    pub(crate) drains: BTreeMap<InstanceId, Millis>,
    pub(crate) story: Vec<String>,
    /// Requests that find nobody, from the first time on that somebody answered.
    pub(crate) outages: u32,
    served: bool,
    /// For each effect: carry it out, and tell of its result.
    pub(crate) luck: Box<dyn FnMut() -> (bool, bool)>,
}

fn wall(ms: u64) -> Timestamp {
    Timestamp::from_millisecond(1_700_000_000_000 + ms as i64).unwrap()
}

/// Where, if it is not the node that every site has.
fn on(node: &NodeName) -> String {
    if *node == NodeName::local() { String::new() } else { format!(" on {node}") }
}

pub(crate) fn cause(kind: CauseKind, summary: &str) -> Cause {
    Cause {
        kind,
        id: "x".to_owned(),
        summary: summary.to_owned(),
        actor: "ada".to_owned(),
        time: wall(0),
        traceparent: String::new(),
    }
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            fleet: Fleet::new("web".parse().unwrap()),
            releases: Releases::new(),
            view: View {
                engine: Some(BTreeMap::new()),
                watching: Duration::from_secs(3600),
                ..View::default()
            },
            now: 0,
            behaviours: BTreeMap::new(),
            node: BTreeMap::new(),
            edges: BTreeMap::new(),
            monitor_up: true,
            held_for_gone: BTreeSet::new(),
            told_at: BTreeMap::new(),
            answered: BTreeMap::new(),
            checked_at: BTreeMap::new(),
            committed_at: 0,
            refuse_edge_with: None,
            generation: 0,
            drains: BTreeMap::new(),
            story: Vec::new(),
            outages: 0,
            served: false,
            luck: Box::new(|| (true, true)),
        }
    }

    pub(crate) fn time(&self) -> Now {
        Now { wall: wall(self.now), monotonic: Duration::from_millis(self.now) }
    }

    pub(crate) fn say(&mut self, line: impl std::fmt::Display) {
        self.story.push(format!("{:>7.2}s  {line}", self.now as f64 / 1000.0));
    }

    pub(crate) fn behave(&mut self, image: &'static str, behaviour: Behaviour) {
        self.behaviours.insert(Digest::of(image.as_bytes()), behaviour);
    }

    pub(crate) fn revise(&mut self, made: &Made) {
        self.generation += 1;
        let packages: PackageVersions =
            made.packages.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        let revision = Revision {
            server: self.fleet.server.clone(),
            generation: self.generation,
            created: wall(self.now),
            content: RevisionContent::Image(Box::new(ImageRevision {
                definition_digest: Digest::of(made.definition.as_bytes()),
                image_digest: Digest::of(made.image.as_bytes()),
                run_digest: made.run.digest().unwrap(),
                run: made.run.clone(),
                update: UpdatePolicy {
                    definition: Mode::Auto,
                    packages: Mode::Auto,
                    unhealthy: made.unhealthy,
                    debounce: Millis(0),
                },
                build: "web-b1".parse().unwrap(),
                commit: String::new(),
                packages,
                cause: cause(CauseKind::DefinitionChanged, made.definition),
            })),
        };
        self.say(format!("> revision {}: {} in {}", self.generation, made.definition, made.image));
        self.take(&revision);
    }

    pub(crate) fn remove(&mut self) {
        self.generation += 1;
        let revision = Revision {
            server: self.fleet.server.clone(),
            generation: self.generation,
            created: wall(self.now),
            content: RevisionContent::Removed { cause: cause(CauseKind::Manual, "removed") },
        };
        self.say("> removed");
        self.take(&revision);
    }

    fn take(&mut self, revision: &Revision) {
        let accepted = accept(&self.fleet, &self.releases, revision, self.time()).unwrap();
        assert!(
            accept(&accepted.fleet, &self.releases, revision, self.time()).is_none(),
            "taken once, not again"
        );
        self.keep(accepted.fleet, accepted.releases, &accepted.events);
    }

    pub(crate) fn rollback(&mut self, to: Option<u64>) -> Result<(), Refused> {
        let ask = RollbackAsk {
            expected: self.fleet.release,
            to,
            cause: cause(CauseKind::Rollback, "ada said so"),
        };
        self.say("> rollback");
        let done = rollback(&self.fleet, &self.releases, &ask, self.time())?;
        self.keep(done.fleet, done.releases, &done.events);
        Ok(())
    }

    pub(crate) fn abort(&mut self) -> Result<(), Refused> {
        let expected = self.fleet.rollout.as_ref().map_or(0, |r| r.to);
        self.say("> abort");
        let cause = cause(CauseKind::Manual, "ada stopped it");
        let done = abort(&self.fleet, &self.releases, expected, &cause, self.time())?;
        self.keep(done.fleet, done.releases, &done.events);
        Ok(())
    }

    pub(crate) fn signal(&mut self, id: &InstanceId, kind: CauseKind) {
        self.say(format_args!("> signal: {} {id}", kind.as_str()));
        if let Some(fleet) = replace(&self.fleet, Some(id), &cause(kind, "the monitor says so")) {
            self.keep(fleet, Vec::new(), &[]);
        }
    }

    fn keep(&mut self, fleet: Fleet, releases: Vec<Release>, events: &[Event]) {
        for release in releases {
            self.releases.insert(release.number, release);
        }
        // Through its stored form, as a service that was killed would find it.
        let stored = serde_json::to_value(&fleet).unwrap();
        self.fleet = serde_json::from_value(stored).unwrap();
        self.committed_at = self.now;
        for event in events {
            let line = match event {
                Event::Release(r) if r.quarantined => format!("release {} made, quarantined", r.number),
                Event::Release(r) => format!("release {} made", r.number),
                Event::Rollout(verb, r) if r.problem.is_empty() => {
                    format!("rollout {} {}", r.id, verb.as_str())
                }
                Event::Rollout(verb, r) => format!("rollout {} {}: {}", r.id, verb.as_str(), r.problem),
                Event::Instance(verb, id, _) => format!("{id} {}", verb.as_str()),
            };
            self.say(line);
        }
    }

    /// Forgets everything that is not stored, and learns anew what the node has.
    pub(crate) fn crash(&mut self) {
        self.say("> the deployer is killed and started again");
        self.view = View { engine: Some(BTreeMap::new()), ..View::default() };
        self.told_at.clear();
        self.checked_at.clear();
        self.committed_at = self.now;
        self.relist();
    }

    fn generation_at(&self, node: &NodeName) -> u64 {
        self.edges.get(node).map_or(0, |(generation, _)| *generation)
    }

    fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.edges.values().flat_map(|(_, listeners)| listeners).flat_map(|listener| &listener.backends)
    }

    fn relist(&mut self) {
        self.view.engine = Some(self.node.iter().map(|(id, r)| (id.clone(), r.seen.clone())).collect());
        self.view.routed =
            self.edges.iter().map(|(node, (generation, _))| (node.clone(), *generation)).collect();
        self.view.edge = self.edges.values().flat_map(|(_, listeners)| listeners).cloned().collect();
    }

    pub(crate) fn exit(&mut self, id: &InstanceId, code: i32) {
        let Some(running) = self.node.get_mut(id) else { return };
        if running.seen.state != SeenState::Running {
            return;
        }
        running.seen.state = SeenState::Exited;
        running.seen.exit_code = Some(code);
        running.seen.detail = "killed".to_owned();
        // The node takes it off the edge by itself.
        for listener in self.edges.values_mut().flat_map(|(_, listeners)| listeners) {
            listener.backends.retain(|backend| backend.instance != *id);
        }
        self.relist();
    }

    /// As when the machine goes down and comes back: every instance is gone, and nobody saw how.
    pub(crate) fn lose_all(&mut self) {
        for running in self.node.values_mut().filter(|running| running.seen.state == SeenState::Running) {
            running.seen.state = SeenState::Exited;
            running.seen.detail = "ended; nobody saw its exit code".to_owned();
            running.seen.cut_off = true;
        }
        let listeners = self.edges.values_mut().flat_map(|(_, listeners)| listeners);
        listeners.for_each(|listener| listener.backends.clear());
        self.relist();
    }

    /// As when the node's store is put back from before: it knows of none of them, and removes what it finds.
    pub(crate) fn forget_all(&mut self) {
        self.node.clear();
        self.edges.values_mut().for_each(|(_, listeners)| listeners.clear());
        self.relist();
    }

    pub(crate) fn running(&self) -> Vec<InstanceId> {
        let up = self.node.iter().filter(|(_, r)| r.seen.state == SeenState::Running);
        up.map(|(id, _)| id.clone()).collect()
    }

    fn truth(&self, id: &InstanceId) -> HealthState {
        let Some(running) = self.node.get(id) else { return HealthState::Gone };
        if running.seen.state != SeenState::Running {
            return HealthState::Gone;
        }
        if self.held_for_gone.contains(id) {
            return HealthState::Gone;
        }
        let age = self.now - running.at;
        match self.behaviours.get(&running.image).unwrap_or(&Behaviour::Good) {
            _ if age < 100 => HealthState::Starting,
            Behaviour::NeverHealthy if age < running.start => HealthState::Starting,
            Behaviour::NeverHealthy => HealthState::Unhealthy,
            Behaviour::Sickens { after } if age >= *after => HealthState::Unhealthy,
            _ => HealthState::Healthy,
        }
    }

    fn falters(&self, id: &InstanceId) -> bool {
        let Some(running) = self.node.get(id) else { return false };
        let behaviour = self.behaviours.get(&running.image);
        matches!(behaviour, Some(Behaviour::Falters { after }) if self.now - running.at >= *after)
    }

    /// The monitor takes an instance for gone, and looks at it no more.
    pub(crate) fn hold_for_gone(&mut self, id: &InstanceId) {
        self.say(format_args!("> the monitor holds {id} for gone"));
        self.held_for_gone.insert(id.clone());
    }

    fn tell(&mut self, id: &InstanceId) {
        let state = self.truth(id);
        if state == HealthState::Gone && self.view.health.get(id).is_some_and(|told| told.state == state) {
            return;
        }
        self.told_at.insert(id.clone(), self.now);
        // What is gone is not asked; its last answer stays what it was.
        if state == HealthState::Gone
            && let Some(told) = self.view.health.get_mut(id)
        {
            (told.state, told.age) = (state, Duration::ZERO);
            return;
        }
        let passed = state == HealthState::Healthy && !self.falters(id);
        if passed {
            self.answered.entry(id.clone()).or_insert((self.now, self.now)).1 = self.now;
        }
        let last_checks = vec![CheckResult {
            passed,
            detail: if passed { "status 200" } else { "status 502, wanted 200 to 399" }.to_owned(),
            took: Millis(1),
            time: wall(self.now),
        }];
        self.view.health.insert(id.clone(), Told { state, age: Duration::ZERO, last_checks });
    }

    /// What happens by itself at this moment: instances end, and the monitor tells what changed.
    fn happen(&mut self) {
        for (id, running) in self.node.clone() {
            if let Some(Behaviour::Exits { after }) = self.behaviours.get(&running.image)
                && running.seen.state == SeenState::Running
                && self.now - running.at >= *after
            {
                self.exit(&id, 1);
            }
            if self.monitor_up
                && running.seen.state == SeenState::Running
                && self.view.health.get(&id).map(|told| told.state) != Some(self.truth(&id))
            {
                self.tell(&id);
            }
        }
    }

    fn next_event(&self) -> Option<u64> {
        let times = self.node.values().filter(|r| r.seen.state == SeenState::Running).flat_map(|r| {
            let change = match self.behaviours.get(&r.image) {
                Some(Behaviour::NeverHealthy) => r.start,
                Some(Behaviour::Exits { after } | Behaviour::Sickens { after }) => *after,
                _ => 100,
            };
            [r.at + 100, r.at + change]
        });
        times.filter(|time| *time > self.now).min()
    }

    /// One look, committed, with its effects. Returns when the next one is due, and whether anything changed.
    pub(crate) fn look(&mut self) -> (Option<Duration>, bool) {
        self.happen();
        for (id, told) in &mut self.view.health {
            told.age = Duration::from_millis(self.now - self.told_at[id]);
        }
        for (id, own) in &mut self.view.checks {
            own.age = Duration::from_millis(self.now - self.checked_at[id]);
        }
        self.view.elapsed = Duration::from_millis(self.now - self.committed_at);
        let decision = next(&self.fleet, &self.releases, &self.view, self.time());
        let violations = lint(&self.fleet, &decision, &self.releases, &self.view);
        assert!(violations.is_empty(), "{violations:#?}\n{}", self.story.join("\n"));
        let changed = decision.fleet != self.fleet;
        if changed {
            self.keep(decision.fleet, decision.releases, &decision.events);
        } else {
            assert!(decision.events.is_empty(), "events without a change: {:?}", decision.events);
        }
        let mut acted = false;
        let mut wake_in = decision.wake_in;
        for effect in decision.effects {
            let (carried_out, told) = (self.luck)();
            if carried_out {
                acted |= self.carry_out(effect, told) && told;
            }
            if !carried_out || !told {
                // It is tried again, though not at once.
                let retry = Duration::from_millis(50);
                wake_in = Some(wake_in.map_or(retry, |due| due.min(retry)));
            }
        }
        self.watch_traffic();
        (wake_in, changed || acted)
    }

    fn carry_out(&mut self, effect: Effect, told: bool) -> bool {
        match effect {
            Effect::Verify { image, .. } => {
                let wrong = self.behaviours.get(&image) == Some(&Behaviour::Tampered);
                let verdict = if wrong { Verdict::Wrong("blob differs".to_owned()) } else { Verdict::Right };
                if told {
                    self.view.verdicts.insert(image, verdict);
                }
            }
            Effect::Launch { node, id, image, run, generation, .. } => {
                assert!(generation >= self.generation_at(&node), "a stale launch");
                if !self.node.contains_key(&id) {
                    self.say(format_args!("launch {id}{}", on(&node)));
                    let behaviour = self.behaviours.get(&image).copied();
                    let cut_off = behaviour == Some(Behaviour::CutOff);
                    let refused = cut_off || behaviour == Some(Behaviour::Refused);
                    let seen = Seen {
                        node,
                        state: if refused { SeenState::Failed } else { SeenState::Running },
                        address: "10.77.0.2".to_owned(),
                        launched: Some(wall(self.now)),
                        ended: None,
                        exit_code: None,
                        detail: match behaviour {
                            Some(Behaviour::Refused) => "no memory left",
                            Some(Behaviour::CutOff) => "its launch was cut off",
                            _ => "",
                        }
                        .to_owned(),
                        cut_off,
                    };
                    let start = run.health.map_or(0, |h| h.start.0);
                    self.node.insert(id, Running { seen, image, at: self.now, start });
                }
                if told {
                    self.relist();
                }
            }
            Effect::Route { node, listeners, generation, .. } => {
                assert!(generation >= self.generation_at(&node), "a stale route");
                if let Some(port) = self.refuse_edge_with.filter(|p| listeners.iter().any(|l| l.listen == *p))
                {
                    self.view.unroutable = Some((generation, format!("port {port} is held by sshd")));
                    return false;
                }
                let names: BTreeSet<String> = listeners
                    .iter()
                    .flat_map(|l| {
                        l.backends.iter().map(move |b| format!("{}:{}>{}", l.listen, b.instance, b.target))
                    })
                    .collect();
                self.view.unroutable = None;
                let names = names.into_iter().collect::<Vec<_>>().join(" ");
                self.say(format_args!("edge{} {names}", on(&node)));
                self.edges.insert(node.clone(), (generation, listeners));
                if told {
                    self.view.routed.insert(node, generation);
                }
            }
            Effect::Retire { id, drain, .. } => {
                self.drains.insert(id.clone(), drain);
                let on_edge = self.backends().any(|backend| backend.instance == id);
                assert!(!on_edge, "{id} is retired on the edge\n{}", self.story.join("\n"));
                self.say(format_args!("retire {id}"));
                if let Some(running) = self.node.get_mut(&id) {
                    running.seen.state = SeenState::Retired;
                }
                if told {
                    self.view.retired.insert(id);
                    self.relist();
                }
            }
            Effect::Check { id, .. } => {
                let last = CheckResult {
                    passed: self.truth(&id) == HealthState::Healthy,
                    detail: String::new(),
                    took: Millis(1),
                    time: wall(self.now),
                };
                let before = self.view.checks.get(&id).map_or((0, 0), |own| (own.passes, own.failures));
                let (passes, failures) = if last.passed { (before.0 + 1, 0) } else { (0, before.1 + 1) };
                self.checked_at.insert(id.clone(), self.now);
                self.view.checks.insert(id, OwnChecks { passes, failures, last, age: Duration::ZERO });
            }
            Effect::Observe { .. } => {
                if self.monitor_up {
                    for id in self.running() {
                        self.tell(&id);
                    }
                }
                return false;
            }
            Effect::Evidence { id, .. } => {
                let lines = vec![format!("{id}: last words")];
                self.view.evidence.insert(id, Evidence { lines });
            }
            Effect::Hold { images } => {
                self.view.held = Some(images);
            }
        }
        true
    }

    fn watch_traffic(&mut self) {
        let answered = self.backends().any(|backend| {
            self.node.get(&backend.instance).is_some_and(|r| r.seen.state == SeenState::Running)
        });
        self.served |= answered;
        if self.served && !answered && !self.fleet.removed {
            self.outages += 1;
        }
    }

    /// Lets time pass until nothing happens any more, or `most` milliseconds are over.
    pub(crate) fn play(&mut self, most: u64) {
        let end = self.now + most;
        let mut looks = 0;
        loop {
            looks += 1;
            assert!(looks < 20_000, "it never rests\n{}", self.story.join("\n"));
            let (wake_in, again) = self.look();
            if again {
                continue;
            }
            let due = wake_in.map(|d| self.now + u64::try_from(d.as_millis()).unwrap().max(1));
            match due.into_iter().chain(self.next_event()).min() {
                Some(time) if time <= end => self.now = time,
                _ => break,
            }
        }
        self.now = self.now.max(if end - self.now < 1000 { end } else { self.now });
    }

    pub(crate) fn told(&mut self) -> String {
        let story = self.story.join("\n");
        self.story.clear();
        story
    }
}
