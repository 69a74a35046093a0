//! A release: the deployer's numbered form of a revision.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kiln_model::digest::Digest;
use kiln_model::revision::ImageRevision;
use kiln_model::run::{HealthPolicy, RolloutPolicy, Strategy};
use kiln_model::time::Millis;
use serde::{Deserialize, Serialize};

/// The releases that a decision may have to look at, by number.
pub type Releases = BTreeMap<u64, Release>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Never reset, never used twice.
    pub number: u64,
    /// Of the revision; where that was made again, of the newest one. There is one release for each.
    pub generation: u64,
    pub revision: ImageRevision,
    /// When the revision was made.
    pub revised: Timestamp,
    /// A rollout to it succeeded.
    pub good: bool,
    /// Proven bad, or the same as what was: no rollout goes to it any more.
    pub quarantined: bool,
    pub created: Timestamp,
}

/// What makes two instances alike, whatever the number of the release that they were launched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Content {
    pub image: Digest,
    pub run: Digest,
}

impl Release {
    pub fn content(&self) -> Content {
        Content { image: self.revision.image_digest, run: self.revision.run_digest }
    }

    /// Whether a revision says of this server what this release says already.
    pub fn is_of(&self, revision: &ImageRevision) -> bool {
        let said = |of: &ImageRevision| (of.definition_digest, of.image_digest, of.run_digest);
        said(&self.revision) == said(revision)
    }

    pub fn replicas(&self) -> u32 {
        self.revision.run.replicas
    }

    pub fn health(&self) -> Option<&HealthPolicy> {
        self.revision.run.health.as_ref()
    }

    pub fn policy(&self) -> RolloutPolicy {
        self.revision.run.rollout
    }

    pub fn surge(&self) -> u32 {
        let Strategy::Rolling { max_surge, .. } = self.policy().strategy;
        max_surge
    }

    pub fn unavailable(&self) -> u32 {
        let Strategy::Rolling { max_unavailable, .. } = self.policy().strategy;
        max_unavailable
    }

    /// Healthy time that an instance must show before an old one leaves for it.
    ///
    /// Where nothing is asked of an instance, "it runs" is all that can be seen of it, and it runs for a moment even
    /// where its command ends at once: a second is the least that tells one from the other.
    pub fn soak(&self) -> Millis {
        let soak = self.policy().soak;
        if self.health().is_some() { soak } else { soak.max(Millis::from_secs(1)) }
    }
}
