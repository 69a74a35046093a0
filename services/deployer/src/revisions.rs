//! What others ask of a fleet by facts: a revision becomes a release, a signal marks an instance to be replaced.

use std::time::Duration;

use kiln_api::types;
use kiln_deployer_core::{accept, replace};
use kiln_model::cause::Cause;
use kiln_model::revision::{Revision, RevisionContent};
use kiln_model::signal::{Remedy, Signal, SignalState};
use kiln_service::clock::Clock;
use kiln_store::{Batch, Error, Store, Watermark};

use crate::reconcile::Deployer;
use crate::store::{Loaded, Outcome, batch, load};

/// For the builder to hold an image before a release is made of it. Without an answer the release is made all the same:
/// an image is kept for a day without being held, and holding is tried again.
const HOLD: Duration = Duration::from_secs(2);

const SIGNAL: &str = "monitor.signal";

impl<S: Store, C: Clock> Deployer<S, C> {
    /// Makes a release of a revision, once.
    pub(crate) async fn take_revision(&self, revision: &Revision) -> Result<(), Error> {
        let server = &revision.server;
        let loaded = load(&self.store, server).await?;
        if revision.generation <= loaded.fleet.revision {
            return Ok(());
        }
        self.hold(&loaded, revision).await;
        loop {
            let loaded = load(&self.store, server).await?;
            let now = self.clock.now();
            let Some(accepted) = accept(&loaded.fleet, &loaded.releases, revision, now) else { break };
            let outcome = Outcome {
                fleet: &accepted.fleet,
                releases: &accepted.releases,
                events: &accepted.events,
                now: now.wall,
            };
            let batch = batch(&self.store, &loaded, &outcome).await?;
            match self.store.commit(batch).await {
                Ok(_) => {
                    tracing::info!(%server, generation = revision.generation, "took a revision");
                    break;
                }
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.look_after(server);
        Ok(())
    }

    async fn hold(&self, loaded: &Loaded, revision: &Revision) {
        let RevisionContent::Image(content) = &revision.content else { return };
        let releases = loaded.releases.values();
        let mut images: std::collections::BTreeSet<_> =
            releases.map(|release| release.revision.image_digest).collect();
        images.insert(content.image_digest);
        let held = tokio::time::timeout(HOLD, self.peers.builder.hold(&revision.server, &images)).await;
        if !matches!(held, Ok(Ok(()))) {
            tracing::warn!(server = %revision.server, "the image is not held yet; holding is tried again");
        }
    }

    /// Marks what a signal wants replaced, once. Signals that wait, or want something else, are not ours.
    /// `version` is its document's, in a store of this epoch: a monitor whose store was restored counts anew.
    pub(crate) async fn take_signal(&self, signal: &Signal, epoch: &str, version: u64) -> Result<(), Error> {
        if signal.remedy != Remedy::Replace || signal.state != SignalState::Open {
            return Ok(());
        }
        let id = signal.id.0.to_string();
        let cause = Cause {
            kind: signal.cause,
            id: id.clone(),
            summary: summary(signal),
            actor: signal.reporter.clone(),
            time: signal.raised,
            traceparent: signal.traceparent.clone(),
        };
        loop {
            let loaded = load(&self.store, &signal.server).await?;
            let marked = match loaded.version {
                0 => None,
                _ => replace(&loaded.fleet, signal.instance.as_ref(), &cause),
            };
            let mut changes = match &marked {
                Some(fleet) => {
                    let now = self.clock.now().wall;
                    let outcome = Outcome { fleet, releases: &[], events: &[], now };
                    batch(&self.store, &loaded, &outcome).await?
                }
                None => Batch::default(),
            };
            changes.watermarks.push(Watermark {
                source_kind: format!("{SIGNAL}/{epoch}"),
                source_id: id.clone(),
                version,
            });
            match self.store.commit(changes).await {
                Ok(_) => break,
                Err(Error::Stale { .. }) => return Ok(()),
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.look_after(&signal.server);
        Ok(())
    }
}

fn summary(signal: &Signal) -> String {
    match signal.evidence.first() {
        Some(line) => format!("{}: {line}", signal.cause.as_str()),
        None => signal.cause.as_str().to_owned(),
    }
}

/// A signal out of its message.
pub(crate) fn signal(message: types::Signal) -> Result<(Signal, u64), kiln_api::convert::Invalid> {
    let version = message.version;
    Ok((Signal::try_from(message)?, version))
}
