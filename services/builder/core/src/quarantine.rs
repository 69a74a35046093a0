//! What rollbacks proved bad, and what follows for later plans.

use std::collections::BTreeSet;

use jiff::Timestamp;
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::digest::Digest;
use kiln_model::revision::PackageVersions;
use serde::{Deserialize, Serialize};

use crate::server::{InForce, Server};
use crate::time::after;

/// Older convictions are dropped: what they are about lies that many rollbacks back.
const MAX_CONVICTIONS: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Quarantine {
    /// Oldest first.
    convictions: Vec<Conviction>,
}

/// One rollback's verdict, as the deployer tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The release that was left.
    pub release: u64,
    pub definition: Option<Digest>,
    /// Convicted where neither the definition nor `run` had changed.
    pub packages: PackageVersions,
    pub reason: String,
    pub traceparent: String,
    pub time: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Conviction {
    release: u64,
    /// The definitions that can't be built again. Several where a definition changed without changing its outcome.
    definitions: BTreeSet<Digest>,
    packages: PackageVersions,
    /// The very image and `run` that failed, where they are known: an edit of a comment gives another definition, and the
    /// same outcome.
    outcome: Option<(Digest, Digest)>,
    reason: String,
    time: Timestamp,
}

impl Quarantine {
    pub fn convicts_definition(&self, digest: &Digest) -> bool {
        self.convictions.iter().any(|conviction| conviction.definitions.contains(digest))
    }

    pub fn reason(&self, definition: &Digest) -> Option<&str> {
        let conviction =
            self.convictions.iter().rev().find(|conviction| conviction.definitions.contains(definition))?;
        Some(&conviction.reason)
    }

    pub fn knows(&self, release: u64) -> bool {
        self.convictions.iter().any(|conviction| conviction.release == release)
    }

    pub fn is_empty(&self) -> bool {
        self.convictions.is_empty()
    }

    /// Why this outcome must not be shipped.
    ///
    /// A set of versions is convicted as a whole, since nobody knows which of them was at fault: once one of them has
    /// moved on, the set is another one and deserves a try.
    pub fn objection(&self, lock_key: &Digest, run: &Digest, packages: &PackageVersions) -> Option<String> {
        self.convictions.iter().rev().find_map(|conviction| {
            let Conviction { release, outcome, packages: convicted, reason, .. } = conviction;
            if outcome.as_ref() == Some(&(*lock_key, *run)) {
                return Some(format!("this is what release {release} was rolled back from: {reason}"));
            }
            let contained = convicted.iter().all(|(name, version)| packages.get(name) == Some(version));
            (!convicted.is_empty() && contained).then(|| {
                let named: Vec<_> =
                    convicted.iter().take(5).map(|(name, version)| format!("{name} {version}")).collect();
                format!("release {release} was rolled back because of {}: {reason}", named.join(", "))
            })
        })
    }
}

/// A rollback convicted something.
///
/// `convicted` is the revision that was left and `good` the one that the fleet runs now, where they are known. The
/// fleet is planned from there on. Gives false where this verdict is known already.
pub fn convict(
    server: &mut Server,
    verdict: &Verdict,
    convicted: Option<&InForce>,
    good: Option<InForce>,
    now: Timestamp,
) -> bool {
    if server.quarantine.knows(verdict.release) {
        return false;
    }
    let mut definitions: BTreeSet<_> = verdict.definition.into_iter().collect();
    let outcome_of = |in_force: &InForce| (in_force.lock_key, in_force.definition.run_digest);
    let outcome = convicted.map(outcome_of);
    let in_force_is_bad = server.in_force.as_ref().is_some_and(|in_force| {
        // Made again before the verdict was heard, as where the server was removed and applied anew, it is as bad.
        outcome == Some(outcome_of(in_force)) || definitions.contains(&in_force.definition.digest)
    });
    if in_force_is_bad && !definitions.is_empty() {
        // Since that revision the definition may have changed without changing the outcome.
        definitions.extend(server.in_force.as_ref().map(|in_force| in_force.definition.digest));
    }
    server.quarantine.convictions.push(Conviction {
        release: verdict.release,
        definitions,
        packages: verdict.packages.clone(),
        outcome,
        reason: verdict.reason.clone(),
        time: verdict.time,
    });
    let excess = server.quarantine.convictions.len().saturating_sub(MAX_CONVICTIONS);
    server.quarantine.convictions.drain(..excess);

    // A revision that was made meanwhile, of something else, stays in force.
    if in_force_is_bad {
        server.in_force = good.filter(|good| !server.quarantine.convicts_definition(&good.definition.digest));
    }
    // What was rolled back may have held package updates as well. The good definition gets them by itself.
    if server.effective().is_some() && !server.removed {
        let cause = Cause {
            kind: CauseKind::Rollback,
            id: format!("{}-r{}", server.name, verdict.release),
            summary: format!("release {} was rolled back: {}", verdict.release, verdict.reason),
            actor: "deployer".to_owned(),
            time: verdict.time,
            traceparent: verdict.traceparent.clone(),
        };
        let due = after(now, server.head.update.debounce.as_duration());
        server.want(cause, due);
    }
    true
}
