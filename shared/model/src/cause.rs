//! Why something was done: the links of the chain that `kiln why` walks.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    pub kind: CauseKind,
    /// Id of the signal, event or request.
    pub id: String,
    /// One line for people.
    pub summary: String,
    /// A service, or a person's user name.
    pub actor: String,
    pub time: Timestamp,
    /// W3C trace context; everything that follows from this cause belongs to this trace. Empty where tracing is off.
    pub traceparent: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CauseKind {
    DefinitionApplied,
    DefinitionChanged,
    PackageUpdates,
    Unhealthy,
    Gone,
    Reported,
    Manual,
    Rollback,
}

impl CauseKind {
    pub const ALL: [Self; 8] = [
        Self::DefinitionApplied,
        Self::DefinitionChanged,
        Self::PackageUpdates,
        Self::Unhealthy,
        Self::Gone,
        Self::Reported,
        Self::Manual,
        Self::Rollback,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DefinitionApplied => "definition_applied",
            Self::DefinitionChanged => "definition_changed",
            Self::PackageUpdates => "package_updates",
            Self::Unhealthy => "unhealthy",
            Self::Gone => "gone",
            Self::Reported => "reported",
            Self::Manual => "manual",
            Self::Rollback => "rollback",
        }
    }
}

impl fmt::Display for CauseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no kind of cause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no kind of cause")]
pub struct NotACauseKind(String);

impl FromStr for CauseKind {
    type Err = NotACauseKind;

    fn from_str(text: &str) -> Result<Self, NotACauseKind> {
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == text);
        found.ok_or_else(|| NotACauseKind(text.chars().take(80).collect()))
    }
}
