//! Every call that changes something leaves one record of who asked for it.

use std::collections::BTreeSet;

use kiln_api::builder::builder_service_server::BuilderService as _;
use kiln_api::builder::{BuildRequest, CancelBuildRequest, CollectRequest, HoldRequest, RemoveRequest};
use kiln_builder_core::build::{Build, State};
use kiln_model::name::ServerName;
use kiln_model::revision::RevisionContent;
use kiln_service::access::{TABLE, from_local};
use kiln_store::{AuditRecord, Store as _};
use serde_json::{Value, json};

use super::world::{World, yaml};
use crate::audit::standing;

/// The record that a call is to leave.
struct Expected {
    method: &'static str,
    request_id: &'static str,
    action: &'static str,
    actor: &'static str,
    subject: &'static str,
    is_of_server: bool,
    before: Value,
    after: Value,
}

async fn build(world: &World, id: &str) -> Build {
    world.builder.documents.build(&id.parse().unwrap()).await.unwrap().unwrap().value
}

#[tokio::test]
async fn every_call_that_changes_something_leaves_one_record() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    let head = world.server("web").await.unwrap().head;
    let first = world.running(world.revision("web", 1)).await;
    let RevisionContent::Image(first) = first.content else { panic!("a removal") };

    world.bakery.package("nginx", "2");
    let request = BuildRequest { request_id: "b1".into(), server: "web".into(), ..BuildRequest::default() };
    world.build(request).await.unwrap();
    let queued = build(&world, "web-b2").await;

    let request = CancelBuildRequest { request_id: "c1".into(), build: "web-b2".into() };
    world.api().cancel_build(from_local("me", request)).await.unwrap();
    let cancelled = build(&world, "web-b2").await;
    assert!(matches!(cancelled.state, State::Cancelled { .. }));

    let image_digests = vec![first.image_digest.to_string()];
    let request = HoldRequest { request_id: "h1".into(), holder: "deployer/web".into(), image_digests };
    world.api().hold(from_local("deployer", request)).await.unwrap();

    let request = CollectRequest { request_id: "g1".into(), dry_run: false };
    world.api().collect(from_local("me", request)).await.unwrap();
    // What is only looked at leaves none.
    let request = CollectRequest { request_id: "g2".into(), dry_run: true };
    world.api().collect(from_local("me", request)).await.unwrap();

    let stood = standing(&world.server("web").await.unwrap());
    let request = RemoveRequest { request_id: "d1".into(), server: "web".into() };
    world.api().remove(from_local("me", request)).await.unwrap();
    let removed = standing(&world.server("web").await.unwrap());
    assert_eq!((&stood["removed"], &removed["removed"]), (&json!(false), &json!(true)));

    let expected = [
        Expected {
            method: "Apply",
            request_id: "r1",
            action: "apply",
            actor: "me",
            subject: "web",
            is_of_server: true,
            before: Value::Null,
            after: json!({ "definition": head.digest, "commit": head.commit }),
        },
        Expected {
            method: "Build",
            request_id: "b1",
            action: "build",
            actor: "me",
            subject: "web",
            is_of_server: true,
            before: json!({ "lock": build(&world, "web-b1").await.lock_key }),
            after: json!({ "lock": queued.lock_key, "outcome": "queued" }),
        },
        Expected {
            method: "CancelBuild",
            request_id: "c1",
            action: "cancel_build",
            actor: "me",
            subject: "web-b2",
            is_of_server: true,
            before: json!({ "state": queued.state }),
            after: json!({ "state": cancelled.state }),
        },
        Expected {
            method: "Collect",
            request_id: "g1",
            action: "collect",
            actor: "me",
            subject: "images",
            is_of_server: false,
            before: Value::Null,
            after: json!({ "images": 0, "layers that were never finished": 0, "logs of old builds": 0 }),
        },
        Expected {
            method: "Hold",
            request_id: "h1",
            action: "hold",
            actor: "deployer",
            subject: "deployer/web",
            is_of_server: false,
            before: json!([]),
            after: json!([first.image_digest]),
        },
        Expected {
            method: "Remove",
            request_id: "d1",
            action: "remove",
            actor: "me",
            subject: "web",
            is_of_server: true,
            before: stood,
            after: removed,
        },
    ];
    let changes = TABLE.iter().filter(|row| row.changes);
    let methods = changes.filter_map(|row| row.method.strip_prefix("/kiln.builder.v1.BuilderService/"));
    let named: BTreeSet<_> = expected.iter().map(|it| it.method).collect();
    assert_eq!(named, methods.collect(), "say what record a new method leaves");

    let server: ServerName = "web".parse().unwrap();
    let audit = world.builder.documents.store().audit(0, 500).await.unwrap();
    for it in expected {
        let is_of_call =
            |record: &AuditRecord| record.request_id.as_ref().is_some_and(|id| id.as_str() == it.request_id);
        let of_call: Vec<_> = audit.iter().map(|(_, record)| record).filter(|it| is_of_call(it)).collect();
        let [record] = of_call[..] else { panic!("{}: {of_call:?}", it.method) };
        let who = (record.actor.as_str(), record.action.as_str(), record.subject.as_str());
        assert_eq!(who, (it.actor, it.action, it.subject));
        assert_eq!(record.server.as_ref() == Some(&server), it.is_of_server, "{record:?}");
        assert_eq!((&record.before, &record.after), (&it.before, &it.after), "{}", it.method);
    }
}
