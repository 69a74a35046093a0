use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use kiln_api::events::{PlanUnchanged, Report, RevisionCreated};
use kiln_api::monitor::monitor_service_server::MonitorService;
use kiln_api::monitor::{
    ApproveSignalRequest, GetServerStatusRequest, ListSignalsRequest, ReportSignalRequest, WatchHealthRequest,
};
use kiln_api::types;
use kiln_model::event::Service;
use kiln_service::access::{TABLE, from_local};
use kiln_store::Store;
use prost::Message;
use serde_json::{Value, json};
use tonic::{Code, Request, Status};

use crate::server::Server;
use crate::world::{Running, World, instance, policy, server, until};

fn request(request_id: &str, id: &str) -> ReportSignalRequest {
    ReportSignalRequest {
        request_id: request_id.to_owned(),
        server: "web".to_owned(),
        reporter: "scanner".to_owned(),
        id: id.to_owned(),
        summary: "CVE-2026-1 in nginx".to_owned(),
        ..ReportSignalRequest::default()
    }
}

async fn report(monitor: &Running, request: ReportSignalRequest) -> Result<types::Signal, Status> {
    let answer = monitor.api.report_signal(from_local("ann", request)).await?;
    Ok(answer.into_inner().signal.unwrap())
}

async fn signals(monitor: &Running) -> Vec<types::Signal> {
    let request = Request::new(ListSignalsRequest::default());
    MonitorService::list_signals(&monitor.api, request).await.unwrap().into_inner().signals
}

