//! Single scenes.

use std::time::Instant;

use kiln_api::deployer::deployer_service_server::DeployerService as _;
use kiln_api::deployer::{
    AbortRolloutRequest, GetFleetRequest, ListFleetsRequest, ListInstancesRequest, ListReleasesRequest,
    ListRolloutsRequest, RollbackRequest, RolloutState, WatchFleetRequest,
};
use kiln_api::types::ListOptions;
use kiln_model::name::NodeName;
use kiln_service::access::from_local;
use serde_json::json;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};

use super::*;
use crate::grpc::Api;
use crate::tests::world::{Behaviour, run_spec};

fn slow(soak: u64) -> RunSpec {
    let mut run = run_spec();
    run.rollout.soak = Millis(soak);
    run
}

#[tokio::test]
async fn events_alone_bring_a_release_out_and_it_is_told_in_one_trace() {
    let site = Site::new().await;
    site.boot(&Life::long(), NEVER);
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    let mut run = run_spec();
    if let Some(health) = &mut run.health {
        health.interval = Millis(1000);
    }
    let began = Instant::now();
    let second = revision(2, "second", "two", run);
    for _ in 0..3 {
        // However often it is told.
        site.tell_revision(&second).await;
    }
    site.until_at(2).await;
    // Nothing waits for a poll: three launches, probes and flips of an instant each.
    assert!(began.elapsed() < Duration::from_millis(800), "{:?}", began.elapsed());
    site.assert_tidy().await;
    let held = site.world.held(&site.server);
    assert!(held.contains(&Digest::of(b"one")) && held.contains(&Digest::of(b"two")));

    site.until("the events", || async { site.count("rollout.succeeded") == 2 }).await;
    assert_eq!(site.count("release.created"), 2);
    assert_eq!((site.count("instance.launched"), site.count("instance.retired")), (6, 3));
    for event in site.bus.published() {
        assert_eq!(event.event.traceparent, TRACE, "{:?}", event.event.kind);
    }
}

#[tokio::test]
async fn with_every_event_lost_the_resync_finds_the_work() {
    let site = Site::new().await;
    site.bus.set_away(true);
    site.world.revise(revision(1, "first", "one", run_spec()));
    site.world.revise(revision(2, "second", "two", run_spec()));
    site.boot(&Life::long(), Duration::from_millis(20));
    // The newest of them, and nothing on the way there.
    site.until_at(1).await;
    let release = site.loaded().await.releases[&1].clone();
    assert_eq!((release.generation, release.good), (2, true));
    site.world.revise(revision(3, "third", "three", run_spec()));
    site.until_at(2).await;
    site.bus.set_away(false);
    site.until("the events", || async { site.count("rollout.succeeded") == 2 }).await;
}

#[tokio::test]
async fn one_server_that_can_not_be_read_keeps_no_other_waiting() {
    let site = Site::new().await;
    site.bus.set_away(true);
    let nonsense = crate::store::put(crate::record::FLEET, "a", 0, &"nonsense").unwrap();
    let batch = kiln_store::Batch { changes: vec![nonsense], ..kiln_store::Batch::default() };
    site.store.commit(batch).await.unwrap();
    let first = revision(1, "first", "one", run_spec());
    site.world.revise(types::Revision { server: "a".to_owned(), ..first.clone() });
    site.world.revise(first);
    site.world.signal(gone(&"a-r1-0-a1".parse().unwrap()));
    site.boot(&Life::long(), Duration::from_millis(20));
    site.until_at(1).await;
    let victim = site.world.running()[0].clone();
    site.world.exit(&victim, 137);
    site.world.signal(gone(&victim));
    site.until_at(1).await;
}

