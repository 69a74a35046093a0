//! Where definitions come from, and which of them wait to be taken over.

use std::collections::BTreeSet;
use std::fmt;

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::digest::Digest;
use kiln_model::name::ServerName;
use serde::{Deserialize, Serialize};

use crate::time::{after, backoff, due};

/// Document kind.
pub const KIND: &str = "source";
pub const SCHEMA: u32 = 1;

/// `git-` or `folder-` and twelve hexadecimal digits of what it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SourceId(String);

impl SourceId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    Git {
        url: String,
        branch: String,
    },
    /// A folder that somebody sent; `origin` says where it lay.
    Folder {
        origin: String,
    },
}

impl Place {
    /// The same place is the same source, however often it is applied.
    pub fn id(&self) -> SourceId {
        // A line end can't be part of an URL or branch that was accepted, so the two can't run into each other.
        let (kind, text) = match self {
            Self::Git { url, branch } => ("git", format!("{url}\n{branch}")),
            Self::Folder { origin } => ("folder", origin.clone()),
        };
        SourceId(format!("{kind}-{}", Digest::of(text.as_bytes()).short()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub id: SourceId,
    pub place: Place,
    /// The last one that was taken over; empty for a folder.
    pub commit: String,
    /// Servers that were applied from here and were not removed.
    pub servers: BTreeSet<ServerName>,
    /// Signals that ask for a look at the branch's head.
    pub pending: Vec<Pending>,
    pub attempts: u32,
    /// Set after a failed look.
    pub not_before: Option<Timestamp>,
    /// Why the last look failed.
    pub problem: Option<String>,
}

/// One server's changed definition, waiting to be fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    pub server: ServerName,
    /// The digest that the signal was about. A person's approval holds for this one alone.
    pub fingerprint: String,
    pub cause: Cause,
}

impl Source {
    pub fn new(place: Place) -> Self {
        Self {
            id: place.id(),
            place,
            commit: String::new(),
            servers: BTreeSet::new(),
            pending: Vec::new(),
            attempts: 0,
            not_before: None,
            problem: None,
        }
    }

    /// A signal says that a definition changed. False where this is known already.
    pub fn ask(&mut self, pending: Pending) -> bool {
        if self.pending.iter().any(|p| p.cause.id == pending.cause.id && p.server == pending.server) {
            return false;
        }
        self.pending.push(pending);
        self.not_before = None;
        true
    }

    /// Whether it is time to look, and if not yet, when.
    pub fn due(&self, now: Timestamp) -> Option<Timestamp> {
        (!self.pending.is_empty()).then(|| self.not_before.map_or(now, |at| due(at, now)).max(now))
    }

    /// The branch's head was looked at on behalf of `handled`. What was asked meanwhile still waits.
    pub fn looked(&mut self, commit: &str, handled: &[Pending]) {
        commit.clone_into(&mut self.commit);
        self.pending.retain(|p| !handled.contains(p));
        self.attempts = 0;
        self.not_before = None;
        self.problem = None;
    }

    /// The branch's head could not be looked at.
    pub fn look_failed(&mut self, problem: String, now: Timestamp) {
        self.attempts = self.attempts.saturating_add(1);
        self.not_before = Some(after(now, backoff(self.attempts)));
        self.problem = Some(problem);
    }
}
