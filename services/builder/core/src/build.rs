//! A build: one run that turns a lock into an image, or fails and says why.

use std::time::Duration;

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::digest::Digest;
use kiln_model::name::{BuildId, ServerName};
use kiln_model::time::Millis;
use serde::{Deserialize, Serialize};

use crate::Illegal;
use crate::time::{LONGEST, after, age, backoff, due};

/// Document kind.
pub const KIND: &str = "build";
pub const SCHEMA: u32 = 1;
/// Document kind of the build that is queued, running or succeeded for a lock key; its id is the key. It makes the key
/// unique among them.
pub const SLOT_KIND: &str = "build_slot";

/// How long a worker may be silent before its build is another's to take.
pub const LEASE: Duration = Duration::from_secs(20);
/// How often a worker says that it is there.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// Attempts at a lock whose failures may pass. The waits between them are 2 s, 4 s … 512 s and then 600 s: with the tenth
/// that is 27 minutes. What asked for the build is planned anew then, since what the lock names may have left the archive.
pub const MAX_ATTEMPTS: u32 = 11;
/// Attempts that ended without an outcome before the build is taken for what ends them, and is left alone for a while. A
/// builder that is killed a few times for other reasons comes through.
pub const MAX_INTERRUPTIONS: u32 = 5;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    pub id: BuildId,
    pub lock_key: Digest,
    pub definition: Digest,
    /// The first one; the others are in the server's plan.
    pub cause: Cause,
    pub state: State,
    /// Grows with each claim. What an earlier owner writes is refused by it.
    pub token: u64,
    /// Claims that came to an outcome, and the one that is running.
    pub attempts: u32,
    /// Claims whose process or worker was gone before there was an outcome.
    #[serde(default)]
    pub interruptions: u32,
    pub created: Timestamp,
    pub started: Option<Timestamp>,
    pub ended: Option<Timestamp>,
    /// How long its lock took to be resolved.
    #[serde(default)]
    pub resolving: Millis,
    /// It brings security updates: it comes before others that wait.
    #[serde(default)]
    pub security: bool,
    /// A second build on an empty layer cache, compared with the first. It makes no revision and has no slot.
    pub verify: bool,
    pub progress: Progress,
    pub tests: Vec<TestResult>,
    /// Against what was in force when it was planned.
    pub packages: Vec<PackageChange>,
    /// Why an attempt failed, and what to do.
    pub problem: String,
    /// What it failed of may pass by itself, and says nothing of the definition.
    #[serde(default)]
    pub transient: bool,
    /// Last lines of the log of what failed.
    pub last_log: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Queued { not_before: Timestamp },
    Running { lease: Lease },
    Succeeded { image: Digest },
    Failed,
    Cancelled { actor: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// One run of one builder process.
    pub owner: String,
    pub renewed: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    pub steps: Vec<Step>,
    /// 0 where it is not known yet.
    pub steps_total: u32,
    /// In the order of the phases. They go on beside each other, so all together can be longer than the build.
    #[serde(default)]
    pub timings: Vec<Timing>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    pub cached: bool,
    pub millis: u64,
}

/// A part of a build's work, in the order in which most of it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// For layers that another build makes.
    Wait,
    /// Packages from their archives.
    Fetch,
    /// Files into the tree: of packages, of archives, of other images, of `files` steps.
    Unpack,
    /// Packages' own scripts.
    Configure,
    /// Scripts, playbooks, manifests and Containerfiles.
    Run,
    /// Layers' digests.
    Hash,
    /// Layers, read from the tree and written to the store.
    Write,
    /// What is written about the image: packages, datasheet.
    Describe,
    Sign,
    /// To the registry.
    Push,
    /// The image's own tests.
    Test,
}

impl Phase {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Fetch => "fetch",
            Self::Unpack => "unpack",
            Self::Configure => "configure",
            Self::Run => "run",
            Self::Hash => "hash",
            Self::Write => "write",
            Self::Describe => "describe",
            Self::Sign => "sign",
            Self::Push => "push",
            Self::Test => "test",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    pub phase: Phase,
    pub took: Millis,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestResult {
    pub name: String,
    pub passed: bool,
    pub detail: String,
    /// Until it passed, or was given up.
    #[serde(default)]
    pub took: Millis,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PackageChange {
    pub name: String,
    /// None where it is new.
    pub from: Option<String>,
    /// None where it goes.
    pub to: Option<String>,
}

/// How an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub problem: String,
    /// It may pass by itself: an archive or the node could not be reached.
    pub transient: bool,
    pub last_log: Vec<String>,
    pub tests: Vec<TestResult>,
}

impl State {
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Queued { .. } => "queued",
            Self::Running { .. } => "running",
            Self::Succeeded { .. } => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled { .. } => "cancelled",
        }
    }

    pub const fn has_ended(&self) -> bool {
        matches!(self, Self::Succeeded { .. } | Self::Failed | Self::Cancelled { .. })
    }

    /// Whether this build holds the slot of its key.
    pub const fn holds_slot(&self) -> bool {
        matches!(self, Self::Queued { .. } | Self::Running { .. } | Self::Succeeded { .. })
    }
}

