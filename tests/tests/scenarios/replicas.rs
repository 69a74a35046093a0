//! Two of builder, deployer and monitor each: nothing is done twice, and one that is gone or stands still is not missed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_api::builder::{BuildState, ListBuildsRequest, ListSourcesRequest};
use kiln_api::convert::from_timestamp;
use kiln_api::deployer::{Fleet, ListReleasesRequest, RolloutState};
use kiln_api::engine::ListInstancesRequest;
use kiln_api::monitor::{GetServerStatusRequest, ListHealthRequest, ListSignalsRequest};
use kiln_api::types::{self, Role};
use kiln_builder_core::build::Build;
use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::replicas::{Replica, Second};
use kiln_tests::repo::Repo;
use kiln_tests::server::{SETTLES, Web};
use kiln_tests::site::Site;
use kiln_tests::wait::until;
use rustix::process::Signal;

/// From the death of a replica to what another one does in its place.
const TAKEN_OVER: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(30);
/// Longer than two resyncs and a lease.
const LONG: Duration = Duration::from_secs(12);

/// Who can be asked.
struct Alive {
    builder: Replica,
    deployer: Replica,
    monitor: Replica,
}

const ALL_ALIVE: Alive =
    Alive { builder: Replica::First, deployer: Replica::Second, monitor: Replica::Second };

/// Two of each service take longer on a busy machine, and another replica its time to notice that one is gone.
fn patiently(repo: &Repo) -> Result<()> {
    repo.replace("web/server.yaml", "deadline: 20s", "deadline: 90s")
}

