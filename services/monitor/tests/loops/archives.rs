use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_api::builder::{PackageChange, Plan, ReleaseFile, Server as BuilderServer};
use kiln_api::{convert, types};
use kiln_model::digest::Digest;
use kiln_monitor::download::AptHelper;
use kiln_monitor::ports::Archive;

use crate::server::Server;
use crate::world::{World, server, until};

const OLD: &str = "Origin: x\nDate: Wed, 10 Jun 2026 10:00:00 UTC\nSHA256:\n";
const NEW: &str = "Origin: x\nDate: Thu, 11 Jun 2026 10:00:00 UTC\nSHA256:\n";
const PATH: &str = "/dists/stable/InRelease";

struct Mirror {
    server: Server,
    url: String,
    _folder: tempfile::TempDir,
}

impl Mirror {
    async fn new() -> (World, Self) {
        let (server, folder) = (Server::start().await, tempfile::tempdir().unwrap());
        let mut world = World::new().await;
        world.archive = Arc::new(AptHelper::new(folder.path(), None));
        let url = format!("http://127.0.0.1:{}{PATH}", server.port);
        let mirror = Self { server, url, _folder: folder };
        mirror.publish(OLD);
        (world, mirror)
    }

    fn publish(&self, content: &str) {
        self.server.files.lock().unwrap().insert(PATH.to_owned(), content.to_owned());
    }

    fn web(&self, mode: types::Mode, resolved_from: &str) -> BuilderServer {
        let digest = Digest::of(resolved_from.as_bytes()).to_string();
        BuilderServer {
            release_files: vec![ReleaseFile { url: self.url.clone(), digest }],
            ..server("web", mode)
        }
    }
}

fn plan() -> Plan {
    let change = |name: &str, from: &str, to: &str| PackageChange {
        name: name.into(),
        from: from.into(),
        to: to.into(),
    };
    Plan {
        server: "web".to_owned(),
        needs_build: true,
        packages: vec![change("nginx-light", "1.22.1-9", "1.22.1-9+deb12u3"), change("libx", "", "2")],
        release_file_digest: "r1".to_owned(),
        ..Plan::default()
    }
}

async fn polled(mirror: &Mirror, times: u64) {
    let before = mirror.server.requests.load(Ordering::SeqCst);
    until("polls", async || (mirror.server.requests.load(Ordering::SeqCst) >= before + times).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn packages_with_a_fix_are_a_signal_until_they_are_in() {
    let (world, mirror) = Mirror::new().await;
    *world.builder.plan.lock().unwrap() = plan();
    world.has_server(mirror.web(types::Mode::Auto, OLD));
    let monitor = world.start().await;
    polled(&mirror, 2).await;
    assert_eq!((world.said().len(), world.builder.planned.load(Ordering::SeqCst)), (0, 0));

    mirror.publish(NEW);
    world.hears("needs_update package_updates web").await;
    let signal = world.signals_said()[0].clone();
    assert_eq!(signal.evidence, ["nginx-light 1.22.1-9 -> 1.22.1-9+deb12u3", "libx 2 is new"]);
    assert_eq!(signal.fingerprint, "r1");
    let since = convert::from_timestamp("since", signal.since).unwrap();
    let date = "2026-06-11T10:00:00Z".parse().unwrap();
    assert_eq!(since, jiff::Timestamp::now().min(date));
    // The builder is not asked again for what it answered.
    polled(&mirror, 3).await;
    assert_eq!(world.builder.planned.load(Ordering::SeqCst), 1);

    world.has_server(mirror.web(types::Mode::Auto, NEW));
    world.hears("settled package_updates web").await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_changed_nothing_for_us_is_no_signal() {
    let (world, mirror) = Mirror::new().await;
    world.has_server(mirror.web(types::Mode::Auto, OLD));
    mirror.publish(NEW);
    let monitor = world.start().await;
    until("a plan", async || (world.builder.planned.load(Ordering::SeqCst) > 0).then_some(())).await;
    polled(&mirror, 3).await;
    assert_eq!((world.said().len(), world.builder.planned.load(Ordering::SeqCst)), (0, 1));
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_is_away_settles_nothing() {
    let (world, mirror) = Mirror::new().await;
    *world.builder.plan.lock().unwrap() = plan();
    world.has_server(mirror.web(types::Mode::Auto, OLD));
    mirror.publish(NEW);
    let monitor = world.start().await;
    world.hears("needs_update package_updates web").await;
    mirror.server.set(500);
    polled(&mirror, 4).await;
    assert_eq!(world.said().len(), 1);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_wants_no_packages_is_not_planned_for() {
    let (world, mirror) = Mirror::new().await;
    *world.builder.plan.lock().unwrap() = plan();
    world.has_server(mirror.web(types::Mode::Never, OLD));
    mirror.publish(NEW);
    let monitor = world.start().await;
    polled(&mirror, 3).await;
    assert_eq!((world.said().len(), world.builder.planned.load(Ordering::SeqCst)), (0, 0));
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn release_files_come_from_http_and_from_files_and_are_bounded() {
    let (_, mirror) = Mirror::new().await;
    let folder = tempfile::tempdir().unwrap();
    let archive = AptHelper::new(folder.path(), None);
    let file = folder.path().join("InRelease");
    std::fs::write(&file, OLD).unwrap();
    let wanted = Digest::of(OLD.as_bytes());
    assert_eq!(archive.release_file(&mirror.url).await.unwrap().digest, wanted);
    assert_eq!(archive.release_file(&format!("file:{}", file.display())).await.unwrap().digest, wanted);
    for (url, said) in [
        (format!("http://127.0.0.1:{}/nothing", mirror.server.port), None),
        ("http://127.0.0.1:1/InRelease".to_owned(), Some("apt-helper can't fetch it")),
        (format!("file:{}/none", folder.path().display()), Some("apt-helper can't fetch it")),
        ("cdrom:/x".to_owned(), Some("no http, https or file address")),
        ("--help".to_owned(), Some("no http, https or file address")),
        ("http://127.0.0.1/ x".to_owned(), Some("no http, https or file address")),
    ] {
        let answer = archive.release_file(&url).await;
        match said {
            Some(said) => assert!(answer.clone().unwrap_err().0.contains(said), "{url}: {answer:?}"),
            // An empty file is a file.
            None => assert_eq!(answer.unwrap().digest, Digest::of(b"")),
        }
    }
    // Past the bound the kernel stops it.
    mirror.publish(&"x".repeat(17 << 20));
    assert!(archive.release_file(&mirror.url).await.is_err());
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["InRelease"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_takes_long_keeps_no_other_server_waiting() {
    let (world, mirror) = Mirror::new().await;
    *world.builder.plan.lock().unwrap() = plan();
    *world.builder.slow.lock().unwrap() = Some("db".to_owned());
    for name in ["db", "web"] {
        world.has_server(BuilderServer { name: name.to_owned(), ..mirror.web(types::Mode::Auto, OLD) });
    }
    mirror.publish(NEW);
    let monitor = world.start().await;
    until("the slow plan", async || (world.builder.planned.load(Ordering::SeqCst) > 0).then_some(())).await;
    world.hears("needs_update package_updates web").await;
    monitor.stop().await;
}