#[tokio::test]
async fn a_bad_image_goes_back_and_says_why() {
    let site = Site::new().await;
    let deployer = site.boot(&Life::long(), NEVER);
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    site.world.behave("bad", Behaviour::Exits);
    site.tell_revision(&revision(2, "second", "bad", run_spec())).await;
    site.until("the way back", || async { site.count("rollout.rolled_back") == 1 }).await;
    site.until_at(1).await;
    site.assert_tidy().await;

    let told = site.bus.published();
    let back = told.iter().find(|event| event.event.kind.verb == "rolled_back").unwrap();
    let back = events::RolloutChanged::decode(back.event.payload.as_slice()).unwrap();
    assert_eq!(back.quarantine.unwrap().definition_digest, Digest::of(b"second").to_string());

    let api = Api::new(deployer);
    let list = ListRolloutsRequest { options: None, server: "web".to_owned() };
    site.until("the last words", || async {
        let rollouts = api.list_rollouts(Request::new(list.clone())).await.unwrap().into_inner().rollouts;
        let failed = rollouts.iter().find(|r| r.id == "web-r2").unwrap();
        failed.exit_code == Some(3)
            && failed.failed_instance == "web-r2-0-a4"
            && failed.last_log == ["web-r2-0-a4: last words"]
            && failed.problem.contains("web-r2-0-a4 exited with 3")
            && failed.state() == RolloutState::RolledBack
            && (failed.from_release, failed.to_release, failed.back_to) == (1, 2, 1)
    })
    .await;
    let request = ListReleasesRequest { options: None, server: "web".to_owned() };
    let releases = api.list_releases(Request::new(request)).await.unwrap().into_inner().releases;
    let marks: Vec<_> = releases.iter().map(|r| (r.number, r.good, r.quarantined)).collect();
    assert_eq!(marks, [(1, true, false), (2, false, true)]);
    // The same definition does not come back.
    site.tell_revision(&revision(3, "second", "bad again", run_spec())).await;
    site.until("the third release", || async { site.loaded().await.fleet.refused == Some(3) }).await;
    let fleet = api.get_fleet(Request::new(GetFleetRequest { server: "web".to_owned() })).await.unwrap();
    let fleet = fleet.into_inner().fleet.unwrap();
    assert_eq!((fleet.release, fleet.rollout), (1, None));
}

#[tokio::test]
async fn an_image_whose_health_never_comes_goes_back_within_its_start_period() {
    let site = Site::new().await;
    site.boot(&Life::long(), NEVER);
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    site.world.behave("bad", Behaviour::NeverHealthy);
    site.tell_revision(&revision(2, "second", "bad", run_spec())).await;
    site.until("the way back", || async { site.count("rollout.rolled_back") == 1 }).await;
    site.until_at(1).await;
    site.assert_tidy().await;
    let failure = site.loaded().await.fleet.finished.and_then(|rollout| rollout.failure).unwrap();
    assert!(failure.last_checks.iter().all(|check| !check.passed) && !failure.last_checks.is_empty());
}

fn rollback(request_id: &str, expected: u64) -> Request<RollbackRequest> {
    let request = RollbackRequest {
        request_id: request_id.to_owned(),
        server: "web".to_owned(),
        expected_release: expected,
        to_release: 0,
        reason: "it looks wrong".to_owned(),
    };
    from_local("ada", request)
}