impl Lease {
    /// Also where the clock was set back by more than a lease, since an end that is never reached would leave the build
    /// to nobody.
    fn has_expired(&self, now: Timestamp) -> bool {
        age(self.renewed, now) >= LEASE || age(now, self.renewed) >= LEASE
    }
}

/// Which of several builds that wait is claimed first, the lowest: those with security updates before the rest, and then as
/// they came, whoever they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Precedence {
    without_security: bool,
    created: Timestamp,
}

impl Build {
    pub fn server(&self) -> &ServerName {
        &self.id.server
    }

    pub fn precedence(&self) -> Precedence {
        Precedence { without_security: !self.security, created: self.created }
    }

    /// When a worker may claim it; none where it has ended.
    pub fn claimable_at(&self, now: Timestamp) -> Option<Timestamp> {
        match &self.state {
            State::Queued { not_before } => Some(due(*not_before, now)),
            State::Running { lease } if lease.has_expired(now) => Some(now),
            State::Running { lease } => Some(after(lease.renewed, LEASE)),
            State::Succeeded { .. } | State::Failed | State::Cancelled { .. } => None,
        }
    }

    /// Between two tries: nothing is lost where it gives way.
    pub fn is_tried_again(&self) -> bool {
        matches!(self.state, State::Queued { .. }) && self.attempts > 0
    }

    /// A worker takes it.
    ///
    /// # Errors
    /// [`Illegal::NotOwner`] where another's lease holds, [`Illegal::State`] where it is not time or it has ended.
    pub fn claim(&mut self, owner: &str, now: Timestamp) -> Result<u64, Illegal> {
        match &self.state {
            State::Queued { not_before } if due(*not_before, now) <= now => {}
            State::Running { lease } if lease.has_expired(now) => {}
            State::Running { lease } => {
                return Err(Illegal::NotOwner {
                    what: self.id.to_string(),
                    owner: lease.owner.clone(),
                    token: self.token,
                });
            }
            state => return Err(self.cannot(state.as_str(), "claimed")),
        }
        self.token += 1;
        self.attempts = self.attempts.saturating_add(1);
        self.started = Some(self.started.unwrap_or(now));
        self.progress = Progress::default();
        self.tests.clear();
        self.state = State::Running { lease: Lease { owner: owner.to_owned(), renewed: now } };
        Ok(self.token)
    }

    /// The owner is there, and got this far.
    ///
    /// # Errors
    /// Where it is no longer this owner's.
    pub fn heartbeat(
        &mut self,
        token: u64,
        progress: Option<Progress>,
        now: Timestamp,
    ) -> Result<(), Illegal> {
        self.check_owner(token, "continued")?;
        if let State::Running { lease } = &mut self.state {
            lease.renewed = now;
        }
        if let Some(progress) = progress {
            self.progress = progress;
        }
        Ok(())
    }

    /// # Errors
    /// Where it is no longer this owner's.
    pub fn succeed(
        &mut self,
        token: u64,
        image: Digest,
        progress: Progress,
        tests: Vec<TestResult>,
        now: Timestamp,
    ) -> Result<(), Illegal> {
        self.check_owner(token, "succeeded")?;
        self.state = State::Succeeded { image };
        self.progress = progress;
        self.tests = tests;
        self.problem.clear();
        self.last_log.clear();
        self.ended = Some(now);
        Ok(())
    }

    /// The attempt failed: queued again where that may pass and attempts are left, else ended.
    ///
    /// # Errors
    /// Where it is no longer this owner's.
    pub fn fail(&mut self, token: u64, failed: Failed, now: Timestamp) -> Result<(), Illegal> {
        self.check_owner(token, "failed")?;
        self.problem = failed.problem;
        self.last_log = failed.last_log;
        self.tests = failed.tests;
        self.transient = failed.transient;
        if failed.transient && self.attempts < MAX_ATTEMPTS {
            self.state = State::Queued { not_before: after(now, backoff(self.attempts)) };
        } else {
            self.state = State::Failed;
            self.ended = Some(now);
        }
        Ok(())
    }

