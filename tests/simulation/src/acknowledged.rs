//! An event is acknowledged only when what it asks for is committed: whoever dies right after it loses nothing, and nobody
//! has to wait for a resync. What each handler commits is its own choice; here is where it can be seen.

use kiln_api::events::{DefinitionChanged, NeedsUpdate, RevisionCreated};
use kiln_deployer_core::Fleet;
use kiln_model::event::{Event, Service};
use kiln_model::revision::Revision;
use kiln_model::signal::{Remedy, Signal, SignalState};
use kiln_store::{MemoryStore, Store as _, decode};
use prost::Message as _;

/// What a service should have committed because of an event, and did not. What can't be read asks for nothing.
pub(crate) async fn missing(service: Service, store: &MemoryStore, event: &Event) -> Option<String> {
    let kind = &event.event.kind;
    let payload = event.event.payload.as_slice();
    match (service, kind.service, kind.entity.as_str(), kind.verb.as_str()) {
        (Service::Builder, Service::Monitor, "server", "needs_update" | "settled") => {
            let (signal, version) = signal(payload)?;
            unmarked(store, event, &signal, version).await
        }
        (Service::Deployer, Service::Monitor, "server", "needs_update") => {
            let (signal, version) = signal(payload)?;
            // Others are the builder's, or wait for somebody's approval.
            let asks = signal.remedy == Remedy::Replace && signal.state == SignalState::Open;
            if asks { unmarked(store, event, &signal, version).await } else { None }
        }
        (Service::Deployer, Service::Builder, "revision", "created") => {
            let revision = Revision::try_from(RevisionCreated::decode(payload).ok()?.revision?).ok()?;
            let fleet = store.get("fleet", revision.server.as_str()).await.unwrap();
            let taken = fleet.map_or(0, |fleet| decode::<Fleet>(&fleet, u32::MAX).unwrap().revision);
            (taken < revision.generation).then(|| {
                format!("generation {} of {}, {taken} was taken", revision.generation, revision.server)
            })
        }
        // What the monitor is told of instances it has in memory first, and writes when their state changes.
        (Service::Monitor, Service::Builder, "definition", _) => {
            let server = DefinitionChanged::decode(payload).ok()?.server.filter(|server| !server.removed)?;
            let known = store.get("server", &server.name).await.unwrap();
            let seen = known.map(|known| known.body["seen"]["version"].as_u64().unwrap()).unwrap_or_default();
            (seen < server.version)
                .then(|| format!("version {} of {}, {seen} was taken", server.version, server.name))
        }
        _ => None,
    }
}

fn signal(payload: &[u8]) -> Option<(Signal, u64)> {
    let message = NeedsUpdate::decode(payload).ok()?.signal?;
    let version = message.version;
    Some((Signal::try_from(message).ok()?, version))
}

async fn unmarked(store: &MemoryStore, event: &Event, signal: &Signal, version: u64) -> Option<String> {
    let source = format!("monitor.signal/{}", event.epoch);
    let mark = store.watermark(&source, &signal.id.0.to_string()).await.unwrap();
    (mark < version).then(|| format!("version {version} of signal {}, the watermark is {mark}", signal.id))
}
