//! Which instances come, which go, and what stands on the edge. Nothing here asks why: the target is given.

use std::collections::{BTreeMap, BTreeSet};

use kiln_model::cause::{Cause, CauseKind};
use kiln_model::definition::Mode;
use kiln_model::name::InstanceId;
use kiln_model::run::Port;
use kiln_model::signal::HealthState;
use kiln_model::time::Millis;

use crate::fleet::{Backend, Fleet, Instance, InstanceState, Listener};
use crate::next::{Work, is_cleared};
use crate::observe;
use crate::release::{Release, Releases};
use crate::rollout::RolloutState;
use crate::strangers;
use crate::view::{Seen, View};

/// The bounds of invariant 1, over all releases that the fleet is between.
pub(crate) struct Bounds {
    /// Instances at most, draining ones included.
    pub(crate) most: u32,
    /// Healthy instances at least, as far as they did not fail by themselves.
    pub(crate) least: u32,
}

pub(crate) fn bounds(fleet: &Fleet, releases: &Releases) -> Option<Bounds> {
    let target = releases.get(&fleet.target())?;
    let between = fleet.rollout.iter().flat_map(|r| [Some(r.from), Some(r.to), r.back_to]).flatten();
    let replicas = between.filter_map(|number| releases.get(&number)).map(Release::replicas);
    let (mut high, mut low) = (target.replicas(), target.replicas());
    for replicas in replicas {
        high = high.max(replicas);
        low = low.min(replicas);
    }
    Some(Bounds {
        most: high.saturating_add(target.surge()),
        least: low.saturating_sub(target.unavailable()),
    })
}

/// Who holds which ordinal of the target: one instance each, the furthest one. An instance that is to be replaced
/// holds nothing.
fn keepers(work: &Work<'_>) -> BTreeMap<u32, InstanceId> {
    let mut keepers: BTreeMap<u32, InstanceId> = BTreeMap::new();
    let Some(target) = work.target().filter(|_| !work.fleet.removed) else { return keepers };
    let rolling = work.fleet.rollout.is_some();
    let back = rolling && !work.fleet.is_forward();
    for (id, instance) in &work.fleet.instances {
        // Outside of a rollout the monitor's signal says when another one takes the place of what is gone.
        let spent = instance.replace.is_some()
            || rolling && instance.health == HealthState::Gone
            || back && instance.health == HealthState::Unhealthy;
        if !instance.is_live()
            || instance.content != target.content()
            || id.ordinal >= target.replicas()
            || spent
        {
            continue;
        }
        let furthest =
            keepers.get(&id.ordinal).is_none_or(|other| rank(instance) > rank(&work.fleet.instances[other]));
        if furthest {
            keepers.insert(id.ordinal, id.clone());
        }
    }
    keepers
}

fn rank(instance: &Instance) -> (bool, bool, bool) {
    (instance.is_up(), instance.passed, instance.state == InstanceState::Running)
}

/// Through its gate: an old one may leave for it.
fn is_available(work: &Work<'_>, target: &Release, instance: &Instance) -> bool {
    instance.is_up() && instance.served && (!work.fleet.is_forward() || instance.soaked >= target.soak())
}

/// Instances of the target that are through their gate.
pub(crate) fn done(work: &Work<'_>) -> u32 {
    let Some(target) = work.target() else { return 0 };
    let through =
        keepers(work).into_values().filter(|id| is_available(work, target, &work.fleet.instances[id]));
    u32::try_from(through.count()).unwrap_or(u32::MAX)
}

/// Live instances that hold no ordinal of the target.
pub(crate) fn leavers(work: &Work<'_>) -> Vec<InstanceId> {
    let kept: BTreeSet<InstanceId> = keepers(work).into_values().collect();
    let live = work.fleet.instances.iter().filter(|(id, i)| i.is_live() && !kept.contains(*id));
    live.map(|(id, _)| id.clone()).collect()
}

/// Everything that takes room and holds no ordinal.
pub(crate) fn others(work: &Work<'_>) -> usize {
    let draining = work.fleet.instances.values().filter(|i| i.state == InstanceState::Draining);
    draining.count() + leavers(work).len()
}

pub(crate) fn drain(instance: &mut Instance) {
    instance.state = InstanceState::Draining;
    instance.in_state = Millis(0);
}

/// Nobody comes or goes: the rollout holds, or the fleet waits for a person.
pub(crate) fn is_frozen(work: &Work<'_>) -> bool {
    let fleet = &work.fleet;
    fleet.is_halted() || fleet.rollout.as_ref().is_some_and(|r| r.state == RolloutState::Held)
}

