//! What was seen of the outside becomes state: time, what runs, what is healthy.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use kiln_model::check::CheckResult;
use kiln_model::name::InstanceId;
use kiln_model::run::HealthPolicy;
use kiln_model::signal::HealthState;
use kiln_model::time::Millis;

use crate::effect::{Event, InstanceVerb};
use crate::fleet::{Backoff, Instance, InstanceState};
use crate::next::Work;
use crate::plan;
use crate::release::Release;
use crate::rollout::RolloutState;
use crate::view::{Seen, SeenState, Told, View};

/// The most that one look at the clock may count: a process that was stopped, or a machine that slept, has not
/// observed anything meanwhile.
pub const MAX_TICK: Duration = Duration::from_secs(5);

/// Sums are written at least this often while they grow, so a crash forgets at most that much.
pub const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Between two looks for an answer that is due.
const ANSWER: Duration = Duration::from_millis(100);

/// On top of three intervals and a probe's own time: one delivery of an event.
const SLACK: Duration = Duration::from_secs(1);

/// The monitor may learn of an end before we do, and the node's word on it has the exit code.
const NODE_FIRST: Duration = Duration::from_secs(1);

/// An instance that ended is replaced without being asked for after so many intervals.
const GRACE_INTERVALS: u64 = 3;
const GRACE_WITHOUT_POLICY: Millis = Millis::from_secs(3);

/// How old the monitor's facts on an instance may be.
pub fn freshness(policy: &HealthPolicy) -> Duration {
    policy.interval.as_duration() * 3 + policy.timeout.as_duration() + SLACK
}

pub(crate) fn grace(release: &Release) -> Millis {
    release.health().map_or(GRACE_WITHOUT_POLICY, |policy| Millis(policy.interval.0 * GRACE_INTERVALS))
}

/// Adds time to the sums. It passed under the state as it was, so it is attributed before anything new is looked at.
pub(crate) fn tick(work: &mut Work<'_>, view: &View, elapsed: Millis) {
    let target = work.target();
    let running = work.fleet.rollout.as_ref().map(|r| r.state) == Some(RolloutState::Running);
    let steady = work.fleet.rollout.is_none();
    let releases = work.releases;
    if let Some(rollout) = &mut work.fleet.rollout
        && rollout.state != RolloutState::Held
    {
        rollout.elapsed.0 += elapsed.0;
    }
    for (id, instance) in &mut work.fleet.instances {
        if let Some(target) = target
            && running
            && instance.is_up()
            && instance.content == target.content()
        {
            let unseen = instance.unseen.0 + elapsed.0;
            // That it runs is what counts without a policy, and the node tells of its end at once.
            let asked = releases.get(&id.release).is_some_and(|release| release.health().is_some());
            // It takes several answers that fail to call an instance unhealthy; the first of them already says nothing good of
            // the time before it. Nor does it that one is gone: its newest answer was an earlier one.
            let well = |told: &&Told| {
                told.state != HealthState::Gone && told.last_checks.last().is_none_or(|newest| newest.passed)
            };
            let told = || view.health.get(id).filter(well).map_or(u64::MAX, |told| Millis::from(told.age).0);
            let age = if asked { told() } else { 0 };
            let seen = unseen.saturating_sub(age);
            instance.soaked = Millis(instance.soaked.0 + seen).min(target.soak());
            instance.unseen = Millis(unseen - seen);
        } else {
            instance.unseen = Millis(0);
        }
        let due = releases.get(&id.release).and_then(|release| in_state_until(instance, release, steady));
        if let Some(due) = due {
            instance.in_state = Millis(instance.in_state.0 + elapsed.0).min(due);
        }
    }
    if steady && work.fleet.backoff.launches > 0 {
        let calm = work.fleet.instances.values().all(Instance::is_up);
        let backoff = &mut work.fleet.backoff;
        let longest = backoff.delay(target.map_or(0, Release::replicas));
        backoff.waited = Millis(backoff.waited.0 + elapsed.0).min(longest);
        backoff.calm = if calm { Millis(backoff.calm.0 + elapsed.0) } else { Millis(0) };
        if backoff.calm >= Backoff::CALM {
            *backoff = Backoff::default();
        }
    }
}

/// When its soak may be over: where only an answer is missing, it is looked for often.
fn soaked_in(instance: &Instance, target: &Release) -> Duration {
    let left = target.soak().0.saturating_sub(instance.soaked.0 + instance.unseen.0);
    Duration::from_millis(left).max(ANSWER)
}

