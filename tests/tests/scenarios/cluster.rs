//! The broker as a cluster of three, of which one is killed.

use std::time::Duration;

use kiln_api::builder::ListBuildsRequest;
use kiln_tests::Result;
use kiln_tests::load::fetch;
use kiln_tests::random::Random;
use kiln_tests::server::Web;
use kiln_tests::site::{Site, full};
use kiln_tests::wait::until;

#[tokio::test(flavor = "multi_thread")]
async fn with_a_server_of_the_brokers_cluster_killed_the_loop_goes_on() -> Result<()> {
    let (site, mut cluster) = Site::up_on_cluster("cluster")?;
    let mut streams = cluster.streams()?;
    streams.sort();
    let names: Vec<_> = streams.iter().map(|(name, _, copies)| (name.as_str(), *copies)).collect();
    assert_eq!(names, [("KILN_CLUSTER", 3), ("KILN_DEAD_CLUSTER", 3), ("KILN_IN_CLUSTER", 3)]);

    let web = Web::start(site).await?;
    let load = web.load();
    let mut random = Random::seeded();
    let rounds: u64 = if full() { 10 } else { 2 };
    for release in 2..2 + rounds {
        cluster.whole().await?;
        // Who leads the events is missed most: a new leader has to be found on the way.
        let streams = cluster.streams()?;
        let (_, leader, _) = streams.iter().find(|(name, ..)| name == "KILN_CLUSTER").ok_or("no events")?;
        let delay = Duration::from_millis(random.below(6000));
        let said = format!("release {release}");
        let told = |error| format!("{random}: server {leader} killed after {delay:?}: {error}");
        web.say(&said)?;
        tokio::time::sleep(delay).await;
        cluster.kill(*leader)?;
        web.site.settled("web", release, Duration::from_secs(90)).await.map_err(told)?;
        assert!(fetch(web.address(), "/").await?.contains(&format!("Hello {said}")), "{said}");
        // What went on did not do so by the resyncs alone.
        until("the event of the rollout", Duration::from_secs(30), async || web.site.heard(release))
            .await
            .map_err(told)?;
        cluster.revive(*leader)?;
        let builds = web.site.builder().list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
        assert_eq!(builds.len() as u64, release, "{random}: one for each cause: {builds:?}");
    }
    load.stop().await.unfailing(1000)?;
    web.site.down()
}
