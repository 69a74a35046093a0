//! Whether a site is at rest, and where it should be.

use std::collections::BTreeSet;

use kiln_api::types;
use kiln_builder_core::server::Server;
use kiln_deployer_core::{Fleet, Release};
use kiln_model::event::Service;
use kiln_model::name::InstanceId;
use kiln_store::{Store as _, decode};
use tokio::time::Instant;

use crate::outside::Definition;
use crate::site::Site;

/// Why it is not at rest; none where it is.
pub(crate) async fn unsettled(site: &Site) -> Option<String> {
    look(site).await.err()
}

async fn look(site: &Site) -> Result<(), String> {
    let document = site.disk(Service::Builder).store.get("server", "web").await.unwrap();
    let server: Server = decode(&document.ok_or("no server was applied")?, u32::MAX).unwrap();
    if let Some(building) = &server.building {
        return Err(format!("{} is awaited", building.build));
    }
    if let Some(wanted) = &server.wanted {
        return Err(format!("a plan is wanted: {wanted:?}"));
    }
    if let Some(build) = site.invariants.builds().iter().find(|build| !build.state.has_ended()) {
        return Err(format!("{} is {}", build.id, build.state.as_str()));
    }
    // A build that fails its tests goes nowhere, and says so.
    let failed = server.failure.as_ref().is_some_and(|failure| !failure.transient);
    let Some(fleet) = site.invariants.fleet() else {
        return if failed { Ok(()) } else { Err("there is no fleet".to_owned()) };
    };
    if let Some(rollout) = &fleet.rollout {
        return Err(format!("{} is {:?}: {}", rollout.id, rollout.state, rollout.problem));
    }
    if fleet.pending.is_some() {
        return Err(format!("release {:?} waits", fleet.pending));
    }
    if fleet.is_halted() {
        return halted(site, &fleet);
    }
    let release = site.invariants.release(fleet.release).ok_or("nothing runs")?;
    machine(site, &fleet, &release)?;
    let unpublished = site.invariants.unpublished();
    if unpublished > 0 {
        return Err(format!("{unpublished} events were never published"));
    }
    expected(site, &server, &fleet, &release)
}

/// There was nothing good to go back to: it says so, and nothing of it runs.
fn halted(site: &Site, fleet: &Fleet) -> Result<(), String> {
    let machine = site.invariants.machine.lock().unwrap();
    // Or the way back met an accident, as when what it launched hangs: it says so, and what runs stays until somebody acts.
    let back = fleet.finished.as_ref().and_then(|rollout| rollout.back_to);
    if back.is_some_and(|back| site.invariants.is_excused(back)) && !fleet.problem.is_empty() {
        let mut live = machine.instances.iter().filter(|(_, held)| held.takes_room());
        return match live.find(|(id, _)| !fleet.instances.contains_key(*id)) {
            Some((id, _)) => Err(format!("{id} runs, and the fleet does not know it")),
            None => Ok(()),
        };
    }
    if let Some((id, _)) = machine.instances.iter().find(|(_, held)| held.takes_room()) {
        return Err(format!("{id} runs, and the fleet was given up"));
    }
    let failed = fleet.finished.as_ref().and_then(|rollout| site.invariants.release(rollout.to));
    if failed.as_ref().is_some_and(|release| site.invariants.is_excused(release.number)) {
        return Ok(());
    }
    let image = failed.and_then(|release| site.outside.image(&release.revision.image_digest));
    let definition = site.outside.definition();
    let is_bad = |definition: Definition| definition.nature.is_bad();
    if fleet.last_good != 0 || fleet.problem.is_empty() {
        return Err(format!("given up, with release {} good: {}", fleet.last_good, fleet.problem));
    }
    match image {
        Some(image) if image.nature.is_bad() && definition.is_none_or(is_bad) => Ok(()),
        Some(image) if image.nature.is_bad() && site.outside.packages().1.is_bad() => Ok(()),
        image => Err(format!("given up with {image:?}, which is not the newest that is bad")),
    }
}

/// What runs is what is meant to: nothing less, and nothing left over.
fn machine(site: &Site, fleet: &Fleet, release: &Release) -> Result<(), String> {
    let machine = site.invariants.machine.lock().unwrap();
    let now = Instant::now();
    let live = machine.instances.iter().filter(|(_, held)| held.is_there());
    let (tests, live): (Vec<_>, Vec<_>) = live.partition(|(_, held)| held.spec().role() == types::Role::Test);
    if let Some((id, _)) = tests.first() {
        return Err(format!("{id} is left over from an image's tests"));
    }
    let live: BTreeSet<&InstanceId> = live.into_iter().map(|(id, _)| id).collect();
    let meant: BTreeSet<&InstanceId> = fleet.instances.keys().collect();
    if live != meant {
        return Err(format!("{live:?} run, and {meant:?} are meant to"));
    }
    let on_edge = machine.on_edge("web");
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

/// What should run, by what was committed, what the archive has, and what proved bad.
fn expected(site: &Site, server: &Server, fleet: &Fleet, release: &Release) -> Result<(), String> {
    let image = site.outside.image(&release.revision.image_digest).ok_or("what runs was never baked")?;
    if image.nature.is_bad() {
        return Err(format!("release {} is bad, and runs", release.number));
    }
    let (packages, of_packages) = site.outside.packages();
    let convicts_good = fleet.quarantine.iter().any(|conviction| {
        let convicted = site.invariants.release(conviction.release);
        let image = convicted.and_then(|release| site.outside.image(&release.revision.image_digest));
        image.is_none_or(|image| !image.nature.is_bad())
    });
    // A person, or a fault of the machine, said otherwise.
    let newest = site.invariants.newest_release().filter(|newest| *newest != release.number);
    if convicts_good || newest.is_some_and(|newest| site.invariants.is_excused(newest)) {
        return Ok(());
    }
    // With a newest commit that can't be read, it depends on what was seen before it.
    let Some(definition) = site.outside.definition() else { return Ok(()) };
    let failed = server.failure.as_ref().is_some_and(|failure| !failure.transient);
    if failed && (definition.nature.is_bad() || of_packages.is_bad()) {
        return Ok(());
    }
    if !of_packages.is_bad() && image.packages != packages {
        return Err(format!("packages {} run, and {packages} are there", image.packages));
    }
    if server.is_quarantined() {
        return Ok(());
    }
    if definition.nature.is_bad() {
        return Err("a bad definition is neither convicted nor failed".to_owned());
    }
    let run = release.revision.run.env.get("RUN").map(String::as_str);
    if image.image != definition.image || run != Some(definition.run.to_string().as_str()) {
        return Err(format!("image {} with run {run:?} runs, and wanted is {definition}", image.image));
    }
    Ok(())
}
