//! How instances run: what a release adds to its image.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::check::Check;
use crate::digest::Digest;
use crate::name::NodeName;
use crate::time::Millis;

/// Everything under `run` of a definition, checked and with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSpec {
    /// Where they run; none for the site's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeName>,
    pub replicas: u32,
    pub ports: Vec<Port>,
    /// Absolute paths that are in memory, starting as a copy of the image's content.
    pub writable: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub limits: Limits,
    /// Without the `CAP_` prefix, sorted; everything else is dropped.
    pub capabilities: Vec<String>,
    /// Without one an instance is healthy while it runs.
    pub health: Option<HealthPolicy>,
    pub rollout: RolloutPolicy,
    /// Time that open connections get to end after an instance left the edge.
    pub drain: Millis,
}

/// Capabilities that a definition may ask for. With the others a process could leave its instance: load code into the
/// kernel, mount, read every file, change the machine's devices, clock or audit.
pub const GRANTABLE: [&str; 21] = [
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
    "SYS_NICE",
];

impl RunSpec {
    pub fn node(&self) -> NodeName {
        self.node.clone().unwrap_or_else(NodeName::local)
    }

    /// # Errors
    /// None in practice: every field has a JSON form.
    pub fn digest(&self) -> Result<Digest, serde_json::Error> {
        Digest::of_json(self)
    }
}

/// A port that users connect to, and the one that instances answer on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Port {
    pub listen: u16,
    pub target: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limits {
    pub memory_bytes: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u32>,
    pub pids: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthPolicy {
    /// Never a file check.
    pub check: Check,
    pub interval: Millis,
    pub timeout: Millis,
    /// Consecutive passes that make an instance healthy.
    pub healthy: u32,
    /// Consecutive failures that make it unhealthy.
    pub unhealthy: u32,
    /// Failures within this time after the launch do not count.
    pub start: Millis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutPolicy {
    pub strategy: Strategy,
    /// Healthy instance-time that each step must show.
    pub soak: Millis,
    pub deadline: Millis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Never both zero.
    Rolling { max_surge: u32, max_unavailable: u32 },
}
