//! What lies in the store beside the fleets: one document for each release, rollout and instance, for those who list
//! them, and for whom they are the aggregates of events.

use kiln_deployer_core::{Fleet, Instance, Release, Releases, Rollout};
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::run::HealthPolicy;
use kiln_model::time::Millis;
use serde::{Deserialize, Serialize};

pub(crate) const SCHEMA: u32 = 1;
pub(crate) const FLEET: &str = "fleet";
pub(crate) const RELEASE: &str = "release";
pub(crate) const ROLLOUT: &str = "rollout";
pub(crate) const INSTANCE: &str = "instance";
/// How far listings of others were read.
pub(crate) const CURSOR: &str = "cursor";

/// A rollout for those who list them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RolloutRecord {
    pub(crate) server: ServerName,
    pub(crate) rollout: Rollout,
}

/// An instance for those who list them. It outlives its place in the fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InstanceRecord {
    pub(crate) instance: Instance,
    pub(crate) on_edge: bool,
    pub(crate) policy: Option<HealthPolicy>,
    /// The fleet has done with it.
    pub(crate) past: bool,
}

impl InstanceRecord {
    /// Without the sums: a tick is not a change.
    pub(crate) fn of(fleet: &Fleet, releases: &Releases, id: &InstanceId, instance: &Instance) -> Self {
        Self {
            instance: Instance {
                soaked: Millis(0),
                unseen: Millis(0),
                in_state: Millis(0),
                ..instance.clone()
            },
            // Wanted there, and the node has put it there.
            on_edge: fleet.on_edge(id) && instance.served,
            policy: releases.get(&id.release).and_then(Release::health).cloned(),
            past: !fleet.instances.contains_key(id),
        }
    }
}

/// Sorted by number under their server, and no server's ids are a prefix of another's.
pub(crate) fn release_id(server: &ServerName, number: u64) -> String {
    format!("{server}/{number:020}")
}

/// The server that a release's document belongs to.
pub(crate) fn server_of_release(id: &str) -> Option<ServerName> {
    id.split_once('/')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use kiln_test_earlier::{documents, read};

    use super::*;

    #[test]
    fn what_an_earlier_version_wrote_is_read() {
        for document in &documents(kiln_test_earlier::DEPLOYER) {
            match document.kind.as_str() {
                FLEET => read::<Fleet>(document, SCHEMA),
                RELEASE => read::<Release>(document, SCHEMA),
                ROLLOUT => read::<RolloutRecord>(document, SCHEMA),
                INSTANCE => read::<InstanceRecord>(document, SCHEMA),
                CURSOR => read::<kiln_store::Cursor>(document, SCHEMA),
                other => panic!("nobody reads {other}"),
            }
        }
    }
}
