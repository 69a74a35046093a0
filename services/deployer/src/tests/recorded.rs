//! Every call that changes something leaves one record of who asked for it.

use std::collections::BTreeSet;

use kiln_api::deployer::deployer_service_server::DeployerService as _;
use kiln_api::deployer::{AbortRolloutRequest, RollbackRequest};
use kiln_service::access::{TABLE, from_local};
use serde_json::{Value, json};

use super::*;
use crate::audit::standing;
use crate::grpc::Api;
use crate::tests::world::run_spec;

/// What a record says of a fleet, as far as the loops beside leave it alone.
fn told(of: &Value) -> Value {
    json!({ "release": of["release"], "rollout": of["rollout"], "removed": of["removed"] })
}

#[tokio::test]
async fn every_call_that_changes_something_leaves_one_record() {
    let site = Site::new().await;
    let api = Api::new(site.boot(&Life::long(), NEVER));
    site.tell_revision(&revision(1, "first", "one", run_spec())).await;
    site.until_at(1).await;
    let mut slow = run_spec();
    slow.rollout.soak = Millis(60_000);
    site.tell_revision(&revision(2, "second", "two", slow)).await;
    site.until("a new one on the edge", || async { site.world.on_edge(&site.server).len() == 4 }).await;
    let under_way = standing(&site.loaded().await.fleet);
    let request =
        AbortRolloutRequest { request_id: "a1".to_owned(), server: "web".to_owned(), expected_release: 2 };
    let aborted = api.abort_rollout(from_local("ada", request)).await.unwrap().into_inner().rollout.unwrap();
    site.until_at(1).await;
    site.tell_revision(&revision(3, "third", "three", run_spec())).await;
    site.until_at(3).await;
    let at_third = standing(&site.loaded().await.fleet);
    let request = RollbackRequest {
        request_id: "b1".to_owned(),
        server: "web".to_owned(),
        expected_release: 3,
        ..RollbackRequest::default()
    };
    let back = api.rollback(from_local("bob", request)).await.unwrap().into_inner().rollout.unwrap();
    site.until_at(1).await;

    // Method, request id, action, actor, before; then the rollout that is to be after it.
    let expected = [
        ("AbortRollout", "a1", "abort_rollout", "ada", under_way, aborted),
        ("Rollback", "b1", "rollback", "bob", at_third, back),
    ];
    let changes = TABLE.iter().filter(|row| row.changes);
    let methods = changes.filter_map(|row| row.method.strip_prefix("/kiln.deployer.v1.DeployerService/"));
    let named: BTreeSet<_> = expected.iter().map(|it| it.0).collect();
    assert_eq!(named, methods.collect(), "say what record a new method leaves");

    let audit = site.store.audit(0, 500).await.unwrap();
    for (method, id, action, actor, before, rollout) in expected {
        let is_of_call =
            |it: &kiln_store::AuditRecord| it.request_id.as_ref().is_some_and(|asked| asked.as_str() == id);
        let of_call: Vec<_> = audit.iter().map(|(_, it)| it).filter(|it| is_of_call(it)).collect();
        let [record] = of_call[..] else { panic!("{method}: {of_call:?}") };
        let who = (record.actor.as_str(), record.action.as_str(), record.subject.as_str());
        assert_eq!(who, (actor, action, "web"));
        assert_eq!(record.server.as_ref(), Some(&site.server));
        assert_eq!(told(&record.before), told(&before), "{method}");
        let after = (&record.after["release"], &record.after["rollout"]["id"]);
        assert_eq!(after, (&json!(1), &json!(rollout.id)), "{method}");
        assert_ne!(record.before["rollout"], record.after["rollout"], "{method}");
    }
}
