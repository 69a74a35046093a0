use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_api::monitor::monitor_service_server::MonitorService;
use kiln_api::monitor::{Health, ListHealthRequest, WatchHealthRequest};
use kiln_api::{convert, deployer, engine, types};
use kiln_model::check::{Check, CheckResult, CommandCheck, HttpCheck};
use kiln_model::event::Service;
use kiln_model::time::Millis;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tonic::Request;

use crate::server::Server;
use crate::world::{Running, TRACE, World, in_state, instance, policy, until};

const A1: &str = "web-r1-0-a1";
const LONG: u64 = 30_000;

async fn health(monitor: &Running) -> Vec<Health> {
    let request = Request::new(ListHealthRequest::default());
    MonitorService::list_health(&monitor.api, request).await.unwrap().into_inner().health
}

async fn state(monitor: &Running, id: &str) -> Option<types::HealthState> {
    let all = health(monitor).await;
    all.iter().find(|health| health.instance == id).map(Health::state)
}

fn observed(health: &Health) -> Option<Timestamp> {
    convert::from_optional_timestamp("observed", health.observed).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_is_seen_healthy_and_stays_observed() {
    let (world, server) = (World::new().await, Server::start().await);
    let monitor = world.start().await;
    world.tells(instance(A1, Some(policy(server.check(), 100, LONG)))).await;
    world.hears("healthy web-r1-0-a1").await;
    assert_eq!(world.said(), ["healthy web-r1-0-a1"]);
    let event =
        world.bus.published().into_iter().rfind(|e| e.event.kind.service == Service::Monitor).unwrap();
    assert_eq!(event.event.traceparent, TRACE);

    // Its document is not written again, and yet the fact stays fresh.
    let first = health(&monitor).await[0].clone();
    let later = until("a newer observation", async || {
        let now = health(&monitor).await[0].clone();
        (observed(&now) > observed(&first)).then_some(now)
    })
    .await;
    assert_eq!((later.version, later.state()), (first.version, types::HealthState::Healthy));
    assert!(later.last_checks.len() > 2 && later.last_checks.len() <= 10);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_opens_its_port_late_is_seen_soon_after() {
    let world = World::new().await;
    let monitor = world.start().await;
    // The port is known, and refuses until it is listened on.
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let check = Check::Http(HttpCheck { port, path: "/".to_owned(), status: None, body: None });
    let once = kiln_model::run::HealthPolicy { healthy: 1, ..policy(check, 60_000, LONG * 10) };
    world.tells(instance(A1, Some(once))).await;
    until("a first look", async || health(&monitor).await.iter().find_map(observed)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let server = Server::on(TcpListener::bind(("127.0.0.1", port)).await.unwrap());
    let open = Instant::now();
    world.hears("healthy web-r1-0-a1").await;
    // Not at the next interval, a minute later.
    assert!(open.elapsed() < Duration::from_secs(10), "{:?}", open.elapsed());
    assert_eq!(server.requests.load(Ordering::SeqCst), 1);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sick_instance_is_to_be_replaced_until_it_recovers() {
    let (world, server) = (World::new().await, Server::start().await);
    let monitor = world.start().await;
    world.tells(instance(A1, Some(policy(server.check(), 30, LONG)))).await;
    world.hears("healthy web-r1-0-a1").await;
    server.set(503);
    world.hears("needs_update unhealthy web-r1-0-a1").await;
    let signal = world.signals_said()[0].clone();
    assert_eq!((signal.remedy(), signal.fingerprint.as_str()), (types::Remedy::Replace, A1));
    assert!(signal.evidence[0].contains("status 503, wanted 200 to 399"), "{:?}", signal.evidence);
    server.set(200);
    world.hears("settled unhealthy web-r1-0-a1").await;
    let mut said = world.said();
    // Two aggregates: their events are ordered each for itself.
    said.sort();
    assert_eq!(
        said,
        [
            "healthy web-r1-0-a1",
            "healthy web-r1-0-a1",
            "needs_update unhealthy web-r1-0-a1",
            "settled unhealthy web-r1-0-a1",
            "unhealthy web-r1-0-a1"
        ]
    );
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_is_known_at_once_and_settled_when_it_is_cleared_away() {
    let (world, server) = (World::new().await, Server::start().await);
    let monitor = world.start().await;
    let running = instance(A1, Some(policy(server.check(), 100, LONG)));
    world.tells(running.clone()).await;
    world.hears("healthy web-r1-0-a1").await;
    world.engine.set(A1, engine::InstanceState::Exited, Some(137));
    world.hears("gone web-r1-0-a1").await;
    world.hears("needs_update gone web-r1-0-a1").await;
    assert!(world.signals_said()[0].evidence[0].contains("exited with status 137"));
    world.tells(in_state(&running, deployer::InstanceState::Exited)).await;
    world.tells(in_state(&running, deployer::InstanceState::Retired)).await;
    world.hears("settled gone web-r1-0-a1").await;
    until("no health any more", async || health(&monitor).await.is_empty().then_some(())).await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_engine_does_not_know_any_more_is_gone() {
    let (world, server) = (World::new().await, Server::start().await);
    world.engine.knows.store(false, Ordering::SeqCst);
    world.engine.set_away(true);
    world.has(instance(A1, Some(policy(server.check(), 100, LONG))));
    let monitor = world.start().await;
    world.hears("healthy web-r1-0-a1").await;
    // It comes back without its instances.
    world.engine.set_away(false);
    world.hears("needs_update gone web-r1-0-a1").await;
    // It knew it after all.
    world.engine.set(A1, engine::InstanceState::Running, None);
    world.hears("settled gone web-r1-0-a1").await;
    until("it is healthy again", async || {
        (state(&monitor, A1).await == Some(types::HealthState::Healthy)).then_some(())
    })
    .await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_one_says_nothing_of_the_others() {
    let (world, server) = (World::new().await, Server::start().await);
    let monitor = world.start().await;
    for id in [A1, "web-r1-1-a2", "web-r1-2-a3"] {
        world.tells(instance(id, Some(policy(server.check(), 50, LONG)))).await;
        world.hears(&format!("healthy {id}")).await;
    }
    // All of them were launched before it asks the engine.
    monitor.stop().await;
    let monitor = world.start().await;
    until("the engine is watched anew", async || {
        (world.engine.watched.load(Ordering::SeqCst) > 1).then_some(())
    })
    .await;
    // The engine's messages are taken in their order: what the first change did to the others is done when the second
    // one is heard of.
    for id in ["web-r1-1-a2", "web-r1-2-a3"] {
        world.engine.set(id, engine::InstanceState::Exited, Some(1));
        world.hears(&format!("needs_update gone {id}")).await;
    }
    assert_eq!(state(&monitor, A1).await, Some(types::HealthState::Healthy));
    assert!(!world.said().iter().any(|said| said == "gone web-r1-0-a1"), "{:?}", world.said());
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_leaves_is_not_looked_at_and_its_end_is_no_signal() {
    let (world, server) = (World::new().await, Server::start().await);
    let monitor = world.start().await;
    let running = instance(A1, Some(policy(server.check(), 20, LONG)));
    world.tells(running.clone()).await;
    world.hears("healthy web-r1-0-a1").await;
    world.tells(in_state(&running, deployer::InstanceState::Draining)).await;
    until("no more looks", async || {
        let before = server.requests.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(200)).await;
        (server.requests.load(Ordering::SeqCst) == before).then_some(())
    })
    .await;
    server.set(500);
    world.engine.set(A1, engine::InstanceState::Exited, Some(0));
    world.tells(in_state(&running, deployer::InstanceState::Retired)).await;
    until("no health any more", async || health(&monitor).await.is_empty().then_some(())).await;
    assert_eq!(world.said(), ["healthy web-r1-0-a1"]);
    monitor.stop().await;
}

/// Whether the deployer tells of it or the engine: the deployer launches another one unasked.
#[tokio::test(flavor = "multi_thread")]
async fn a_launch_that_was_cut_off_is_no_signal_and_one_that_failed_is() {
    let world = World::new().await;
    let monitor = world.start().await;
    let launching = |id| in_state(&instance(id, None), deployer::InstanceState::Launching);
    let failed = |id| in_state(&instance(id, None), deployer::InstanceState::Failed);
    world.tells(deployer::Instance { cut_off: true, ..failed(A1) }).await;
    world.tells(failed("web-r1-1-a2")).await;
    world.hears("needs_update gone web-r1-1-a2").await;
    for id in ["web-r1-2-a3", "web-r1-3-a4"] {
        world.tells(launching(id)).await;
        until(id, async || state(&monitor, id).await).await;
    }
    let state = engine::InstanceState::Failed.into();
    world
        .engine
        .tell("web-r1-2-a3", engine::Instance { state, cut_off: true, ..engine::Instance::default() });
    world.engine.tell("web-r1-3-a4", engine::Instance { state, ..engine::Instance::default() });
    world.hears("needs_update gone web-r1-3-a4").await;
    let said = world.said();
    assert!(!said.iter().any(|said| said.ends_with("-a1") || said.ends_with("-a3")), "{said:?}");
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_what_was_known_and_observes_anew() {
    let (world, server) = (World::new().await, Server::start().await);
    let monitor = world.start().await;
    world.tells(instance(A1, Some(policy(server.check(), 50, LONG)))).await;
    world.hears("healthy web-r1-0-a1").await;
    monitor.stop().await;
    let stopped = Timestamp::now();

    // Nobody is there to be asked.
    world.deployer.away.store(true, Ordering::SeqCst);
    let monitor = world.start().await;
    assert_eq!(state(&monitor, A1).await, Some(types::HealthState::Healthy));
    until("an observation of its own", async || {
        health(&monitor).await.iter().find_map(observed).filter(|observed| *observed > stopped)
    })
    .await;
    assert_eq!(world.said(), ["healthy web-r1-0-a1"]);
    // What happens from now on is seen from now on.
    server.set(500);
    world.hears("needs_update unhealthy web-r1-0-a1").await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_event_lost_the_list_tells_it_all() {
    let (world, server) = (World::new().await, Server::start().await);
    let running = world.has(instance(A1, Some(policy(server.check(), 50, LONG))));
    let monitor = world.start().await;
    world.hears("healthy web-r1-0-a1").await;
    world.has(instance("web-r1-1-a2", Some(policy(server.check(), 50, LONG))));
    world.hears("healthy web-r1-1-a2").await;
    world.has(in_state(&running, deployer::InstanceState::Exited));
    world.hears("needs_update gone web-r1-0-a1").await;
    world.has(in_state(&running, deployer::InstanceState::Retired));
    world.hears("settled gone web-r1-0-a1").await;
    assert_eq!(state(&monitor, A1).await, None);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_event_of_a_retired_instance_brings_nothing_back() {
    let (world, server) = (World::new().await, Server::start().await);
    let monitor = world.start().await;
    let running = instance(A1, Some(policy(server.check(), 50, LONG)));
    world.tells(running.clone()).await;
    world.hears("healthy web-r1-0-a1").await;
    world.tells(in_state(&running, deployer::InstanceState::Retired)).await;
    until("no health any more", async || health(&monitor).await.is_empty().then_some(())).await;
    // Redelivered, after the deployer is away: no list could correct it.
    world.deployer.away.store(true, Ordering::SeqCst);
    let old = kiln_api::events::InstanceChanged {
        instance: Some(deployer::Instance { version: 1, ..running.clone() }),
    };
    let payload = prost::Message::encode_to_vec(&old);
    world.publish(Service::Deployer, "instance", "launched", "again", 1, payload).await;
    world.tells(instance("web-r1-0-a2", Some(policy(server.check(), 50, LONG)))).await;
    world.hears("healthy web-r1-0-a2").await;
    assert_eq!(state(&monitor, A1).await, None);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_check_the_engine_decides_and_its_silence_is_no_fact() {
    let world = World::new().await;
    // The engine has not seen it yet when the deployer tells of it.
    world.engine.knows.store(false, Ordering::SeqCst);
    let monitor = world.start().await;
    // Told before, it would be one that the engine does not know.
    until("the engine is watched", async || (world.engine.watched.load(Ordering::SeqCst) > 0).then_some(()))
        .await;
    world.tells(instance(A1, None)).await;
    until("it is watched", async || state(&monitor, A1).await).await;
    assert_eq!(world.said(), [""; 0]);
    world.engine.set(A1, engine::InstanceState::Running, None);
    world.hears("healthy web-r1-0-a1").await;
    world.engine.set_away(true);
    let last = until("observations stop", async || {
        let before = health(&monitor).await.iter().find_map(observed);
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let after = health(&monitor).await.iter().find_map(observed);
        (before == after).then_some(after)
    })
    .await;
    assert_eq!(state(&monitor, A1).await, Some(types::HealthState::Healthy));
    world.engine.set_away(false);
    until("observations go on", async || {
        (health(&monitor).await.iter().find_map(observed) > last).then_some(())
    })
    .await;
    assert_eq!(world.said(), ["healthy web-r1-0-a1"]);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_run_by_the_engine_and_its_absence_fails_nothing() {
    let world = World::new().await;
    let monitor = world.start().await;
    let result =
        |passed| CheckResult { passed, detail: String::new(), took: Millis(1), time: Timestamp::now() };
    *world.engine.check.lock().unwrap() = Some(result(true));
    let check = Check::Command(CommandCheck { run: "true".to_owned(), status: 0, stdout: None });
    world.tells(instance(A1, Some(policy(check, 30, LONG)))).await;
    world.hears("healthy web-r1-0-a1").await;
    // The node can't be asked: many looks long.
    *world.engine.check.lock().unwrap() = None;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.said(), ["healthy web-r1-0-a1"]);
    *world.engine.check.lock().unwrap() = Some(result(false));
    world.hears("unhealthy web-r1-0-a1").await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_begins_with_the_state_and_tells_every_answer() {
    let (world, server) = (World::new().await, Server::start().await);
    let monitor = world.start().await;
    world.tells(instance(A1, Some(policy(server.check(), 50, LONG)))).await;
    world.tells(instance("db-r1-0-a1", Some(policy(server.check(), 50, LONG)))).await;
    world.hears("healthy web-r1-0-a1").await;
    let request = Request::new(WatchHealthRequest { server: "web".to_owned(), own: false });
    let mut stream = monitor.api.watch_health(request).await.unwrap().into_inner();
    let mut next = async || {
        let message = tokio::time::timeout(Duration::from_secs(20), stream.next()).await.unwrap();
        message.unwrap().unwrap().health.unwrap()
    };
    let first = next().await;
    assert_eq!((first.instance.as_str(), first.state()), (A1, types::HealthState::Healthy));
    let second = next().await;
    assert!(second.instance == A1 && observed(&second) > observed(&first));
    server.set(500);
    while next().await.state() != types::HealthState::Unhealthy {}
    monitor.stop().await;
    // The end of the monitor ends the stream.
    while stream.next().await.is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_are_watched_by_one() {
    const MANY: usize = 2000;
    let (world, server) = (World::new().await, Server::start().await);
    for n in 0..MANY {
        world.has(instance(&format!("web-r1-{n}-a1"), Some(policy(server.check(), 1000, LONG))));
    }
    let monitor = world.start().await;
    until("all are healthy", async || {
        let healthy = world.said().iter().filter(|said| said.starts_with("healthy")).count();
        tokio::time::sleep(Duration::from_millis(100)).await;
        (healthy == MANY).then_some(())
    })
    .await;
    // Each page is bounded, and all pages together are everything once.
    let (mut seen, mut token) = (std::collections::BTreeSet::new(), String::new());
    loop {
        let options =
            types::ListOptions { page_size: 500, page_token: token, ..types::ListOptions::default() };
        let request = Request::new(ListHealthRequest { options: Some(options), server: String::new() });
        let page = MonitorService::list_health(&monitor.api, request).await.unwrap().into_inner();
        assert!(page.health.len() <= 500);
        seen.extend(page.health.into_iter().map(|health| health.instance));
        token = page.info.unwrap().next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen.len(), MANY);
    monitor.stop().await;
}
