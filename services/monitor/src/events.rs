//! Events are hints: what they tell is taken over at once, and found by the resync where they were lost.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_api::events::{DefinitionChanged, InstanceChanged, PlanUnchanged, RevisionCreated};
use kiln_bus::{Handled, Handler, ReportHandler};
use kiln_model::event::{Event, Service};
use kiln_model::signal::{Remedy, SignalId};
use kiln_monitor_core::signal::Observation;
use kiln_service::clock::Clock;
use kiln_service::trace;
use kiln_store::{Error, Store};
use prost::Message;
use tokio::sync::Notify;
use tracing::Instrument;

use crate::reports;
use crate::servers::Servers;
use crate::signals::{Scope, Signals};
use crate::watcher::Watcher;

#[derive(Clone)]
pub struct Events<S, C> {
    pub watcher: Watcher<S, C>,
    pub servers: Servers<S>,
    pub signals: Signals<S, C>,
    pub clock: C,
    /// Has the builder's servers and sources listed anew.
    pub builder_changed: Arc<Notify>,
}

impl<S: Store, C: Clock> Events<S, C> {
    async fn take(&self, event: &Event) -> Result<(), Refusal> {
        let kind = &event.event.kind;
        let payload = event.event.payload.as_slice();
        match (kind.service, kind.entity.as_str()) {
            (Service::Deployer, "instance") => {
                if let Some(instance) = InstanceChanged::decode(payload)?.instance {
                    self.watcher.tell(&event.epoch, instance).await?;
                }
            }
            (Service::Builder, "definition") => {
                if let Some(server) = DefinitionChanged::decode(payload)?.server {
                    self.servers.tell(&event.epoch, server).await?;
                }
                // A source may be new, or have other servers.
                self.builder_changed.notify_one();
            }
            (Service::Builder, "revision") => {
                // The server itself, with its generation and release files, is told by the list.
                self.builder_changed.notify_one();
                if let Some(revision) = RevisionCreated::decode(payload)?.revision
                    && let (Ok(server), Some(cause)) = (revision.server.parse(), revision.cause)
                {
                    self.signals.answered(&server, &cause.id, revision.generation).await?;
                }
            }
            (Service::Builder, "plan") => {
                self.builder_changed.notify_one();
                let plan = PlanUnchanged::decode(payload)?;
                if let (Ok(server), Some(cause)) = (plan.server.parse(), plan.cause) {
                    self.signals.answered(&server, &cause.id, 0).await?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

enum Refusal {
    Later(String),
    Failed(String),
}

impl From<prost::DecodeError> for Refusal {
    fn from(error: prost::DecodeError) -> Self {
        Self::Failed(format!("the payload can't be read: {error}"))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        match error {
            Error::Unavailable { .. } | Error::Conflict { .. } => Self::Later(error.to_string()),
            error => Self::Failed(error.to_string()),
        }
    }
}

fn handled(result: Result<(), Refusal>) -> Handled {
    match result {
        Ok(()) => Handled::Done,
        Err(Refusal::Later(why)) => Handled::Later(why),
        Err(Refusal::Failed(why)) => Handled::Failed(why),
    }
}

#[async_trait]
impl<S: Store, C: Clock> Handler for Events<S, C> {
    async fn handle(&self, event: &Event, _attempt: u64) -> Handled {
        let span =
            trace::span_under(&event.event.traceparent, &format!("take {}", event.event.kind.ce_type()));
        handled(self.take(event).instrument(span).await)
    }
}

#[async_trait]
impl<S: Store, C: Clock> ReportHandler for Events<S, C> {
    async fn handle(&self, report: &kiln_bus::Report, _attempt: u64) -> Handled {
        let span = trace::span_under(&report.traceparent, "take report");
        handled(self.report(report).instrument(span).await)
    }
}

impl<S: Store, C: Clock> Events<S, C> {
    async fn report(&self, report: &kiln_bus::Report) -> Result<(), Refusal> {
        let report = reports::decode(&report.payload).map_err(Refusal::Failed)?;
        let Some(server) = self.servers.get(&report.server) else {
            return Err(Refusal::Failed(format!("there is no server `{}`", report.server)));
        };
        if let (Remedy::Replace, Some(instance)) = (report.remedy, &report.instance)
            && !self.watcher.is_watched(instance)
        {
            return Err(Refusal::Failed(format!("there is no instance `{instance}`")));
        }
        let mut observation: Observation = report.observation(server.generation, self.clock.now().wall);
        // What is named is a source of reports. Who answers for it is whoever may publish, and the broker does not tell who.
        observation.reporter = format!("bus for {}", observation.reporter);
        let scope =
            Scope::Report(SignalId::new(&observation.server, observation.cause, &observation.fingerprint));
        Ok(self.signals.see(&scope, &[observation]).await?)
    }
}
