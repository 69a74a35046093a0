//! What must hold after every step, by its number in the list of invariants. It looks at what was committed and at what the
//! machine has, never at how a decision was come by.

mod builds;
mod room;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::SignedDuration;
use kiln_builder_core::build::{Build, State};
use kiln_deployer_core::{Fleet, Quarantine, Release, Rollout, RolloutState};
use kiln_model::cause::CauseKind;
use kiln_model::digest::Digest;
use kiln_model::event::{Event, Service};
use kiln_model::name::ServerName;
use kiln_store::{Committed, Document, Watermark, decode};
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
    servers: BTreeMap<ServerName, Known>,
    /// Poison that a service's consumer stands still for.
    blocked: BTreeSet<(Service, Digest)>,
    builds: BTreeMap<String, Build>,
    /// Of each server, when a build came of what Kiln found by itself, and by what the wall clock was shifted then.
    by_itself: BTreeMap<String, Vec<(Instant, SignedDuration)>>,
}

/// What the deployer has of one server.
#[derive(Default)]
struct Known {
    fleet: Option<Fleet>,
    releases: BTreeMap<u64, Release>,
    /// Releases that a fault of the machine or a person may have convicted.
    excused: BTreeSet<u64>,
}

impl Seen {
    fn of(&self, server: &ServerName) -> Option<&Known> {
        self.servers.get(server)
    }
}

/// Of a document of the deployer.
fn server_of(document: &Document) -> ServerName {
    document.id.split('/').next().unwrap().parse().unwrap()
}

