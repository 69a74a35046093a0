//! Whether a site is at rest, and where it should be.

use std::collections::BTreeSet;

use kiln_api::types;
use kiln_builder_core::server::Server;
use kiln_deployer_core::{Fleet, Release};
use kiln_model::event::Service;
use kiln_model::name::{InstanceId, ServerName};
use kiln_store::{Store as _, decode};
use tokio::time::Instant;

use crate::node::{Held, Machine};
use crate::outside::{Definition, SIDE};
use crate::site::Site;

/// The server that stories are about.
pub(crate) fn web() -> ServerName {
    "web".parse().unwrap()
}

/// Why what is at rest is not judged by what should run.
pub(crate) type Unjudged = Option<&'static str>;

/// Why it is not at rest; none where it is.
pub(crate) async fn unsettled(site: &Site) -> Option<String> {
    look(site).await.err()
}

/// That it is at rest, and where it should be as far as that can be said.
///
/// # Errors
/// Why it is not.
pub(crate) async fn look(site: &Site) -> Result<Unjudged, String> {
    let server = known(site, "web").await.ok_or("no server was applied")?;
    planned(&server)?;
    let unpublished = site.invariants.unpublished();
    if unpublished > 0 {
        return Err(format!("{unpublished} events were never published"));
    }
    if let Some(build) = site.invariants.builds().iter().find(|build| !build.state.has_ended()) {
        return Err(format!("{} is {}", build.id, build.state.as_str()));
    }
    let name = web();
    // A build that fails its tests goes nowhere, and says so.
    let failed = server.failure.as_ref().is_some_and(|failure| !failure.transient);
    let Some(fleet) = site.invariants.fleet(&name) else {
        return if failed { Ok(Some("nothing was ever built")) } else { Err("there is no fleet".to_owned()) };
    };
    moves(&fleet)?;
    if fleet.is_halted() {
        return halted(site, &fleet);
    }
    if fleet.removed && (failed || server.is_quarantined()) {
        return gone(site, &server, &fleet, failed);
    }
    let release = site.invariants.release(&name, fleet.release).ok_or("nothing runs")?;
    machine(site, &fleet, &release)?;
    if site.world.extras().second {
        beside(site).await?;
    }
    expected(site, &server, &fleet, &release)
}

async fn known(site: &Site, name: &str) -> Option<Server> {
    let document = site.disk(Service::Builder).store.get("server", name).await.unwrap();
    Some(decode(&document?, u32::MAX).unwrap())
}

fn planned(server: &Server) -> Result<(), String> {
    if let Some(building) = &server.building {
        return Err(format!("{} is awaited", building.build));
    }
    // Where all that it was is convicted and nothing good is left, as after a removal, it waits for another definition.
    match &server.wanted {
        Some(wanted) if server.effective().is_some() => Err(format!("a plan is wanted: {wanted:?}")),
        _ => Ok(()),
    }
}

fn moves(fleet: &Fleet) -> Result<(), String> {
    if let Some(rollout) = &fleet.rollout {
        return Err(format!("{} is {:?}: {}", rollout.id, rollout.state, rollout.problem));
    }
    match fleet.pending {
        Some(pending) => Err(format!("release {pending} waits")),
        None => Ok(()),
    }
}

/// The other server is at rest too, and runs what it is meant to.
async fn beside(site: &Site) -> Result<(), String> {
    let name: ServerName = SIDE.parse().unwrap();
    let server = known(site, SIDE).await.ok_or("the other server was never applied")?;
    planned(&server)?;
    let Some(fleet) = site.invariants.fleet(&name) else {
        // Its only build was cancelled, and nobody could ask for another where the last commit can't be read.
        let given_up = server.failure.as_ref().is_some_and(|failure| !failure.transient);
        return if given_up { Ok(()) } else { Err("the other server has no fleet".to_owned()) };
    };
    moves(&fleet)?;
    if fleet.is_halted() {
        return Ok(());
    }
    let release = site.invariants.release(&name, fleet.release).ok_or("nothing of the other server runs")?;
    machine(site, &fleet, &release)
}

