//! One server's fleet: the aggregate that every decision is made on and committed with.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::check::CheckResult;
use kiln_model::name::{InstanceId, NodeName, ServerName};
use kiln_model::signal::HealthState;
use kiln_model::time::Millis;
use serde::{Deserialize, Serialize};

use crate::quarantine::Quarantine;
use crate::release::Content;
use crate::rollout::{Rollout, RolloutState};

/// How many good releases are kept ready for a rollback, their images held.
const GOODS: usize = 5;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fleet {
    pub server: ServerName,
    /// What runs, or is being moved to; 0 for nothing yet.
    pub release: u64,
    /// Where a failed rollout goes back to; 0 while none succeeded.
    pub last_good: u64,
    /// The newest releases that were good, oldest first.
    pub goods: Vec<u64>,
    /// Neither these two nor `backs` ever reset, not even when the server is removed.
    pub next_release: u64,
    pub next_attempt: u64,
    /// Manual rollbacks so far.
    pub backs: u64,
    /// Fences effects at the node, which refuses what is lower: it grows with each change of the edge.
    pub generation: u64,
    /// Generation of the newest revision that was taken.
    pub revision: u64,
    pub rollout: Option<Rollout>,
    /// The rollout that ended last. One that failed halts the fleet until a newer revision or a person comes.
    pub finished: Option<Rollout>,
    /// A release that waits for the way back to end.
    pub pending: Option<u64>,
    /// The newest release, where it is not rolled out because it was convicted.
    pub refused: Option<u64>,
    /// What is meant to be there, what is on its way out, and what ended by itself and has not been replaced.
    pub instances: BTreeMap<InstanceId, Instance>,
    /// What the nodes are to have on the edge at `generation`, each its own instances.
    pub edge: Vec<Listener>,
    /// Nodes that have no instance of it any more, and have not confirmed that their edge is empty.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left: BTreeSet<NodeName>,
    pub backoff: Backoff,
    pub quarantine: Vec<Quarantine>,
    pub removed: bool,
    /// What is wrong and what to do; empty where nothing is.
    pub problem: String,
}

/// An instance that was meant to exist from the commit that wrote it on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    #[serde(default = "NodeName::local")]
    pub node: NodeName,
    pub content: Content,
    pub state: InstanceState,
    pub health: HealthState,
    /// It was healthy once: it may stand on the edge.
    pub passed: bool,
    /// The node had it on the edge (or it has no ports): an old one may leave for it.
    pub served: bool,
    pub address: String,
    pub created: Timestamp,
    pub launched: Option<Timestamp>,
    pub ended: Option<Timestamp>,
    pub exit_code: Option<i32>,
    pub detail: String,
    /// It ended while the node was away, as with a machine that goes down: not its release's fault.
    #[serde(default)]
    pub cut_off: bool,
    /// What was known of its probes when it became unhealthy or ended by itself: the monitor forgets what is retired.
    #[serde(default)]
    pub last_checks: Vec<CheckResult>,
    pub cause: Cause,
    /// Why another one is to take its place.
    pub replace: Option<Cause>,
    /// Healthy time during its rollout, up to the soak. It ends with the newest answer: what came after that, nobody has
    /// seen.
    pub soaked: Millis,
    /// The time since, until an answer makes it a part of the soak.
    #[serde(default)]
    pub unseen: Millis,
    /// How long it is in its state, as far as something is due after that.
    pub in_state: Millis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    Launching,
    Running,
    /// Ended by itself.
    Exited,
    /// Off the edge; ends when its connections did.
    Draining,
    Retired,
    /// Could not be launched.
    Failed,
}

impl Instance {
    pub fn is_live(&self) -> bool {
        matches!(self.state, InstanceState::Launching | InstanceState::Running)
    }

    /// It ended by itself; what is left of it at the node is to be cleared away.
    pub fn is_broken(&self) -> bool {
        matches!(self.state, InstanceState::Exited | InstanceState::Failed)
    }

    /// It counts for `maxSurge`: a draining one takes memory as much as a running one.
    pub fn takes_room(&self) -> bool {
        self.is_live() || self.state == InstanceState::Draining
    }

