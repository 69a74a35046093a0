//! The move of a fleet from one release to another.

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::check::CheckResult;
use kiln_model::name::{InstanceId, NodeName};
use kiln_model::time::Millis;
use serde::{Deserialize, Serialize};

use crate::quarantine::Quarantine;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// `web-r12`, or `web-r11-back2` for the second time that a person went back.
    pub id: String,
    pub from: u64,
    pub to: u64,
    pub state: RolloutState,
    pub cause: Cause,
    /// Why it holds, was rolled back, or failed.
    pub problem: String,
    pub failure: Option<Failure>,
    /// What the way back convicted.
    pub convicted: Option<Quarantine>,
    pub started: Timestamp,
    pub ended: Option<Timestamp>,
    /// Instances of the target that passed their gate.
    pub done: u32,
    pub total: u32,
    /// The image's digest and signature were found right, so launching may begin.
    pub verified: bool,
    /// Attempts from here on were launched by the leg under way: forward, or back.
    pub first_attempt: u64,
    /// Launches of that leg that failed, as far as they were not cut off. One says nothing yet of the release: the machine
    /// may have been busy.
    #[serde(default)]
    pub failed_launches: u32,
    /// Time of that leg, as far as it counts for the deadline.
    pub elapsed: Millis,
    /// The release that it goes back to.
    pub back_to: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutState {
    Running,
    /// Waits for the monitor's facts.
    Held,
    RollingBack,
    Succeeded,
    RolledBack,
    /// The way back failed too, or there was none.
    Failed,
    /// A newer release took its place.
    Superseded,
}

/// The instance that failed the gate, and what was seen of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub instance: InstanceId,
    #[serde(default = "NodeName::local")]
    pub node: NodeName,
    pub exit_code: Option<i32>,
    pub last_checks: Vec<CheckResult>,
    /// Not asked for yet, or the node did not answer yet.
    pub last_log: Option<Vec<String>>,
}

impl Rollout {
    pub fn target(&self) -> u64 {
        self.back_to.unwrap_or(self.to)
    }

    pub fn is_forward(&self) -> bool {
        matches!(self.state, RolloutState::Running | RolloutState::Held)
    }

    /// As it is told to others: sums that grow with every tick are left out, so that a tick is not a change.
    #[must_use]
    pub fn record(&self) -> Self {
        Self { elapsed: Millis(0), ..self.clone() }
    }
}