    /// Ends at once whoever runs it: its owner finds out at its next heartbeat, and nothing that it writes counts.
    ///
    /// # Errors
    /// Where it has ended otherwise. Cancelling what is cancelled changes nothing.
    pub fn cancel(&mut self, actor: &str, now: Timestamp) -> Result<bool, Illegal> {
        match &self.state {
            State::Cancelled { .. } => Ok(false),
            State::Queued { .. } | State::Running { .. } => {
                self.state = State::Cancelled { actor: actor.to_owned() };
                self.problem = format!("cancelled by {actor}");
                self.ended = Some(now);
                Ok(true)
            }
            state => Err(self.cannot(state.as_str(), "cancelled")),
        }
    }

    /// A builder process finds a build of a process that is gone, as far as it knows who is there. True where that changed
    /// the build.
    pub fn abandoned(&mut self, is_there: impl FnOnce(&str) -> bool, now: Timestamp) -> bool {
        match &self.state {
            State::Running { lease } if !is_there(&lease.owner) => {
                self.interrupted(now, now);
                true
            }
            _ => false,
        }
    }

    /// Its worker is gone without an outcome, and its process goes on.
    ///
    /// # Errors
    /// Where it is no longer this owner's.
    pub fn broke_off(&mut self, token: u64, now: Timestamp) -> Result<(), Illegal> {
        self.check_owner(token, "given back")?;
        self.interrupted(after(now, backoff(self.interruptions + 1)), now);
        Ok(())
    }

    /// Its process ends in order: the next one goes on, and nothing is counted.
    ///
    /// # Errors
    /// Where it is no longer this owner's.
    pub fn release(&mut self, token: u64, now: Timestamp) -> Result<(), Illegal> {
        self.check_owner(token, "given back")?;
        self.attempts = self.attempts.saturating_sub(1);
        self.state = State::Queued { not_before: now };
        Ok(())
    }

    /// An attempt that ended so says little of the build, and is not counted among those that failed. One that always ends
    /// so would keep its process from ever working on another: it leaves room between a few such ends and the next.
    fn interrupted(&mut self, not_before: Timestamp, now: Timestamp) {
        self.attempts = self.attempts.saturating_sub(1);
        self.interruptions = self.interruptions.saturating_add(1);
        if self.interruptions < MAX_INTERRUPTIONS {
            self.state = State::Queued { not_before };
            return;
        }
        self.state = State::Failed;
        self.transient = true;
        self.problem = format!(
            "the builder ended in the middle of it {MAX_INTERRUPTIONS} times, so it may be what ends it: see the end of this \
             build's log and the builder's own log; it is tried again in {} minutes",
            LONGEST.as_secs() / 60
        );
        self.ended = Some(now);
    }

    /// How long what asked for it waits, where it failed of what may pass, before it is planned anew.
    pub(crate) fn pause(&self) -> Duration {
        if self.interruptions < MAX_INTERRUPTIONS { backoff(self.attempts) } else { LONGEST }
    }

    fn check_owner(&self, token: u64, wanted: &'static str) -> Result<(), Illegal> {
        match &self.state {
            State::Running { .. } if self.token == token => Ok(()),
            State::Running { lease } => Err(Illegal::NotOwner {
                what: self.id.to_string(),
                owner: lease.owner.clone(),
                token: self.token,
            }),
            state => Err(self.cannot(state.as_str(), wanted)),
        }
    }

    fn cannot(&self, state: &'static str, wanted: &'static str) -> Illegal {
        Illegal::State { what: self.id.to_string(), state, wanted }
    }
}

/// What differs between two sets of packages, by name.
pub fn package_changes(
    from: &kiln_model::revision::PackageVersions,
    to: &kiln_model::revision::PackageVersions,
) -> Vec<PackageChange> {
    let gone = from.iter().filter(|(name, _)| !to.contains_key(*name)).map(|(name, version)| PackageChange {
        name: name.clone(),
        from: Some(version.clone()),
        to: None,
    });
    let moved =
        to.iter().filter(|(name, version)| from.get(*name) != Some(*version)).map(|(name, version)| {
            PackageChange { name: name.clone(), from: from.get(name).cloned(), to: Some(version.clone()) }
        });
    let mut changes: Vec<_> = gone.chain(moved).collect();
    changes.sort();
    changes
}
