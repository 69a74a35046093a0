//! An instance that is killed costs what was in flight there and 100 ms of traffic, and is replaced.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kiln_api::deployer::{Fleet, RolloutState};
use kiln_tests::Result;
use kiln_tests::load::Summary;
use kiln_tests::netns::Neighbour;
use kiln_tests::server::{SETTLES, Web};
use kiln_tests::site::{Site, settled};
use kiln_tests::wait::until;
use rustix::process::{Pid, Signal, kill_process};

const BOUND: SignedDuration = SignedDuration::from_millis(100);

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_instance_is_replaced_and_costs_what_was_in_flight() -> Result<()> {
    let web = Web::start(Site::up("killed")?).await?;
    let neighbour = Neighbour::new()?;
    let beside = neighbour.load(web.port, "Hello")?;
    let load = web.load();
    until("some requests", Duration::from_secs(10), async || {
        if load.requests() > 100 { Ok(()) } else { Err("few".into()) }
    })
    .await?;

    let mut killed = Vec::new();
    for _ in 0..3 {
        let fleet = web.settled(1).await?;
        let (id, at) = kill_one(&web, &fleet, 1).await?;
        killed.push(at);
        until("a replacement", SETTLES, async || {
            let fleet = web.site.fleet("web").await?;
            settled(&fleet, 1)?;
            if fleet.instances.iter().any(|i| i.id == id && i.on_edge) {
                return Err(format!("{id} is still there").into());
            }
            Ok(())
        })
        .await?;
    }

    // While the fleet is being replaced: the edge is flipped for other reasons at the same time.
    web.say("two")?;
    let fleet = until("the rollout to be half way", SETTLES, async || {
        let fleet = web.site.fleet("web").await?;
        let running = fleet.rollout.as_ref().is_some_and(|r| r.state() == RolloutState::Running);
        let new_on_edge = fleet.instances.iter().any(|i| i.release == 2 && i.on_edge);
        if running && new_on_edge { Ok(fleet) } else { Err(format!("{fleet:?}").into()) }
    })
    .await?;
    killed.push(kill_one(&web, &fleet, 1).await?.1);
    web.settled(2).await?;
    // From beside come half as many.
    until("enough requests", Duration::from_secs(20), async || {
        if load.requests() > 2_500 { Ok(()) } else { Err(format!("{} so far", load.requests()).into()) }
    })
    .await?;

    for (whence, summary) in [("from 127.0.0.1", load.stop().await), ("from beside", beside.stop()?)] {
        assert!(summary.requests > 1000, "there was load {whence}: {}", summary.requests);
        println!("{whence}: {} of {} requests failed", summary.failed, summary.requests);
        only_in_time(&summary, &killed)?;
    }
    web.site.down()
}

/// Kills the first process of an instance of a release that is on the edge; says whose, and when.
async fn kill_one(web: &Web, fleet: &Fleet, release: u64) -> Result<(String, Timestamp)> {
    let on_edge = |i: &&kiln_api::deployer::Instance| i.on_edge && i.release == release;
    let id = fleet.instances.iter().find(on_edge).ok_or("an instance is on the edge")?.id.clone();
    let pid = i32::try_from(web.pid_of(&id).await?)?;
    let at = Timestamp::now();
    kill_process(Pid::from_raw(pid).ok_or("a process id")?, Signal::KILL)?;
    Ok((id, at))
}

/// Every failed request was under way when an instance was killed, or began within the bound after that.
fn only_in_time(summary: &Summary, killed: &[Timestamp]) -> Result<()> {
    for failure in &summary.failures {
        if !killed.iter().any(|at| failure.began <= *at + BOUND && failure.ended >= *at) {
            return Err(format!("killed at {killed:?}, and failed at another time: {failure:?}").into());
        }
    }
    Ok(())
}
