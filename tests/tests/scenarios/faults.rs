//! Services are killed, stopped and taken away at any moment: traffic flows, work goes on, nothing is left over.

use std::time::Duration;

use kiln_api::builder::{BuildState, ListBuildsRequest};
use kiln_tests::Result;
use kiln_tests::load::fetch;
use kiln_tests::site::{Site, full};
use kiln_tests::wait::until;
use rustix::process::Signal;

use kiln_tests::server::Web;

const SERVICES: [&str; 4] = ["builder", "deployer", "monitor", "node"];

#[tokio::test(flavor = "multi_thread")]
async fn traffic_flows_while_everything_of_kiln_is_down() -> Result<()> {
    let web = Web::start(Site::up("down")?).await?;
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
    let summary = load.stop().await;
    assert_eq!(summary.failures, [], "among {} requests", summary.requests);
    web.site.down()
}

/// SIGKILL of one service at a random moment of the way from a commit to the replaced fleet.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_killed_at_any_moment_goes_on_where_it_was() -> Result<()> {
    let rounds = if full() { 50 } else { 4 };
    let web = Web::start(Site::up("kills")?).await?;
    let seed = std::env::var("KILN_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_secs())
    });
    println!("KILN_TEST_SEED={seed}");
    let mut random = seed | 1;
    let mut next = move |bound: u64| {
        // xorshift64: enough to spread the moments, and the seed gives them again.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    let load = web.load();
    for round in 1..=rounds {
        let victim = SERVICES[usize::try_from(next(4))?];
        let delay = Duration::from_millis(next(6000));
        let release = u64::try_from(round)? + 1;
        web.say(&format!("round {round}"))?;
        tokio::time::sleep(delay).await;
        web.site.signal(victim, Signal::KILL)?;
        web.site.settled("web", release, Duration::from_secs(90)).await.map_err(|error| {
            format!("round {round}, seed {seed}: {victim} killed after {delay:?}: {error}")
        })?;
        assert!(fetch(web.address(), "/").await?.contains(&format!("Hello round {round}")), "round {round}");
        let builds = web.site.builder().list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
        let succeeded = builds.iter().filter(|build| build.state() == BuildState::Succeeded).count();
        assert_eq!(u64::try_from(succeeded)?, release, "round {round}: one build for each cause");
        until("nothing but the fleet to be left", Duration::from_secs(30), async || {
            let listed =
                web.site.engine().list_instances(kiln_api::engine::ListInstancesRequest::default()).await?;
            let live = listed.into_inner().instances.into_iter().filter(|i| i.ended.is_none()).count();
            if live == 3 { Ok(()) } else { Err(format!("{live} instances").into()) }
        })
        .await?;
    }
    let summary = load.stop().await;
    assert_eq!(summary.failures, [], "among {} requests", summary.requests);
    web.site.down()
}