/// Up to when the time in its present state matters: the end of its start period while it has not passed; the grace
/// before it is replaced unasked once it ended.
fn in_state_until(instance: &Instance, release: &Release, steady: bool) -> Option<Millis> {
    match instance.state {
        InstanceState::Running if !instance.passed => release.health().map(|policy| {
            // What the monitor says of a new instance is missed from here on, too.
            policy.start.max(freshness(policy).into())
        }),
        InstanceState::Exited if steady => Some(grace(release)),
        _ => None,
    }
}

/// Takes over what the node says.
pub(crate) fn engine(work: &mut Work<'_>, engine: &BTreeMap<InstanceId, Seen>, view: &View) {
    let now = work.now;
    for (id, instance) in &mut work.fleet.instances {
        let seen = engine.get(id);
        let Some(verb) = advance(id, instance, seen, view, now) else { continue };
        // One that was unhealthy first has the answers of that moment, which say more than those of its end.
        if verb == InstanceVerb::Exited && instance.last_checks.is_empty() {
            instance.last_checks = last_checks(view, id);
        }
        if !instance.takes_room() && instance.ended.is_none() {
            instance.ended = seen.and_then(|seen| seen.ended).or(Some(now));
        }
        if let Some(rollout) = &mut work.fleet.rollout
            && verb == InstanceVerb::Failed
            && id.attempt >= rollout.first_attempt
            && !seen.is_some_and(|seen| seen.cut_off)
        {
            rollout.failed_launches += 1;
        }
        work.events.push(Event::Instance(verb, id.clone(), Box::new(instance.clone())));
    }
}

/// Brings one instance to what was seen of it; gives what happened to it.
fn advance(
    id: &InstanceId,
    instance: &mut Instance,
    seen: Option<&Seen>,
    view: &View,
    now: Timestamp,
) -> Option<InstanceVerb> {
    match (instance.state, seen.map(|seen| seen.state)) {
        (InstanceState::Launching, Some(SeenState::Running)) => {
            take(instance, seen, InstanceState::Running);
            instance.launched = instance.launched.or(Some(now));
            Some(InstanceVerb::Launched)
        }
        (InstanceState::Launching, Some(SeenState::Failed)) => {
            take(instance, seen, InstanceState::Failed);
            Some(InstanceVerb::Failed)
        }
        // It leaves or left on an order that our store, restored since, has forgotten: the node lets none end unasked.
        (InstanceState::Launching | InstanceState::Running, Some(SeenState::Retiring)) => {
            take(instance, seen, InstanceState::Draining);
            None
        }
        (InstanceState::Launching | InstanceState::Running, Some(SeenState::Retired)) => {
            take(instance, seen, InstanceState::Retired);
            "it was retired before the store was restored".clone_into(&mut instance.detail);
            Some(InstanceVerb::Retired)
        }
        (InstanceState::Launching, None | Some(SeenState::Launching)) => {
            let reason = view.refused.get(id)?;
            take(instance, seen, InstanceState::Failed);
            instance.detail.clone_from(reason);
            Some(InstanceVerb::Failed)
        }
        (InstanceState::Launching | InstanceState::Running, Some(SeenState::Exited))
        | (InstanceState::Running, Some(SeenState::Failed)) => {
            take(instance, seen, InstanceState::Exited);
            Some(InstanceVerb::Exited)
        }
        (InstanceState::Running, None) => {
            take(instance, seen, InstanceState::Exited);
            // Its store was restored, which is not the release's fault.
            instance.cut_off = true;
            "the node does not know it any more".clone_into(&mut instance.detail);
            Some(InstanceVerb::Exited)
        }
        (InstanceState::Draining, state) => {
            // That the node does not have it says nothing of one that it was never seen to have: its launch may still
            // be on the way there, until the retirement is confirmed.
            let never_came = state.is_none() && instance.launched.is_none();
            let gone = matches!(state, None | Some(SeenState::Retired)) && !never_came;
            if !gone && !view.retired.contains(id) {
                return None;
            }
            take(instance, seen, InstanceState::Retired);
            Some(InstanceVerb::Retired)
        }
        _ => None,
    }
}

