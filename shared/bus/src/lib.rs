//! Events between services and to other systems: subjects, publish, consume, dead letters, trace headers.
//!
//! State is the truth and events are hints: a lost event costs time, never correctness.

#[cfg(test)]
mod conformance;
mod delivery;
mod headers;
mod memory;
mod nats;
mod subjects;

pub use headers::{decode, headers, schema};
pub use memory::{DeadLetter, MemoryBus};
pub use nats::{Follow, NatsBus, NatsOptions, NewKey, User, accounts_section, new_key};
pub use subjects::interests;

use std::time::Duration;

use async_trait::async_trait;
use kiln_model::event::{Event, Service};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker can't be reached, or did not answer in time. Try again; nothing is lost.
    #[error("{what} on the bus at {place} failed: {reason}")]
    Unavailable { what: &'static str, place: String, reason: String },
    /// What was sent, or is to be sent, is not an event. Trying again does not help.
    #[error("no event on {subject}: {reason}")]
    Undecodable { subject: String, reason: String },
    /// The broker is not as it must be: too old, or a stream that it configured otherwise than asked.
    #[error("the broker at {place} can't be used: {reason}")]
    Unsuitable { place: String, reason: String },
}

/// Which events a consumer is given. All of them are bounded to this site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interest {
    pub service: Service,
    /// `build`, or `*`.
    pub entity: &'static str,
}

/// What a handler made of an event.
#[derive(Debug)]
pub enum Handled {
    /// State is committed (or there was nothing to do): acknowledge.
    Done,
    /// A store or a peer could not be reached: pause, give it again, count nothing.
    Later(String),
    /// This event can't be handled: counts as an attempt; past the bound it goes to the dead letters.
    Failed(String),
}

#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// `attempt` starts at 1. Unknown types are [`Handled::Done`]: the resync finds what they told.
    async fn handle(&self, event: &Event, attempt: u64) -> Handled;
}

/// Something that other systems sent in on `kiln.in.v1.<site>.>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub subject: String,
    /// `ce-id`, or stream and sequence where the sender gave none.
    pub id: String,
    pub payload: Vec<u8>,
    pub traceparent: String,
}

#[async_trait]
pub trait ReportHandler: Send + Sync + 'static {
    async fn handle(&self, report: &Report, attempt: u64) -> Handled;
}

/// Attempts at an event before it goes to the dead letters.
pub const MAX_ATTEMPTS: u64 = 5;

/// Bound on one publish, its acknowledgement included.
pub const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Cheap to clone; every clone is the same connection.
#[async_trait]
pub trait Bus: Clone + Send + Sync + 'static {
    /// Returns once the broker has stored the event; an event that it already had is stored once.
    async fn publish(&self, event: &Event) -> Result<(), Error>;

    /// Handles events of the site under a durable name until `stop` resolves. Returns an error only where the broker
    /// is unsuitable; one that is away is waited for.
    async fn consume(
        &self,
        durable: &str,
        interests: &[Interest],
        handler: std::sync::Arc<dyn Handler>,
        stop: tokio::sync::watch::Receiver<bool>,
    ) -> Result<(), Error>;

    /// As [`Bus::consume`], for reports of other systems.
    async fn consume_reports(
        &self,
        durable: &str,
        handler: std::sync::Arc<dyn ReportHandler>,
        stop: tokio::sync::watch::Receiver<bool>,
    ) -> Result<(), Error>;
}
