//! Kiln's own programs are replaced under a site that serves, one after the other as the runbook says, and the former
//! ones are put back.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_api::engine::{InstanceState, ListInstancesRequest};
use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::command::binary;
use kiln_tests::free_port;
use kiln_tests::kept::Kept;
use kiln_tests::load::{Load, Options, fetch};
use kiln_tests::process::begun;
use kiln_tests::repo::Repo;
use kiln_tests::server::{SETTLES, Web};
use kiln_tests::site::{Site, edge};
use kiln_tests::wait::until;
use rustix::process::Signal;

const COMES_UP: Duration = Duration::from_secs(60);

/// In the order of the runbook; none is what renews certificates and keeps the streams, which is `kiln` itself.
const ORDER: [Option<Service>; 5] =
    [Some(Service::Node), None, Some(Service::Builder), Some(Service::Deployer), Some(Service::Monitor)];

/// The programs of another commit.
fn former() -> Result<PathBuf> {
    let folder = std::env::var_os("KILN_BEFORE").map(PathBuf::from).ok_or(
        "there are no programs to upgrade from: tests/upgrade.sh compiles those of the commit before, and runs this",
    )?;
    for program in ORDER {
        let path = folder.join(name(program));
        if !path.is_file() {
            return Err(format!("{} is missing: run tests/upgrade.sh", path.display()).into());
        }
    }
    Ok(folder)
}

fn name(program: Option<Service>) -> String {
    program.map_or_else(|| "kiln".to_owned(), |service| format!("kiln-{service}"))
}

#[ignore = "compiles another commit first: tests/upgrade.sh"]
#[tokio::test(flavor = "multi_thread")]
async fn every_program_is_replaced_and_put_back_under_load_and_no_request_fails() -> Result<()> {
    replaced_and_put_back(|programs| Site::up_from(programs, "upgrade")).await
}

/// Where both read and write one database, in turn.
#[ignore = "compiles another commit first: tests/upgrade.sh"]
#[tokio::test(flavor = "multi_thread")]
async fn every_program_is_replaced_and_put_back_under_load_and_no_request_fails_on_postgresql() -> Result<()>
{
    replaced_and_put_back(|programs| Site::up_from_on_postgres(programs, "pgupgrade")).await
}

async fn replaced_and_put_back(up: impl FnOnce(&Path) -> Result<Site>) -> Result<()> {
    let former = former()?;
    let present = binary("kiln")?.parent().ok_or("it lies in a folder")?.to_owned();
    let programs = tempfile::tempdir()?;
    for program in ORDER {
        install(&former, programs.path(), program)?;
    }
    let web = Web::start(up(programs.path())?).await?;
    let shop = Shop::apply(&web).await?;
    let (load, shops) = (web.load(), shop.load());

    for (release, folder, word) in [(1, &present, "new"), (2, &former, "former")] {
        let kept = [Kept::start(web.address(), 4), Kept::start(shop.address, 4)];
        let before = running(&web.site).await?;
        assert_eq!(before.len(), 4, "{before:?}");
        for program in ORDER {
            replace(&web.site, folder, programs.path(), program).await?;
            web.settled(release).await?;
            web.site.settled("shop", 1, SETTLES).await?;
            // A service that was just started may not answer yet; an instance that was replaced never is the same again.
            until("the same instances", COMES_UP, async || {
                let now = running(&web.site).await?;
                if now == before { Ok(()) } else { Err(format!("{now:?} were {before:?}").into()) }
            })
            .await?;
            web.site.kiln(&["status"])?;
            println!("the {word} {} runs", name(program));
        }
        for kept in kept {
            let answered = kept.stop().await?;
            assert!(answered > 10, "{answered} answers on kept connections");
        }
        web.say(word)?;
        web.settled(release + 1).await?;
        assert!(fetch(web.address(), "/").await?.contains(&format!("Hello {word}")));
    }
    // A start of everything brings forward what no program does while another runs as it began: the broker has TLS then.
    for program in ORDER {
        install(&present, programs.path(), program)?;
    }
    let before = running(&web.site).await?;
    web.site.kiln(&["down", "--keep-instances"])?;
    web.site.kiln(&["up"])?;
    assert!(kiln_service::config::Site::load(web.site.home())?.broker_has_tls());
    assert_eq!(running(&web.site).await?, before);
    web.say("whole")?;
    web.settled(4).await?;
    load.stop().await.unfailing(1000)?;
    shops.stop().await.unfailing(500)?;
    web.site.down()
}

/// A second fleet, of one instance, that nothing is asked of.
struct Shop {
    address: SocketAddr,
    _repo: Repo,
}

impl Shop {
    async fn apply(web: &Web) -> Result<Self> {
        let repo = Repo::with(&web.folder().join("shops"), "shop", &web.repo.path().join("web"))?;
        let port = free_port()?;
        repo.replace("shop/server.yaml", "name: web", "name: shop")?;
        repo.replace("shop/server.yaml", "replicas: 3", "replicas: 1")?;
        repo.replace("shop/server.yaml", &format!("listen: {}", web.port), &format!("listen: {port}"))?;
        repo.commit("Make it a shop")?;
        web.site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
        web.site.settled("shop", 1, SETTLES).await?;
        Ok(Self { address: edge(port), _repo: repo })
    }

    fn load(&self) -> Load {
        let (path, wanted) = ("/".to_owned(), "Hello".to_owned());
        Load::start(Options { target: self.address, path, clients: 2, rate: 100.0, wanted })
    }
}

/// Put where it is started from, as `install` does: in one step, whatever runs from there.
fn install(from: &Path, to: &Path, program: Option<Service>) -> Result<()> {
    let name = name(program);
    let aside = to.join(format!("{name}.new"));
    std::fs::copy(from.join(&name), &aside)?;
    Ok(std::fs::rename(aside, to.join(name))?)
}

/// One program is replaced by another one, and runs.
async fn replace(site: &Site, from: &Path, to: &Path, program: Option<Service>) -> Result<()> {
    install(from, to, program)?;
    let process = program.map_or("supervisor", |service| service.as_str());
    let old = site.pid(process)?;
    site.signal(process, Signal::TERM)?;
    // The supervisor starts a service again; itself it is started by hand, and finds the others running.
    if program.is_none() {
        until("the supervisor's end", COMES_UP, async || match site.pid(process) {
            Ok(pid) => Err(format!("process {pid} runs").into()),
            Err(_) => Ok(()),
        })
        .await?;
        site.kiln(&["up"])?;
    }
    let wanted = to.join(name(program)).canonicalize()?;
    until(&format!("the other {process}"), COMES_UP, async || {
        let pid = site.pid(process)?;
        // The file of a program that was replaced is called `… (deleted)`.
        let runs = std::fs::read_link(format!("/proc/{pid}/exe"))?;
        if pid != old && runs == wanted { Ok(()) } else { Err(format!("{pid} is {}", runs.display()).into()) }
    })
    .await
}

/// What runs, each with its process and when that began.
async fn running(site: &Site) -> Result<BTreeSet<(String, u32, String)>> {
    let listed = site.engine().list_instances(ListInstancesRequest::default()).await?.into_inner();
    let running = listed.instances.into_iter().filter(|it| it.state() == InstanceState::Running);
    running
        .map(|instance| {
            let begun = begun(instance.pid).ok_or("it is gone")?;
            let id = instance.spec.ok_or("an instance without a specification")?.id;
            Ok((id, instance.pid, begun))
        })
        .collect()
}
