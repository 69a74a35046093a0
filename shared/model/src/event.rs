//! Events as the outbox keeps them and the bus carries them: facts, named in the past tense.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::name::{ServerName, SiteName};

/// Who an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Service {
    Builder,
    Deployer,
    Monitor,
    Node,
}

impl Service {
    pub const ALL: [Self; 4] = [Self::Builder, Self::Deployer, Self::Monitor, Self::Node];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Builder => "builder",
            Self::Deployer => "deployer",
            Self::Monitor => "monitor",
            Self::Node => "node",
        }
    }

    /// Whether it publishes events. The node is told everything, and asked.
    pub const fn has_broker(self) -> bool {
        !matches!(self, Self::Node)
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What happened to what: `build.succeeded`. Both parts are texts of this program, never of a user.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EventType {
    pub service: Service,
    pub entity: String,
    pub verb: String,
}

impl EventType {
    pub fn new(service: Service, entity: &'static str, verb: &'static str) -> Self {
        Self { service, entity: entity.to_owned(), verb: verb.to_owned() }
    }

    /// `kiln.builder.build.succeeded.v1`, as in the header `ce-type`.
    pub fn ce_type(&self) -> String {
        format!("kiln.{}.{}.{}.v1", self.service, self.entity, self.verb)
    }

    /// `kiln.v1.<site>.<service>.<entity>.<verb>.<server|_>`.
    pub fn subject(&self, site: &SiteName, server: Option<&ServerName>) -> String {
        let server = server.map_or("_", ServerName::as_str);
        format!("kiln.v1.{site}.{}.{}.{}.{server}", self.service, self.entity, self.verb)
    }
}

/// An event before it has a place in the store's order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewEvent {
    pub kind: EventType,
    pub server: Option<ServerName>,
    /// The aggregate whose change this tells: its document kind and id, and the version after the change.
    pub aggregate_kind: String,
    pub aggregate_id: String,
    pub aggregate_version: u64,
    /// A message of `kiln.events.v1`, encoded.
    pub payload: Vec<u8>,
    pub time: Timestamp,
    /// W3C trace context; empty where tracing is off.
    pub traceparent: String,
}

/// An event with its identity: what is published, and what a consumer is handed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// hash(epoch, kind, id, version, index).
    pub id: Digest,
    /// In the order of the store's commits; outsiders order and de-duplicate by it.
    pub sequence: u64,
    pub epoch: String,
    pub event: NewEvent,
}

impl Event {
    /// The id of the event at `index` among those that one change of an aggregate gave.
    pub fn id_of(epoch: &str, event: &NewEvent, index: usize) -> Digest {
        let NewEvent { aggregate_kind, aggregate_id, aggregate_version, .. } = event;
        Digest::of(
            format!("{epoch}\n{aggregate_kind}\n{aggregate_id}\n{aggregate_version}\n{index}").as_bytes(),
        )
    }
}