/// A monitor that knows the server `web`.
async fn started(mode: types::Mode) -> (World, Running) {
    let world = World::new().await;
    world.has_server(server("web", mode));
    let monitor = world.start().await;
    until("the server is known", async || {
        let request = Request::new(GetServerStatusRequest { server: "web".to_owned(), own: false });
        monitor.api.get_server_status(request).await.ok()
    })
    .await;
    (world, monitor)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_one_signal_however_often_it_comes() {
    let (world, monitor) = started(types::Mode::Auto).await;
    let first = report(&monitor, request("r1", "17")).await.unwrap();
    assert_eq!((first.state(), first.remedy()), (types::SignalState::Open, types::Remedy::Rebuild));
    assert_eq!(
        (&first.evidence[..], first.reporter.as_str()),
        (&["CVE-2026-1 in nginx".to_owned()][..], "ann for scanner")
    );
    // The same call, and the same report in another call.
    assert_eq!(report(&monitor, request("r1", "17")).await.unwrap(), first);
    assert_eq!(report(&monitor, request("r2", "17")).await.unwrap(), first);
    let second = report(&monitor, request("r3", "18")).await.unwrap();
    assert_ne!(second.id, first.id);
    world.hears("needs_update reported web").await;
    until("both are told", async || (world.said().len() == 2).then_some(())).await;
    let (_, audit) = world.store.audit(0, 10).await.unwrap().into_iter().next_back().unwrap();
    assert_eq!((audit.actor.as_str(), audit.action.as_str()), ("ann", "report_signal"));

    // Who reports for nobody else is the reporter.
    let own = ReportSignalRequest { reporter: String::new(), ..request("r5", "20") };
    assert_eq!(report(&monitor, own).await.unwrap().reporter, "ann");

    // It outlives a restart as one.
    monitor.stop().await;
    let monitor = world.start().await;
    assert_eq!(report(&monitor, request("r4", "17")).await.unwrap(), first);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_or_an_unchanged_plan_answers_a_report() {
    let (world, monitor) = started(types::Mode::Auto).await;
    let first = report(&monitor, request("r1", "17")).await.unwrap();
    let cause = Some(types::Cause { id: first.id.clone(), ..types::Cause::default() });
    let event = PlanUnchanged { server: "web".to_owned(), cause: cause.clone(), lock_key: String::new() };
    world.publish(Service::Builder, "plan", "unchanged", "web", 1, event.encode_to_vec()).await;
    world.hears("settled reported web").await;

    // A revision that is newer than the report, whatever caused it.
    report(&monitor, request("r2", "18")).await.unwrap();
    let revision =
        types::Revision { server: "web".to_owned(), generation: 2, cause, ..types::Revision::default() };
    let event = RevisionCreated { revision: Some(revision) };
    world.publish(Service::Builder, "revision", "created", "web", 2, event.encode_to_vec()).await;
    until("both are settled", async || (world.said().len() == 4).then_some(())).await;
    assert!(signals(&monitor).await.iter().all(|signal| signal.state() == types::SignalState::Resolved));
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_whose_answer_was_lost_is_found_to_be_done() {
    let (world, monitor) = started(types::Mode::Auto).await;
    world.builder.plan.lock().unwrap().needs_build = true;
    report(&monitor, request("r1", "17")).await.unwrap();
    until("it was asked for", async || (world.builder.planned.load(Ordering::SeqCst) > 0).then_some(()))
        .await;
    assert_eq!(world.said(), ["needs_update reported web"]);
    world.builder.plan.lock().unwrap().needs_build = false;
    world.hears("settled reported web").await;
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_can_be_asked_for_by_name() {
    let (world, monitor) = started(types::Mode::Auto).await;
    let backend = Server::start().await;
    let a1 = instance("web-r1-0-a1", Some(policy(backend.check(), 100, 30_000)));
    let ask = |request_id: &str| ReportSignalRequest {
        remedy: types::Remedy::Replace.into(),
        instance: "web-r1-0-a1".to_owned(),
        ..request(request_id, "19")
    };
    assert_eq!(report(&monitor, ask("r1")).await.unwrap_err().code(), Code::NotFound);
    world.tells(a1.clone()).await;
    world.hears("healthy web-r1-0-a1").await;
    let first = report(&monitor, ask("r2")).await.unwrap();
    world.hears("needs_update reported web-r1-0-a1").await;
    world.tells(crate::world::in_state(&a1, kiln_api::deployer::InstanceState::Retired)).await;
    world.hears("settled reported web-r1-0-a1").await;
    // The answer was lost: the same call gets it, though what it asked for is done and the instance gone.
    until("the instance is gone", async || report(&monitor, ask("r3")).await.err()).await;
    assert_eq!(report(&monitor, ask("r2")).await.unwrap(), first);
    monitor.stop().await;
}

/// A signal that acts once somebody approves. Sickness asks nobody here; a changed definition does.
async fn waits_for_approval(world: &World, monitor: &Running) -> String {
    let observed = kiln_monitor_core::signal::Observation {
        server: "web".parse().unwrap(),
        cause: kiln_model::cause::CauseKind::DefinitionChanged,
        fingerprint: "d".to_owned(),
        remedy: kiln_model::signal::Remedy::Rebuild,
        evidence: vec!["commit 1".to_owned()],
        instance: None,
        since: jiff::Timestamp::now(),
        reporter: "monitor".to_owned(),
        generation: 1,
    };
    let id = observed.id().to_string();
    let scope = kiln_monitor::signals::Scope::Cause(observed.server.clone(), observed.cause);
    monitor.api.signals.see(&scope, &[observed]).await.unwrap();
    world.hears("waits_for_approval definition_changed web").await;
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_approval_acts_when_it_is_given() {
    let (world, monitor) = started(types::Mode::Approve).await;
    let id = waits_for_approval(&world, &monitor).await;

    let approve = |request_id: &str, id: &str| {
        from_local("ann", ApproveSignalRequest { request_id: request_id.to_owned(), id: id.to_owned() })
    };
    let unknown = kiln_model::digest::Digest::of(b"unknown").to_string();
    assert_eq!(monitor.api.approve_signal(approve("a0", &unknown)).await.unwrap_err().code(), Code::NotFound);
    let wrong = monitor.api.approve_signal(approve("a0", "../x")).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    let approved = monitor.api.approve_signal(approve("a1", &id)).await.unwrap().into_inner().signal.unwrap();
    assert_eq!(approved.state(), types::SignalState::Open);
    assert_eq!(approved.evidence, ["commit 1", "approved by ann"]);
    world.hears("needs_update definition_changed web").await;
    // Again the same call; another one finds nothing that waits.
    let again = monitor.api.approve_signal(approve("a1", &id)).await.unwrap().into_inner().signal.unwrap();
    assert_eq!(again, approved);
    let late = monitor.api.approve_signal(approve("a2", &id)).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_calls_are_refused_with_the_field() {
    let (_world, monitor) = started(types::Mode::Auto).await;
    for (change, code) in [
        ((|r| r.server = "Web!".to_owned()) as fn(&mut ReportSignalRequest), Code::InvalidArgument),
        (|r| r.server = "db".to_owned(), Code::NotFound),
        (|r| r.request_id = String::new(), Code::InvalidArgument),
        (|r| r.reporter = "a\nb".to_owned(), Code::InvalidArgument),
        (|r| r.summary = "x".repeat(5000), Code::InvalidArgument),
        (|r| r.remedy = 77, Code::InvalidArgument),
        (|r| r.instance = "web".to_owned(), Code::InvalidArgument),
    ] {
        let mut request = request("r1", "17");
        change(&mut request);
        assert_eq!(report(&monitor, request.clone()).await.unwrap_err().code(), code, "{request:?}");
    }
    assert!(signals(&monitor).await.is_empty());
    let watch = Request::new(WatchHealthRequest { server: "../x".to_owned(), own: false });
    assert_eq!(monitor.api.watch_health(watch).await.err().unwrap().code(), Code::InvalidArgument);
    let token = types::ListOptions { page_token: "junk".to_owned(), ..types::ListOptions::default() };
    let list = Request::new(ListSignalsRequest { options: Some(token), server: String::new() });
    let refused = MonitorService::list_signals(&monitor.api, list).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_come_in_on_the_bus_and_bad_ones_are_put_aside() {
    let (world, monitor) = started(types::Mode::Auto).await;
    let subject = "kiln.in.v1.test.report";
    let send = |payload: &[u8]| world.bus.publish_raw(subject, Default::default(), payload).unwrap();
    send(b"not a report");
    send(br#"{"server":"nobody","reporter":"scanner","id":"1","summary":"x"}"#);
    let json = br#"{"server":"web","reporter":"scanner","id":"17","summary":"CVE-2026-1"}"#;
    send(json);
    send(json);
    let binary = Report {
        server: "web".to_owned(),
        reporter: "scanner".to_owned(),
        id: "17".to_owned(),
        summary: "the same in protobuf".to_owned(),
        ..Report::default()
    };
    send(&binary.encode_to_vec());
    world.hears("needs_update reported web").await;
    until("the bad ones are put aside", async || (world.bus.dead_letters().len() == 2).then_some(())).await;
    let signals = signals(&monitor).await;
    assert_eq!(signals.len(), 1);
    assert_eq!(signals[0].reporter, "bus for scanner");
    assert_eq!(world.said(), ["needs_update reported web"]);
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_that_changes_something_leaves_one_record() {
    let (world, monitor) = started(types::Mode::Approve).await;
    let reported = report(&monitor, request("r1", "17")).await.unwrap();
    let waiting = waits_for_approval(&world, &monitor).await;
    let request = ApproveSignalRequest { request_id: "a1".to_owned(), id: waiting.clone() };
    monitor.api.approve_signal(from_local("bob", request)).await.unwrap();

    // Method, request id, action, actor, which signal, its state before, and its evidence after.
    let seen = ["CVE-2026-1 in nginx"].as_slice();
    let approved = ["commit 1", "approved by bob"].as_slice();
    let expected = [
        ("ReportSignal", "r1", "report_signal", "ann", reported.id, Value::Null, seen),
        ("ApproveSignal", "a1", "approve_signal", "bob", waiting, json!("waiting"), approved),
    ];
    let changes = TABLE.iter().filter(|row| row.changes);
    let methods = changes.filter_map(|row| row.method.strip_prefix("/kiln.monitor.v1.MonitorService/"));
    let named: BTreeSet<_> = expected.iter().map(|it| it.0).collect();
    assert_eq!(named, methods.collect(), "say what record a new method leaves");

    let audit = world.store.audit(0, 500).await.unwrap();
    for (method, id, action, actor, signal, before, evidence) in expected {
        let is_of_call =
            |it: &kiln_store::AuditRecord| it.request_id.as_ref().is_some_and(|asked| asked.as_str() == id);
        let of_call: Vec<_> = audit.iter().map(|(_, it)| it).filter(|it| is_of_call(it)).collect();
        let [record] = of_call[..] else { panic!("{method}: {of_call:?}") };
        let who = (record.actor.as_str(), record.action.as_str(), &record.subject);
        assert_eq!(who, (actor, action, &format!("signal/{signal}")));
        assert_eq!(record.server.as_ref().map(|server| server.as_str()), Some("web"));
        let states = (&record.before["state"], &record.after["state"]);
        assert_eq!(states, (&before, &json!("open")), "{method}");
        assert_eq!(record.before.is_null(), before.is_null(), "{method}");
        assert_eq!(record.after["evidence"], json!(evidence), "{method}");
    }
    monitor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_can_not_be_read_are_put_aside_with_words_and_hold_nothing_up() {
    let (world, monitor) = started(types::Mode::Auto).await;
    // Groups of a field that nobody knows, each in the one before.
    let deep = [vec![0x7b; 101], vec![0x7c; 101]].concat();
    let not_utf8 = vec![1 << 3 | 2, 4, 1 << 3 | 2, 2, 0xff, 0xfe];
    let kinds = [
        (Service::Builder, "definition", "applied"),
        (Service::Builder, "revision", "created"),
        (Service::Deployer, "instance", "launched"),
    ];
    let payloads = [(&deep, "recursion limit"), (&not_utf8, "UTF-8")];
    for (service, entity, verb) in kinds {
        for (version, (payload, _)) in (1..).zip(payloads) {
            world.publish(service, entity, verb, "strange", version, payload.clone()).await;
        }
    }
    let all = kinds.len() * payloads.len();
    until("they are put aside", async || (world.bus.dead_letters().len() == all).then_some(())).await;
    for letter in world.bus.dead_letters() {
        let (_, words) = payloads.into_iter().find(|(payload, _)| **payload == letter.payload).unwrap();
        assert!(letter.reason.contains(words), "{letter:?}");
    }
    // Others are taken, and what a value of an enum means that came with a later version is not guessed.
    let first = report(&monitor, request("r1", "17")).await.unwrap();
    let cause = Some(types::Cause { id: first.id, ..types::Cause::default() });
    let event = PlanUnchanged { server: "web".to_owned(), cause, lock_key: String::new() };
    world.publish(Service::Builder, "plan", "unchanged", "web", 1, event.encode_to_vec()).await;
    world.hears("settled reported web").await;
    let later = ReportSignalRequest { remedy: 77, ..request("r2", "18") };
    assert_eq!(report(&monitor, later).await.unwrap_err().code(), Code::InvalidArgument);
    monitor.stop().await;
}
