//! What must hold after every step, by its number in the list of invariants. It looks at what was committed and at what the
//! machine has, never at how a decision was come by.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use kiln_builder_core::build::{self, Build, State};
use kiln_deployer_core::{Fleet, Quarantine, Release, Rollout, RolloutState};
use kiln_model::cause::CauseKind;
use kiln_model::digest::Digest;
use kiln_model::event::{Event, Service};
use kiln_model::name::InstanceId;
use kiln_store::{Committed, Document, decode};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::life::Life;
use crate::node::Machine;
use crate::outside::Outside;
use crate::world::World;

/// After so long the deployer knows what is on the edge, if it is there and can commit.
const ACKNOWLEDGED: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub(crate) struct Invariants {
    world: World,
    outside: Outside,
    pub(crate) machine: Arc<Mutex<Machine>>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    committed: BTreeSet<Digest>,
    published: BTreeSet<Digest>,
    fleet: Option<Fleet>,
    releases: BTreeMap<u64, Release>,
    builds: BTreeMap<String, Build>,
    /// Releases that a fault of the machine or a person may have convicted.
    excused: BTreeSet<u64>,
}

fn all<T: DeserializeOwned>(documents: &[Document], kind: &str) -> Vec<T> {
    let of_kind = documents.iter().filter(|document| document.kind == kind);
    of_kind.map(|document| decode(document, u32::MAX).unwrap()).collect()
}

