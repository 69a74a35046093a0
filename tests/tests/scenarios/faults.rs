//! Services are killed, stopped and taken away at any moment: traffic flows, work goes on, nothing is left over.

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_api::builder::{BuildState, ListBuildsRequest};
use kiln_api::monitor::ListSignalsRequest;
use kiln_tests::Result;
use kiln_tests::load::fetch;
use kiln_tests::netns::Neighbour;
use kiln_tests::random::Random;
use kiln_tests::server::Web;
use kiln_tests::site::{Site, full};
use kiln_tests::wait::until;
use rustix::process::Signal;

const SERVICES: [&str; 4] = ["builder", "deployer", "monitor", "node"];

#[tokio::test(flavor = "multi_thread")]
async fn traffic_flows_while_everything_of_kiln_is_down() -> Result<()> {
    let web = Web::start(Site::up("down")?).await?;
    let neighbour = Neighbour::new(2)?;
    let beside = neighbour.load(web.port, "Hello")?;
    let load = web.load();
    for process in SERVICES {
        web.site.signal(process, Signal::KILL)?;
        until("traffic", Duration::from_secs(10), async || {
            fetch(web.address(), "/").await.map(drop).map_err(Into::into)
        })
        .await?;
    }
    web.settled(1).await?;

    web.site.kiln(&["down", "--keep-instances"])?;
    let before = load.requests();
    until("traffic with nothing of Kiln running", Duration::from_secs(30), async || {
        let more = load.requests() - before;
        if more > 1000 { Ok(()) } else { Err(format!("{more} requests").into()) }
    })
    .await?;
    web.site.kiln(&["up"])?;
    let fleet = web.settled(1).await?;
    assert!(fleet.instances.iter().all(|i| i.attempt <= 3), "the same instances: {:?}", fleet.instances);
    load.stop().await.unfailing(1000)?;
    beside.stop()?.unfailing(300)?;
    web.site.down()
}

/// SIGKILL of each service, and of the broker, at a random moment of the way from a commit to the replaced fleet.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_killed_at_any_moment_goes_on_where_it_was() -> Result<()> {
    let rounds: u64 = if full() { 50 } else { 5 };
    let web = Web::start(Site::up("kills")?).await?;
    let mut random = Random::seeded();
    let victims = ["builder", "deployer", "monitor", "node", "nats"];
    let first = random.below(victims.len() as u64);
    let usual = until("the node's spare namespaces", Duration::from_secs(30), async || {
        let kinds = kinds(&web.site)?;
        if kinds.get("netns") > Some(&3) { Ok(kinds) } else { Err(format!("{kinds:?}").into()) }
    })
    .await?;
    let neighbour = Neighbour::new(3)?;
    let beside = neighbour.load(web.port, "Hello")?;
    let load = web.load();
    for round in 1..=rounds {
        // Each in its turn, so that few rounds meet all of them.
        let victim = victims[usize::try_from((first + round) % victims.len() as u64)?];
        let delay = Duration::from_millis(random.below(6000));
        let release = round + 1;
        web.say(&format!("round {round}"))?;
        tokio::time::sleep(delay).await;
        web.site.signal(victim, Signal::KILL)?;
        let told = |error| format!("round {round}, {random}: {victim} killed after {delay:?}: {error}");
        web.site.settled("web", release, Duration::from_secs(90)).await.map_err(told)?;
        assert!(fetch(web.address(), "/").await?.contains(&format!("Hello round {round}")), "round {round}");
        // The victim may be on its way up still.
        until("one build for each cause, and nothing but the fleet", Duration::from_secs(30), async || {
            let builds =
                web.site.builder().list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
            let succeeded = builds.iter().filter(|build| build.state() == BuildState::Succeeded).count();
            if u64::try_from(succeeded)? != release || builds.len() != succeeded {
                return Err(format!("{builds:?}").into());
            }
            let kinds = kinds(&web.site)?;
            if kinds == usual { Ok(()) } else { Err(format!("{kinds:?}, usual is {usual:?}").into()) }
        })
        .await
        .map_err(told)?;
        // Nothing happened to an instance: a service that came back must not think so.
        let signals = web.site.monitor().list_signals(ListSignalsRequest::default()).await;
        let signals = signals.map_or_else(|_| Vec::new(), |answer| answer.into_inner().signals);
        let wrong: Vec<_> =
            signals.iter().filter(|s| ["gone", "unhealthy"].contains(&s.cause.as_str())).collect();
        assert!(wrong.is_empty(), "round {round}, {random}: {victim} killed after {delay:?}: {wrong:?}");
    }
    load.stop().await.unfailing(1000)?;
    beside.stop()?.unfailing(1000)?;
    web.site.down()
}

/// How many of each kind of thing the site has on the machine: cgroups, mounts, namespaces, leases and so on.
fn kinds(site: &Site) -> Result<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for thing in site.on_machine()? {
        let kind = thing.split([':', ' ']).next().unwrap_or_default();
        // An instance's workers come and go.
        if kind != "process" {
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
    }
    Ok(kinds)
}
