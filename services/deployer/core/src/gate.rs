//! Whether a rollout goes on, holds, turns back or ends.

use kiln_model::name::{InstanceId, NodeName};
use kiln_model::signal::HealthState;
use kiln_model::time::Millis;

use crate::effect::RolloutVerb;
use crate::fleet::{Backoff, Instance, InstanceState};
use crate::next::Work;
use crate::observe;
use crate::plan;
use crate::quarantine::{self, Quarantine};
use crate::release::Release;
use crate::rollout::{Failure, Rollout, RolloutState};
use crate::view::{Verdict, View};

/// Launches that may fail before the release is to blame. Those that a node's end cut off are not counted.
const LAUNCHES: u32 = 3;

/// A gate that failed.
struct Failed {
    reason: String,
    instance: Option<InstanceId>,
}

/// Looks at the rollout's gates. The first failure turns it back, a second one on the way back ends it loudly.
pub(crate) fn judge(work: &mut Work<'_>, view: &View) {
    let Some(rollout) = &work.fleet.rollout else { return };
    let Some(target) = work.target() else { return };
    if !rollout.is_forward() {
        let failed = failed_instance(work, rollout)
            .or_else(|| unroutable(work, view))
            .or_else(|| overdue(work, rollout, target, view));
        if let Some(failed) = failed {
            fail_for_good(work, failed, view);
        }
        return;
    }

    let verdict = view.verdicts.get(&target.revision.image_digest);
    if verdict == Some(&Verdict::Right)
        && let Some(rollout) = &mut work.fleet.rollout
    {
        rollout.verified = true;
    }
    let unverified = match verdict {
        Some(Verdict::Wrong(why)) => Some(Failed {
            reason: format!("image {} is not what was signed: {why}", target.revision.image_digest),
            instance: None,
        }),
        _ => None,
    };
    let Some(rollout) = &work.fleet.rollout else { return };
    let failed = unverified
        .or_else(|| failed_instance(work, rollout))
        .or_else(|| unroutable(work, view))
        .or_else(|| overdue(work, rollout, target, view).filter(|_| rollout.state != RolloutState::Held));
    match failed {
        Some(failed) => {
            let evidence = failed.instance.map(|id| failure(work, view, id));
            match work.fleet.last_good {
                0 => give_up(work, &failed.reason, evidence),
                good => turn_back(work, good, &failed.reason, true, evidence),
            }
        }
        None => hold_or_resume(work, view),
    }
}

/// An instance that the leg under way launched, and that is not what it should be.
fn failed_instance(work: &Work<'_>, rollout: &Rollout) -> Option<Failed> {
    let content = work.release(rollout.target())?.content();
    let launched = work
        .fleet
        .instances
        .iter()
        .filter(|(id, i)| id.attempt >= rollout.first_attempt && i.content == content);
    launched.into_iter().find_map(|(id, instance)| {
        let reason = match instance.state {
            InstanceState::Failed if rollout.failed_launches >= LAUNCHES => {
                format!("{id} could not be launched: {}", instance.detail)
            }
            // Another one takes its place.
            InstanceState::Exited if instance.cut_off => return None,
            InstanceState::Exited => match instance.exit_code {
                Some(code) => format!("{id} exited with {code}: {}", instance.detail),
                None => format!("{id} ended: {}", instance.detail),
            },
            InstanceState::Running if instance.health == HealthState::Unhealthy => {
                format!("{id} is unhealthy")
            }
            InstanceState::Running if instance.health == HealthState::Gone => gone(id),
            _ => return None,
        };
        let reason = reason.trim_end_matches([':', ' ']).to_owned();
        Some(Failed { reason, instance: Some(id.clone()) })
    })
}

fn gone(id: &InstanceId) -> String {
    format!("{id} is gone, as the monitor saw, though the node has it for running")
}

fn unroutable(work: &Work<'_>, view: &View) -> Option<Failed> {
    let (_, why) = view.unroutable.as_ref().filter(|(generation, _)| *generation == work.fleet.generation)?;
    Some(Failed { reason: format!("the node refuses to put it on the edge: {why}"), instance: None })
}

