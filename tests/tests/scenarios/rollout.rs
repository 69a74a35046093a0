//! Commits become releases, without a failed request.

use std::time::Duration;

use kiln_api::builder::ListRevisionsRequest;
use kiln_api::deployer::{InstanceState, ListReleasesRequest};
use kiln_api::types::ListOptions;
use kiln_tests::Result;
use kiln_tests::load::fetch;
use kiln_tests::netns::Neighbour;
use kiln_tests::wait::until;

use kiln_tests::server::Web;
use kiln_tests::site::Site;

#[tokio::test(flavor = "multi_thread")]
async fn commits_replace_and_roll_back_without_a_failed_request() -> Result<()> {
    let web = Web::start(Site::up("rollout")?).await?;
    let neighbour = Neighbour::new()?;
    let beside = neighbour.load(web.port, "Hello")?;
    let load = web.load();

    web.say("two")?;
    web.settled(2).await?;
    assert!(fetch(web.address(), "/").await?.contains("Hello two"), "the new page is served");

    web.site.kiln(&["rollback", "web"])?;
    let back = web.settled(1).await?;
    assert!(fetch(web.address(), "/").await?.contains("Hello one"), "the old page is served again");
    assert!(!back.quarantine.is_empty(), "a manual rollback convicts what it left");

    load.stop().await.unfailing(1000)?;
    beside.stop()?.unfailing(100)?;
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_changes_image_and_run_gives_one_release() -> Result<()> {
    let web = Web::start(Site::up("mixed")?).await?;
    web.repo.replace("web/server.yaml", "STAGE: one", "STAGE: two")?;
    web.say("two")?;
    let fleet = web.settled(2).await?;
    assert_eq!(fleet.instances.iter().filter(|i| i.state() == InstanceState::Running).count(), 3);

    let listed = ListReleasesRequest { options: Some(ListOptions::default()), server: "web".to_owned() };
    let releases = web.site.deployer().list_releases(listed).await?.into_inner().releases;
    assert_eq!(
        releases.iter().map(|release| release.number).collect::<Vec<_>>(),
        [1, 2],
        "never a mixed one"
    );
    let listed = ListRevisionsRequest { options: Some(ListOptions::default()), server: "web".to_owned() };
    let revisions = web.site.builder().list_revisions(listed).await?.into_inner().revisions;
    let last = revisions.iter().max_by_key(|revision| revision.generation).ok_or("there are revisions")?;
    assert_eq!(last.run.as_ref().and_then(|run| run.env.get("STAGE")).map(String::as_str), Some("two"));
    assert!(fetch(web.address(), "/").await?.contains("Hello two"));

    // A change of `run` alone: a release, no build.
    let builds =
        web.site.builder().list_builds(kiln_api::builder::ListBuildsRequest::default()).await?.into_inner();
    web.repo.replace("web/server.yaml", "STAGE: two", "STAGE: three")?;
    web.repo.commit("Change the environment")?;
    web.settled(3).await?;
    let after =
        web.site.builder().list_builds(kiln_api::builder::ListBuildsRequest::default()).await?.into_inner();
    assert_eq!(after.builds.len(), builds.builds.len(), "no build for a change of `run` alone");
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_deleted_in_git_is_orphaned_and_runs_until_it_is_removed() -> Result<()> {
    let web = Web::start(Site::up("orphan")?).await?;
    std::fs::remove_dir_all(web.repo.path().join("web"))?;
    web.repo.write("README", "empty now\n")?;
    web.repo.commit("Delete the definition")?;
    until("the server to be shown as orphaned", Duration::from_secs(30), async || {
        let request = kiln_api::builder::GetServerRequest { server: "web".to_owned() };
        let server = web.site.builder().get_server(request).await?.into_inner().server.ok_or("no server")?;
        if server.orphaned { Ok(()) } else { Err("not yet".into()) }
    })
    .await?;
    web.settled(1).await?;
    assert!(web.site.kiln(&["status"])?.contains("orphaned"), "people see it");

    web.site.kiln(&["remove", "web"])?;
    until("the fleet to be retired", Duration::from_secs(60), async || {
        let listed =
            web.site.engine().list_instances(kiln_api::engine::ListInstancesRequest::default()).await?;
        let running = listed.into_inner().instances.into_iter().filter(|i| i.ended.is_none()).count();
        if running == 0 { Ok(()) } else { Err(format!("{running} run").into()) }
    })
    .await?;
    web.site.down()
}