impl Invariants {
    pub(crate) fn new(world: &World, outside: &Outside) -> Self {
        let (machine, seen) = (Arc::default(), Arc::default());
        Self { world: world.clone(), outside: outside.clone(), machine, seen }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    /// An instance of this release was struck by a fault: that the release is convicted for it is not wrong.
    pub(crate) fn excuse(&self, release: u64) {
        self.seen().excused.insert(release);
    }

    pub(crate) fn is_excused(&self, release: u64) -> bool {
        self.seen().excused.contains(&release)
    }

    pub(crate) fn fleet(&self) -> Option<Fleet> {
        self.seen().fleet.clone()
    }

    pub(crate) fn release(&self, number: u64) -> Option<Release> {
        self.seen().releases.get(&number).cloned()
    }

    pub(crate) fn newest_release(&self) -> Option<u64> {
        self.seen().releases.keys().last().copied()
    }

    pub(crate) fn builds(&self) -> Vec<Build> {
        self.seen().builds.values().cloned().collect()
    }

    /// Events that nobody published.
    pub(crate) fn unpublished(&self) -> usize {
        let seen = self.seen();
        seen.committed.difference(&seen.published).count()
    }

    pub(crate) fn committed(
        &self,
        life: &Life,
        committed: &Committed,
        before: &[Document],
        after: &[Document],
    ) {
        let mut seen = self.seen();
        for event in &committed.events {
            let kind = &event.event.kind;
            let about = &event.event.aggregate_id;
            self.world.tell(format!("{}: {}.{} {about}", life.name(), kind.entity, kind.verb));
            seen.committed.insert(event.id);
        }
        match life.service {
            Service::Builder => self.builder(life, &mut seen, after),
            Service::Deployer => self.deployer(&mut seen, before, after),
            Service::Monitor | Service::Node => {}
        }
    }

    /// 3: nothing is published that was not committed.
    pub(crate) fn published(&self, service: Service, event: &Event) {
        let mut seen = self.seen();
        if !seen.committed.contains(&event.id) {
            self.world.wrong(3, format!("{service} publishes what it did not commit: {event:?}"));
        }
        seen.published.insert(event.id);
    }

    fn builder(&self, life: &Life, seen: &mut Seen, after: &[Document]) {
        for build in all::<Build>(after, build::KIND) {
            let was = seen.builds.insert(build.id.to_string(), build.clone());
            if let Some(was) = &was {
                self.owned(life, was, &build);
            }
        }
        // 2 and 19, as the builder's own list has them.
        let builds: Vec<Build> = seen.builds.values().cloned().collect();
        for violation in kiln_builder_core::invariants::violations(&[], &builds) {
            self.world.wrong(2, violation);
        }
        for server in all::<kiln_builder_core::server::Server>(after, "server") {
            for violation in kiln_builder_core::invariants::violations(&[server], &[]) {
                self.world.wrong(13, violation);
            }
        }
    }

    /// 7: a build is brought to its end by who holds it, and what has ended stays so.
    fn owned(&self, life: &Life, was: &Build, is: &Build) {
        if is.token < was.token {
            self.world.wrong(7, format!("{}: its token went from {} to {}", is.id, was.token, is.token));
        }
        let ended = matches!(is.state, State::Succeeded { .. } | State::Failed);
        if let State::Running { lease } = &was.state
            && ended
            // Given up by the process that comes next, after it was interrupted too often.
            && is.interruptions == was.interruptions
            && lease.owner != life.name()
        {
            self.world.wrong(7, format!("{} ends {}, which {} holds", life.name(), is.id, lease.owner));
        }
        if was.state.has_ended() && was.state != is.state {
            self.world.wrong(2, format!("{} had ended as {:?}, and is {:?}", is.id, was.state, is.state));
        }
    }

    fn deployer(&self, seen: &mut Seen, before: &[Document], after: &[Document]) {
        for release in all::<Release>(after, "release") {
            let known = seen.releases.insert(release.number, release.clone());
            if known.is_some_and(|known| known.revision != release.revision) {
                self.world.wrong(12, format!("release {} became another one", release.number));
            }
        }
        let was = all::<Fleet>(before, "fleet").pop();
        let Some(is) = all::<Fleet>(after, "fleet").pop() else { return };
        if let Some(was) = &was {
            self.numbers(was, &is);
        }
        self.rollouts(seen, was.as_ref(), &is);
        for conviction in &is.quarantine {
            let known = was.as_ref().is_some_and(|was| was.quarantine.contains(conviction));
            if !known {
                self.convicted(seen, &is, conviction);
            }
        }
        seen.fleet = Some(is);
    }

    /// 7 and 12: what only grows, grows; no attempt is used twice; a release goes back by a rollback that is on record.
    fn numbers(&self, was: &Fleet, is: &Fleet) {
        let growing = [
            ("next release", was.next_release, is.next_release),
            ("next attempt", was.next_attempt, is.next_attempt),
            ("generation", was.generation, is.generation),
            ("revision", was.revision, is.revision),
            ("backs", was.backs, is.backs),
        ];
        for (what, was, is) in growing {
            if is < was {
                self.world.wrong(7, format!("{what} went from {was} to {is}"));
            }
        }
        if was.edge != is.edge && is.generation == was.generation {
            self.world.wrong(7, "the edge changed under the same generation");
        }
        for id in is.instances.keys().filter(|id| !was.instances.contains_key(*id)) {
            if id.attempt < was.next_attempt {
                self.world.wrong(7, format!("{id} takes an attempt that was used before"));
            }
        }
        let back = is.rollout.iter().chain(&is.finished).any(|rollout| rollout.back_to == Some(is.release));
        if is.release < was.release && !back && !is.removed {
            let what = format!("release {} after {}, and no rollback says so", is.release, was.release);
            self.world.wrong(12, what);
        }
    }

    fn rollouts(&self, seen: &Seen, was: Option<&Fleet>, is: &Fleet) {
        let is_new = |rollout: &&Rollout| {
            let earlier = was.iter().flat_map(|was| was.rollout.iter().chain(&was.finished));
            !earlier.into_iter().any(|earlier| earlier.id == rollout.id && earlier.state == rollout.state)
        };
        // 13: what was convicted is not rolled out again.
        for rollout in is.rollout.iter().filter(is_new).filter(|rollout| rollout.is_forward()) {
            let is_convicted = |release: &Release| {
                is.quarantine.iter().any(|it| {
                    it.content == Some(release.content())
                        || it.definition == Some(release.revision.definition_digest)
                })
            };
            let convicted = seen.releases.get(&rollout.to).is_some_and(is_convicted);
            if convicted && rollout.cause.kind != CauseKind::Rollback {
                self.world.wrong(13, format!("{} brings back what was convicted", rollout.id));
            }
        }
        // 5: what fails by itself goes back to what was the last good release when it failed; the way back makes its target
        // that.
        let turned = is.rollout.iter().filter(is_new).filter(|rollout| rollout.convicted.is_some());
        for rollout in turned.filter(|rollout| rollout.cause.kind != CauseKind::Rollback) {
            if let Some(good) = was.map(|was| was.last_good).filter(|good| rollout.back_to != Some(*good)) {
                let what = format!("{} goes back to {:?}, and {good} was good", rollout.id, rollout.back_to);
                self.world.wrong(5, what);
            }
        }
        for rollout in is.finished.iter().filter(is_new) {
            match rollout.state {
                RolloutState::Succeeded => self.succeeded(seen, is, rollout),
                // 5: it ends on the last good release, or says loudly that it could not.
                RolloutState::RolledBack if rollout.back_to != Some(is.last_good) => {
                    let what =
                        format!("{} went back to {:?}, not to {}", rollout.id, rollout.back_to, is.last_good);
                    self.world.wrong(5, what);
                }
                RolloutState::Failed if rollout.problem.is_empty() => {
                    self.world.wrong(5, format!("{} failed without a word", rollout.id));
                }
                _ => {}
            }
        }
    }

    /// 15: in truth, and not only as far as the deployer knows, an instance answered in each place for the soak.
    fn succeeded(&self, seen: &Seen, fleet: &Fleet, rollout: &Rollout) {
        let Some(target) = seen.releases.get(&rollout.to) else { return };
        let machine = self.machine.lock().unwrap();
        let soak = target.policy().soak.as_duration();
        for ordinal in 0..target.replicas() {
            let soaked = fleet.instances.iter().any(|(id, instance)| {
                let held = machine.instances.get(id);
                let ready = held.and_then(|held| held.course.ready);
                id.ordinal == ordinal
                    && instance.content == target.content()
                    && ready.is_some_and(|ready| Instant::now().saturating_duration_since(ready) >= soak)
            });
            if !soaked {
                self.world.wrong(15, format!("{} succeeded, and place {ordinal} had no soak", rollout.id));
            }
        }
        if fleet.last_good != rollout.to {
            self.world.wrong(15, format!("{} succeeded, and is not the last good release", rollout.id));
        }
    }

    /// 5: a release is convicted for what it does, or because a person said so: not for what Kiln's own parts, the broker
    /// or the clock do.
    fn convicted(&self, seen: &Seen, fleet: &Fleet, conviction: &Quarantine) {
        let Some(release) = seen.releases.get(&conviction.release) else { return };
        let image = self.outside.image(&release.revision.image_digest);
        let bad = image.is_none_or(|image| image.nature.is_bad());
        let by_hand =
            fleet.rollout.iter().chain(&fleet.finished).any(|r| r.cause.kind == CauseKind::Rollback);
        if !bad && !by_hand && !seen.excused.contains(&release.number) {
            let what =
                format!("release {} was convicted, and is good: {}", release.number, conviction.reason);
            self.world.wrong(5, what);
        }
    }

    /// 1 and 11.
    pub(crate) fn launched(&self, machine: &Machine, id: &InstanceId) {
        let Some(held) = machine.instances.get(id) else { return };
        let digest: Digest = held.spec().image_digest.parse().unwrap();
        if !self.outside.is_signed(&digest) {
            self.world.wrong(11, format!("{id} runs an image that nobody signed"));
        }
        if !held.is_fleet() {
            return;
        }
        let live: Vec<_> = machine
            .instances
            .values()
            .filter(|other| {
                other.is_fleet() && other.takes_room() && other.spec().server == held.spec().server
            })
            .collect();
        let seen = self.seen();
        let most = between(&seen).chain([u64::from(held.spec().run.as_ref().unwrap().replicas)]).max();
        let most = usize::try_from(most.unwrap_or(0)).unwrap() + 1;
        if live.len() > most {
            self.world.wrong(1, format!("{} instances with {id}, at most {most} may be", live.len()));
        }
    }

    /// 1: who is put on the edge answers, and who answers is taken off it only where enough others do. Those that broke by
    /// themselves are nobody's fault.
    pub(crate) fn routed(&self, machine: &Machine, server: &str, before: &BTreeSet<InstanceId>) {
        let now = Instant::now();
        let after = machine.on_edge(server);
        let held = |id: &InstanceId| machine.instances.get(id);
        for id in after.difference(before) {
            let ready = held(id).and_then(|held| held.course.ready);
            if ready.is_none_or(|ready| ready > now) {
                self.world.wrong(1, format!("{id} is on the edge and has never answered"));
            }
        }
        let well = |id: &&InstanceId| held(id).is_some_and(|held| held.is_well(now));
        // The deployer may not know yet that one is there which came a moment ago.
        let serves = |id: &&InstanceId| {
            let since = held(id).and_then(|held| held.on_edge);
            well(id) && since.is_some_and(|since| now.saturating_duration_since(since) >= ACKNOWLEDGED)
        };
        let (were, are) = (before.iter().filter(serves).count(), after.iter().filter(well).count());
        let seen = self.seen();
        // Where nothing has proved good yet, there is nothing to keep.
        let kept = |fleet: &Fleet| !fleet.removed && fleet.last_good != 0;
        if are >= were || !seen.fleet.as_ref().is_some_and(kept) {
            return;
        }
        let least = usize::try_from(between(&seen).min().unwrap_or(0)).unwrap();
        let fleet = machine.instances.values().filter(|held| held.is_fleet() && held.spec().server == server);
        let broken =
            fleet.filter(|held| !held.is_well(now) && held.course.ready.is_some_and(|r| r <= now)).count();
        if are + broken < least {
            self.world.wrong(1, format!("{are} of {least} answer on the edge, {were} did before"));
        }
    }
}

/// How many instances the releases want that the fleet is between.
fn between(seen: &Seen) -> impl Iterator<Item = u64> {
    let numbers = seen.fleet.iter().flat_map(|fleet| {
        let rollout = fleet.rollout.iter().flat_map(|r| [Some(r.from), Some(r.to), r.back_to]);
        rollout.chain([Some(fleet.release)]).flatten().collect::<Vec<_>>()
    });
    numbers.filter_map(|number| seen.releases.get(&number)).map(|release| release.replicas().into())
}
