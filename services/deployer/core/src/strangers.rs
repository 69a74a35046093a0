//! What the node runs in a fleet's name and the fleet does not know: its store was restored, and has forgotten them. They
//! serve until enough of its own do.

use std::collections::{BTreeMap, BTreeSet};

use kiln_model::name::InstanceId;

use crate::fleet::{Backend, Fleet, Listener};
use crate::next::Work;
use crate::plan;
use crate::release::Release;
use crate::view::{Seen, SeenState, View};

#[derive(Debug, Default)]
pub(crate) struct Strangers {
    /// How many take room.
    pub(crate) count: u32,
    /// Those that were not told to leave.
    there: BTreeSet<InstanceId>,
    /// Those that run, each with its ports of the edge and its own.
    running: BTreeMap<InstanceId, Vec<(u16, u16)>>,
}

impl Strangers {
    pub(crate) fn find(fleet: &Fleet, engine: &BTreeMap<InstanceId, Seen>, view: &View) -> Self {
        let unknown = |id: &InstanceId| !fleet.instances.contains_key(id) && !view.retired.contains(id);
        let mut strangers = Self::default();
        for (id, seen) in engine.iter().filter(|(id, _)| unknown(id)) {
            if matches!(seen.state, SeenState::Launching | SeenState::Running | SeenState::Retiring) {
                strangers.count += 1;
            }
            if !matches!(seen.state, SeenState::Retiring | SeenState::Retired) {
                strangers.there.insert(id.clone());
            }
            if seen.state == SeenState::Running {
                strangers.running.insert(id.clone(), ports_of(&view.edge, id));
            }
        }
        strangers
    }
}

fn ports_of(edge: &[Listener], id: &InstanceId) -> Vec<(u16, u16)> {
    let all = edge.iter().flat_map(|listener| listener.backends.iter().map(move |b| (listener.listen, b)));
    all.filter(|(_, backend)| backend.instance == *id).map(|(listen, b)| (listen, b.target)).collect()
}

/// Those that go on serving: as many as the fleet's own fall short of what must serve. The newest first, which are of the
/// release that users saw last.
fn needed<'w>(work: &'w Work<'_>) -> BTreeSet<&'w InstanceId> {
    let bounds = plan::bounds(&work.fleet, work.releases).filter(|_| !work.fleet.removed);
    let own = work.fleet.instances.values().filter(|i| i.is_up() && i.served).count();
    let short = bounds.map_or(0, |bounds| bounds.least as usize).saturating_sub(own);
    let portless = |release: &Release| release.revision.run.ports.is_empty();
    let portless = work.target().is_some_and(portless);
    let serving = work.strangers.running.iter().rev().filter(|(_, ports)| portless || !ports.is_empty());
    serving.map(|(id, _)| id).take(short).collect()
}

/// Adds those that go on serving to what stands on the edge.
pub(crate) fn serve(work: &Work<'_>, listeners: &mut BTreeMap<u16, Vec<Backend>>) {
    for id in needed(work) {
        for (listen, target) in work.strangers.running.get(id).into_iter().flatten() {
            let backend = Backend { instance: id.clone(), target: *target };
            listeners.entry(*listen).or_default().push(backend);
        }
    }
}

/// Those that are to leave.
pub(crate) fn leavers<'w>(work: &'w Work<'_>) -> impl Iterator<Item = &'w InstanceId> + use<'w> {
    let needed = needed(work);
    work.strangers.there.iter().filter(move |id| !needed.contains(id))
}
