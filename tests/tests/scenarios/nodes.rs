//! Nodes on several machines, and images by way of a registry.

use std::path::Path;
use std::time::Duration;

use kiln_tests::command::both;
use kiln_tests::load::{Load, Options, fetch};
use kiln_tests::machine::Machine;
use kiln_tests::registry::Registry;
use kiln_tests::server::Web;
use kiln_tests::site::Site;
use kiln_tests::wait::until;
use kiln_tests::{Result, command};

fn images(home: &Path) -> usize {
    let blobs = std::fs::read_dir(home.join("images/blobs/sha256"));
    blobs.map_or(0, |blobs| blobs.count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_runs_on_the_machine_that_it_names_with_an_image_from_the_registry() -> Result<()> {
    let mut machines = [Machine::new("edge-1", 5)?, Machine::new("edge-2", 6)?];
    let hosts = machines.each_ref().map(Machine::host);
    let mut registry = Registry::start(&hosts).await?;
    let keys = registry.folder();
    registry.give_keys(&keys, hosts[0])?;
    let settings = [
        machines[0].setting(),
        machines[1].setting(),
        format!("registry.repository={}", registry.repository(hosts[0])),
        format!("registry.ca={}", keys.join("registry-ca.pem").display()),
        format!("registry.credentials={}", keys.join("registry.json").display()),
    ];
    let site = Site::up_with("nodes", &settings.each_ref().map(String::as_str))?;
    for (machine, number) in machines.iter_mut().zip([5, 6]) {
        machine.join(&site, number, &registry)?;
    }
    let on = |node: &str| format!("run:\n  node: {node}\n  replicas: 3");
    let web =
        Web::start_with(site, |repo| repo.replace("web/server.yaml", "run:\n  replicas: 3", &on("edge-1")))
            .await?;
    let [first, second] = &mut machines;
    let fleet = web.site.fleet("web").await?;
    assert!(fleet.instances.iter().all(|it| it.node == "edge-1"), "{fleet:?}");
    assert!(fetch(first.edge(web.port), "/").await?.contains("Hello"));
    assert!(fetch(web.address(), "/").await.is_err(), "it is served where it runs, and nowhere else");
    assert!(images(first.home()) > 0 && images(second.home()) == 0);
    assert!(web.site.kiln(&["status", "web"])?.contains("edge-1"));

    // To the other machine, one after the other; both serve on the way.
    web.repo.replace("web/server.yaml", "node: edge-1", "node: edge-2")?;
    web.repo.commit("Move to the other machine")?;
    let fleet = web.settled(2).await?;
    assert!(fleet.instances.iter().all(|it| it.node == "edge-2"), "{fleet:?}");
    assert!(fetch(second.edge(web.port), "/").await?.contains("Hello"));
    until("the first machine's edge to be empty", Duration::from_secs(20), async || {
        match fetch(first.edge(web.port), "/").await {
            Err(_) => Ok(()),
            Ok(page) => Err(page.into()),
        }
    })
    .await?;

    // A machine that names nobody's node is refused where it is written.
    web.repo.replace("web/server.yaml", "node: edge-2", "node: edge-9")?;
    let refused = web.site.try_kiln(&["apply", &web.repo.path().join("web").display().to_string()])?;
    assert!(
        both(&refused).contains("the site has no node `edge-9`; name one of `edge-1`, `edge-2`, `local`")
    );
    web.repo.replace("web/server.yaml", "node: edge-9", "node: edge-2")?;

    // Its node goes: users are served on, it is said, and what runs elsewhere goes on.
    let load = Load::start(Options {
        target: second.edge(web.port),
        path: "/".to_owned(),
        clients: 4,
        rate: 200.0,
        wanted: "Hello".to_owned(),
    });
    second.kill()?;
    until("it to be said", Duration::from_secs(30), async || {
        let status = web.site.kiln(&["status", "web"])?;
        if status.contains("node `edge-2` can't be reached") { Ok(()) } else { Err(status.into()) }
    })
    .await?;
    let beside = kiln_tests::free_port()?;
    let folder = web.folder().join("beside");
    command::run(std::process::Command::new("cp").arg("-r").arg(web.repo.path().join("web")).arg(&folder))?;
    let text = std::fs::read_to_string(folder.join("server.yaml"))?;
    let text = text.replace("name: web", "name: beside").replace("  node: edge-2\n", "");
    std::fs::write(folder.join("server.yaml"), text.replace(&web.port.to_string(), &beside.to_string()))?;
    web.site.kiln(&["apply", &folder.display().to_string()])?;
    web.site.settled("beside", 1, Duration::from_secs(60)).await?;
    second.start()?;
    web.settled(2).await?;
    load.stop().await.unfailing(100)?;

    // Back with the registry down: what ran there once is there still.
    registry.kill()?;
    web.site.kiln(&["rollback", "web"])?;
    let fleet = web.settled(1).await?;
    assert!(fleet.instances.iter().all(|it| it.node == "edge-1"), "{fleet:?}");
    assert!(fetch(first.edge(web.port), "/").await?.contains("Hello"));
    // What has to be pushed waits for it, says so, and comes when it is back.
    web.say("again")?;
    until("the build to say what it lacks", Duration::from_secs(60), async || {
        let builds = web.site.kiln(&["history", "web"])?;
        if builds.contains("push sha256:") { Ok(()) } else { Err(builds.into()) }
    })
    .await?;
    registry.resume().await?;
    until("the new page", Duration::from_secs(120), async || {
        let page = fetch(second.edge(web.port), "/").await?;
        if page.contains("Hello again") { Ok(()) } else { Err(page.into()) }
    })
    .await?;
    web.site.down()?;
    let [first, second] = machines;
    first.clear()?;
    second.clear()
}
