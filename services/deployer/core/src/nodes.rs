//! Which nodes have something of a fleet, and what each of them is to have on its edge.

use std::collections::{BTreeMap, BTreeSet};

use kiln_model::name::{InstanceId, NodeName};

use crate::fleet::{Fleet, Listener};
use crate::view::{Seen, SeenState, View};

/// With those that have what the fleet has forgotten, and that users may come to.
pub(crate) fn all<'a>(fleet: &'a Fleet, engine: &'a BTreeMap<InstanceId, Seen>) -> BTreeSet<&'a NodeName> {
    let serves = |seen: &Seen| matches!(seen.state, SeenState::Launching | SeenState::Running);
    let strangers = engine.iter().filter(|(id, seen)| !fleet.instances.contains_key(*id) && serves(seen));
    fleet.nodes().into_iter().chain(strangers.map(|(_, seen)| &seen.node)).collect()
}

/// The part of the edge that is one node's.
pub(crate) fn edge_of(fleet: &Fleet, engine: &BTreeMap<InstanceId, Seen>, node: &NodeName) -> Vec<Listener> {
    let is_there = |id: &InstanceId| {
        let known = fleet.instances.get(id).map(|instance| &instance.node);
        known.or_else(|| engine.get(id).map(|seen| &seen.node)) == Some(node)
    };
    let own = fleet.edge.iter().map(|Listener { listen, backends }| Listener {
        listen: *listen,
        backends: backends.iter().filter(|backend| is_there(&backend.instance)).cloned().collect(),
    });
    own.filter(|listener| !listener.backends.is_empty()).collect()
}

/// Those that do not have the edge as it is to be.
pub(crate) fn behind<'a>(fleet: &'a Fleet, view: &'a View) -> Vec<&'a NodeName> {
    let Some(engine) = view.engine.as_ref().filter(|_| fleet.generation > 0) else { return Vec::new() };
    let is_behind = |node: &&NodeName| view.routed.get(*node) != Some(&fleet.generation);
    all(fleet, engine).into_iter().filter(is_behind).collect()
}
