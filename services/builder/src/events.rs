//! What the monitor and the deployer tell: signals that call for a rebuild, and rollbacks that convict. Each comes as an
//! event, and is found by the resync where the event is lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use kiln_api::deployer::{Fleet, Quarantine, Release};
use kiln_api::types::Cursor;
use kiln_builder_core::quarantine::{self, Verdict};
use kiln_builder_core::server::InForce;
use kiln_builder_core::signal::{self, Intake};
use kiln_builder_core::source::{self, Pending, Place, Source};
use kiln_bus::{Handled, Handler};
use kiln_model::cause::CauseKind;
use kiln_model::event::{Event, Service};
use kiln_model::name::ServerName;
use kiln_model::signal::{Signal, SignalState};
use kiln_service::clock::Clock;
use kiln_store::Store;
use prost::Message as _;
use tokio::sync::{Mutex, Notify, watch};
use tonic::Status;
use tracing::Instrument as _;

use crate::bakery::Bakery;
use crate::builder::{Builder, Error, TRIES};
use crate::peers::Peers;
use crate::store::{Edit, Read};

/// Handles events of other services.
pub struct EventHandler<S, K, C> {
    builder: Builder<S, K, C>,
    /// Wakes the resync.
    wake: Arc<Notify>,
}

impl<S, K, C> EventHandler<S, K, C> {
    pub fn new(builder: Builder<S, K, C>, wake: Arc<Notify>) -> Self {
        Self { builder, wake }
    }
}

#[async_trait]
impl<S: Store, K: Bakery, C: Clock> Handler for EventHandler<S, K, C> {
    async fn handle(&self, event: &Event, _attempt: u64) -> Handled {
        let kind = &event.event.kind;
        match (kind.service, kind.entity.as_str(), kind.verb.as_str()) {
            (Service::Monitor, "server", "needs_update" | "settled") => {
                let span = kiln_service::trace::span_under(&event.event.traceparent, "signal");
                self.signal(event).instrument(span).await
            }
            // The verdict has to be read with the releases that it is about, so the resync does it, at once.
            (Service::Deployer, "rollout", "rolled_back") => {
                self.wake.notify_one();
                Handled::Done
            }
            _ => Handled::Done,
        }
    }
}

impl<S: Store, K: Bakery, C: Clock> EventHandler<S, K, C> {
    async fn signal(&self, event: &Event) -> Handled {
        let message = match kiln_api::events::NeedsUpdate::decode(event.event.payload.as_slice()) {
            Ok(message) => message,
            Err(error) => return Handled::Failed(format!("its payload is no NeedsUpdate: {error}")),
        };
        let Some(message) = message.signal else { return Handled::Failed("it carries no signal".to_owned()) };
        let version = message.version;
        let signal = match Signal::try_from(message) {
            Ok(signal) => signal,
            Err(invalid) => return Handled::Failed(invalid.to_string()),
        };
        match self.builder.receive(&signal, &event.epoch, version).await {
            Ok(()) => Handled::Done,
            Err(error) if error.is_transient() => Handled::Later(error.to_string()),
            Err(error) => Handled::Failed(error.to_string()),
        }
    }
}

