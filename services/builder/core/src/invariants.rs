//! What must hold of the builder's state after every step, checked apart from the code that takes the steps.

use std::collections::BTreeMap;

use kiln_model::cause::{Cause, CauseKind};

use crate::build::{Build, State};
use crate::server::Server;

/// What is violated, in words; empty where all holds.
pub fn violations(servers: &[Server], builds: &[Build]) -> Vec<String> {
    let mut found = Vec::new();
    let mut slots = BTreeMap::new();
    for build in builds.iter().filter(|build| build.state.holds_slot() && !build.verify) {
        if let Some(other) = slots.insert(build.lock_key, &build.id) {
            found.push(format!("{other} and {} are both running or succeeded for one lock key", build.id));
        }
    }
    for build in builds {
        if matches!(&build.state, State::Running { lease } if lease.owner.is_empty()) {
            found.push(format!("{} is running without an owner", build.id));
        }
        if build.state.has_ended() != build.ended.is_some() {
            found.push(format!("{} is {} but its end is {:?}", build.id, build.state.as_str(), build.ended));
        }
    }
    for server in servers {
        let name = &server.name;
        if server.in_force.as_ref().is_some_and(|in_force| in_force.generation > server.generation) {
            found.push(format!("{name} has in force what was never made"));
        }
        if server
            .effective()
            .is_some_and(|effective| server.quarantine.convicts_definition(&effective.digest))
        {
            found.push(format!("{name} goes on with a convicted definition"));
        }
        if server.removed
            && (server.wanted.is_some() || server.building.is_some() || server.in_force.is_some())
        {
            found.push(format!("{name} was removed and still does something"));
        }
        if server.wanted.as_ref().is_some_and(|wanted| wanted.causes.is_empty()) {
            found.push(format!("{name} is planned for no cause"));
        }
        // A definition that a commit brings back is wanted again under the name that it had before.
        let is_of_one_time = |cause: &&Cause| cause.kind != CauseKind::DefinitionChanged;
        if let (Some(wanted), Some(building)) = (&server.wanted, &server.building)
            && wanted
                .causes
                .iter()
                .filter(is_of_one_time)
                .any(|cause| building.causes.iter().any(|other| other.id == cause.id))
        {
            found.push(format!("{name} would follow one cause twice"));
        }
    }
    found
}
