//! What is known of the outside, for all servers: filled by the watches, the resyncs and the results of effects, read as
//! a [`View`] by whoever decides. Nothing here is stored.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use kiln_api::convert::{self, Invalid};
use kiln_api::{engine, monitor, types};
use kiln_deployer_core::{
    Evidence, Fleet, InstanceState, Listener, OwnChecks, Seen, SeenState, Told, Verdict, View,
};
use kiln_model::check::CheckResult;
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, NodeName, ServerName};
use kiln_model::signal::HealthState;
use kiln_model::time::{Age, Now};
use tokio::sync::Notify;

use crate::wire;

/// An edge that was refused so often, over some seconds, stays refused: an instance that had just ended would have been
/// taken out of the plan by then.
const REFUSALS: u32 = 5;

#[derive(Debug, Clone, Default)]
pub(crate) struct Board {
    shared: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Those that told everything, and whose watches stand: when they were last asked for everything.
    synced: BTreeMap<NodeName, Duration>,
    servers: BTreeMap<ServerName, Server>,
}

#[derive(Debug, Default)]
struct Server {
    /// Woken at each change.
    wake: Arc<Notify>,
    engine: BTreeMap<InstanceId, Held>,
    refused: BTreeMap<InstanceId, String>,
    retired: BTreeSet<InstanceId>,
    routed: BTreeMap<NodeName, u64>,
    edge: BTreeMap<NodeName, Vec<Listener>>,
    /// For which generation, how often, and why.
    refusals: BTreeMap<NodeName, (u64, u32, String)>,
    health: BTreeMap<InstanceId, Heard>,
    checks: BTreeMap<InstanceId, (OwnChecks, Duration)>,
    verdicts: BTreeMap<Digest, Verdict>,
    evidence: BTreeMap<InstanceId, Evidence>,
    held: Option<BTreeSet<Digest>>,
}

#[derive(Debug)]
struct Held {
    seen: Seen,
    version: u64,
    at: Duration,
}

#[derive(Debug)]
struct Heard {
    state: HealthState,
    last_checks: Vec<CheckResult>,
    observed: Timestamp,
    /// Of the monitor's document.
    version: u64,
    age: Age,
}

/// The way that a fact on health came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// The monitor's own answer, just now.
    Asked,
    /// An event, which may have been on its way for long.
    Event,
}

impl How {
    /// Whether a fact is older than what is known. The document's version decides, and then how old the look is: times of a
    /// clock that was set back say nothing. Only a monitor whose store is new begins to count again, and then it has looked
    /// since.
    fn is_outdated(self, fact: &Heard, known: &Heard, now: Now) -> bool {
        match self {
            Self::Asked => {
                let older = fact.age.at(now) > known.age.at(now);
                match fact.version.cmp(&known.version) {
                    Ordering::Greater => false,
                    Ordering::Equal => older,
                    Ordering::Less => older || fact.observed <= known.observed,
                }
            }
            Self::Event => (fact.version, fact.observed) < (known.version, known.observed),
        }
    }
}

impl Known {
    fn wake_all(&self) {
        for server in self.servers.values() {
            server.wake.notify_one();
        }
    }
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, Known> {
        // A panic elsewhere leaves the maps whole: each change is one insertion or removal.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, server: &ServerName, change: impl FnOnce(&mut Server) -> T) -> T {
        let mut known = self.lock();
        let server = known.servers.entry(server.clone()).or_default();
        let changed = change(server);
        server.wake.notify_one();
        changed
    }

    /// What wakes those who decide on this server.
    pub(crate) fn waker(&self, server: &ServerName) -> Arc<Notify> {
        self.lock().servers.entry(server.clone()).or_default().wake.clone()
    }

    pub(crate) fn wake(&self, server: &ServerName) {
        self.waker(server).notify_one();
    }

    pub(crate) fn wake_all(&self) {
        self.lock().wake_all();
    }

    /// Takes over one instance as its node has it. What is older than what is known is left out: answers and changes may
    /// overtake each other.
    pub(crate) fn engine(
        &self,
        node: &NodeName,
        instance: engine::Instance,
        at: Duration,
    ) -> Result<(), Invalid> {
        // Nothing is known from before the beginning.
        self.engine_since(node, instance, Duration::ZERO, at)
    }

