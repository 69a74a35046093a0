//! Servers and builds in memory, carried from decision to decision the way the service does it.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use kiln_builder_core::build::{self, Build, State};
use kiln_builder_core::definition::StoredDefinition;
use kiln_builder_core::head::{self, By, Found};
use kiln_builder_core::next::{self, Next, Order, Snapshot};
use kiln_builder_core::plan::{self, Made, Planned, Slot};
use kiln_builder_core::quarantine::{self, Verdict};
use kiln_builder_core::server::{InForce, Server};
use kiln_builder_core::signal::{self, Intake};
use kiln_builder_core::source::Place;
use kiln_builder_core::{Illegal, graph, invariants};
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::definition::{Definition, ImageSpec, Mode, Source, UpdatePolicy};
use kiln_model::digest::Digest;
use kiln_model::name::ServerName;
use kiln_model::revision::{PackageVersions, Revision, RevisionContent};
use kiln_model::run::{Limits, RolloutPolicy, RunSpec, Strategy};
use kiln_model::signal::{Remedy, Signal, SignalId, SignalState};
use kiln_model::time::Millis;

pub(crate) const OWNER: &str = "builder-1";

/// What somebody commits: which image it gives, and how that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) image: String,
    pub(crate) replicas: u32,
    pub(crate) comment: String,
    pub(crate) parent: Option<ServerName>,
    pub(crate) mode: Mode,
}

impl Content {
    pub(crate) fn new(image: &str, replicas: u32) -> Self {
        Self { image: image.to_owned(), replicas, comment: String::new(), parent: None, mode: Mode::Auto }
    }
}

pub(crate) struct World {
    pub(crate) now: Timestamp,
    pub(crate) servers: BTreeMap<ServerName, Server>,
    pub(crate) builds: BTreeMap<String, Build>,
    pub(crate) definitions: BTreeMap<Digest, StoredDefinition>,
    /// In the order in which they were made.
    pub(crate) revisions: Vec<Revision>,
    in_force: BTreeMap<(ServerName, u64), InForce>,
    /// What the archive holds.
    pub(crate) packages: PackageVersions,
    /// What of it is there for security.
    pub(crate) security: PackageVersions,
    /// Plans that were made.
    pub(crate) plans: usize,
    /// Everything that happened, for people.
    pub(crate) log: Vec<String>,
}

pub(crate) fn name(text: &str) -> ServerName {
    text.parse().unwrap()
}