    pub fn is_up(&self) -> bool {
        self.state == InstanceState::Running && self.passed && self.health == HealthState::Healthy
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    pub listen: u16,
    pub backends: Vec<Backend>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    pub instance: InstanceId,
    pub target: u16,
}

/// Bounds the rate at which a server's instances are replaced outside of rollouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Backoff {
    /// Replacements since the fleet was last calm, or a rollout came to its end.
    pub launches: u32,
    /// Since the last of them.
    pub waited: Millis,
    /// Time in which every instance was healthy.
    pub calm: Millis,
}

impl Backoff {
    const FIRST: u64 = 1000;
    const LONGEST: u64 = 300_000;
    /// After so much calm the count starts anew.
    pub(crate) const CALM: Millis = Millis::from_secs(60);

    /// Wait before the next replacement. A fleet may be replaced once as a whole without one (the machine was started
    /// anew); then it doubles: 1, 2, 4 s … 5 min, so a crash loop is at most twelve launches an hour in the end.
    pub(crate) fn delay(&self, replicas: u32) -> Millis {
        let Some(over) = self.launches.checked_sub(replicas.max(1)) else { return Millis(0) };
        Millis(Self::FIRST.saturating_mul(1 << over.min(16)).min(Self::LONGEST))
    }

    pub(crate) fn due_in(&self, replicas: u32) -> Millis {
        Millis(self.delay(replicas).0.saturating_sub(self.waited.0))
    }
}

impl Fleet {
    pub fn new(server: ServerName) -> Self {
        Self {
            server,
            release: 0,
            last_good: 0,
            goods: Vec::new(),
            next_release: 1,
            next_attempt: 1,
            backs: 0,
            generation: 0,
            revision: 0,
            rollout: None,
            finished: None,
            pending: None,
            refused: None,
            instances: BTreeMap::new(),
            edge: Vec::new(),
            left: BTreeSet::new(),
            backoff: Backoff::default(),
            quarantine: Vec::new(),
            removed: false,
            problem: String::new(),
        }
    }

    /// With numbers that go on above one: whoever knew a store that was restored since has seen those below it.
    pub fn numbered_above(mut self, number: u64) -> Self {
        if number > 0 {
            self.next_release = self.next_release.max(number + 1);
            self.next_attempt = self.next_attempt.max(number + 1);
        }
        self
    }

    /// The last rollout failed, and its way back too: nothing is launched or torn down until someone acts.
    pub fn is_halted(&self) -> bool {
        self.rollout.is_none() && self.finished.as_ref().is_some_and(|r| r.state == RolloutState::Failed)
    }

    /// The release whose content the fleet is to have.
    pub fn target(&self) -> u64 {
        self.rollout.as_ref().map_or(self.release, Rollout::target)
    }

    /// A rollout goes to a release that is not proven yet: it needs the monitor's facts.
    pub fn is_forward(&self) -> bool {
        self.rollout.as_ref().is_some_and(Rollout::is_forward)
    }

    pub fn on_edge(&self, id: &InstanceId) -> bool {
        self.edge.iter().flat_map(|listener| &listener.backends).any(|backend| backend.instance == *id)
    }

    /// Nodes that have, or may have, something of it, as far as it knows.
    pub fn nodes(&self) -> BTreeSet<&NodeName> {
        self.instances.values().map(|instance| &instance.node).chain(&self.left).collect()
    }

    /// Releases that a decision on this fleet may look at.
    pub fn releases_needed(&self) -> impl Iterator<Item = u64> {
        let rollouts = self.rollout.iter().flat_map(|r| [Some(r.from), Some(r.to), r.back_to]);
        let mut numbers: Vec<u64> = rollouts
            .chain([Some(self.release), Some(self.last_good), self.pending, self.refused])
            .flatten()
            .chain(self.goods.iter().copied())
            .chain(self.instances.keys().map(|id| id.release))
            .filter(|number| *number != 0)
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.into_iter()
    }

    pub(crate) fn remember_good(&mut self, number: u64) {
        self.last_good = number;
        self.goods.retain(|good| *good != number);
        self.goods.push(number);
        if self.goods.len() > GOODS {
            self.goods.remove(0);
        }
    }
}