/// Launches and drains, within the bounds.
pub(crate) fn people(work: &mut Work<'_>) {
    if work.fleet.removed {
        for instance in work.fleet.instances.values_mut().filter(|i| i.is_live()) {
            drain(instance);
        }
        return;
    }
    let Some(target) = work.target() else { return };
    let Some(bounds) = bounds(&work.fleet, work.releases) else { return };
    let unverified = work.fleet.rollout.as_ref().is_some_and(|r| r.is_forward() && !r.verified);
    if is_frozen(work) || unverified {
        return;
    }
    drop_unproven(work);
    let waiting = launch(work, target, &bounds);
    drain_unhealthy(work, target, &bounds, waiting);
    drain_healthy(work, target, &bounds);
}

/// What never served and is not wanted any more serves nobody by staying.
fn drop_unproven(work: &mut Work<'_>) {
    for id in leavers(work) {
        if let Some(instance) = work.fleet.instances.get_mut(&id).filter(|i| !i.served) {
            drain(instance);
        }
    }
}

/// Launches what is missing as far as there is room; gives how many are still missing for want of it.
fn launch(work: &mut Work<'_>, target: &Release, bounds: &Bounds) -> usize {
    let held = keepers(work);
    let mut missing: Vec<u32> =
        (0..target.replicas()).filter(|ordinal| !held.contains_key(ordinal)).collect();
    // First where nobody serves.
    missing.sort_by_key(|ordinal| (serves(&work.fleet, *ordinal), *ordinal));
    let mut room = bounds.most.saturating_sub(taken(work));
    let mut waiting = 0;
    let steady = work.fleet.rollout.is_none();
    for ordinal in missing {
        if steady && !may_replace(work, target, ordinal) {
            continue;
        }
        if room == 0 {
            waiting += 1;
            continue;
        }
        room -= 1;
        let cause = cause_of(work, target, ordinal);
        let fleet = &mut work.fleet;
        if steady {
            fleet.backoff.launches += 1;
            fleet.backoff.waited = Millis(0);
            fleet.backoff.calm = Millis(0);
        }
        let id = InstanceId {
            server: fleet.server.clone(),
            release: target.number,
            ordinal,
            attempt: fleet.next_attempt,
        };
        fleet.next_attempt += 1;
        let instance = Instance {
            node: target.revision.run.node(),
            content: target.content(),
            state: InstanceState::Launching,
            health: HealthState::Starting,
            passed: false,
            served: false,
            address: String::new(),
            created: work.now,
            launched: None,
            ended: None,
            exit_code: None,
            detail: String::new(),
            cut_off: false,
            last_checks: Vec::new(),
            cause,
            replace: None,
            soaked: Millis(0),
            unseen: Millis(0),
            in_state: Millis(0),
        };
        fleet.instances.insert(id, instance);
    }
    waiting
}

fn taken(work: &Work<'_>) -> u32 {
    let own = work.fleet.instances.values().filter(|i| i.takes_room()).count();
    u32::try_from(own).unwrap_or(u32::MAX).saturating_add(work.strangers.count)
}

fn serves(fleet: &Fleet, ordinal: u32) -> bool {
    fleet.instances.iter().any(|(id, i)| id.ordinal == ordinal && i.is_up())
}

/// Outside of a rollout: whether a new instance may take this ordinal now.
fn may_replace(work: &Work<'_>, target: &Release, ordinal: u32) -> bool {
    work.fleet.backoff.due_in(target.replicas()) == Millis(0)
        && !work
            .fleet
            .instances
            .iter()
            .any(|(id, i)| id.ordinal == ordinal && waits_for_leave(work, target, i))
}

/// It served, it ended by itself, and nobody said yet that another one is to take its place: the monitor does, when
/// the policy lets it. Where the policy needs no person and the monitor stays silent, the grace is enough.
fn waits_for_leave(work: &Work<'_>, target: &Release, instance: &Instance) -> bool {
    let unasked =
        target.revision.update.unhealthy == Mode::Auto && instance.in_state >= observe::grace(target);
    let steady = work.fleet.rollout.is_none();
    steady
        && instance.state == InstanceState::Exited
        && instance.passed
        && instance.replace.is_none()
        && !unasked
}

fn cause_of(work: &Work<'_>, target: &Release, ordinal: u32) -> Cause {
    if let Some(rollout) = &work.fleet.rollout {
        return rollout.cause.clone();
    }
    let before = work.fleet.instances.iter().rfind(|(id, _)| id.ordinal == ordinal);
    match before {
        Some((_, Instance { replace: Some(cause), .. })) => cause.clone(),
        Some((id, instance)) => Cause {
            kind: CauseKind::Gone,
            id: id.to_string(),
            summary: format!("{id} ended: {}", instance.detail),
            actor: "deployer".to_owned(),
            time: work.now,
            traceparent: instance.cause.traceparent.clone(),
        },
        None => target.revision.cause.clone(),
    }
}