fn overdue(work: &Work<'_>, rollout: &Rollout, target: &Release, view: &View) -> Option<Failed> {
    let deadline = target.policy().deadline;
    // Old instances that only wait for their connections to end make nobody wait.
    let settled = plan::done(work) == target.replicas() && plan::leavers(work).is_empty();
    let decided = settled && work.acknowledged(view);
    if rollout.elapsed < deadline || decided {
        return None;
    }
    let late = |(id, i): (&InstanceId, &Instance)| {
        (i.is_live() && i.content == target.content() && !i.is_up()).then(|| id.clone())
    };
    let reason = format!(
        "the deadline of {} s passed with {} of {} instances through their gate",
        deadline.0 / 1000,
        plan::done(work),
        target.replicas()
    );
    Some(Failed { reason, instance: work.fleet.instances.iter().find_map(late) })
}

fn failure(work: &Work<'_>, view: &View, instance: InstanceId) -> Failure {
    let known = work.fleet.instances.get(&instance);
    Failure {
        node: known.map_or_else(NodeName::local, |instance| instance.node.clone()),
        exit_code: known.and_then(|instance| instance.exit_code),
        last_checks: observe::last_checks(view, &instance),
        last_log: None,
        instance,
    }
}

fn hold_or_resume(work: &mut Work<'_>, view: &View) {
    let silent = observe::unobserved(work, view);
    let Some(mut rollout) = work.fleet.rollout.take() else { return };
    match (rollout.state, silent) {
        (RolloutState::Running, Some((id, limit))) => {
            rollout.state = RolloutState::Held;
            rollout.problem = format!(
                "holds: the monitor has said nothing of {id} for more than {} ms; it goes on by itself when the \
                 monitor is back, and its deadline stands still until then",
                limit.as_millis()
            );
            work.tell_rollout(RolloutVerb::Held, &rollout);
        }
        (RolloutState::Held, None) => {
            rollout.state = RolloutState::Running;
            rollout.problem = String::new();
            work.tell_rollout(RolloutVerb::Resumed, &rollout);
        }
        _ => {}
    }
    work.fleet.rollout = Some(rollout);
}

/// Turns a rollout that goes forward back to a release that is known to be good.
pub(crate) fn turn_back(
    work: &mut Work<'_>,
    good: u64,
    reason: &str,
    convict: bool,
    failure: Option<Failure>,
) {
    let Some(mut rollout) = work.fleet.rollout.take() else { return };
    let left = rollout.to;
    if convict && let (Some(bad), Some(good)) = (work.release(left), work.release(good)) {
        let conviction = Quarantine::convict(bad, good, reason, work.now);
        quarantine::keep(&mut work.fleet.quarantine, conviction.clone());
        rollout.convicted = Some(conviction);
        work.mark(left, |release| release.quarantined = true);
    }
    rollout.state = RolloutState::RollingBack;
    rollout.problem = reason.to_owned();
    rollout.failure = failure;
    rollout.back_to = Some(good);
    rollout.elapsed = Millis(0);
    rollout.first_attempt = work.fleet.next_attempt;
    rollout.failed_launches = 0;
    rollout.done = 0;
    rollout.total = work.release(good).map_or(0, Release::replicas);
    work.tell_rollout(RolloutVerb::RollingBack, &rollout);
    work.fleet.release = good;
    work.fleet.remember_good(good);
    work.fleet.rollout = Some(rollout);
}

/// There is nothing to go back to: what was tried is retired, and its record kept.
pub(crate) fn give_up(work: &mut Work<'_>, reason: &str, failure: Option<Failure>) {
    let Some(mut rollout) = work.fleet.rollout.take() else { return };
    rollout.problem = format!("{reason}; there is no good release to go back to: change the definition");
    rollout.failure = failure;
    for instance in work.fleet.instances.values_mut().filter(|i| i.is_live()) {
        plan::drain(instance);
    }
    work.end_rollout(rollout, RolloutState::Failed, RolloutVerb::Failed);
}