/// Slow enough for something to happen in the middle of a rollout.
fn slowly(repo: &Repo) -> Result<()> {
    patiently(repo)?;
    repo.replace("web/server.yaml", "soak: 300ms", "soak: 1s")
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_service_double_each_commit_goes_out_once() -> Result<()> {
    let (site, second) = Site::up_double("double").await?;
    let web = Web::start_with(site, patiently).await?;
    let load = web.load();
    for release in 2..5 {
        web.say(&format!("release {release}"))?;
        web.settled(release).await?;
    }
    went_out_once(&second, ALL_ALIVE, 4).await?;

    let listed = ListReleasesRequest { server: "web".to_owned(), ..Default::default() };
    for replica in [Replica::First, Replica::Second] {
        let releases = second.deployer(replica).list_releases(listed.clone()).await?.into_inner().releases;
        let numbers: Vec<_> = releases.iter().map(|release| release.number).collect();
        assert_eq!(numbers, [1, 2, 3, 4], "{replica:?}");
        // Also of the monitor that does not look at the repository itself.
        let request = GetServerStatusRequest { server: "web".to_owned(), own: false };
        let status = second.monitor(replica).get_server_status(request).await?.into_inner();
        let ago = Timestamp::now().duration_since(from_timestamp("source_polled", status.source_polled)?);
        assert!(ago.as_secs() < 10, "{replica:?} was last told {ago} ago");
    }

    // Of each event one is published, whichever replica's relay was first.
    until("the events of the last rollout", SOON, async || {
        let events = web.site.lines(&["events", "--since", "1h"])?;
        let ids: BTreeSet<_> = events.iter().map(|event| event["id"].as_str()).collect();
        assert_eq!(ids.len(), events.len(), "an event is there twice");
        for kind in ["builder.build.succeeded", "deployer.release.created", "deployer.rollout.succeeded"] {
            let kind = format!("kiln.{kind}.v1");
            let count = events.iter().filter(|event| event["type"] == kind.as_str()).count();
            assert!(count <= 4, "{count} of {kind}");
            if count < 4 {
                return Err(format!("{count} of {kind}").into());
            }
        }
        Ok(())
    })
    .await?;
    load.stop().await.unfailing(1000)?;
    second.stop(&web.site)?;
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployer_that_wakes_after_another_has_finished_its_rollout_does_no_harm() -> Result<()> {
    let (site, second) = Site::up_double("woken").await?;
    let web = Web::start_with(site, slowly).await?;
    let load = web.load();
    // Once as soon as there is a rollout, with all of its effects on their way; once half way.
    for (release, on_edge) in [(2, 0), (3, 1)] {
        let frozen = second.owner(Service::Deployer, "web").await?;
        let awake = frozen.other();
        web.say(&format!("release {release}"))?;
        under_way(&second, awake, release, on_edge).await?;
        second.signal(frozen, Service::Deployer, Signal::STOP)?;
        let begun = Instant::now();
        let fleet = second.settled(awake, "web", release, SETTLES).await?;
        println!("the {frozen:?} deployer stands still, the other is done {:?} later", begun.elapsed());

        let before = (seen(&fleet), web.pids().await?, second.rollouts(awake, "web").await?);
        second.signal(frozen, Service::Deployer, Signal::CONT)?;
        tokio::time::sleep(LONG).await;
        for replica in [awake, frozen] {
            let fleet = second.settled(replica, "web", release, SOON).await?;
            let after = (seen(&fleet), web.pids().await?, second.rollouts(replica, "web").await?);
            assert_eq!(before, after, "as the {replica:?} deployer has it");
        }
    }
    went_out_once(&second, ALL_ALIVE, 3).await?;
    load.stop().await.unfailing(1000)?;
    second.stop(&web.site)?;
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_builder_and_a_monitor_that_wake_do_nothing_twice() -> Result<()> {
    let (site, second) = Site::up_double("awake").await?;
    let web = Web::start_with(site, slowly).await?;
    let load = web.load();
    let deployer = Replica::First;

    // In the middle of a build: another one makes it again, and its own comes to nothing.
    web.repo.replace("web/server.yaml", "command: { run: nginx -v }", "command: { run: sleep 4 }")?;
    web.say("release 2")?;
    let (frozen, build) = tested(&second, &web).await?;
    second.signal(frozen, Service::Builder, Signal::STOP)?;
    second.settled(deployer, "web", 2, SETTLES).await?;
    let done = second.build(&build.id).await?;
    assert!(done.token > build.token && done.state.has_ended(), "{done:?}");
    second.signal(frozen, Service::Builder, Signal::CONT)?;

    // Before a commit: another one sees it, and it sees nothing that is new.
    let sources = web.site.builder().list_sources(ListSourcesRequest::default()).await?.into_inner().sources;
    let source = sources.first().ok_or("there is a source")?;
    let monitor = second.owner(Service::Monitor, &source.id).await?;
    second.signal(monitor, Service::Monitor, Signal::STOP)?;
    web.say("release 3")?;
    second.settled(deployer, "web", 3, SETTLES).await?;
    second.signal(monitor, Service::Monitor, Signal::CONT)?;

    tokio::time::sleep(LONG).await;
    for replica in [Replica::First, Replica::Second] {
        second.settled(replica, "web", 3, SOON).await?;
        went_out_once(&second, Alive { builder: replica, deployer: replica, monitor: replica }, 3).await?;
    }
    until("the tests' instances are gone", SOON, async || {
        if testing(&web).await? { Err("one is left".into()) } else { Ok(()) }
    })
    .await?;
    load.stop().await.unfailing(1000)?;
    second.stop(&web.site)?;
    web.site.down()
}

/// One of each service, in the middle of what it was at.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_killed_is_replaced_by_another_within_five_seconds() -> Result<()> {
    let (site, second) = Site::up_double("heirs").await?;
    let web = Web::start_with(site, slowly).await?;
    let load = web.load();
    // It would start again what is killed.
    web.site.signal("supervisor", Signal::STOP)?;

    let dead = second.owner(Service::Deployer, "web").await?;
    let deployer = dead.other();
    web.say("release 2")?;
    under_way(&second, deployer, 2, 1).await?;
    let killed = kill(&second, dead, Service::Deployer)?;
    // What it had committed when it died can be seen a moment later.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let left = second.fleet(deployer, "web").await?.version;
    let taken_over = until("the next step", SOON, async || {
        let version = second.fleet(deployer, "web").await?.version;
        if version > left { Ok(killed.elapsed()) } else { Err("the rollout stands".into()) }
    })
    .await?;
    in_time("the rollout went on", taken_over);
    second.settled(deployer, "web", 2, SETTLES).await?;

    let sources = web.site.builder().list_sources(ListSourcesRequest::default()).await?.into_inner().sources;
    let source = sources.first().ok_or("there is a source")?;
    let dead = second.owner(Service::Monitor, &source.id).await?;
    let monitor = dead.other();
    let causes = signals(&second, monitor).await?.len();
    let at = Timestamp::now();
    let killed = kill(&second, dead, Service::Monitor)?;
    web.say("release 3")?;
    let (all_seen, raised) = tokio::try_join!(
        until("a look at every instance", SOON, async || {
            looked(&second, monitor, at).await.map(|()| killed.elapsed())
        }),
        until("the signal", SOON, async || {
            let count = signals(&second, monitor).await?.len();
            if count > causes { Ok(killed.elapsed()) } else { Err("no signal".into()) }
        }),
    )?;
    in_time("every instance was looked at", all_seen);
    in_time("the commit was seen", raised);
    second.settled(deployer, "web", 3, SETTLES).await?;

    web.repo.replace("web/server.yaml", "command: { run: nginx -v }", "command: { run: sleep 4 }")?;
    web.say("release 4")?;
    let (dead, build) = tested(&second, &web).await?;
    let killed = kill(&second, dead, Service::Builder)?;
    let taken_over = until("the other builder", SOON, async || {
        let (whose, now) = second.building().await?;
        assert_eq!(now.id, build.id);
        if whose != dead && now.token > build.token { Ok(killed.elapsed()) } else { Err("not yet".into()) }
    })
    .await?;
    in_time("the build went on", taken_over);
    second.settled(deployer, "web", 4, SETTLES).await?;

    let alive = Alive { builder: dead.other(), deployer, monitor };
    went_out_once(&second, alive, 4).await?;
    load.stop().await.unfailing(1000)?;
    second.stop(&web.site)?;
    web.site.down()
}

/// An instance is there for an image's tests.
async fn testing(web: &Web) -> Result<bool> {
    let listed = web.site.engine().list_instances(ListInstancesRequest::default()).await?.into_inner();
    let mut specs = listed.instances.iter().filter(|it| it.ended.is_none()).filter_map(|it| it.spec.as_ref());
    Ok(specs.any(|spec| spec.role() == Role::Test))
}

/// A build whose image is under test, and whose it is.
async fn tested(second: &Second, web: &Web) -> Result<(Replica, Build)> {
    until("the image's tests", SETTLES, async || {
        let building = second.building().await?;
        if testing(web).await? { Ok(building) } else { Err("not yet".into()) }
    })
    .await
}

fn kill(second: &Second, replica: Replica, service: Service) -> Result<Instant> {
    println!("the {replica:?} {service} is killed");
    second.signal(replica, service, Signal::KILL)?;
    Ok(Instant::now())
}

fn in_time(what: &str, took: Duration) {
    println!("{what} after {took:?}");
    assert!(took < TAKEN_OVER, "{what} after {took:?}, which is more than {TAKEN_OVER:?}");
}

/// A rollout to a release is at work, and so many of its instances are on the edge.
async fn under_way(second: &Second, replica: Replica, release: u64, on_edge: usize) -> Result<()> {
    until("the rollout", SETTLES, async || {
        let fleet = second.fleet(replica, "web").await?;
        let runs = fleet.rollout.as_ref().is_some_and(|it| it.to_release == release);
        let new = fleet.instances.iter().filter(|it| it.release == release && it.on_edge).count();
        if runs && new >= on_edge { Ok(()) } else { Err(format!("{fleet:?}").into()) }
    })
    .await
}

/// Which instances serve.
fn seen(fleet: &Fleet) -> BTreeSet<(String, bool)> {
    fleet.instances.iter().map(|instance| (instance.id.clone(), instance.on_edge)).collect()
}

/// Every instance has answered since then, whichever monitor asked.
async fn looked(second: &Second, replica: Replica, since: Timestamp) -> Result<()> {
    let request = ListHealthRequest { server: "web".to_owned(), ..Default::default() };
    let health = second.monitor(replica).list_health(request).await?.into_inner().health;
    for health in &health {
        if from_timestamp("observed", health.observed)? <= since {
            return Err(format!("{} was last seen before", health.instance).into());
        }
    }
    if health.len() >= 3 { Ok(()) } else { Err(format!("{health:?}").into()) }
}

/// Of commits.
async fn signals(second: &Second, replica: Replica) -> Result<Vec<types::Signal>> {
    let request = ListSignalsRequest { server: "web".to_owned(), ..Default::default() };
    let signals = second.monitor(replica).list_signals(request).await?.into_inner().signals;
    Ok(signals.into_iter().filter(|signal| signal.cause == "definition_changed").collect())
}

/// One build, one rollout and, but for the first release, one signal for each release, all of them ended well.
async fn went_out_once(second: &Second, alive: Alive, releases: usize) -> Result<()> {
    let request = ListBuildsRequest { server: "web".to_owned(), ..Default::default() };
    let builds = second.builder(alive.builder).list_builds(request).await?.into_inner().builds;
    assert!(builds.iter().all(|build| build.state() == BuildState::Succeeded), "{builds:?}");
    assert_eq!(builds.len(), releases, "{builds:?}");
    let rollouts = second.rollouts(alive.deployer, "web").await?;
    assert!(rollouts.iter().all(|rollout| rollout.state() == RolloutState::Succeeded), "{rollouts:?}");
    assert_eq!(rollouts.len(), releases, "{rollouts:?}");
    let signals = signals(second, alive.monitor).await?;
    assert_eq!(signals.len(), releases - 1, "{signals:?}");
    Ok(())
}
