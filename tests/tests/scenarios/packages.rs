//! A package gets an update: noticed, planned, built, rolled out, by itself.

use std::time::Duration;

use kiln_api::builder::PlanRequest;
use kiln_api::builder::plan_response::Item;
use kiln_tests::Result;
use kiln_tests::archive::Archive;
use kiln_tests::load::fetch;
use kiln_tests::repo::Repo;
use kiln_tests::site::{Site, settled};
use kiln_tests::wait::until;
use tokio_stream::StreamExt as _;

use kiln_tests::server::{SETTLES, Web};

/// A package of the test's own archive, whose file nginx serves.
pub(crate) fn with_archive(archive: &Archive) -> impl FnOnce(&Repo) -> Result<()> {
    let (url, ring) = (archive.url(), archive.key_ring());
    move |repo| {
        std::fs::copy(ring, repo.path().join("web/archive.gpg"))?;
        repo.replace(
            "web/server.yaml",
            "from: { debian: bookworm }",
            &format!(
                "from:\n    debian: bookworm\n    archives:\n      - {{ url: \"{url}\", suite: test, components: [main], signedBy: archive.gpg }}"
            ),
        )?;
        repo.replace("web/server.yaml", "packages: [nginx-light]", "packages: [nginx-light, greeting]")
    }
}

/// A site that asks archives often.
fn watching(name: &str) -> Result<Site> {
    Site::up_with(name, &["poll.archive=1500ms"])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_a_package_goes_out_by_itself() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut archive = Archive::serve(folder.path())?;
    archive.add("greeting", "1.0", "/var/www/html/greeting.html", "Hello 1.0\n")?;
    let web = Web::apply(watching("packages")?, with_archive(&archive))?;
    web.site.settled("web", 1, SETTLES).await?;
    assert!(fetch(web.address(), "/greeting.html").await?.contains("Hello 1.0"));
    let load = web.load();

    archive.add("greeting", "1.1", "/var/www/html/greeting.html", "Hello 1.1\n")?;
    let request = PlanRequest { server: "web".to_owned() };
    let items: Vec<_> =
        web.site.builder().plan(request).await?.into_inner().collect::<std::result::Result<_, _>>().await?;
    let resolved =
        items.iter().any(|item| matches!(&item.item, Some(Item::Line(line)) if line.contains("resolved")));
    assert!(resolved, "what resolving says is told meanwhile: {items:?}");
    let Some(Item::Plan(plan)) = items.into_iter().next_back().and_then(|last| last.item) else {
        return Err("there is no plan".into());
    };
    let change = plan.packages;
    assert!(
        change.iter().any(|c| c.name == "greeting" && c.from == "1.0" && c.to == "1.1"),
        "the plan shows the difference: {change:?}"
    );
    web.settled(2).await?;
    assert!(fetch(web.address(), "/greeting.html").await?.contains("Hello 1.1"));
    let signals = web.site.kiln(&["signal", "list"])?;
    assert!(signals.contains("package"), "the cause is shown:\n{signals}");

    // A release file that is new but changes nothing for this server: no build.
    let builds = |answer: kiln_api::builder::ListBuildsResponse| answer.builds.len();
    let before = builds(
        web.site.builder().list_builds(kiln_api::builder::ListBuildsRequest::default()).await?.into_inner(),
    );
    archive.add("unrelated", "1.0", "/usr/share/unrelated", "nothing\n")?;
    let request = kiln_api::monitor::GetServerStatusRequest { server: "web".to_owned(), own: false };
    let polled = async || -> Result<_> {
        let status = web.site.monitor().get_server_status(request.clone()).await?.into_inner();
        Ok(status.archive_polled.map(|time| (time.seconds, time.nanos)))
    };
    let first = polled().await?;
    // Two more looks at the archive: the second began after the new release file was there.
    for _ in 0..2 {
        let seen = polled().await?.max(first);
        until("another look at the archive", Duration::from_secs(30), async || {
            if polled().await? > seen { Ok(()) } else { Err("not yet".into()) }
        })
        .await?;
    }
    let after = builds(
        web.site.builder().list_builds(kiln_api::builder::ListBuildsRequest::default()).await?.into_inner(),
    );
    assert_eq!(after, before, "nothing of this server changed");

    load.stop().await.unfailing(1000)?;
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_commit_does_not_hold_back_a_package_update() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut archive = Archive::serve(folder.path())?;
    archive.add("greeting", "1.0", "/var/www/html/greeting.html", "Hello 1.0\n")?;
    let web = Web::apply(watching("lastgood")?, with_archive(&archive))?;
    web.site.settled("web", 1, SETTLES).await?;

    web.repo.replace("web/server.yaml", "deadline: 20s", "deadline: 5s")?;
    web.repo.replace("web/server.yaml", "start: 10s", "start: 2s")?;
    web.repo.replace("web/server.yaml", "path: / }, interval", "path: /missing }, interval")?;
    web.repo.commit("Ask for a page that is not there")?;
    until("the commit to be convicted", Duration::from_secs(90), async || {
        let request = kiln_api::builder::GetServerRequest { server: "web".to_owned() };
        let server = web.site.builder().get_server(request).await?.into_inner().server.ok_or("no server")?;
        if server.quarantined { Ok(()) } else { Err("not quarantined".into()) }
    })
    .await?;

    archive.add("greeting", "1.1", "/var/www/html/greeting.html", "Hello 1.1\n")?;
    until("the update to be deployed", SETTLES, async || {
        let fleet = web.site.fleet("web").await?;
        if fleet.release <= 2 {
            return Err(format!("release {}", fleet.release).into());
        }
        settled(&fleet, fleet.release)
    })
    .await?;
    let page = fetch(web.address(), "/greeting.html").await?;
    assert!(page.contains("Hello 1.1"), "the last good definition with the new package: {page}");
    web.site.down()
}