/// The way back failed too. Nothing more is torn down.
fn fail_for_good(work: &mut Work<'_>, failed: Failed, view: &View) {
    let Some(mut rollout) = work.fleet.rollout.take() else { return };
    rollout.problem = format!(
        "{}; then the way back failed: {}; what is healthy goes on serving: mend the cause, then `kiln rollback`, or \
         change the definition",
        rollout.problem, failed.reason
    );
    if rollout.failure.is_none() {
        rollout.failure = failed.instance.map(|id| failure(work, view, id));
    }
    work.end_rollout(rollout, RolloutState::Failed, RolloutVerb::Failed);
}

/// What waited for the way back to end begins now.
pub(crate) fn begin_pending(work: &mut Work<'_>) {
    if work.fleet.rollout.is_some() || work.fleet.removed {
        return;
    }
    let Some(release) = work.fleet.pending.take().and_then(|number| work.release(number)) else { return };
    // What was convicted meanwhile may be the same thing.
    if work.fleet.quarantine.iter().any(|conviction| conviction.matches(release)) {
        work.mark(release.number, |release| release.quarantined = true);
        return;
    }
    let from = work.fleet.release;
    work.start_rollout(release, from);
}

/// Ends a rollout whose every instance is through its gate, with nothing else left, and the edge as it is to be.
pub(crate) fn complete(work: &mut Work<'_>, acknowledged: bool) {
    let Some(target) = work.target() else { return };
    let done = plan::done(work);
    let others = plan::others(work);
    let Some(mut rollout) = work.fleet.rollout.take() else { return };
    rollout.done = done;
    let complete = acknowledged && done == target.replicas() && others == 0;
    if !complete || rollout.state == RolloutState::Held {
        work.fleet.rollout = Some(rollout);
        return;
    }
    // Each instance of it came through its gate: it does not pay for those of another release that ended.
    work.fleet.backoff = Backoff::default();
    if rollout.is_forward() {
        work.fleet.remember_good(rollout.to);
        work.mark(rollout.to, |release| release.good = true);
        work.end_rollout(rollout, RolloutState::Succeeded, RolloutVerb::Succeeded);
    } else {
        work.end_rollout(rollout, RolloutState::RolledBack, RolloutVerb::RolledBack);
    }
}

/// Says what is wrong with a fleet that is not as it should be. Without numbers that move with time, so that a tick
/// is not a change.
pub(crate) fn describe(work: &mut Work<'_>, view: &View) {
    let fleet = &work.fleet;
    if let Some(rollout) = &fleet.rollout {
        let problem = rollout.problem.clone();
        work.fleet.problem = problem;
        return;
    }
    let ended = fleet.finished.as_ref();
    if fleet.is_halted() {
        work.fleet.problem = ended.map(|r| r.problem.clone()).unwrap_or_default();
        return;
    }
    let missing: Vec<String> = fleet
        .instances
        .iter()
        .filter(|(_, i)| {
            let sick = matches!(i.health, HealthState::Unhealthy | HealthState::Gone);
            i.is_broken() || i.state == InstanceState::Running && sick
        })
        .map(|(id, i)| match i.state {
            InstanceState::Running if i.health == HealthState::Gone => gone(id),
            InstanceState::Running => format!("{id} is unhealthy"),
            InstanceState::Failed => format!("{id} could not be launched: {}", i.detail),
            _ => format!("{id} ended: {}", i.detail),
        })
        .collect();
    let unroutable = unroutable(work, view).map(|failed| failed.reason);
    let wrong: Vec<String> = missing.into_iter().filter(|_| !fleet.removed).chain(unroutable).collect();
    let short = (!wrong.is_empty()).then(|| wrong.join("; "));
    // Both stay true until a newer revision comes.
    let refused = fleet.refused.and_then(|number| work.release(number)).and_then(|release| {
        let conviction = fleet.quarantine.iter().rev().find(|conviction| conviction.matches(release))?;
        Some(format!(
            "{0} r{1} is not rolled out: it is what {0} r{2} was rolled back for; change the definition, or wait for \
             newer packages",
            fleet.server, release.number, conviction.release
        ))
    });
    let left = ended.filter(|r| r.state == RolloutState::RolledBack).map(|r| {
        let left = if r.back_to == Some(r.to) { r.from } else { r.to };
        format!("{} r{left} was rolled back: {}", fleet.server, r.problem)
    });
    work.fleet.problem = short.or(refused).or(left).unwrap_or_default();
}