fn take(instance: &mut Instance, seen: Option<&Seen>, state: InstanceState) {
    instance.state = state;
    instance.in_state = Millis(0);
    if state != InstanceState::Running {
        instance.health = HealthState::Gone;
    }
    if let Some(seen) = seen {
        instance.address.clone_from(&seen.address);
        instance.launched = instance.launched.or(seen.launched);
        instance.exit_code = seen.exit_code;
        instance.cut_off = seen.cut_off;
        instance.detail.clone_from(&seen.detail);
    }
}

/// Takes over what is known of health.
pub(crate) fn health(work: &mut Work<'_>, view: &View) {
    let releases = work.releases;
    for (id, instance) in &mut work.fleet.instances {
        if instance.state != InstanceState::Running {
            continue;
        }
        let Some(release) = releases.get(&id.release) else { continue };
        let before = instance.health;
        instance.health = match release.health() {
            None => HealthState::Healthy,
            Some(policy) => match fresh(view, id, policy) {
                Some(told) if told.state == HealthState::Gone && told.age < NODE_FIRST => instance.health,
                Some(told) => told.state,
                None => own_verdict(view, id, policy, instance).unwrap_or(instance.health),
            },
        };
        instance.passed |= instance.health == HealthState::Healthy;
        // At the moment of the change alone: each further answer would be a change of the fleet.
        if instance.health != before {
            instance.last_checks = match instance.health {
                HealthState::Unhealthy | HealthState::Gone => last_checks(view, id),
                HealthState::Starting | HealthState::Healthy => Vec::new(),
            };
        }
    }
}

/// The newest answers of an instance's probe: the monitor's, or where it has none our own.
pub(crate) fn last_checks(view: &View, id: &InstanceId) -> Vec<CheckResult> {
    let told = view.health.get(id).map(|told| told.last_checks.clone());
    let own = || view.checks.get(id).map(|own| vec![own.last.clone()]);
    told.filter(|checks| !checks.is_empty()).or_else(own).unwrap_or_default()
}

/// Takes over that the node has the edge as it was wanted last.
pub(crate) fn edge(work: &mut Work<'_>, acknowledged: bool) {
    let releases = work.releases;
    let fleet = &mut work.fleet;
    let on_edge = fleet.edge.iter().flat_map(|listener| &listener.backends).map(|backend| &backend.instance);
    let on_edge: BTreeSet<&InstanceId> = on_edge.filter(|_| acknowledged).collect();
    for (id, instance) in &mut fleet.instances {
        let portless = releases.get(&id.release).is_some_and(|release| release.revision.run.ports.is_empty());
        instance.served |= instance.passed && (portless || on_edge.contains(id));
    }
}

/// What the monitor says of an instance, if that still holds. What is gone is not looked at any more, so that stays true
/// however long ago it was said.
pub(crate) fn fresh<'v>(view: &'v View, id: &InstanceId, policy: &HealthPolicy) -> Option<&'v Told> {
    view.health.get(id).filter(|told| told.state == HealthState::Gone || told.age <= freshness(policy))
}

/// Checks of our own are only asked for where they may decide (see [`to_check`]), so what there is may be used.
fn own_verdict(
    view: &View,
    id: &InstanceId,
    policy: &HealthPolicy,
    instance: &Instance,
) -> Option<HealthState> {
    let own = view.checks.get(id).filter(|own| own.age <= freshness(policy))?;
    let started = instance.passed || instance.in_state >= policy.start;
    if own.passes >= policy.healthy {
        Some(HealthState::Healthy)
    } else if own.failures >= policy.unhealthy && started {
        Some(HealthState::Unhealthy)
    } else {
        None
    }
}

/// Running instances whose health decides, and on which the monitor is silent: on the way back, and for what takes
/// the place of an instance outside of a rollout. Going forward is never decided by this.
pub(crate) fn to_check(work: &Work<'_>, view: &View) -> Vec<InstanceId> {
    let fleet = &work.fleet;
    let Some(target) = work.target().filter(|_| !fleet.is_forward()) else { return Vec::new() };
    let back = fleet.rollout.is_some();
    let decides = |id: &InstanceId, instance: &Instance| {
        instance.state == InstanceState::Running
            && instance.content == target.content()
            && (back || !instance.passed)
            && target.health().is_some_and(|policy| fresh(view, id, policy).is_none())
    };
    fleet.instances.iter().filter(|(id, i)| decides(id, i)).map(|(id, _)| id.clone()).collect()
}