impl<S: Store, K: Bakery, C: Clock> Builder<S, K, C> {
    /// A signal is there, in this version of the monitor's document.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn receive(&self, signal: &Signal, epoch: &str, version: u64) -> Result<(), Error> {
        // A monitor whose store was restored counts anew.
        let (watermark, id) = (format!("monitor.signal/{epoch}"), signal.id.to_string());
        let mut lost = None;
        for _ in 0..TRIES {
            if self.documents.store().watermark(&watermark, &id).await? >= version {
                return Ok(());
            }
            let now = self.now();
            let mut edit = Edit::new(now);
            edit.watermark(&watermark, &id, version);
            self.take_signal(&mut edit, signal, now).await?;
            match self.documents.store().commit(edit.finish()).await {
                Ok(_) | Err(kiln_store::Error::Stale { .. }) => return Ok(()),
                Err(error @ kiln_store::Error::Conflict { .. }) => lost = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        // The bus or the resync comes back to it.
        lost.map_or(Ok(()), |conflict| Err(conflict.into()))
    }

    async fn take_signal(&self, edit: &mut Edit, signal: &Signal, now: Timestamp) -> Result<(), Error> {
        let pending = || Pending {
            server: signal.server.clone(),
            fingerprint: signal.fingerprint.clone(),
            cause: signal::cause(signal),
        };
        let Some(Read { version, value: before }) = self.documents.server(&signal.server).await? else {
            // A server that came with a commit: its source is one of those that are known.
            if signal.cause == CauseKind::DefinitionChanged && signal.state == SignalState::Open {
                for read in self.documents.all::<Source>(source::KIND, "git-").await? {
                    self.ask(edit, read, pending())?;
                }
            }
            return Ok(());
        };
        let mut server = before.clone();
        if signal.state == SignalState::Resolved {
            signal::resolved(&mut server, signal.id);
        } else {
            let intake = signal::receive(&mut server, signal, now);
            tracing::info!(server = %server.name, cause = signal.cause.as_str(), ?intake, "a signal");
            if intake == Intake::LookAtSource
                && let Some(read) = self.documents.source(server.source.as_str()).await?
            {
                self.ask(edit, read, pending())?;
            }
        }
        if server != before {
            edit.put_server(version, &server, &[])?;
        }
        Ok(())
    }

    fn ask(&self, edit: &mut Edit, mut read: Read<Source>, pending: Pending) -> Result<(), Error> {
        if matches!(read.value.place, Place::Git { .. }) && read.value.ask(pending) {
            edit.put_source(read.version, &read.value)?;
        }
        Ok(())
    }

    /// An open signal is seen again. Where it persists although it was followed, that is said.
    async fn see_again(&self, signal: &Signal) -> Result<(), Error> {
        let Some(Read { version, value: mut server }) = self.documents.server(&signal.server).await? else {
            return Ok(());
        };
        let now = self.now();
        if signal::persists(&mut server, signal, now) {
            tracing::warn!(server = %server.name, problem = server.problem(), "the breaker tripped");
            let mut edit = Edit::new(now);
            edit.put_server(version, &server, &[])?;
            match self.documents.store().commit(edit.finish()).await {
                Ok(_) | Err(kiln_store::Error::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// A fleet's rollbacks, with the releases that they are about.
    async fn convict(&self, server: &ServerName, fleet: &Fleet, releases: &[Release]) -> Result<(), Error> {
        let mut lost = None;
        for _ in 0..TRIES {
            let Some(Read { version, value: before }) = self.documents.server(server).await? else {
                return Ok(());
            };
            let now = self.now();
            let mut after = before.clone();
            for verdict in &fleet.quarantine {
                let convicted = self.put_in_force_by(server, releases, verdict.release).await?;
                // What runs now; where the verdict is about just that, what ran well before.
                let back = if fleet.release == verdict.release { fleet.last_good } else { fleet.release };
                let good = self.put_in_force_by(server, releases, back).await?;
                let verdict = self.verdict(verdict);
                quarantine::convict(&mut after, &verdict, convicted.as_ref(), good, now);
            }
            if after == before {
                return Ok(());
            }
            tracing::warn!(%server, problem = after.problem(), "a rollback was noted");
            let mut edit = Edit::new(now);
            edit.put_server(version, &after, &[])?;
            let back = after.in_force.as_ref().filter(|_| after.in_force != before.in_force);
            if let Some(back) = back {
                match self.need(&mut edit, &back.image).await {
                    // The deployer runs it all the same.
                    Err(Error::Illegal(illegal)) => tracing::warn!(%server, %illegal, "what it went back to"),
                    other => other?,
                }
            }
            match self.documents.store().commit(edit.finish()).await {
                Ok(_) => return Ok(()),
                Err(error @ kiln_store::Error::Conflict { .. }) => lost = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        // The resync comes back to it.
        lost.map_or(Ok(()), |conflict| Err(conflict.into()))
    }

    /// What the revision behind a release put in force.
    async fn put_in_force_by(
        &self,
        server: &ServerName,
        releases: &[Release],
        number: u64,
    ) -> Result<Option<InForce>, Error> {
        let release = releases.iter().find(|release| release.number == number);
        let Some(revision) = release.and_then(|release| release.revision.as_ref()) else { return Ok(None) };
        let stored = self.documents.revision(server, revision.generation).await?;
        Ok(stored.and_then(|stored| stored.in_force))
    }

    fn verdict(&self, quarantine: &Quarantine) -> Verdict {
        let time = kiln_api::convert::from_timestamp("time", quarantine.time).unwrap_or_else(|_| self.now());
        Verdict {
            release: quarantine.release,
            definition: quarantine.definition_digest.parse().ok(),
            packages: quarantine.packages.clone(),
            reason: quarantine.reason.clone(),
            traceparent: kiln_service::trace::current(),
            time,
        }
    }
}

/// Brings what the builder knows of the others up to date.
pub struct Resync<S, K, C, P> {
    builder: Builder<S, K, C>,
    peers: P,
    /// When the deployer last answered.
    heard: watch::Sender<Option<Timestamp>>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    signals: Option<Cursor>,
    /// By id.
    open: BTreeMap<String, Signal>,
    fleets: Option<Cursor>,
}

impl<S: Store, K: Bakery, C: Clock, P: Peers> Resync<S, K, C, P> {
    pub fn new(builder: Builder<S, K, C>, peers: P) -> Self {
        Self { builder, peers, heard: watch::Sender::new(None), seen: Mutex::default() }
    }

    pub fn heard(&self) -> watch::Receiver<Option<Timestamp>> {
        self.heard.subscribe()
    }

    /// # Errors
    /// In words, where a peer or the store is away. The other peer is asked all the same.
    pub async fn run(&self) -> Result<(), String> {
        let mut seen = self.seen.lock().await;
        let fleets = self.fleets(&mut seen).await;
        let signals = self.signals(&mut seen).await;
        fleets.and(signals)
    }

    async fn signals(&self, seen: &mut Seen) -> Result<(), String> {
        let changes =
            self.peers.signals(seen.signals.clone()).await.map_err(|status| away("monitor", &status))?;
        if changes.full {
            seen.open.clear();
        }
        let epoch = changes.cursor.as_ref().map(|cursor| cursor.epoch.clone()).unwrap_or_default();
        for message in changes.items {
            let version = message.version;
            let signal = match Signal::try_from(message) {
                Ok(signal) => signal,
                // A newer monitor's: what it means is not for this builder.
                Err(invalid) => {
                    tracing::warn!(%invalid, "the monitor lists a signal that can't be read");
                    continue;
                }
            };
            passing(self.builder.receive(&signal, &epoch, version).await, &signal.server)?;
            if signal.state == SignalState::Open {
                seen.open.insert(signal.id.to_string(), signal);
            } else {
                seen.open.remove(&signal.id.to_string());
            }
        }
        seen.signals = changes.cursor;
        for signal in seen.open.values() {
            passing(self.builder.see_again(signal).await, &signal.server)?;
        }
        Ok(())
    }

    async fn fleets(&self, seen: &mut Seen) -> Result<(), String> {
        let changes =
            self.peers.fleets(seen.fleets.clone()).await.map_err(|status| away("deployer", &status))?;
        self.heard.send_replace(Some(self.builder.now()));
        for fleet in changes.items.iter().filter(|fleet| !fleet.quarantine.is_empty()) {
            let Ok(server) = fleet.server.parse::<ServerName>() else { continue };
            let known = self.builder.documents.server(&server).await.map_err(Error::from);
            let known = passing(known, &server)?.flatten();
            let knows = |release| known.as_ref().is_none_or(|read| read.value.quarantine.knows(release));
            if fleet.quarantine.iter().all(|verdict| knows(verdict.release)) {
                continue;
            }
            let trace = fleet.rollout.as_ref().and_then(|rollout| rollout.cause.as_ref());
            let trace = trace.map(|cause| cause.traceparent.clone()).unwrap_or_default();
            let span = kiln_service::trace::span_under(&trace, "convict");
            let convicted = async {
                let releases =
                    self.peers.releases(&server).await.map_err(|status| away("deployer", &status))?;
                passing(self.builder.convict(&server, fleet, &releases).await, &server)
            };
            convicted.instrument(span).await?;
        }
        seen.fleets = changes.cursor;
        Ok(())
    }
}

/// What comes of one server in a resync: where its documents can't be read, that is said, and holds no other back.
fn passing<T>(outcome: Result<T, Error>, server: &ServerName) -> Result<Option<T>, String> {
    use kiln_store::Error::{Schema, Unreadable};
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(Error::Store(error @ (Schema { .. } | Unreadable { .. }))) => {
            tracing::error!(%server, %error, "is passed over");
            Ok(None)
        }
        Err(error) => Err(error.to_string()),
    }
}

fn away(peer: &str, status: &Status) -> String {
    format!("{peer}: {}", kiln_service::error::describe(status))
}