fn all<'a, T: DeserializeOwned>(documents: impl IntoIterator<Item = &'a Document>, kind: &str) -> Vec<T> {
    let of_kind = documents.into_iter().filter(|document| document.kind == kind);
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
    pub(crate) fn excuse(&self, server: &ServerName, release: u64) {
        self.seen().servers.entry(server.clone()).or_default().excused.insert(release);
    }

    pub(crate) fn is_excused(&self, server: &ServerName, release: u64) -> bool {
        self.seen().of(server).is_some_and(|known| known.excused.contains(&release))
    }

    pub(crate) fn fleet(&self, server: &ServerName) -> Option<Fleet> {
        self.seen().of(server)?.fleet.clone()
    }

    pub(crate) fn release(&self, server: &ServerName, number: u64) -> Option<Release> {
        self.seen().of(server)?.releases.get(&number).cloned()
    }

    pub(crate) fn newest_release(&self, server: &ServerName) -> Option<u64> {
        self.seen().of(server)?.releases.keys().last().copied()
    }

    pub(crate) fn builds(&self) -> Vec<Build> {
        self.seen().builds.values().cloned().collect()
    }

    /// A handler was given what nobody can take, and wants it again later.
    pub(crate) fn poisoned(&self, service: Service, event: &Event, later: bool) {
        let mut seen = self.seen();
        if later {
            seen.blocked.insert((service, event.id));
        } else {
            seen.blocked.remove(&(service, event.id));
        }
    }

    /// Services whose consumers stand still for poison.
    pub(crate) fn blocked(&self) -> Vec<Service> {
        self.seen().blocked.iter().map(|(service, _)| *service).collect()
    }

    /// Builds that run, with their owners.
    pub(crate) fn running(&self) -> Vec<(String, String)> {
        let seen = self.seen();
        let running = seen.builds.iter().filter_map(|(id, build)| match &build.state {
            State::Running { lease } => Some((id.clone(), lease.owner.clone())),
            _ => None,
        });
        running.collect()
    }

    /// Events that the broker never had.
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
            Service::Builder => {
                self.builder(life, &mut seen, before, after);
            }
            Service::Deployer => self.deployer(&mut seen, before, after),
            Service::Monitor | Service::Node => {}
        }
    }

    /// 2: what was handled is not handled again, and not after what came later.
    pub(crate) fn advanced(&self, life: &Life, marks: &[Watermark], were: &[u64]) {
        for (mark, was) in marks.iter().zip(were).filter(|(mark, was)| mark.version <= **was) {
            let Watermark { source_kind, source_id, version } = mark;
            let what =
                format!("{} takes version {version} of {source_kind} {source_id} after {was}", life.name());
            self.world.wrong(2, what);
        }
    }

    /// 3: nothing is published that was not committed.
    pub(crate) fn publishing(&self, service: Service, event: &Event) {
        if !self.seen().committed.contains(&event.id) {
            self.world.wrong(3, format!("{service} publishes what it did not commit: {event:?}"));
        }
    }

    /// The broker has it, or said so.
    pub(crate) fn published(&self, event: &Event) {
        self.seen().published.insert(event.id);
    }

    fn deployer(&self, seen: &mut Seen, before: &[Document], after: &[Document]) {
        let is_about = |document: &&Document| matches!(document.kind.as_str(), "fleet" | "release");
        let servers: BTreeSet<ServerName> = after.iter().filter(is_about).map(server_of).collect();
        for server in servers {
            let of_it = |document: &&Document| is_about(document) && server_of(document) == server;
            let before: Vec<&Document> = before.iter().filter(of_it).collect();
            let after: Vec<&Document> = after.iter().filter(of_it).collect();
            self.server(seen.servers.entry(server.clone()).or_default(), &before, &after);
        }
    }

    fn server(&self, known: &mut Known, before: &[&Document], after: &[&Document]) {
        for release in all::<Release>(after.iter().copied(), "release") {
            let earlier = known.releases.insert(release.number, release.clone());
            if earlier.is_some_and(|earlier| earlier.revision != release.revision) {
                self.world.wrong(12, format!("release {} became another one", release.number));
            }
        }
        let was = all::<Fleet>(before.iter().copied(), "fleet").pop();
        let Some(is) = all::<Fleet>(after.iter().copied(), "fleet").pop() else { return };
        if let Some(was) = &was {
            self.numbers(was, &is);
        }
        self.rollouts(known, was.as_ref(), &is);
        for conviction in &is.quarantine {
            let is_new = was.as_ref().is_none_or(|was| !was.quarantine.contains(conviction));
            if is_new {
                self.convicted(known, &is, conviction);
            }
        }
        known.fleet = Some(is);
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

    fn rollouts(&self, known: &Known, was: Option<&Fleet>, is: &Fleet) {
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
            let convicted = known.releases.get(&rollout.to).is_some_and(is_convicted);
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
                RolloutState::Succeeded => self.succeeded(known, is, rollout),
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

    /// 15: in truth, and not only as far as the deployer knows, an instance in each place was asked and answered from the
    /// beginning of the soak to its end.
    fn succeeded(&self, known: &Known, fleet: &Fleet, rollout: &Rollout) {
        let Some(target) = known.releases.get(&rollout.to) else { return };
        let machine = self.machine.lock().unwrap();
        let soak = target.policy().soak.as_duration();
        for ordinal in 0..target.replicas() {
            let soaked = fleet.instances.iter().any(|(id, instance)| {
                let well = machine.instances.get(id).and_then(|held| held.well);
                id.ordinal == ordinal
                    && instance.content == target.content()
                    && well.is_some_and(|(first, last)| last - first >= soak)
            });
            if !soaked {
                self.world.wrong(15, format!("{} succeeded, and place {ordinal} had no soak", rollout.id));
            }
        }
        // Whatever is bad stops to answer well before a soak is over.
        let image = self.outside.image(&target.revision.image_digest);
        if let Some(image) = image.filter(|image| image.nature.is_bad()) {
            let what = format!("{} succeeded, and its image is one that {}", rollout.id, image.nature.word());
            self.world.wrong(15, what);
        }
        if fleet.last_good != rollout.to {
            self.world.wrong(15, format!("{} succeeded, and is not the last good release", rollout.id));
        }
    }

    /// 5: a release is convicted for what it does, or because a person said so: not for what Kiln's own parts, the broker
    /// or the clock do.
    fn convicted(&self, known: &Known, fleet: &Fleet, conviction: &Quarantine) {
        let Some(release) = known.releases.get(&conviction.release) else { return };
        let image = self.outside.image(&release.revision.image_digest);
        let bad = image.is_none_or(|image| image.nature.is_bad());
        let by_hand =
            fleet.rollout.iter().chain(&fleet.finished).any(|r| r.cause.kind == CauseKind::Rollback);
        if !bad && !by_hand && !known.excused.contains(&release.number) {
            let what =
                format!("release {} was convicted, and is good: {}", release.number, conviction.reason);
            self.world.wrong(5, what);
        }
    }
}