/// It was removed, and what was applied since then is bad: nothing of it runs.
fn gone(site: &Site, server: &Server, fleet: &Fleet, failed: bool) -> Result<Unjudged, String> {
    let machine = site.invariants.machine.lock().unwrap();
    let mut live = machine.instances.iter().filter(|(id, held)| id.server == fleet.server && held.is_there());
    if let Some((id, _)) = live.next() {
        return Err(format!("{id} runs, and the server was removed"));
    }
    off_edge(&machine, fleet)?;
    let bad = site.outside.definition().is_none_or(|definition| definition.nature.is_bad());
    if bad || site.outside.packages().1.is_bad() {
        return Ok(None);
    }
    if failed {
        // By packages that are mended since then: nothing is in force that asks for them, and a person applies again.
        return Ok(Some("nothing good was left after a removal"));
    }
    if convicts_good(site, fleet) {
        return Ok(Some(BY_HAND));
    }
    // What it was released with was bad. It stays convicted until it changes, and there is nothing else to run.
    let mut convicted =
        fleet.quarantine.iter().filter_map(|it| site.invariants.release(&fleet.server, it.release));
    if convicted.any(|release| release.revision.definition_digest == server.head.digest) {
        return Ok(Some("what was applied after a removal had been convicted with bad packages"));
    }
    Err("nothing runs, and what was applied is good".to_owned())
}

/// There was nothing good to go back to: it says so, and nothing of it runs.
fn halted(site: &Site, fleet: &Fleet) -> Result<Unjudged, String> {
    let machine = site.invariants.machine.lock().unwrap();
    // Or the way back met an accident, as when what it launched hangs: it says so, and what runs stays until somebody acts.
    let back = fleet.finished.as_ref().and_then(|rollout| rollout.back_to);
    if back.is_some_and(|back| site.invariants.is_excused(&fleet.server, back)) && !fleet.problem.is_empty() {
        let live = machine.instances.iter().filter(|(_, held)| held.takes_room());
        let mut live = live.filter(|(id, _)| id.server == fleet.server);
        return match live.find(|(id, _)| !fleet.instances.contains_key(*id)) {
            Some((id, _)) => Err(format!("{id} runs, and the fleet does not know it")),
            None => Ok(Some("an accident on the way back")),
        };
    }
    let of_it = |held: &Held| held.takes_room() && held.spec().server == fleet.server.as_str();
    if let Some((id, _)) = machine.instances.iter().find(|(_, held)| of_it(held)) {
        return Err(format!("{id} runs, and the fleet was given up"));
    }
    off_edge(&machine, fleet)?;
    let failed =
        fleet.finished.as_ref().and_then(|rollout| site.invariants.release(&fleet.server, rollout.to));
    if failed.as_ref().is_some_and(|release| site.invariants.is_excused(&fleet.server, release.number)) {
        return Ok(Some("the first release met an accident"));
    }
    let image = failed.and_then(|release| site.outside.image(&release.revision.image_digest));
    let definition = site.outside.definition();
    let is_bad = |definition: Definition| definition.nature.is_bad();
    if fleet.last_good != 0 || fleet.problem.is_empty() {
        return Err(format!("given up, with release {} good: {}", fleet.last_good, fleet.problem));
    }
    match image {
        Some(image) if image.nature.is_bad() && definition.is_none_or(is_bad) => Ok(None),
        Some(image) if image.nature.is_bad() && site.outside.packages().1.is_bad() => Ok(None),
        image => Err(format!("given up with {image:?}, which is not the newest that is bad")),
    }
}

fn off_edge(machine: &Machine, fleet: &Fleet) -> Result<(), String> {
    let listeners = machine.edge.get(fleet.server.as_str()).map_or(&[][..], |(_, listeners)| listeners);
    match listeners.first() {
        Some(left) => Err(format!("port {} is on the edge, and nothing runs behind it", left.listen)),
        None => Ok(()),
    }
}