/// Running instances that the monitor is to have facts on, with their policies.
pub(crate) fn watched<'w>(
    work: &'w Work<'_>,
) -> impl Iterator<Item = (&'w InstanceId, &'w HealthPolicy)> + use<'w> {
    let running = work.fleet.instances.iter().filter(|(_, i)| i.state == InstanceState::Running);
    running.filter_map(|(id, _)| Some((id, work.releases.get(&id.release)?.health()?)))
}

/// The instance on which the monitor's facts are too old to go forward, and how old they may be. One that was just
/// launched is given as long to be looked at for the first time, and so are all of them by a process that is new, whatever
/// it was told first: another one may have heard more. What such a process finds held goes on by an answer only: another
/// one may know better that there is none.
pub(crate) fn unobserved(work: &Work<'_>, view: &View) -> Option<(InstanceId, Duration)> {
    let held = work.fleet.rollout.as_ref().is_some_and(|rollout| rollout.state == RolloutState::Held);
    let silent = |id: &InstanceId, policy: &HealthPolicy| {
        let instance = &work.fleet.instances[id];
        let limit = freshness(policy);
        let is_new = !instance.passed && instance.in_state.as_duration() < limit;
        let early = view.watching < limit && !held || is_new;
        !early && fresh(view, id, policy).is_none()
    };
    watched(work).find(|(id, policy)| silent(id, policy)).map(|(id, policy)| (id.clone(), freshness(policy)))
}

/// Fills in the last lines of what failed, when the node has given them.
pub(crate) fn evidence(work: &mut Work<'_>, view: &View) {
    let fleet = &mut work.fleet;
    let failures = fleet.rollout.iter_mut().chain(&mut fleet.finished).filter_map(|r| r.failure.as_mut());
    for failure in failures.filter(|failure| failure.last_log.is_none()) {
        failure.last_log = view.evidence.get(&failure.instance).map(|evidence| evidence.lines.clone());
    }
}

/// When something becomes due without anything happening. Sums are looked at from here on as they are stored, plus
/// what of them was not written yet.
pub(crate) fn due(work: &Work<'_>, view: &View) -> Option<Duration> {
    let fleet = &work.fleet;
    let target = work.target();
    let mut due: Vec<Duration> = Vec::new();
    if let (Some(rollout), Some(target)) = (&fleet.rollout, target) {
        if rollout.state != RolloutState::Held {
            let left = target.policy().deadline.0.saturating_sub(rollout.elapsed.0);
            due.push(Duration::from_millis(left));
        }
        // Sums are to be written, and facts get old.
        due.push(COUNT_EVERY);
        if rollout.state == RolloutState::Running {
            let soaking = fleet.instances.values().filter(|i| i.is_up() && i.content == target.content());
            due.extend(soaking.filter(|i| i.soaked < target.soak()).map(|i| soaked_in(i, target)));
        }
        if rollout.is_forward() {
            // When to ask again, and when what is known is too old. What is too old already changes by an answer only.
            due.extend(watched(work).filter_map(|(id, policy)| {
                let age = view.health.get(id)?.age;
                let moments = [policy.interval.as_duration(), freshness(policy) + Duration::from_millis(1)];
                moments.into_iter().find(|moment| *moment > age).map(|moment| moment - age)
            }));
        }
    } else if let Some(target) = target {
        let replicas = target.replicas();
        if fleet.backoff.launches > 0 {
            due.push(COUNT_EVERY);
            let wait = fleet.backoff.due_in(replicas);
            if wait.0 > 0 {
                due.push(wait.as_duration());
            }
        }
        let steady = fleet.instances.iter().filter_map(|(id, instance)| {
            let release = work.releases.get(&id.release)?;
            let until = in_state_until(instance, release, true)?;
            (instance.in_state < until).then(|| Duration::from_millis(until.0 - instance.in_state.0))
        });
        due.extend(steady.filter(|_| !plan::is_frozen(work)).map(|d| d.min(COUNT_EVERY)));
    }
    due.extend(watched(work).filter_map(|(id, _)| {
        let told = view.health.get(id).filter(|told| told.state == HealthState::Gone)?;
        NODE_FIRST.checked_sub(told.age).filter(|wait| !wait.is_zero())
    }));
    due.extend(to_check(work, view).iter().filter_map(|id| {
        let policy = work.releases.get(&id.release)?.health()?;
        policy.interval.as_duration().checked_sub(view.checks.get(id)?.age)
    }));
    // Nothing is ever due at once: what could be decided now was decided.
    due.into_iter().min().map(|due| due.max(Duration::from_millis(5)))
}