#[tokio::test]
async fn a_rollback_needs_the_node_alone_and_happens_once() {
    let site = Site::new().await;
    let deployer = site.boot(&Life::long(), Duration::from_millis(50));
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    site.tell_revision(&revision(2, "second", "two", run_spec())).await;
    site.until_at(2).await;
    site.world.set_others_away(true);
    site.bus.set_away(true);

    let api = Api::new(deployer);
    let refused = api.rollback(rollback("q0", 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let first = api.rollback(rollback("q1", 2)).await.unwrap().into_inner();
    let way = first.rollout.as_ref().map(|it| (it.from_release, it.to_release, it.back_to));
    assert_eq!(way, Some((2, 1, 1)));
    site.until_at(1).await;
    site.assert_tidy().await;
    // The same call again is the same rollback, though another release runs by now.
    let again = api.rollback(rollback("q1", 2)).await.unwrap().into_inner();
    assert_eq!(first, again);
    let nowhere = api.rollback(rollback("q2", 1)).await.unwrap_err();
    assert_eq!(nowhere.code(), Code::FailedPrecondition, "{nowhere}");
    let fleet = site.loaded().await.fleet;
    assert_eq!((fleet.quarantine.len(), fleet.backs), (1, 1));
    let audit = site.store.audit(0, 500).await.unwrap();
    let of = |action: &str| audit.iter().find(|(_, record)| record.action == action).unwrap().1.clone();
    let asked = of("rollback");
    assert_eq!((asked.actor.as_str(), asked.request_id.unwrap().as_str()), ("ada", "q1"));
    assert_eq!((&asked.before["release"], &asked.after["release"]), (&json!(2), &json!(1)));
    let decided = of("instances.changed");
    assert_eq!((decided.actor.as_str(), decided.server), ("deployer", Some(site.server.clone())));
    let actions: Vec<_> = audit.iter().rev().map(|(_, record)| record.action.as_str()).collect();
    let steps = ["release.created", "rollout.started", "rollout.succeeded"];
    assert_eq!(actions.iter().filter(|action| steps.contains(action)).count(), 6, "{actions:?}");
    assert_eq!(actions.iter().filter(|action| **action == "rollback").count(), 1, "{actions:?}");
    site.bus.set_away(false);
    site.until("the events", || async { site.count("rollout.rolled_back") == 1 }).await;
}

#[tokio::test]
async fn an_aborted_rollout_goes_back() {
    let site = Site::new().await;
    let deployer = site.boot(&Life::long(), NEVER);
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    site.tell_revision(&revision(2, "second", "two", slow(60_000))).await;
    let two_on_edge = || async { site.world.on_edge(&site.server).len() == 4 };
    site.until("a new one on the edge", two_on_edge).await;
    let api = Api::new(deployer);
    let request =
        AbortRolloutRequest { request_id: "q1".to_owned(), server: "web".to_owned(), expected_release: 2 };
    api.abort_rollout(from_local("ada", request)).await.unwrap();
    site.until_at(1).await;
    site.assert_tidy().await;
    assert!(site.loaded().await.fleet.quarantine.is_empty());
}

#[tokio::test]
async fn a_killed_instance_is_replaced_once_however_often_it_is_told() {
    let site = Site::new().await;
    let deployer = site.boot(&Life::long(), NEVER);
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    let killed = site.world.running()[1].clone();
    site.world.exit(&killed, 137);
    let signal = gone(&killed);
    for _ in 0..3 {
        site.tell_signal(&signal).await;
        site.world.signal(signal.clone());
    }
    site.until("a replacement", || async { site.loaded().await.fleet.next_attempt == 5 }).await;
    site.until_at(1).await;
    site.tell_signal(&signal).await;
    site.until("the events", || async { site.count("instance.launched") == 4 }).await;
    site.assert_tidy().await;
    assert_eq!(site.loaded().await.fleet.next_attempt, 5);
    let all = ListInstancesRequest { server: "web".to_owned(), all: true, ..Default::default() };
    let listed = Api::new(deployer).list_instances(Request::new(all)).await.unwrap().into_inner().instances;
    let ended = listed.iter().find(|instance| instance.id == killed.to_string()).unwrap();
    assert_eq!(
        (ended.exit_code, ended.last_checks.len()),
        (Some(137), 1),
        "what was last seen of it is kept"
    );
}

#[tokio::test]
async fn what_nobody_means_to_run_is_retired_and_tests_are_left_alone() {
    let site = Site::new().await;
    let life = Life::long();
    site.boot(&life, NEVER);
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    life.kill();
    let orphan: InstanceId = "web-r1-0-a99".parse().unwrap();
    let test: InstanceId = "web-r0-0-a7".parse().unwrap();
    let stranger: InstanceId = "other-r1-0-a1".parse().unwrap();
    site.world.plant(&orphan, types::Role::Fleet);
    site.world.plant(&test, types::Role::Test);
    site.world.plant(&stranger, types::Role::Fleet);
    // A signal about it is none of ours either.
    site.world.signal(gone(&stranger));
    site.boot(&Life::long(), NEVER);
    site.until("the orphan's end", || async { !site.world.running().contains(&orphan) }).await;
    let running = site.world.running();
    assert!(running.contains(&test) && running.contains(&stranger), "{running:?}");
    assert_eq!(running.len(), 5);
}

#[tokio::test]
async fn while_the_node_is_away_nothing_is_decided() {
    let site = Site::new().await;
    let deployer = site.boot(&Life::long(), Duration::from_millis(20));
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    site.world.set_node_away(true);
    site.until("the loss of the node", || async { !deployer.board.is_synced(&NodeName::local()) }).await;
    site.tell_revision(&revision(2, "second", "two", run_spec())).await;
    site.until("the rollout", || async { site.loaded().await.fleet.rollout.is_some() }).await;
    let api = Api::new(deployer.clone());
    let fleet = api.get_fleet(Request::new(GetFleetRequest { server: "web".to_owned() })).await.unwrap();
    assert!(fleet.into_inner().fleet.unwrap().problem.contains("node `local` can't be reached"));
    let before = site.loaded().await;
    assert_eq!(before.fleet.instances.len(), 3);
    site.world.set_node_away(false);
    site.until_at(2).await;
    site.assert_tidy().await;
}

#[tokio::test]
async fn a_silent_monitor_holds_a_rollout_until_it_is_back() {
    let site = Site::new().await;
    site.boot(&Life::long(), NEVER);
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    site.world.set_others_away(true);
    site.tell_revision(&revision(2, "second", "two", slow(100))).await;
    site.until("the hold", || async { site.count("rollout.held") == 1 }).await;
    assert_eq!(site.loaded().await.fleet.last_good, 1);
    site.world.set_others_away(false);
    site.until_at(2).await;
    site.until("the events", || async { site.count("rollout.resumed") == 1 }).await;
    site.assert_tidy().await;
}

#[tokio::test]
async fn a_removed_server_is_retired_and_its_numbers_stay() {
    let site = Site::new().await;
    site.boot(&Life::long(), NEVER);
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    let removed = types::Revision {
        server: "web".to_owned(),
        generation: 2,
        removed: true,
        cause: revision(2, "", "", run_spec()).cause,
        created: revision(2, "", "", run_spec()).created,
        ..types::Revision::default()
    };
    site.tell_revision(&removed).await;
    site.until("the end", || async { site.world.running().is_empty() }).await;
    site.tell_revision(&revision(3, "first", "one", run_spec())).await;
    site.until_at(2).await;
}

#[tokio::test]
async fn a_fleet_can_be_watched_and_listed() {
    let site = Site::new().await;
    let deployer = site.boot(&Life::long(), NEVER);
    let api = Api::new(deployer);
    let watch = || Request::new(WatchFleetRequest { server: "web".to_owned() });
    assert_eq!(api.watch_fleet(watch()).await.err().map(|e| e.code()), Some(Code::NotFound));
    let bad = Request::new(GetFleetRequest { server: "../web".to_owned() });
    assert_eq!(api.get_fleet(bad).await.unwrap_err().code(), Code::InvalidArgument);

    site.tell_revision(&revision(1, "first", "one", slow(100))).await;
    site.until("the fleet", || async { site.loaded().await.version > 0 }).await;
    let mut stream = api.watch_fleet(watch()).await.unwrap().into_inner();
    let mut last = None;
    while let Some(answer) = stream.next().await {
        let fleet = answer.unwrap().fleet.unwrap();
        assert!(fleet.healthy <= 3 && last.as_ref() != Some(&fleet));
        let done = fleet.rollout.is_none();
        last = Some(fleet);
        if done {
            break;
        }
    }
    let fleet = last.unwrap();
    assert_eq!((fleet.release, fleet.last_good, fleet.healthy, fleet.replicas), (1, 1, 3, 3));
    assert!(fleet.instances.iter().all(|i| i.on_edge && i.address == "10.77.0.2"));

    site.tell_revision(&revision(2, "second", "two", run_spec())).await;
    site.until_at(2).await;
    let list = |since, all| {
        let options = Some(ListOptions { since, page_size: 500, page_token: String::new() });
        Request::new(ListInstancesRequest { options, server: "web".to_owned(), all })
    };
    let present = api.list_instances(list(None, false)).await.unwrap().into_inner();
    assert_eq!(present.instances.len(), 3);
    assert!(present.instances.iter().all(|i| i.release == 2 && i.version > 0));
    let every = api.list_instances(list(None, true)).await.unwrap().into_inner();
    assert_eq!(every.instances.len(), 6);
    let since = present.info.unwrap().cursor;
    let nothing = api.list_instances(list(since, false)).await.unwrap().into_inner();
    assert_eq!(nothing.instances, []);
    let one = ListOptions { since: None, page_size: 1, page_token: String::new() };
    let fleets = api.list_fleets(Request::new(ListFleetsRequest { options: Some(one) })).await.unwrap();
    assert_eq!(fleets.into_inner().fleets.len(), 1);
}