/// What runs is what is meant to: nothing less, and nothing left over.
fn machine(site: &Site, fleet: &Fleet, release: &Release) -> Result<(), String> {
    let machine = site.invariants.machine.lock().unwrap();
    let now = Instant::now();
    let live = machine.instances.iter().filter(|(id, held)| id.server == fleet.server && held.is_there());
    let (tests, live): (Vec<_>, Vec<_>) = live.partition(|(_, held)| held.spec().role() == types::Role::Test);
    if let Some((id, _)) = tests.first() {
        return Err(format!("{id} is left over from an image's tests"));
    }
    let live: BTreeSet<&InstanceId> = live.into_iter().map(|(id, _)| id).collect();
    let meant: BTreeSet<&InstanceId> = fleet.instances.keys().collect();
    if live != meant {
        return Err(format!("{live:?} run, and {meant:?} are meant to"));
    }
    let on_edge = machine.on_edge(fleet.server.as_str());
    if on_edge.iter().collect::<BTreeSet<_>>() != meant {
        return Err(format!("{on_edge:?} are on the edge, and {meant:?} are meant to be"));
    }
    let replicas = release.replicas() as usize;
    if live.len() != replicas {
        return Err(format!("{} of {replicas} run", live.len()));
    }
    for (id, instance) in &fleet.instances {
        if !instance.is_up() || instance.content != release.content() {
            return Err(format!("{id} is {:?} and {:?}", instance.state, instance.health));
        }
        if !machine.instances.get(id).is_some_and(|held| held.answers(now)) {
            return Err(format!("{id} does not answer"));
        }
    }
    Ok(())
}

const BY_HAND: &str = "a person or an accident convicted what is good";

fn convicts_good(site: &Site, fleet: &Fleet) -> bool {
    fleet.quarantine.iter().any(|conviction| {
        let convicted = site.invariants.release(&fleet.server, conviction.release);
        let image = convicted.and_then(|release| site.outside.image(&release.revision.image_digest));
        image.is_none_or(|image| !image.nature.is_bad())
    })
}

/// What should run, by what was committed, what the archive has, and what proved bad.
fn expected(site: &Site, server: &Server, fleet: &Fleet, release: &Release) -> Result<Unjudged, String> {
    let image = site.outside.image(&release.revision.image_digest).ok_or("what runs was never baked")?;
    if image.nature.is_bad() {
        return Err(format!("release {} is bad, and runs", release.number));
    }
    let (packages, of_packages) = site.outside.packages();
    if convicts_good(site, fleet) {
        return Ok(Some(BY_HAND));
    }
    // 13: it says so, and waits for a person.
    if server.handled.iter().any(|handled| handled.tripped.is_some()) {
        return Ok(Some("what flaps came back too often, and is left alone"));
    }
    let newest = site.invariants.newest_release(&fleet.server).filter(|newest| *newest != release.number);
    if newest.is_some_and(|newest| site.invariants.is_excused(&fleet.server, newest)) {
        return Ok(Some("the newest release met an accident"));
    }
    let failed = server.failure.as_ref().is_some_and(|failure| !failure.transient);
    let Some(definition) = site.outside.definition() else {
        // What was seen before it is what the builder has taken.
        if failed || server.is_quarantined() {
            return Ok(None);
        }
        if release.revision.definition_digest != server.head.digest {
            return Err("what was committed before what can't be read does not run".to_owned());
        }
        return Ok(None);
    };
    if failed && (definition.nature.is_bad() || of_packages.is_bad()) {
        return Ok(None);
    }
    if !of_packages.is_bad() && image.packages != packages {
        return Err(format!("packages {} run, and {packages} are there", image.packages));
    }
    if server.is_quarantined() {
        return Ok(None);
    }
    if definition.nature.is_bad() {
        return Err("a bad definition is neither convicted nor failed".to_owned());
    }
    let run = release.revision.run.env.get("RUN").map(String::as_str);
    if image.image != definition.image || run != Some(definition.run.to_string().as_str()) {
        return Err(format!("image {} with run {run:?} runs, and wanted is {definition}", image.image));
    }
    Ok(None)
}
