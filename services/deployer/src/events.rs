//! Events of the others. They are hints: what is lost is found by the resync.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_api::events;
use kiln_bus::{Handled, Handler};
use kiln_model::event::{Event, Service};
use kiln_model::revision::Revision;
use kiln_service::clock::Clock;
use kiln_service::trace;
use kiln_store::{Error, Store};
use prost::Message;
use tracing::Instrument as _;

use crate::board::How;
use crate::reconcile::Deployer;
use crate::revisions;

pub(crate) const DURABLE: &str = "deployer";

pub(crate) struct Events<S, C> {
    deployer: Deployer<S, C>,
}

impl<S: Store, C: Clock> Events<S, C> {
    pub(crate) fn handler(deployer: Deployer<S, C>) -> Arc<dyn Handler> {
        Arc::new(Self { deployer })
    }

    async fn take(&self, event: &Event) -> Handled {
        let kind = &event.event.kind;
        match (kind.service, kind.entity.as_str(), kind.verb.as_str()) {
            (Service::Builder, "revision", "created") => self.revision(event).await,
            (Service::Monitor, "server", "needs_update") => self.signal(event).await,
            (Service::Monitor, "instance", _) => self.health(event),
            _ => Handled::Done,
        }
    }

    async fn revision(&self, event: &Event) -> Handled {
        let message: events::RevisionCreated = match decode(event) {
            Ok(message) => message,
            Err(failed) => return failed,
        };
        match message.revision.map(Revision::try_from) {
            Some(Ok(revision)) => handled(self.deployer.take_revision(&revision).await),
            Some(Err(invalid)) => Handled::Failed(format!("the revision makes no sense: {invalid}")),
            None => Handled::Failed("there is no revision in it".to_owned()),
        }
    }

    async fn signal(&self, event: &Event) -> Handled {
        let message: events::NeedsUpdate = match decode(event) {
            Ok(message) => message,
            Err(failed) => return failed,
        };
        match message.signal.map(revisions::signal) {
            Some(Ok((signal, version))) => {
                handled(self.deployer.take_signal(&signal, &event.epoch, version).await)
            }
            Some(Err(invalid)) => Handled::Failed(format!("the signal makes no sense: {invalid}")),
            None => Handled::Failed("there is no signal in it".to_owned()),
        }
    }

    fn health(&self, event: &Event) -> Handled {
        let message: events::HealthChanged = match decode(event) {
            Ok(message) => message,
            Err(failed) => return failed,
        };
        let Some(health) = message.health else {
            return Handled::Failed("there is no health in it".to_owned());
        };
        match self.deployer.board.health(health, How::Event, self.deployer.clock.now()) {
            Ok(()) => Handled::Done,
            Err(invalid) => Handled::Failed(format!("the health makes no sense: {invalid}")),
        }
    }
}

fn decode<M: Message + Default>(event: &Event) -> Result<M, Handled> {
    M::decode(event.event.payload.as_slice())
        .map_err(|error| Handled::Failed(format!("{} can't be read: {error}", event.event.kind.ce_type())))
}

fn handled(result: Result<(), Error>) -> Handled {
    match result {
        Ok(()) => Handled::Done,
        Err(error @ (Error::Unavailable { .. } | Error::Conflict { .. })) => {
            Handled::Later(error.to_string())
        }
        Err(error) => Handled::Failed(error.to_string()),
    }
}

#[async_trait]
impl<S: Store, C: Clock> Handler for Events<S, C> {
    async fn handle(&self, event: &Event, _attempt: u64) -> Handled {
        let span = trace::span_under(&event.event.traceparent, &event.event.kind.ce_type());
        self.take(event).instrument(span).await
    }
}