    /// As it was asked for at `since`: what was known before that is older, whatever its version says. A node whose store
    /// was restored counts anew.
    fn engine_since(
        &self,
        node: &NodeName,
        instance: engine::Instance,
        since: Duration,
        at: Duration,
    ) -> Result<(), Invalid> {
        let version = instance.version;
        let Some((id, seen)) = wire::seen(node, instance)? else { return Ok(()) };
        self.change(&id.server.clone(), |server| {
            if server.engine.get(&id).is_none_or(|held| held.version <= version || held.at < since) {
                server.engine.insert(id, Held { seen, version, at });
            }
        });
        Ok(())
    }

    /// Takes over everything that a node has, as it was asked for at `since`: what it did not name, and what nobody
    /// told of since, is not there.
    pub(crate) fn listing(
        &self,
        node: &NodeName,
        listing: crate::ports::Listing,
        since: Duration,
        at: Duration,
    ) {
        for instance in listing.instances {
            if let Err(invalid) = self.engine_since(node, instance, since, at) {
                tracing::warn!(%node, error = %invalid, "the node lists an instance that makes no sense");
            }
        }
        let mut known = self.lock();
        for server in known.servers.values_mut() {
            server.engine.retain(|_, held| held.seen.node != *node || held.at >= since);
            server.routed.remove(node);
            server.edge.remove(node);
        }
        for route in listing.routes {
            let Ok(name) = route.server.parse::<ServerName>() else { continue };
            let server = known.servers.entry(name).or_default();
            server.routed.insert(node.clone(), route.generation);
            server.edge.insert(node.clone(), wire::edge(route.listeners));
        }
        known.synced.insert(node.clone(), since);
        known.wake_all();
    }

    /// A node that was not asked since the fleet was read, at `read`, though the fleet runs an instance there of which
    /// nothing is known. It may have been launched by another process while this one stood still: then that says nothing.
    pub(crate) fn behind(&self, fleet: &Fleet, read: Duration) -> Option<NodeName> {
        let known = self.lock();
        let engine = known.servers.get(&fleet.server).map(|server| &server.engine);
        let is_unknown = |id: &InstanceId| engine.is_none_or(|engine| !engine.contains_key(id));
        let running = fleet.instances.iter().filter(|(_, i)| i.state == InstanceState::Running);
        let mut nodes = running.filter(|(id, _)| is_unknown(id)).map(|(_, instance)| &instance.node);
        nodes.find(|node| known.synced.get(*node).is_some_and(|listed| *listed < read)).cloned()
    }

    /// A node's watch broke: until it stands again nothing is known of what runs there.
    pub(crate) fn node_away(&self, node: &NodeName) {
        self.lock().synced.remove(node);
    }

    pub(crate) fn is_synced(&self, node: &NodeName) -> bool {
        self.lock().synced.contains_key(node)
    }

    /// Takes over what the monitor says of an instance.
    pub(crate) fn health(&self, health: monitor::Health, heard: How, now: Now) -> Result<(), Invalid> {
        let id: InstanceId = convert::text("instance", &health.instance)?;
        // It knows of the instance, and has not looked at it yet.
        let Some(observed) = convert::from_optional_timestamp("observed", health.observed)? else {
            return Ok(());
        };
        let state = convert::enumeration::<types::HealthState, HealthState>("state", health.state)?;
        let checks = health.last_checks.into_iter().map(CheckResult::try_from);
        let last_checks = checks.collect::<Result<Vec<_>, _>>()?;
        let mut age = convert::to_age("age", health.age, observed, now)?;
        // What ended is replaced, whatever the clocks say; that an instance is well has to be of a known time.
        if age.is_unknown() && matches!(state, HealthState::Unhealthy | HealthState::Gone) {
            age = Age::new(Duration::ZERO, now);
        }
        let mut known = self.lock();
        let server = known.servers.entry(id.server.clone()).or_default();
        let before = server.health.get(&id);
        let version = health.version;
        let mut fact = Heard { state, last_checks, observed, version, age };
        // What is heard again does not grow younger, as it would by a clock that was set back meanwhile.
        if let Some(before) =
            before.filter(|before| before.observed == observed && before.age.at(now) > age.at(now))
        {
            fact.age = before.age;
        }
        if before.is_some_and(|before| heard.is_outdated(&fact, before, now)) {
            return Ok(());
        }
        // That nothing changed is told all the time. Who needs it to be fresh looks every second anyway.
        let changed = before.is_none_or(|heard| heard.state != state);
        server.health.insert(id, fact);
        if changed {
            server.wake.notify_one();
        }
        Ok(())
    }

    pub(crate) fn refused(&self, id: &InstanceId, why: String) {
        self.change(&id.server, |server| server.refused.insert(id.clone(), why));
    }

