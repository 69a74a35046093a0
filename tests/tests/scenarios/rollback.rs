//! What fails its gates goes back, and stays out.

use std::time::{Duration, Instant};

use kiln_api::deployer::{ListRolloutsRequest, Rollout, RolloutState};
use kiln_tests::Result;
use kiln_tests::load::fetch;
use kiln_tests::wait::until;
use rustix::process::Signal;

use kiln_tests::server::Web;
use kiln_tests::site::Site;

async fn rollouts(web: &Web) -> Result<Vec<Rollout>> {
    let request = ListRolloutsRequest { server: "web".to_owned(), ..Default::default() };
    Ok(web.site.deployer().list_rollouts(request).await?.into_inner().rollouts)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_health_never_comes_is_rolled_back_and_quarantined() -> Result<()> {
    let web = Web::start(Site::up("bad")?).await?;
    let load = web.load();
    // The image's own tests pass; only the probe of the running fleet sees that the page is missing.
    web.repo.replace("web/server.yaml", "path: / }, interval", "path: /missing }, interval")?;
    web.repo.commit("Ask for a page that is not there")?;

    let bad = until("a rollback", Duration::from_secs(90), async || {
        let found = rollouts(&web).await?.into_iter().find(|rollout| rollout.to_release == 2);
        match found {
            Some(rollout) if rollout.state() == RolloutState::RolledBack => Ok(rollout),
            other => Err(format!("{other:?}").into()),
        }
    })
    .await?;
    let (started, ended) = (bad.started.ok_or("it started")?, bad.ended.ok_or("it ended")?);
    // The definition's deadline is 20 s: whole and back by then.
    assert!(ended.seconds - started.seconds <= 20, "from {started} to {ended}");
    let fleet = web.settled(1).await?;
    assert!(fleet.quarantine.iter().any(|convicted| convicted.release == 2), "{:?}", fleet.quarantine);
    assert!(!bad.failed_instance.is_empty() && !bad.last_checks.is_empty(), "for `why`: {bad:?}");
    let why = web.site.kiln(&["why", "web"])?;
    assert!(why.contains("404"), "the last probe answers are shown:\n{why}");

    // No second attempt: a new plan of the same definition changes nothing.
    let before = rollouts(&web).await?.len();
    let _ = web.site.try_kiln(&["build", "web", "--wait"])?;
    let request = kiln_api::builder::GetServerRequest { server: "web".to_owned() };
    until("the builder to know of the verdict", Duration::from_secs(30), async || {
        let server =
            web.site.builder().get_server(request.clone()).await?.into_inner().server.ok_or("no server")?;
        if server.quarantined { Ok(()) } else { Err("not quarantined".into()) }
    })
    .await?;
    assert_eq!(rollouts(&web).await?.len(), before, "no second attempt");
    assert!(fetch(web.address(), "/").await?.contains("Hello one"));

    // The definition changes: out it goes.
    web.repo.replace("web/server.yaml", "path: /missing }", "path: / }")?;
    web.say("three")?;
    let fleet = until("the mended definition to be deployed", Duration::from_secs(60), async || {
        let fleet = web.site.fleet("web").await?;
        if fleet.release <= 2 {
            return Err(format!("release {}", fleet.release).into());
        }
        kiln_tests::site::settled(&fleet, fleet.release)?;
        Ok(fleet)
    })
    .await?;
    assert!(fetch(web.address(), "/").await?.contains("Hello three"), "release {}", fleet.release);
    load.stop().await.unfailing(1000)?;
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn rollback_needs_nothing_but_deployer_and_node() -> Result<()> {
    rollback_alone(Site::up("alone")?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rollback_needs_nothing_but_deployer_and_node_on_postgresql() -> Result<()> {
    rollback_alone(Site::up_on_postgres("pgalone")?).await
}

async fn rollback_alone(site: Site) -> Result<()> {
    let web = Web::start(site).await?;
    // From before the way forward: the way back alone is over before a thousand requests are made.
    let load = web.load();
    web.say("two")?;
    web.settled(2).await?;
    // Stopped, not killed: the supervisor would start them again.
    for process in ["builder", "monitor", "nats"] {
        web.site.signal(process, Signal::STOP)?;
    }
    let hidden = web.folder().join("hidden");
    std::fs::rename(web.repo.path(), &hidden)?;

    let began = Instant::now();
    web.site.kiln(&["rollback", "web"])?;
    until("the old page", Duration::from_secs(60), async || {
        let fleet = web.site.fleet("web").await?;
        let on_edge = fleet.instances.iter().filter(|i| i.on_edge);
        if on_edge.clone().count() == 3 && on_edge.clone().all(|i| i.release == 1) && fleet.rollout.is_none()
        {
            return Ok(());
        }
        Err(format!("release {}: {:?} {}", fleet.release, fleet.rollout, fleet.problem).into())
    })
    .await?;
    println!("rolled back in {:?} with builder, monitor, broker and Git away", began.elapsed());
    assert!(fetch(web.address(), "/").await?.contains("Hello one"));

    for process in ["nats", "builder", "monitor"] {
        web.site.signal(process, Signal::CONT)?;
    }
    std::fs::rename(&hidden, web.repo.path())?;
    web.settled(1).await?;
    load.stop().await.unfailing(1000)?;
    web.site.down()
}
