//! A site in one file, and out of it again.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_api::deployer::{Fleet, InstanceState};
use kiln_tests::Result;
use kiln_tests::command::both;
use kiln_tests::repo::Repo;
use kiln_tests::server::{SETTLES, Web};
use kiln_tests::site::{Site, settled};
use kiln_tests::wait::until;
use serde_json::Value;

fn texts<'a>(document: &'a Value, list: &str, field: &str) -> Vec<&'a str> {
    document[list].as_array().into_iter().flatten().filter_map(|it| it[field].as_str()).collect()
}

fn live(fleet: &Fleet) -> BTreeSet<String> {
    let there = fleet.instances.iter().filter(|it| it.state() == InstanceState::Running);
    there.map(|instance| instance.id.clone()).collect()
}

/// Some of both releases run.
fn midway(fleet: &Fleet) -> Result<()> {
    let running: Vec<_> = fleet.instances.iter().filter(|it| it.state() == InstanceState::Running).collect();
    let of = |release| running.iter().filter(|it| it.release == release && it.on_edge).count();
    match (fleet.rollout.is_some(), of(1), of(2)) {
        (true, 1.., 1..) => Ok(()),
        found => Err(format!("{found:?}").into()),
    }
}

/// Of the chain of what commands did to the site's keys, which nobody published.
fn own_head(site: &Site) -> Result<String> {
    let told = site.try_kiln(&["-o", "json", "audit", "verify"])?;
    let found: Value = serde_json::from_slice(&told.stdout)?;
    Ok(found["site"]["keep"].as_str().ok_or_else(|| both(&told))?.to_owned())
}

/// Backed up under load while a rollout is under way, taken down, and restored into an empty folder.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_site_serves_again_and_does_nothing_that_was_not_due() -> Result<()> {
    // Long enough for a backup within one of its steps, and on a machine that is busy for all of them once more: what the
    // backup saw in place has to be put there again.
    let slow = |repo: &Repo| {
        repo.replace("web/server.yaml", "soak: 300ms, deadline: 20s", "soak: 3s, deadline: 90s")
    };
    let web = Web::start_with(Site::up("backup")?, slow).await?;
    let folder = web.folder().to_owned();
    let (file, key) =
        (folder.join("site.kiln").display().to_string(), folder.join("key").display().to_string());
    let load = web.load();
    web.say("second")?;
    until("a rollout midway", SETTLES, async || midway(&web.site.fleet("web").await?)).await?;
    let written = web.site.json(&["backup", &file, "--key", &key])?;
    midway(&web.site.fleet("web").await?).map_err(|why| format!("no longer: {why}"))?;
    let history = web.site.json(&["history", "web", "-n", "0"])?;
    let audit = web.site.json(&["audit", "-n", "0"])?;
    let before = live(&web.settled(2).await?);
    load.stop().await.unfailing(100)?;
    println!("a backup of {} bytes with {} images", written["bytes"], written["images"]);
    assert_eq!(written["images"], 2, "the one on its way, and the one to go back to");
    let again = web.site.try_kiln(&["backup", &file, "--key", &key])?;
    assert!(both(&again).contains("there already"), "{}", both(&again));

    web.site.json(&["audit", "verify"])?;
    web.site.erase()?;
    let refused = web.site.try_kiln(&["restore", &file, "--key", "/dev/null"])?;
    assert!(!refused.status.success());
    web.site.kiln(&["restore", &file, "--key", &key])?;
    web.site.kiln(&["up"])?;
    // The rollout goes on to its end. At first the fleet is as the store has it: the node has not been asked yet.
    until("other instances than those that are gone", SETTLES, async || {
        let fleet = web.site.fleet("web").await?;
        settled(&fleet, 2)?;
        if live(&fleet).is_disjoint(&before) { Ok(()) } else { Err("those from before".into()) }
    })
    .await?;
    let load = web.load();

    // Longer than two resyncs and polls.
    tokio::time::sleep(Duration::from_secs(12)).await;
    load.stop().await.unfailing(1000)?;
    let after = web.site.json(&["history", "web", "-n", "0"])?;
    for (list, field) in [("builds", "id"), ("rollouts", "id"), ("signals", "id")] {
        let (before, after) = (texts(&history, list, field), texts(&after, list, field));
        // What died with the machine is replaced, which is a signal and no rollout.
        let news: Vec<_> = after.iter().filter(|id| !before.contains(id)).collect();
        assert!(list == "signals" || news.is_empty(), "{list}: {news:?}");
        assert!(before.iter().all(|id| after.contains(id)), "{list} were lost: {before:?} {after:?}");
    }
    // The records go on, over the restore, and fit.
    let records = web.site.json(&["audit", "-n", "0"])?;
    let actions = texts(&records, "records", "action");
    // Of three stores, and of the keys.
    assert_eq!(actions.iter().filter(|action| **action == "restore").count(), 4, "{actions:?}");
    assert!(actions.len() > texts(&audit, "records", "action").len());
    until("the records to be sealed", Duration::from_secs(10), async || {
        let found = web.site.json(&["audit", "verify", "--head", &own_head(&web.site)?])?;
        let waiting = found["services"].as_array().into_iter().flatten().any(|it| it["not_sealed_yet"] != 0);
        if waiting { Err(found.to_string().into()) } else { Ok(()) }
    })
    .await?;
    // The loop goes on: a commit, and the way back.
    web.say("third")?;
    until("a release that nobody has seen", Duration::from_secs(120), async || {
        let fleet = web.site.fleet("web").await?;
        settled(&fleet, fleet.release)?;
        // Numbers go on above all that were given out after the backup.
        if fleet.release > 2 { Ok(()) } else { Err(fleet.problem.into()) }
    })
    .await?;
    web.site.kiln(&["rollback", "web"])?;
    web.settled(2).await?;
    web.site.down()
}
