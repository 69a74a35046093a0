//! What is known of the outside at one moment. Nothing of it is stored: it is asked for again after a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use kiln_model::check::CheckResult;
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, NodeName};
use kiln_model::signal::HealthState;

use crate::fleet::Listener;

#[derive(Debug, Clone, Default)]
pub struct View {
    /// What the nodes have of this server, if those of its fleet have told everything and their watches stand; else
    /// nothing is decided.
    pub engine: Option<BTreeMap<InstanceId, Seen>>,
    /// Launches that the node refused for good, with its words.
    pub refused: BTreeMap<InstanceId, String>,
    /// What the node has confirmed to be retired.
    pub retired: BTreeSet<InstanceId>,
    /// The generation of what each node has on the edge.
    pub routed: BTreeMap<NodeName, u64>,
    /// What all of that was when each was last asked for everything.
    pub edge: Vec<Listener>,
    /// An edge that a node refuses and goes on refusing: its generation, and why.
    pub unroutable: Option<(u64, String)>,
    pub health: BTreeMap<InstanceId, Told>,
    pub checks: BTreeMap<InstanceId, OwnChecks>,
    pub verdicts: BTreeMap<Digest, Verdict>,
    pub evidence: BTreeMap<InstanceId, Evidence>,
    /// Images that the builder holds for this server, as far as it has confirmed.
    pub held: Option<BTreeSet<Digest>>,
    /// How long this process has been listening to the monitor.
    pub watching: Duration,
    /// Time since the fleet was last committed by this process.
    pub elapsed: Duration,
}

/// An instance as the node has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub node: NodeName,
    pub state: SeenState,
    pub address: String,
    pub launched: Option<Timestamp>,
    pub ended: Option<Timestamp>,
    pub exit_code: Option<i32>,
    pub detail: String,
    /// It failed because the node ended in the middle of its launch, or ended while the node was away:
    /// that says nothing of its release.
    pub cut_off: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeenState {
    Launching,
    Running,
    Exited,
    Retiring,
    Retired,
    Failed,
}

/// What the monitor said of an instance, and how long ago it looked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub state: HealthState,
    pub age: Duration,
    pub last_checks: Vec<CheckResult>,
}

/// What the deployer saw itself, through the node, where the monitor's facts are too old.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnChecks {
    /// Consecutive ones; one of the two is 0.
    pub passes: u32,
    pub failures: u32,
    pub last: CheckResult,
    pub age: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Right,
    Wrong(String),
}

/// The last lines that an instance wrote; empty where they can't be had.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Evidence {
    pub lines: Vec<String>,
}
