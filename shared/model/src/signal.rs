//! The monitor's "needs update", and what it is made from.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::cause::CauseKind;
use crate::digest::{Digest, NotADigest};
use crate::name::{InstanceId, ServerName};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signal {
    pub id: SignalId,
    pub server: ServerName,
    pub cause: CauseKind,
    pub fingerprint: String,
    pub remedy: Remedy,
    /// Lines for people.
    pub evidence: Vec<String>,
    /// The instance that a replacement is about.
    pub instance: Option<InstanceId>,
    pub state: SignalState,
    /// Since when the fix could be had.
    pub since: Timestamp,
    pub raised: Timestamp,
    pub reporter: String,
    pub traceparent: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SignalId(pub Digest);

impl SignalId {
    /// The same cause with the same fingerprint is the same signal, however often it is seen.
    pub fn new(server: &ServerName, cause: CauseKind, fingerprint: &str) -> Self {
        // A line end can't be part of a name or a cause, so the three can't run into each other.
        Self(Digest::of(format!("{server}\n{}\n{fingerprint}", cause.as_str()).as_bytes()))
    }
}

impl fmt::Display for SignalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SignalId {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        text.parse().map(Self)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    Rebuild,
    Replace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SignalState {
    Open,
    /// For a person's approval.
    Waiting,
    Resolved,
}

/// What the monitor says of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// Not enough samples yet.
    Starting,
    Healthy,
    Unhealthy,
    /// The engine says that it does not run.
    Gone,
}
