//! How many instances there are, and how many of them answer, while they are replaced; and what may not be gone that they
//! run from.

use std::collections::BTreeSet;

use kiln_deployer_core::Fleet;
use kiln_model::digest::Digest;
use kiln_model::name::InstanceId;
use tokio::time::Instant;

use super::{ACKNOWLEDGED, Invariants, Known, Seen};
use crate::node::Machine;

impl Invariants {
    /// 1 and 11.
    pub(crate) fn launched(&self, machine: &Machine, id: &InstanceId) {
        let Some(held) = machine.instances.get(id) else { return };
        // An image's tests come before anybody else has it; the node alone looks at its signature then.
        if !held.is_fleet() {
            return;
        }
        let digest: Digest = held.spec().image_digest.parse().unwrap();
        if !machine.verified.contains(&digest) {
            self.world.wrong(11, format!("{id} is launched, and nobody asked whether its image is right"));
        }
        let live: Vec<_> = machine
            .instances
            .values()
            .filter(|other| {
                other.is_fleet() && other.takes_room() && other.spec().server == held.spec().server
            })
            .collect();
        let seen = self.seen();
        let known = seen.of(&id.server);
        let most = between(known).chain([u64::from(held.spec().run.as_ref().unwrap().replicas)]).max();
        let most = usize::try_from(most.unwrap_or(0) + self.world.extras().policy.surge).unwrap();
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
        let known = seen.of(&server.parse().unwrap());
        // Where nothing has proved good yet, there is nothing to keep.
        let kept = |fleet: &Fleet| !fleet.removed && fleet.last_good != 0;
        if are >= were || !known.and_then(|known| known.fleet.as_ref()).is_some_and(kept) {
            return;
        }
        let least = between(known).min().unwrap_or(0).saturating_sub(self.world.extras().policy.unavailable);
        let least = usize::try_from(least).unwrap();
        let fleet = machine.instances.values().filter(|held| held.is_fleet() && held.spec().server == server);
        let broken =
            fleet.filter(|held| !held.is_well(now) && held.course.ready.is_some_and(|r| r <= now)).count();
        if are + broken < least {
            self.world.wrong(1, format!("{are} of {least} answer on the edge, {were} did before"));
        }
    }

    /// 6: an image is forgotten that something runs from, or that its fleet is on, moves to or could go back to.
    pub(super) fn collected(&self, seen: &Seen, image: &Digest) {
        let machine = self.machine.lock().unwrap();
        let of_it = |held: &&crate::node::Held| held.spec().image_digest.parse() == Ok(*image);
        if let Some(held) = machine.instances.values().filter(|held| held.takes_room()).find(of_it) {
            self.world.wrong(6, format!("{image} is collected, and {} runs from it", held.spec().id));
        }
        for known in seen.servers.values() {
            let Some(fleet) = known.fleet.as_ref().filter(|fleet| !fleet.removed) else { continue };
            let moves = fleet.rollout.iter().flat_map(|r| [Some(r.from), Some(r.to), r.back_to]).flatten();
            let kept = fleet.goods.iter().copied();
            let needed: BTreeSet<u64> =
                moves.chain([fleet.release, fleet.last_good]).chain(fleet.pending).chain(kept).collect();
            let image_of = |number: &u64| known.releases.get(number).map(|r| r.revision.image_digest);
            if let Some(number) = needed.iter().find(|number| image_of(number) == Some(*image)) {
                self.world.wrong(
                    6,
                    format!("{image} is collected, and {} needs its release {number}", fleet.server),
                );
            }
        }
    }
}

/// How many instances the releases want that a fleet is between.
fn between(known: Option<&Known>) -> impl Iterator<Item = u64> {
    let numbers = known.into_iter().flat_map(|known| {
        let fleet = known.fleet.iter();
        let numbers = fleet.flat_map(|fleet| {
            let rollout = fleet.rollout.iter().flat_map(|r| [Some(r.from), Some(r.to), r.back_to]);
            rollout.chain([Some(fleet.release)]).flatten().collect::<Vec<_>>()
        });
        numbers.filter_map(|number| known.releases.get(&number))
    });
    numbers.map(|release| release.replicas().into())
}
