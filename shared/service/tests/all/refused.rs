//! Calls that a role does not take, on record.

use std::time::Duration;

use kiln_api::monitor::{GetServerStatusRequest, ListSignalsRequest};
use kiln_service::access::Role;
use kiln_service::audit::{record_refused, refusals};
use kiln_service::clock::SystemClock;
use kiln_store::{AuditRecord, SqlStore, Store as _};
use serde_json::json;
use tokio::sync::watch;
use tonic::Code;

use crate::monitor::report;
use crate::site::{Site, in_an_hour, token};

async fn records(store: &SqlStore) -> Vec<AuditRecord> {
    store.audit(0, 500).await.unwrap().into_iter().map(|(_, record)| record).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_change_something_is_recorded_with_the_number_of_tries() {
    let (refusals, refused) = refusals();
    let site = Site::start_and_tell(refusals).await;
    let store = SqlStore::in_memory().await.unwrap();
    let (stop, stopped) = watch::channel(false);
    let recording = tokio::spawn(record_refused(refused, store.clone(), SystemClock::new(), stopped));
    let (secret, of_bot) = token(1, Role::Viewer, &in_an_hour());
    site.keep(&[&of_bot]);

    // Looking, and being known to nobody, is not recorded.
    let mut broker = site.as_role(Role::Broker);
    let denied = broker.list_signals(ListSignalsRequest::default()).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied, "{denied}");
    let mut nobody = site.client(None, None);
    let unknown = nobody.report_signal(report("r0")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unauthenticated, "{unknown}");
    // Nor is what was let in.
    let mut bot = site.client(None, Some(secret.reveal()));
    let _ = bot.get_server_status(GetServerStatusRequest::default()).await;
    for attempt in 0..3 {
        let denied = bot.report_signal(report(&format!("r{attempt}"))).await.unwrap_err();
        assert_eq!(denied.code(), Code::PermissionDenied, "{denied}");
    }
    let denied = site.as_role(Role::Node).report_signal(report("r4")).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied, "{denied}");

    let first = async {
        while records(&store).await.len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), first).await.unwrap();
    // Those that came after the first are told when it ends.
    stop.send_replace(true);
    recording.await.unwrap();
    let found = records(&store).await;
    let of = |actor: &str, role: &str, way: &str| {
        let mut times = 0;
        for record in found.iter().filter(|record| record.actor == actor) {
            assert_eq!(record.action, "call.refused");
            assert_eq!(record.subject, "kiln.monitor.v1.MonitorService/ReportSignal");
            assert_eq!((&record.after["role"], &record.after["by"]), (&json!(role), &json!(way)));
            times += record.after["times"].as_u64().unwrap();
        }
        times
    };
    assert_eq!((of("bot1", "viewer", "token"), of("node", "node", "certificate")), (3, 1));
    assert!(
        found.len() <= 3 && found.iter().all(|it| ["bot1", "node"].contains(&it.actor.as_str())),
        "{found:?}"
    );
    site.stop().await;
}
