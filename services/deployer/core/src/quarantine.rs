//! The change set that a rollback proved bad.

use jiff::Timestamp;
use kiln_model::digest::Digest;
use kiln_model::revision::PackageVersions;
use serde::{Deserialize, Serialize};

use crate::release::{Content, Release};

/// Convictions kept per server. The oldest goes first; by then its definition is fifty failures in the past.
const KEPT: usize = 50;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// The release that failed, or was left.
    pub release: u64,
    pub definition: Option<Digest>,
    pub run: Option<Digest>,
    /// The versions that were new, where neither definition nor run was.
    pub packages: PackageVersions,
    /// The definition that those versions failed with. A changed one may well go with them.
    pub with_definition: Digest,
    /// Image and run of what failed, unless the last good release has the same.
    pub content: Option<Content>,
    pub reason: String,
    pub time: Timestamp,
}

impl Quarantine {
    /// Convicts what `bad` changed against `good`.
    pub(crate) fn convict(bad: &Release, good: &Release, reason: &str, time: Timestamp) -> Self {
        let (was, is) = (&good.revision, &bad.revision);
        let definition = (is.definition_digest != was.definition_digest).then_some(is.definition_digest);
        let run = (is.run_digest != was.run_digest).then_some(is.run_digest);
        let packages = if definition.is_some() || run.is_some() {
            PackageVersions::new()
        } else {
            let new = is.packages.iter().filter(|(name, version)| was.packages.get(*name) != Some(*version));
            new.map(|(name, version)| (name.clone(), version.clone())).collect()
        };
        Self {
            release: bad.number,
            definition,
            run,
            packages,
            with_definition: is.definition_digest,
            content: (bad.content() != good.content()).then(|| bad.content()),
            reason: reason.to_owned(),
            time,
        }
    }

    /// Whether a release is what was convicted: the very same image and run, the same definition, or the same new
    /// versions under the same definition. A definition decides over its `run`: another definition with the same
    /// `run` is another change set.
    pub(crate) fn matches(&self, release: &Release) -> bool {
        let revision = &release.revision;
        if self.content == Some(release.content()) {
            return true;
        }
        if let Some(definition) = self.definition {
            return definition == revision.definition_digest;
        }
        if let Some(run) = self.run {
            return run == revision.run_digest;
        }
        !self.packages.is_empty()
            && self.with_definition == revision.definition_digest
            && self.packages.iter().all(|(name, version)| revision.packages.get(name) == Some(version))
    }
}

pub(crate) fn keep(list: &mut Vec<Quarantine>, conviction: Quarantine) {
    list.push(conviction);
    if list.len() > KEPT {
        list.remove(0);
    }
}
