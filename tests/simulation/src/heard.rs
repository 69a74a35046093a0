//! What one service has committed and the next does not know yet.

use std::collections::BTreeSet;

use kiln_builder::store::StoredRevision;
use kiln_deployer_core::Fleet;
use kiln_model::event::Service;
use kiln_model::signal::{Remedy, SignalState};
use kiln_monitor_core::signal::Record;
use kiln_store::{Document, Store as _, decode};

use crate::site::Site;

async fn all(site: &Site, service: Service, kind: &str) -> Vec<Document> {
    site.disk(service).store.list(kind, "", None, 500).await.unwrap()
}

/// In words; the same words for as long as it is the same.
pub(crate) async fn not_yet(site: &Site) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let epoch = site.disk(Service::Monitor).store.epoch().to_owned();
    for document in all(site, Service::Monitor, "signal").await {
        let record: Record = decode(&document, u32::MAX).unwrap();
        let signal = record.signal;
        let by = match signal.remedy {
            _ if signal.state != SignalState::Open => continue,
            Remedy::Rebuild => Service::Builder,
            Remedy::Replace => Service::Deployer,
        };
        let (source, id) = (format!("monitor.signal/{epoch}"), signal.id.0.to_string());
        if site.disk(by).store.watermark(&source, &id).await.unwrap() < document.version {
            found.insert(format!("signal {} at {}", signal.id, document.version));
        }
    }
    for document in all(site, Service::Deployer, "fleet").await {
        let fleet: Fleet = decode(&document, u32::MAX).unwrap();
        let revisions = site.disk(Service::Builder).store.list("revision", "", None, 500).await.unwrap();
        let revisions =
            revisions.iter().map(|document| decode::<StoredRevision>(document, u32::MAX).unwrap().revision);
        let newest = revisions
            .filter(|revision| revision.server == fleet.server)
            .map(|revision| revision.generation)
            .max();
        if newest.is_some_and(|newest| newest > fleet.revision) {
            found.insert(format!("generation {} of {}", newest.unwrap_or_default(), fleet.server));
        }
    }
    found
}
