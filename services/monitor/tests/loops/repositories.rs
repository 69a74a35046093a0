use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use kiln_api::builder::{GitSource, InspectSourceResponse, InspectedServer, Source};
use kiln_api::events::DefinitionChanged;
use kiln_api::monitor::monitor_service_server::MonitorService;
use kiln_api::monitor::{GetServerStatusRequest, GetServerStatusResponse, Health};
use kiln_api::{builder, types};
use kiln_model::event::Service;
use kiln_model::name::ServerName;
use kiln_monitor::ports::{Others, Problem};
use kiln_monitor::remote::LocalGit;
use kiln_service::clock::SystemClock;
use kiln_service::members::{self, Member, Members};
use prost::Message;
use tokio::sync::watch;
use tonic::Request;

use crate::world::{World, digest, server, until};

fn git(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"])
        .args(arguments)
        .current_dir(folder)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

struct Repository {
    folder: tempfile::TempDir,
    _home: tempfile::TempDir,
}

impl Repository {
    /// A world whose server `web` comes from a real repository.
    async fn new() -> (World, Self) {
        let (folder, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        git(folder.path(), &["init", "-q", "-b", "main"]);
        let mut world = World::new().await;
        world.git = Arc::new(LocalGit::new(home.path(), None).unwrap());
        let git = GitSource { url: folder.path().to_str().unwrap().to_owned(), branch: "main".to_owned() };
        *world.builder.sources.lock().unwrap() = vec![Source {
            id: "git-1".to_owned(),
            git: Some(git),
            servers: vec!["web".to_owned()],
            version: 1,
            ..Source::default()
        }];
        (world, Self { folder, _home: home })
    }

    /// A commit after which the builder finds a definition of this content, and has another one in force.
    fn commit(&self, world: &World, head: &str, current: &str) -> String {
        self.commit_with(world, head, current, "")
    }

    fn commit_with(&self, world: &World, head: &str, current: &str, problem: &str) -> String {
        let mut inspection = world.builder.inspection.lock().unwrap();
        git(self.folder.path(), &["commit", "-q", "--allow-empty", "-m", head]);
        let commit = git(self.folder.path(), &["rev-parse", "HEAD"]);
        *inspection = InspectSourceResponse {
            commit: commit.clone(),
            servers: vec![InspectedServer {
                name: "web".to_owned(),
                definition_digest: digest(head),
                current_digest: if current.is_empty() { String::new() } else { digest(current) },
                problem: problem.to_owned(),
                ..InspectedServer::default()
            }],
            orphaned: Vec::new(),
        };
        commit
    }
}

/// The builder takes a definition over, and tells so.
async fn takes(world: &World, definition: &str, mode: types::Mode) {
    let server =
        world.has_server(builder::Server { definition_digest: digest(definition), ..server("web", mode) });
    for inspected in &mut world.builder.inspection.lock().unwrap().servers {
        inspected.current_digest = digest(definition);
    }
    let version = server.version;
    let event = DefinitionChanged { server: Some(server), problem: String::new() };
    world.publish(Service::Builder, "definition", "applied", "web", version, event.encode_to_vec()).await;
}

async fn inspected(world: &World, times: u64) {
    until("an inspection", async || (world.builder.inspected.load(Ordering::SeqCst) >= times).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_is_a_signal_until_it_is_taken_over() {
    let (world, repository) = Repository::new().await;
    world.has_server(server("web", types::Mode::Auto));
    repository.commit(&world, "old", "old");
    let monitor = world.start().await;
    inspected(&world, 1).await;
    assert_eq!(world.said(), [""; 0]);

    let commit = repository.commit(&world, "new", "old");
    world.hears("needs_update definition_changed web").await;
    let signal = world.signals_said()[0].clone();
    assert_eq!((signal.remedy(), signal.fingerprint), (types::Remedy::Rebuild, digest("new")));
    assert!(signal.evidence[0].starts_with(&format!("commit {}: definition ", &commit[..12])));

    takes(&world, "new", types::Mode::Auto).await;
    world.hears("settled definition_changed web").await;
    // Many polls later nothing more was asked or said.
    let asked = world.builder.inspected.load(Ordering::SeqCst);
    tokio::time::sleep(world.poll.git * 4).await;
    assert_eq!(world.builder.inspected.load(Ordering::SeqCst), asked);
    assert_eq!(world.said().len(), 2);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_was_seen_before_its_server_was_told_of_is_followed() {
    let (world, repository) = Repository::new().await;
    repository.commit(&world, "new", "old");
    let monitor = world.start().await;
    inspected(&world, 2).await;
    assert_eq!(world.said(), [""; 0]);
    takes(&world, "old", types::Mode::Auto).await;
    world.hears("needs_update definition_changed web").await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_back_to_what_the_monitor_still_takes_for_in_force_is_followed() {
    let (mut world, repository) = Repository::new().await;
    world.poll.resync = Duration::from_secs(60);
    let known = builder::Server { definition_digest: digest("first"), ..server("web", types::Mode::Auto) };
    world.has_server(known);
    repository.commit(&world, "first", "first");
    let monitor = world.start().await;
    inspected(&world, 1).await;
    // That the builder took the second one is not known here yet, when the first one is committed again.
    repository.commit(&world, "first", "second");
    let asked = world.builder.inspected.load(Ordering::SeqCst);
    inspected(&world, asked + 2).await;
    assert_eq!(world.said(), [""; 0]);
    takes(&world, "second", types::Mode::Auto).await;
    world.hears("needs_update definition_changed web").await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_on_top_takes_the_place_and_going_back_acts_again() {
    let (world, repository) = Repository::new().await;
    world.has_server(server("web", types::Mode::Auto));
    repository.commit(&world, "good", "old");
    let monitor = world.start().await;
    world.hears("needs_update definition_changed web").await;
    takes(&world, "good", types::Mode::Auto).await;
    world.hears("settled definition_changed web").await;

    repository.commit(&world, "bad", "good");
    until("the bad one", async || {
        world.signals_said().iter().any(|s| s.fingerprint == digest("bad")).then_some(())
    })
    .await;
    // The head that was taken and convicted equals the head: no signal, however long.
    repository.commit(&world, "bad", "bad");
    takes(&world, "bad", types::Mode::Auto).await;
    until("bad is settled", async || (world.said().len() == 4).then_some(())).await;

    repository.commit(&world, "good", "bad");
    until("good again", async || {
        let said = world.signals_said();
        (said
            .iter()
            .filter(|s| s.fingerprint == digest("good") && s.state() == types::SignalState::Open)
            .count()
            == 2)
            .then_some(())
    })
    .await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_removed_or_can_not_be_taken_is_no_signal() {
    let (world, repository) = Repository::new().await;
    world.has_server(server("web", types::Mode::Auto));
    repository.commit(&world, "new", "");
    let monitor = world.start().await;
    inspected(&world, 1).await;

    repository.commit_with(&world, "broken", "old", "server.yaml:3:1: unknown key");
    let status = until("the problem is shown", async || {
        let request = Request::new(GetServerStatusRequest { server: "web".to_owned(), own: false });
        let status = monitor.api.get_server_status(request).await.ok()?.into_inner();
        status.source_problem.contains("unknown key").then_some(status)
    })
    .await;
    assert!(status.source_polled.is_some());
    assert_eq!(world.said(), [""; 0]);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_is_away_is_told_and_found_again() {
    let (world, repository) = Repository::new().await;
    world.has_server(server("web", types::Mode::Auto));
    let status = async |monitor: &crate::world::Running| {
        let request = Request::new(GetServerStatusRequest { server: "web".to_owned(), own: false });
        monitor.api.get_server_status(request).await.map(tonic::Response::into_inner).ok()
    };
    // It has no commit yet.
    let monitor = world.start().await;
    until("the problem is shown", async || {
        status(&monitor).await?.source_problem.contains("no branch `main`").then_some(())
    })
    .await;
    repository.commit(&world, "new", "old");
    world.hears("needs_update definition_changed web").await;
    until("no problem any more", async || status(&monitor).await?.source_problem.is_empty().then_some(()))
        .await;
    monitor.stop().await;
}

/// The monitor to be started has another one beside it, until that is told to stop.
async fn beside(world: &mut World, id: &str) -> watch::Sender<bool> {
    let join = async |id: &str, address: &str| {
        let me = Member { id: id.to_owned(), address: address.to_owned() };
        Members::join(world.store.clone(), SystemClock::new(), me).await.unwrap()
    };
    let (members, heart) = join("monitor-1", "here").await;
    let (_, other) = join(id, "there").await;
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(other.run(stopped));
    // Beats until the test ends.
    tokio::spawn(async move {
        let (_held, stop) = watch::channel(false);
        heart.run(stop).await;
    });
    until("the other one", async || (members.others().len() == 1).then_some(())).await;
    world.members = members;
    stop
}

/// Another replica, which had this look.
struct Other(GetServerStatusResponse);

#[async_trait]
impl Others for Other {
    async fn watch(&self, _: &str) -> Result<BoxStream<'static, Health>, Problem> {
        Err(Problem("it says nothing by itself".to_owned()))
    }

    async fn status(&self, address: &str, server: &ServerName) -> Result<GetServerStatusResponse, Problem> {
        assert_eq!((address, server.as_str()), ("there", "web"));
        Ok(self.0.clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_look_is_told_whichever_replica_had_it() {
    let mut world = World::new().await;
    world.has_server(server("web", types::Mode::Auto));
    let other = beside(&mut world, "monitor-2").await;
    let source_polled = Some(prost_types::Timestamp { seconds: 7, nanos: 0 });
    let looked = GetServerStatusResponse {
        source_polled,
        source_problem: "no branch".to_owned(),
        ..GetServerStatusResponse::default()
    };
    world.others = Arc::new(Other(looked.clone()));

    let monitor = world.start().await;
    let status = async |own| {
        let request = Request::new(GetServerStatusRequest { server: "web".to_owned(), own });
        monitor.api.get_server_status(request).await.map(tonic::Response::into_inner).ok()
    };
    let told = until("the server", async || status(false).await).await;
    assert_eq!((told.source_polled, told.source_problem), (looked.source_polled, looked.source_problem));
    assert_eq!(until("the server", async || status(true).await).await.source_polled, None);
    monitor.stop().await;
    other.send_replace(true);
}

/// By then, and not when a minute is over, which is how long it would wait for its next look.
#[tokio::test(flavor = "multi_thread")]
async fn the_repository_of_a_replica_that_goes_is_looked_at_by_another_at_once() {
    let (mut world, repository) = Repository::new().await;
    world.poll.git = Duration::from_secs(60);
    world.has_server(server("web", types::Mode::Auto));
    repository.commit(&world, "new", "old");
    let is_its = |id: &String| members::owner(["monitor-1", id], "git-1") == Some(id);
    let id = (2..).map(|number| format!("monitor-{number}")).find(is_its).unwrap();
    let other = beside(&mut world, &id).await;
    let monitor = world.start().await;
    until("the repository is known", async || {
        let request = Request::new(GetServerStatusRequest { server: "web".to_owned(), own: true });
        monitor.api.get_server_status(request).await.ok()
    })
    .await;
    tokio::time::sleep(world.poll.resync * 4).await;
    assert_eq!(world.said(), [""; 0], "it is the other's");

    other.send_replace(true);
    world.hears("needs_update definition_changed web").await;
    monitor.stop().await;
}