    pub(crate) fn retired(&self, id: &InstanceId) {
        self.change(&id.server, |server| server.retired.insert(id.clone()));
    }

    pub(crate) fn routed(&self, name: &ServerName, node: &NodeName, generation: u64) {
        self.change(name, |server| {
            server.routed.insert(node.clone(), generation);
            server.refusals.remove(node);
        });
    }

    pub(crate) fn route_refused(&self, name: &ServerName, node: &NodeName, generation: u64, why: String) {
        self.change(name, |server| {
            let before = server.refusals.get(node).filter(|(of, ..)| *of == generation);
            let times = before.map_or(0, |(_, times, _)| *times) + 1;
            server.refusals.insert(node.clone(), (generation, times, why));
        });
    }

    pub(crate) fn checked(&self, id: &InstanceId, result: CheckResult, at: Duration) {
        self.change(&id.server, |server| {
            let before = server.checks.get(id).map_or((0, 0), |(own, _)| (own.passes, own.failures));
            let (passes, failures) =
                if result.passed { (before.0 + 1, 0) } else { (0, before.1.saturating_add(1)) };
            let own = OwnChecks { passes, failures, last: result, age: Duration::ZERO };
            server.checks.insert(id.clone(), (own, at));
        });
    }

    pub(crate) fn verdict(&self, name: &ServerName, image: Digest, verdict: Verdict) {
        self.change(name, |server| server.verdicts.insert(image, verdict));
    }

    pub(crate) fn evidence(&self, id: &InstanceId, lines: Vec<String>) {
        self.change(&id.server, |server| server.evidence.insert(id.clone(), Evidence { lines }));
    }

    pub(crate) fn held(&self, name: &ServerName, images: BTreeSet<Digest>) {
        self.change(name, |server| server.held = Some(images));
    }

    /// What is known at this moment of a server whose fleet has something on these nodes, or is to have. `started` is
    /// when this process began to listen.
    pub(crate) fn view(
        &self,
        name: &ServerName,
        nodes: &BTreeSet<NodeName>,
        now: Now,
        started: Duration,
        elapsed: Duration,
    ) -> View {
        let since = |at: Duration| now.monotonic.saturating_sub(at);
        let mut known = self.lock();
        let synced = nodes.iter().all(|node| known.synced.contains_key(node));
        let server = known.servers.entry(name.clone()).or_default();
        let mut refusals = server.refusals.values().filter(|(_, times, _)| *times >= REFUSALS);
        View {
            engine: synced
                .then(|| server.engine.iter().map(|(id, held)| (id.clone(), held.seen.clone())).collect()),
            refused: server.refused.clone(),
            retired: server.retired.clone(),
            routed: server.routed.clone(),
            edge: server.edge.values().flatten().cloned().collect(),
            unroutable: refusals.next().map(|(generation, _, why)| (*generation, why.clone())),
            health: server
                .health
                .iter()
                .map(|(id, heard)| {
                    let last_checks = heard.last_checks.clone();
                    (id.clone(), Told { state: heard.state, age: heard.age.at(now), last_checks })
                })
                .collect(),
            checks: server
                .checks
                .iter()
                .map(|(id, (own, at))| (id.clone(), OwnChecks { age: since(*at), ..own.clone() }))
                .collect(),
            verdicts: server.verdicts.clone(),
            evidence: server.evidence.clone(),
            held: server.held.clone(),
            watching: since(started),
            elapsed,
        }
    }

    /// Forgets what no decision on this fleet can need any more.
    pub(crate) fn prune(&self, fleet: &Fleet) {
        let mut known = self.lock();
        let Some(server) = known.servers.get_mut(&fleet.server) else { return };
        let meant = |id: &InstanceId| fleet.instances.contains_key(id);
        server.engine.retain(|id, held| meant(id) || held.seen.state != SeenState::Retired);
        let present: BTreeSet<InstanceId> = server.engine.keys().cloned().collect();
        server.retired.retain(|id| meant(id) || present.contains(id));
        server.refused.retain(|id, _| meant(id));
        server.health.retain(|id, _| meant(id) || present.contains(id));
        server.checks.retain(|id, _| meant(id));
        let failures = fleet.rollout.iter().chain(&fleet.finished).filter_map(|r| r.failure.as_ref());
        let failed: BTreeSet<&InstanceId> = failures.map(|failure| &failure.instance).collect();
        server.evidence.retain(|id, _| failed.contains(id));
        if fleet.rollout.is_none() {
            // What was wrong once is looked at anew the next time.
            server.verdicts.clear();
        }
    }
}
