//! What people ask for, and the monitor's wish to have an instance replaced.

use kiln_model::cause::Cause;
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::time::{Millis, Now};

use crate::effect::{Event, RolloutVerb};
use crate::fleet::{Fleet, InstanceState};
use crate::gate;
use crate::next::Work;
use crate::quarantine::{self, Quarantine};
use crate::release::{Release, Releases};
use crate::rollout::{Rollout, RolloutState};

/// To be committed as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commanded {
    pub fleet: Fleet,
    pub releases: Vec<Release>,
    pub events: Vec<Event>,
    pub rollout: Rollout,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollbackAsk {
    /// The release that the caller believes to be current.
    pub expected: u64,
    /// `None` for the last good one before it.
    pub to: Option<u64>,
    pub cause: Cause,
}

/// Why a command is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{0} was removed")]
    Removed(ServerName),
    #[error("{server} is at release {actual}, not {expected}")]
    Moved { server: ServerName, expected: u64, actual: u64 },
    #[error("{0} is being rolled back already")]
    GoingBack(ServerName),
    #[error("{0} has no earlier good release to go back to")]
    NoGood(ServerName),
    #[error("{server} has no release {number}")]
    NoSuchRelease { server: ServerName, number: u64 },
    #[error("{server} r{number} can't be gone back to: {why}")]
    NotATarget { server: ServerName, number: u64, why: &'static str },
    #[error("{0} has no rollout under way")]
    NoRollout(ServerName),
}

/// Goes back, and convicts what is left. `releases` are all of the server's.
///
/// # Errors
/// [`Refused`], with the fleet as it was.
pub fn rollback(
    fleet: &Fleet,
    releases: &Releases,
    ask: &RollbackAsk,
    now: Now,
) -> Result<Commanded, Refused> {
    let server = || fleet.server.clone();
    if fleet.removed {
        return Err(Refused::Removed(server()));
    }
    if ask.expected != fleet.release {
        return Err(Refused::Moved { server: server(), expected: ask.expected, actual: fleet.release });
    }
    if fleet.rollout.as_ref().is_some_and(|r| r.state == RolloutState::RollingBack) {
        return Err(Refused::GoingBack(server()));
    }
    let to = rollback_target(fleet, releases, ask.to)?;
    let mut work = Work::new(fleet, releases, now.wall);
    let reason = &ask.cause.summary;
    if work.fleet.rollout.is_some() {
        gate::turn_back(&mut work, to.number, reason, true, None);
    } else {
        start_back(&mut work, to, &ask.cause);
    }
    finish(work)
}

/// Ends a rollout that goes forward and goes back to the last good release, without a verdict on what was tried.
///
/// # Errors
/// [`Refused`], with the fleet as it was.
pub fn abort(
    fleet: &Fleet,
    releases: &Releases,
    expected: u64,
    cause: &Cause,
    now: Now,
) -> Result<Commanded, Refused> {
    let server = || fleet.server.clone();
    match &fleet.rollout {
        None => return Err(Refused::NoRollout(server())),
        Some(rollout) if !rollout.is_forward() => return Err(Refused::GoingBack(server())),
        Some(rollout) if rollout.to != expected => {
            return Err(Refused::Moved { server: server(), expected, actual: rollout.to });
        }
        Some(_) => {}
    }
    let mut work = Work::new(fleet, releases, now.wall);
    if fleet.last_good == 0 {
        gate::give_up(&mut work, &cause.summary, None);
    } else {
        gate::turn_back(&mut work, fleet.last_good, &cause.summary, false, None);
    }
    finish(work)
}

/// Marks an instance, or all of them, as to be replaced. `None` where there is nothing (left) to replace.
pub fn replace(fleet: &Fleet, instance: Option<&InstanceId>, cause: &Cause) -> Option<Fleet> {
    let mut fleet = fleet.clone();
    let mut marked = false;
    for (id, record) in &mut fleet.instances {
        let meant = match instance {
            Some(wanted) => wanted == id,
            None => record.is_live(),
        };
        let replaceable = record.is_live() || record.state == InstanceState::Exited;
        if meant && replaceable && record.replace.is_none() {
            record.replace = Some(cause.clone());
            marked = true;
        }
    }
    marked.then_some(fleet)
}

fn rollback_target<'a>(
    fleet: &Fleet,
    releases: &'a Releases,
    to: Option<u64>,
) -> Result<&'a Release, Refused> {
    let server = || fleet.server.clone();
    let Some(number) = to.filter(|number| *number != 0) else {
        if fleet.rollout.is_some() || fleet.is_halted() {
            return releases.get(&fleet.last_good).ok_or_else(|| Refused::NoGood(server()));
        }
        // A release that only recorded what ran already is no way back: the same would run.
        let current = releases.get(&fleet.release).map(Release::content);
        return releases
            .range(..fleet.release)
            .rev()
            .map(|(_, release)| release)
            .find(|release| release.good && !release.quarantined && Some(release.content()) != current)
            .ok_or_else(|| Refused::NoGood(server()));
    };
    let release = releases.get(&number).ok_or_else(|| Refused::NoSuchRelease { server: server(), number })?;
    let refuse = |why| Err(Refused::NotATarget { server: server(), number, why });
    if release.quarantined {
        refuse("it was convicted by an earlier rollback")
    } else if !release.good {
        refuse("no rollout to it succeeded")
    } else if number > fleet.release {
        refuse("it is newer than what runs; releases go forward by new revisions only")
    } else if number == fleet.release && !fleet.is_halted() {
        refuse("it is what runs")
    } else {
        Ok(release)
    }
}

/// A rollback that is a rollout of its own: what runs was good once, or halted.
fn start_back(work: &mut Work<'_>, to: &Release, cause: &Cause) {
    let now = work.now;
    let left = work.fleet.release;
    let convicted = match work.release(left) {
        Some(bad) if bad.number != to.number => Some(Quarantine::convict(bad, to, &cause.summary, now)),
        _ => None,
    };
    let fleet = &mut work.fleet;
    fleet.backs += 1;
    let rollout = Rollout {
        id: format!("{}-r{}-back{}", fleet.server, to.number, fleet.backs),
        from: left,
        to: to.number,
        state: RolloutState::RollingBack,
        cause: cause.clone(),
        problem: cause.summary.clone(),
        failure: None,
        convicted: convicted.clone(),
        started: now,
        ended: None,
        done: 0,
        total: to.replicas(),
        verified: true,
        first_attempt: fleet.next_attempt,
        failed_launches: 0,
        elapsed: Millis(0),
        back_to: Some(to.number),
    };
    fleet.release = to.number;
    fleet.remember_good(to.number);
    fleet.problem = String::new();
    if let Some(convicted) = convicted {
        fleet.goods.retain(|good| *good != left);
        quarantine::keep(&mut fleet.quarantine, convicted);
        work.mark(left, |release| release.quarantined = true);
    }
    work.tell_rollout(RolloutVerb::RollingBack, &rollout);
    work.fleet.rollout = Some(rollout);
}

fn finish(work: Work<'_>) -> Result<Commanded, Refused> {
    let rollout = work.fleet.rollout.clone().or_else(|| work.fleet.finished.clone());
    let rollout = rollout.ok_or_else(|| Refused::NoRollout(work.fleet.server.clone()))?;
    Ok(Commanded {
        fleet: work.fleet,
        releases: work.changed.into_values().collect(),
        events: work.events,
        rollout,
    })
}
