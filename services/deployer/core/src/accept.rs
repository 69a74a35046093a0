//! A revision becomes a release.

use kiln_model::revision::{Revision, RevisionContent};
use kiln_model::time::Now;

use crate::effect::{Event, RolloutVerb};
use crate::fleet::Fleet;
use crate::next::Work;
use crate::release::{Release, Releases};
use crate::rollout::RolloutState;

/// To be committed as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub fleet: Fleet,
    /// The new release, and those whose marks changed.
    pub releases: Vec<Release>,
    pub events: Vec<Event>,
}

/// Takes a revision. `None` where it is not newer than the newest that was taken: it was seen before, or it comes late.
pub fn accept(fleet: &Fleet, releases: &Releases, revision: &Revision, now: Now) -> Option<Accepted> {
    if revision.generation <= fleet.revision {
        return None;
    }
    let content = match &revision.content {
        RevisionContent::Removed { .. } => return Some(remove(fleet, releases, revision.generation, now)),
        RevisionContent::Image(content) => content,
    };
    let newest = releases.values().find(|release| release.generation == fleet.revision);
    if let Some(newest) = newest.filter(|newest| newest.is_of(content)) {
        return Some(made_again(fleet, newest, revision.generation));
    }
    let mut release = Release {
        number: fleet.next_release,
        generation: revision.generation,
        revision: content.as_ref().clone(),
        revised: revision.created,
        good: false,
        quarantined: false,
        created: now.wall,
    };
    release.quarantined = fleet.quarantine.iter().any(|conviction| conviction.matches(&release));
    let same = releases.get(&fleet.release).filter(|current| {
        current.content() == release.content()
            && fleet.rollout.is_none()
            && !fleet.is_halted()
            && !fleet.removed
    });
    release.good = !release.quarantined && same.is_some_and(|current| current.good);

    let mut with_new = releases.clone();
    with_new.insert(release.number, release.clone());
    let mut work = Work::new(fleet, &with_new, now.wall);
    work.fleet.next_release += 1;
    work.fleet.revision = revision.generation;
    work.changed.insert(release.number, release.clone());
    work.events.push(Event::Release(Box::new(release.clone())));

    if release.quarantined {
        work.fleet.refused = Some(release.number);
    } else if let Some(current) = same {
        // Image and run are what runs already: only the number moves on, and with it the policies that are read from
        // the newest release.
        work.fleet.release = release.number;
        if fleet.last_good == current.number {
            work.fleet.remember_good(release.number);
        }
        work.fleet.refused = None;
        work.fleet.finished = None;
    } else {
        match work.fleet.rollout.take() {
            None => work.start_rollout(&release, fleet.release),
            Some(rollout) if rollout.state == RolloutState::RollingBack => {
                // One way at a time: what is proven first, what is new after it.
                work.fleet.pending = Some(release.number);
                work.fleet.rollout = Some(rollout);
            }
            Some(mut rollout) => {
                let from = rollout.from;
                rollout.problem = format!("release {} took its place", release.number);
                work.end_rollout(rollout, RolloutState::Superseded, RolloutVerb::Superseded);
                work.start_rollout(&release, from);
            }
        }
    }
    Some(Accepted { fleet: work.fleet, releases: work.changed.into_values().collect(), events: work.events })
}

/// A builder whose store was restored has forgotten what it made, and makes the same again: that is no other release. From
/// then on it is asked about by the generation that the builder knows.
fn made_again(fleet: &Fleet, newest: &Release, generation: u64) -> Accepted {
    let release = Release { generation, ..newest.clone() };
    let fleet = Fleet { revision: generation, ..fleet.clone() };
    Accepted { fleet, releases: vec![release], events: Vec::new() }
}

/// The fleet is retired; the numbers stay, so that a server of the same name goes on counting.
fn remove(fleet: &Fleet, releases: &Releases, generation: u64, now: Now) -> Accepted {
    let mut work = Work::new(fleet, releases, now.wall);
    if let Some(mut rollout) = work.fleet.rollout.take() {
        rollout.problem = "the server was removed".to_owned();
        work.end_rollout(rollout, RolloutState::Superseded, RolloutVerb::Superseded);
    }
    let fleet = &mut work.fleet;
    fleet.revision = generation;
    fleet.removed = true;
    fleet.release = 0;
    fleet.last_good = 0;
    fleet.goods.clear();
    fleet.pending = None;
    fleet.refused = None;
    fleet.finished = fleet.finished.take().filter(|rollout| rollout.state != RolloutState::Failed);
    fleet.problem = String::new();
    Accepted { fleet: work.fleet, releases: Vec::new(), events: work.events }
}
