//! The audit records of a service: sealed in the background, listed and checked by gRPC. Calls that it refused are among
//! them.

mod api;
mod refused;

use std::time::Duration;

use kiln_api::audit::audit_service_server::AuditServiceServer;
use kiln_api::{audit as wire, events};
use kiln_model::event::{EventType, NewEvent, Service};
use kiln_store::seal::{self, Head};
use kiln_store::{Error, Store};
use prost::Message as _;
use tokio::sync::watch;

pub use api::{Api, checked, message};
pub use refused::{Refusals, Refused, record as record_refused, refusals};

use crate::clock::Clock;
use crate::shutdown::requested;
use crate::trace;

/// After a commit, and after a failure: what is written meanwhile shares a seal.
const PAUSE: Duration = Duration::from_secs(1);

/// What a service does for its records beside its work: the gRPC service that shows them, where its server tells of what it
/// refused, and what records that and seals all, until told to stop.
pub fn keep<S: Store, C: Clock>(
    store: &S,
    service: Service,
    clock: &C,
    stop: &watch::Receiver<bool>,
) -> (AuditServiceServer<Api<S>>, Refusals, impl Future<Output = ()> + Send + use<S, C>) {
    let (refusals, refused) = refusals();
    let sealing = seal_on(store.clone(), service, clock.clone(), stop.clone());
    let recording = record_refused(refused, store.clone(), clock.clone(), stop.clone());
    let running = async {
        tokio::join!(sealing, recording);
    };
    (api::service(store.clone(), service), refusals, running)
}

/// Seals what is recorded, and tells of each new head, until told to stop. Of several replicas, whoever commits first
/// seals, and the others go on from there.
async fn seal_on<S: Store, C: Clock>(store: S, service: Service, clock: C, mut stop: watch::Receiver<bool>) {
    let mut sequence = store.sequence();
    while !*stop.borrow() {
        // Before the look, so that a commit in between wakes again.
        sequence.mark_unchanged();
        let sealed = seal_all(&store, service, &clock).await;
        if let Err(error) = &sealed {
            tracing::warn!(%error, again_in = ?PAUSE, "audit records wait for their seal");
        }
        tokio::select! {
            biased;
            () = requested(&mut stop) => return,
            // The store is gone with its last handle, which this one is not.
            _ = sequence.changed(), if sealed.is_ok() => {}
            () = clock.sleep(PAUSE), if sealed.is_err() => {}
        }
        tokio::select! {
            biased;
            () = requested(&mut stop) => return,
            () = clock.sleep(PAUSE) => {}
        }
    }
}

async fn seal_all<S: Store, C: Clock>(store: &S, service: Service, clock: &C) -> Result<(), Error> {
    while let Some(mut sealing) = seal::next(store).await? {
        // Of one without a broker it would wait in the store for good.
        if service.has_broker() {
            sealing.batch.events.push(published(service, &sealing.head, sealing.version, clock));
        }
        match store.commit(sealing.batch).await {
            Ok(_) | Err(Error::Conflict { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The head, for all to keep: records that do not lead to it any more were changed after that.
fn published(service: Service, head: &Head, version: u64, clock: &impl Clock) -> NewEvent {
    let payload = events::AuditSealed { head: Some(link(&head.link)), records: head.records };
    NewEvent {
        kind: EventType::new(service, "audit", "sealed"),
        server: None,
        aggregate_kind: seal::HEAD.to_owned(),
        aggregate_id: seal::HEAD_ID.to_owned(),
        aggregate_version: version,
        payload: payload.encode_to_vec(),
        time: clock.now().wall,
        traceparent: trace::of(&trace::span_under("", "seal audit records")),
    }
}

fn link(link: &seal::Link) -> wire::Link {
    wire::Link { sequence: link.sequence, hash: link.hash.to_string() }
}

#[cfg(test)]
mod tests {
    use kiln_store::{AuditRecord, Batch, SqlStore};

    use super::*;
    use crate::clock::SystemClock;

    #[tokio::test]
    async fn several_replicas_seal_each_record_once_and_publish_each_head() {
        let store = SqlStore::in_memory().await.unwrap();
        let (stop, stopped) = watch::channel(false);
        let replicas: Vec<_> = (0..3)
            .map(|_| {
                tokio::spawn(seal_on(store.clone(), Service::Builder, SystemClock::new(), stopped.clone()))
            })
            .collect();
        for n in 0..40 {
            let record = AuditRecord::new(jiff::Timestamp::UNIX_EPOCH, "ada", "apply", format!("web{n}"));
            store.commit(Batch { audit: vec![record], ..Batch::default() }).await.unwrap();
        }
        let sealed = async {
            loop {
                let checked = seal::check(&store, seal::Link::start(), 0).await.unwrap();
                assert_eq!(checked.fault, None);
                if (checked.records, checked.unsealed) == (40, 0) {
                    return checked.reached;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_secs(20), sealed).await.unwrap();
        stop.send_replace(true);
        for replica in replicas {
            replica.await.unwrap();
        }
        let heads = store.log(0, 500).await.unwrap();
        let read = |event: &kiln_model::event::Event| {
            assert_eq!(event.event.kind, EventType::new(Service::Builder, "audit", "sealed"));
            let payload = event.event.payload.as_slice();
            let sealed = events::AuditSealed::decode(payload).unwrap();
            (sealed.records, sealed.head.unwrap())
        };
        let heads: Vec<_> = heads.iter().map(read).collect();
        assert!(heads.is_sorted_by(|a, b| a.0 < b.0), "{heads:?}");
        assert_eq!(heads.last(), Some(&(40, link(&reached))));
    }
}