/// What is unhealthy leaves when another one serves in its place, or when there is no room for that one otherwise.
fn drain_unhealthy(work: &mut Work<'_>, target: &Release, bounds: &Bounds, waiting: usize) {
    let draining = work.fleet.instances.values().filter(|i| i.state == InstanceState::Draining).count();
    let mut room_needed = if taken(work) >= bounds.most { waiting.saturating_sub(draining) } else { 0 };
    let complete = keepers(work).len() == target.replicas() as usize;
    for id in leavers(work) {
        if work.fleet.instances.get(&id).is_none_or(Instance::is_up) {
            continue;
        }
        let replaced = is_replaced(work, target, id.ordinal);
        let surplus = id.ordinal >= target.replicas() && complete;
        if !replaced && !surplus {
            if room_needed == 0 {
                continue;
            }
            room_needed -= 1;
        }
        if let Some(instance) = work.fleet.instances.get_mut(&id) {
            drain(instance);
        }
    }
}

fn is_replaced(work: &Work<'_>, target: &Release, ordinal: u32) -> bool {
    keepers(work).get(&ordinal).is_some_and(|id| is_available(work, target, &work.fleet.instances[id]))
}

/// What serves well leaves as long as enough others serve.
fn drain_healthy(work: &mut Work<'_>, target: &Release, bounds: &Bounds) {
    let mut order: Vec<(bool, bool, InstanceId)> = leavers(work)
        .into_iter()
        .filter(|id| work.fleet.instances.get(id).is_some_and(Instance::is_up))
        .map(|id| {
            let surplus = id.ordinal >= target.replicas();
            (!is_replaced(work, target, id.ordinal), !surplus, id)
        })
        .collect();
    order.sort();
    let mut healthy = u32::try_from(order.len()).unwrap_or(u32::MAX).saturating_add(done(work));
    let steady = work.fleet.rollout.is_none();
    for (unreplaced, within, id) in order {
        // Outside of a rollout the backoff may keep the new one from coming: the old one waits for it.
        if healthy <= bounds.least || steady && unreplaced && within {
            continue;
        }
        if let Some(instance) = work.fleet.instances.get_mut(&id) {
            drain(instance);
            healthy -= 1;
        }
    }
}

/// Who answers on which port. An unhealthy instance only where there is no other.
pub(crate) fn edge(work: &Work<'_>) -> Vec<Listener> {
    let serving: Vec<(&InstanceId, &Instance)> =
        work.fleet.instances.iter().filter(|(_, i)| i.state == InstanceState::Running && i.passed).collect();
    let well = |i: &Instance| !matches!(i.health, HealthState::Unhealthy | HealthState::Gone);
    let any_well = serving.iter().any(|(_, i)| well(i));
    let mut listeners: BTreeMap<u16, Vec<Backend>> = BTreeMap::new();
    for (id, instance) in serving {
        if any_well && !well(instance) {
            continue;
        }
        let Some(release) = work.release(id.release) else { continue };
        for Port { listen, target } in &release.revision.run.ports {
            let backend = Backend { instance: id.clone(), target: *target };
            listeners.entry(*listen).or_default().push(backend);
        }
    }
    strangers::serve(work, &mut listeners);
    listeners.into_iter().map(|(listen, backends)| Listener { listen, backends }).collect()
}

/// Drops what has ended, is cleared away, and decides nothing any more. Its own record stays.
pub(crate) fn forget(
    work: &mut Work<'_>,
    engine: &BTreeMap<InstanceId, Seen>,
    view: &View,
    acknowledged: bool,
) {
    let target = work.target();
    let steady = work.fleet.rollout.is_none() && !work.fleet.removed;
    let held = keepers(work);
    let ended: Vec<InstanceId> = work
        .fleet
        .instances
        .iter()
        .filter(|(id, i)| {
            // Outside of a rollout it stands for the ordinal that nobody holds, with the reason why.
            let waits = steady
                && !held.contains_key(&id.ordinal)
                && target.is_some_and(|t| i.content == t.content() && id.ordinal < t.replicas());
            i.state == InstanceState::Retired || i.is_broken() && is_cleared(id, engine, view) && !waits
        })
        .map(|(id, _)| id.clone())
        .collect();
    for id in ended {
        let forgotten = work.fleet.instances.remove(&id);
        work.fleet.left.extend(forgotten.filter(|_| !acknowledged).map(|instance| instance.node));
    }
}