pub(crate) fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
            servers: BTreeMap::new(),
            builds: BTreeMap::new(),
            definitions: BTreeMap::new(),
            revisions: Vec::new(),
            in_force: BTreeMap::new(),
            packages: BTreeMap::from([("nginx".to_owned(), "1".to_owned())]),
            security: BTreeMap::new(),
            plans: 0,
            log: Vec::new(),
        }
    }

    pub(crate) fn advance(&mut self, seconds: u64) {
        self.now = self.now.checked_add(Duration::from_secs(seconds)).unwrap();
    }

    fn say(&mut self, line: impl Into<String>) {
        self.log.push(line.into());
    }

    pub(crate) fn cause(&self, kind: CauseKind, id: &str) -> Cause {
        Cause {
            kind,
            id: id.to_owned(),
            summary: format!("{} {id}", kind.as_str()),
            actor: "somebody".to_owned(),
            time: self.now,
            traceparent: String::new(),
        }
    }

    pub(crate) fn define(&mut self, server: &ServerName, content: &Content) -> StoredDefinition {
        let definition = Definition {
            name: server.clone(),
            image: ImageSpec {
                architecture: None,
                from: content.parent.clone().map_or(Source::Scratch, |name| Source::Server { name }),
                steps: Vec::new(),
                env: BTreeMap::from([("IMAGE".to_owned(), content.image.clone())]),
                user: "root".to_owned(),
                command: vec!["serve".to_owned()],
                tests: Vec::new(),
            },
            run: RunSpec {
                node: None,
                replicas: content.replicas,
                ports: Vec::new(),
                writable: Vec::new(),
                env: BTreeMap::new(),
                limits: Limits::default(),
                capabilities: Vec::new(),
                health: None,
                rollout: RolloutPolicy {
                    strategy: Strategy::Rolling { max_surge: 1, max_unavailable: 0 },
                    soak: Millis(0),
                    deadline: Millis::from_secs(60),
                },
                drain: Millis(0),
            },
            update: UpdatePolicy {
                definition: content.mode,
                packages: Mode::Auto,
                unhealthy: Mode::Auto,
                debounce: Millis::from_secs(30),
            },
        };
        let text = format!("{server} {} {} {}", content.image, content.replicas, content.comment);
        let stored = StoredDefinition {
            digest: digest(&text),
            image_context: digest(&content.image),
            run_digest: definition.run.digest().unwrap(),
            definition,
        };
        self.definitions.insert(stored.digest, stored.clone());
        stored
    }

    pub(crate) fn apply(
        &mut self,
        server: &ServerName,
        content: &Content,
        by: By,
        cause: Cause,
    ) -> head::Outcome {
        let stored = self.define(server, content);
        let found = Found {
            source: Place::Folder { origin: "here".to_owned() }.id(),
            folder: ".".to_owned(),
            definition: stored.reference("c0ffee"),
        };
        let known = self.servers.get(server).cloned();
        let building = known.as_ref().and_then(|server| server.building.as_ref());
        let awaited = building.and_then(|building| self.builds.get(&building.build.to_string()));
        let (taken, outcome, told) =
            head::take_over(known.clone(), server, found, cause, by, awaited, self.now);
        self.servers.insert(server.clone(), taken);
        self.say(format!("{server} {outcome:?} {told:?}"));
        outcome
    }

    pub(crate) fn signal(&mut self, server: &ServerName, cause: CauseKind, fingerprint: &str) -> Intake {
        let signal = self.make_signal(server, cause, fingerprint);
        let now = self.now;
        let intake = signal::receive(self.servers.get_mut(server).unwrap(), &signal, now);
        self.say(format!("signal {fingerprint} to {server}: {intake:?}"));
        intake
    }

    pub(crate) fn make_signal(&self, server: &ServerName, cause: CauseKind, fingerprint: &str) -> Signal {
        Signal {
            id: SignalId::new(server, cause, fingerprint),
            server: server.clone(),
            cause,
            fingerprint: fingerprint.to_owned(),
            remedy: Remedy::Rebuild,
            evidence: vec![fingerprint.to_owned()],
            instance: None,
            state: SignalState::Open,
            since: self.now,
            raised: self.now,
            reporter: "monitor".to_owned(),
            traceparent: String::new(),
        }
    }

    /// Everything that can be decided now without a worker.
    pub(crate) fn settle(&mut self) {
        // Each round ends in a plan, an adoption or nothing; a hundred of them would be a loop that spins.
        for _ in 0..100 {
            if !self.step() {
                return;
            }
        }
        panic!("the reconcile loop spins:\n{}", self.log.join("\n"));
    }

    fn step(&mut self) -> bool {
        let names: Vec<_> = self.servers.keys().cloned().collect();
        let mut moved = false;
        for server in names {
            moved |= match self.next(&server) {
                Next::Plan(order) => self.plan(&server, *order),
                Next::Adopt => self.adopt(&server),
                Next::Forget => {
                    next::forget(self.servers.get_mut(&server).unwrap(), self.now);
                    true
                }
                Next::Supersede => {
                    let now = self.now;
                    let known = self.servers.get_mut(&server).unwrap();
                    let id = known.building.as_ref().unwrap().build.to_string();
                    next::forget(known, now);
                    self.builds.get_mut(&id).unwrap().cancel("builder", now).unwrap();
                    self.say(format!("{id} gives way"));
                    true
                }
                Next::Nothing | Next::Wait(_) | Next::AwaitParent => false,
            };
        }
        moved
    }

    pub(crate) fn next(&self, server: &ServerName) -> Next {
        let server = &self.servers[server];
        let build =
            server.building.as_ref().and_then(|building| self.builds.get(&building.build.to_string()));
        let parent = server.effective().and_then(|effective| self.servers.get(effective.parent.as_ref()?));
        next::next(Snapshot { server, build, parent }, self.now)
    }

    /// What the archive and the parent give for an order, right now.
    pub(crate) fn resolve(&self, order: &Order) -> Planned {
        let image = order.definition.image_context;
        let mut packages = self.packages.clone();
        let parent_image = order.parent.as_ref().map(|parent| parent.image);
        packages.extend(order.parent.iter().flat_map(|parent| parent.packages.clone()));
        let mut security = self.security.clone();
        security.extend(order.parent.iter().flat_map(|parent| parent.security.clone()));
        let mut causes = order.causes.clone();
        let cause = causes.remove(0);
        Planned {
            definition: order.definition.clone(),
            lock_key: digest(&format!("{image} {packages:?} {parent_image:?}")),
            parent_image,
            packages,
            security,
            release_files: Vec::new(),
            resolving: Millis(0),
            cause,
            further_causes: causes,
        }
    }

    fn plan(&mut self, server: &ServerName, order: Order) -> bool {
        let planned = self.resolve(&order);
        self.commit_plan(server, planned).unwrap();
        true
    }

    pub(crate) fn commit_plan(&mut self, server: &ServerName, planned: Planned) -> Result<Made, Illegal> {
        let slot = self.slot(&planned.lock_key);
        let definition = self.definitions[&planned.definition.digest].clone();
        let known = self.servers[server].clone();
        let decided = plan::planned(known, planned, &definition, slot, self.now)?;
        self.plans += 1;
        self.servers.insert(server.clone(), decided.server);
        let line = match &decided.made {
            Made::Unchanged => "unchanged".to_owned(),
            Made::Held { problem } => format!("held: {problem}"),
            Made::Revision(revision) => format!("revision {}", revision.generation),
            Made::Joined(build) => format!("joins {build}"),
            Made::Queued(build) => format!("queued {}", build.id),
        };
        self.say(format!("plan of {server}: {line}"));
        match &decided.made {
            Made::Revision(revision) => self.made(server, revision),
            Made::Queued(build) => {
                self.builds.insert(build.id.to_string(), (**build).clone());
            }
            _ => {}
        }
        Ok(decided.made)
    }

    fn slot(&self, key: &Digest) -> Slot {
        let holder = self.builds.values().find(|build| build.lock_key == *key && build.state.holds_slot());
        match holder {
            None => Slot::Free,
            Some(Build { id, state: State::Succeeded { image }, .. }) => {
                Slot::Succeeded { build: id.clone(), image: *image }
            }
            Some(build) => Slot::Active(build.id.clone()),
        }
    }

    fn adopt(&mut self, server: &ServerName) -> bool {
        let known = self.servers[server].clone();
        let building = known.building.clone().unwrap();
        let build = self.builds[&building.build.to_string()].clone();
        let definition = self.definitions[&building.definition.digest].clone();
        let (adopted, revision) = plan::adopt(known, &build, &definition, self.now).unwrap();
        self.servers.insert(server.clone(), adopted);
        match &revision {
            Some(revision) => self.made(server, revision),
            None => self.say(format!("{server} gets nothing from {}", build.id)),
        }
        true
    }

    fn made(&mut self, server: &ServerName, revision: &Revision) {
        let RevisionContent::Image(image) = &revision.content else { panic!("a removal") };
        let line = format!(
            "revision {server}-g{}: {} of {}, {} replicas",
            revision.generation, image.build, image.cause.id, image.run.replicas
        );
        self.say(line);
        let in_force = self.servers[server].in_force.clone().unwrap();
        self.in_force.insert((server.clone(), revision.generation), in_force);
        self.revisions.push(revision.clone());
        let parent = self.servers[server].clone();
        let now = self.now;
        for child in self.servers.values_mut() {
            graph::follow_parent(child, &parent, &image.cause, now);
        }
    }

    pub(crate) fn claim(&mut self) -> Option<(String, u64)> {
        let now = self.now;
        let due = |build: &&mut Build| build.claimable_at(now).is_some_and(|at| at <= now);
        let build = self.builds.values_mut().find(due)?;
        let token = build.claim(OWNER, now).unwrap();
        Some((build.id.to_string(), token))
    }

    /// Builds everything that is queued; one lock gives one image.
    pub(crate) fn work(&mut self) {
        self.settle();
        while let Some((id, token)) = self.claim() {
            self.succeed(&id, token).unwrap();
            self.settle();
        }
    }

    pub(crate) fn succeed(&mut self, id: &str, token: u64) -> Result<(), Illegal> {
        let now = self.now;
        let build = self.builds.get_mut(id).unwrap();
        let image = digest(&format!("image {}", build.lock_key));
        build.succeed(token, image, build::Progress::default(), Vec::new(), now)?;
        self.say(format!("{id} succeeded"));
        Ok(())
    }

    pub(crate) fn fail(&mut self, id: &str, token: u64, transient: bool) -> Result<(), Illegal> {
        let failed = build::Failed {
            problem: "step run: exit status 1".to_owned(),
            transient,
            last_log: vec!["boom".to_owned()],
            tests: Vec::new(),
        };
        let now = self.now;
        let build = self.builds.get_mut(id).unwrap();
        build.fail(token, failed, now)?;
        let state = build.state.as_str();
        self.say(format!("{id} failed, and is {state}"));
        Ok(())
    }

    pub(crate) fn remove(&mut self, server: &ServerName) {
        let cause = self.cause(CauseKind::DefinitionApplied, "remove");
        let (removed, ..) = head::remove(self.servers[server].clone(), cause, self.now).unwrap();
        self.servers.insert(server.clone(), removed);
        self.say(format!("{server} is removed"));
    }

    /// The deployer left the newest revision and went back to `good`.
    pub(crate) fn roll_back(&mut self, server: &ServerName, good: u64, by_definition: bool) -> bool {
        let newest = self.revisions.iter().rev().find(|revision| revision.server == *server).unwrap();
        self.rolled_back(server, newest.generation, good, by_definition)
    }

    /// That it left this one is heard.
    pub(crate) fn rolled_back(
        &mut self,
        server: &ServerName,
        generation: u64,
        good: u64,
        by_definition: bool,
    ) -> bool {
        let is_it = |revision: &&Revision| revision.server == *server && revision.generation == generation;
        let RevisionContent::Image(image) = &self.revisions.iter().find(is_it).unwrap().content else {
            panic!("a removal")
        };
        let verdict = Verdict {
            release: generation,
            definition: by_definition.then_some(image.definition_digest),
            packages: if by_definition { BTreeMap::new() } else { image.packages.clone() },
            reason: "never healthy".to_owned(),
            traceparent: String::new(),
            time: self.now,
        };
        let convicted = self.in_force.get(&(server.clone(), generation)).cloned();
        let good = self.in_force.get(&(server.clone(), good)).cloned();
        let now = self.now;
        let known = self.servers.get_mut(server).unwrap();
        let news = quarantine::convict(known, &verdict, convicted.as_ref(), good, now);
        let problem = known.problem();
        self.say(format!("{server} release {generation} rolled back: {problem}"));
        news
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        let servers: Vec<_> = self.servers.values().cloned().collect();
        let builds: Vec<_> = self.builds.values().cloned().collect();
        invariants::violations(&servers, &builds)
    }
}
