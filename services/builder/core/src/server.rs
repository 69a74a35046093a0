//! A server: everything that the builder knows of it.

use std::time::Duration;

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::digest::Digest;
use kiln_model::name::{BuildId, ServerName};
use kiln_model::revision::PackageVersions;
use serde::{Deserialize, Serialize};

use crate::definition::DefinitionRef;
use crate::quarantine::Quarantine;
use crate::signal::{Handled, Outcome};
use crate::source::SourceId;
use crate::time::{after, age};
use crate::wanted::Wanted;

/// Document kind.
pub const KIND: &str = "server";
pub const SCHEMA: u32 = 1;

/// Revisions and builds in an hour that Kiln makes by itself. What people commit, apply or ask for is not counted.
pub const AUTOMATIC_PER_HOUR: usize = 20;
const HOUR: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    pub name: ServerName,
    pub source: SourceId,
    /// Inside the source; `.` for its top.
    pub folder: String,
    /// The newest definition that was accepted.
    pub head: DefinitionRef,
    /// Of the newest revision; 0 before the first. Never reset, not even by a removal.
    pub generation: u64,
    /// Number of the newest build. Never reset.
    pub builds: u64,
    /// What the fleet runs or is moving to: the newest revision, or after a conviction the last good one.
    pub in_force: Option<InForce>,
    pub building: Option<Building>,
    pub wanted: Option<Wanted>,
    pub quarantine: Quarantine,
    /// Signals that were followed, oldest first.
    pub handled: Vec<Handled>,
    /// When Kiln last acted by itself, oldest first.
    pub automatic: Vec<Timestamp>,
    /// The parent's revision that last asked for a plan.
    pub parent_followed: Option<String>,
    pub failure: Option<Failure>,
    pub refused: Option<Refused>,
    /// No longer in its source. Its fleet runs on until it is removed by a person.
    pub orphaned: bool,
    pub removed: bool,
}

/// What a revision put in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    pub generation: u64,
    pub definition: DefinitionRef,
    pub lock_key: Digest,
    pub image: Digest,
    /// The parent's image that this one stands on.
    pub parent_image: Option<Digest>,
    pub build: BuildId,
    pub packages: PackageVersions,
    /// Those of them that an archive for security updates has.
    #[serde(default)]
    pub security: PackageVersions,
    pub release_files: Vec<ReleaseFile>,
    /// When its lock was last resolved anew and found equal.
    pub resolved: Timestamp,
}

/// An archive's release file, as a lock was resolved from it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReleaseFile {
    pub url: String,
    pub digest: Digest,
}

/// A build that is awaited, and what its success puts in force. The build may be another server's with the same lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Building {
    pub build: BuildId,
    pub definition: DefinitionRef,
    pub lock_key: Digest,
    pub parent_image: Option<Digest>,
    pub packages: PackageVersions,
    /// Those of them that an archive for security updates has.
    #[serde(default)]
    pub security: PackageVersions,
    pub release_files: Vec<ReleaseFile>,
    pub resolved: Timestamp,
    pub causes: Vec<Cause>,
}

/// Why the last plan or build came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub problem: String,
    pub time: Timestamp,
    /// Tried again by itself.
    pub transient: bool,
}

/// A definition in the source that can't be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub digest: Digest,
    pub commit: String,
    /// With file, line and column.
    pub problem: String,
}

impl Server {
    /// With numbers that go on above one: whoever knew a store that was restored since has seen those below it.
    pub fn numbered_above(mut self, number: u64) -> Self {
        self.generation = self.generation.max(number);
        self.builds = self.builds.max(number);
        self
    }

    /// The definition that is planned and built: the head, or while that is convicted the last good one. None where
    /// nothing good has ever been.
    pub fn effective(&self) -> Option<&DefinitionRef> {
        if self.quarantine.convicts_definition(&self.head.digest) {
            self.in_force.as_ref().map(|in_force| &in_force.definition)
        } else {
            Some(&self.head)
        }
    }

    pub fn is_quarantined(&self) -> bool {
        self.quarantine.convicts_definition(&self.head.digest)
    }

    /// What is wrong, the most pressing first; empty where nothing is.
    pub fn problem(&self) -> String {
        let breaker = || self.handled.iter().rev().find_map(|handled| handled.tripped.clone());
        let convicted = || {
            self.is_quarantined().then(|| {
                format!(
                    "definition {} was rolled back and is not built again until it changes: {}",
                    self.head.digest.short(),
                    self.quarantine.reason(&self.head.digest).unwrap_or("no reason was given"),
                )
            })
        };
        let refused = self.refused.as_ref().map(|refused| refused.problem.clone());
        let failure = self.failure.as_ref().map(|failure| failure.problem.clone());
        refused.or(failure).or_else(breaker).or_else(convicted).unwrap_or_default()
    }

    /// Asks for a plan at `due`; the same cause asks once.
    pub fn want(&mut self, cause: Cause, due: Timestamp) {
        match &mut self.wanted {
            Some(wanted) => wanted.join(cause, due),
            None => self.wanted = Some(Wanted::new(cause, due)),
        }
    }

    /// Asks once more for what came to nothing by a failure that may pass.
    pub(crate) fn want_again(&mut self, causes: Vec<Cause>, due: Timestamp) {
        for cause in causes {
            self.want(cause, due);
        }
        if let Some(wanted) = &mut self.wanted {
            wanted.attempts = wanted.attempts.max(1);
        }
    }

    /// Whether a plan or build for this cause is under way.
    pub fn is_following(&self, id: &str) -> bool {
        self.wanted.as_ref().is_some_and(|wanted| wanted.names(id))
            || self
                .building
                .as_ref()
                .is_some_and(|building| building.causes.iter().any(|cause| cause.id == id))
    }

    /// What became of the signals among `causes`.
    pub(crate) fn settle(&mut self, causes: &[Cause], outcome: Outcome, now: Timestamp) {
        for handled in &mut self.handled {
            if causes.iter().any(|cause| cause.id == handled.id.to_string()) {
                handled.outcome = outcome;
                handled.settled = Some(now);
            }
        }
    }

    /// Notes that Kiln acted by itself.
    pub(crate) fn note_automatic(&mut self, now: Timestamp) {
        self.automatic.retain(|time| age(*time, now) < HOUR);
        self.automatic.push(now);
    }

    /// When a plan for `wanted` is due, as of `now`.
    pub(crate) fn plan_due(&self, wanted: &Wanted, now: Timestamp) -> Timestamp {
        wanted.due(now, self.head.update.debounce.as_duration())
    }

    /// The time before which Kiln does nothing more by itself.
    pub(crate) fn throttled_until(&self, now: Timestamp) -> Option<Timestamp> {
        // What lies ahead was noted before the clock was set back: nobody knows how long ago that was.
        let is_recent = |time: &&Timestamp| **time <= now && age(**time, now) < HOUR;
        let recent: Vec<_> = self.automatic.iter().filter(is_recent).collect();
        let excess = recent.len().checked_sub(AUTOMATIC_PER_HOUR)?;
        recent.get(excess).map(|oldest| after(**oldest, HOUR))
    }
}
