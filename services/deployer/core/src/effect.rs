//! What is to be done, and what is to be told.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_model::check::Check;
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, NodeName};
use kiln_model::run::RunSpec;
use kiln_model::time::Millis;

use crate::fleet::{Instance, Listener};
use crate::release::Release;
use crate::rollout::Rollout;

/// Each of them done twice equals once. All that a decision gives may be done at the same time: what has to wait for
/// another effect is not given before that one's result is in the view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Compare the image with its digest and signature, where it is to run.
    Verify { node: NodeName, image: Digest, traceparent: String },
    Launch {
        node: NodeName,
        id: InstanceId,
        image: Digest,
        run: Box<RunSpec>,
        generation: u64,
        traceparent: String,
    },
    /// The listeners with backends on this node.
    Route { node: NodeName, listeners: Vec<Listener>, generation: u64, traceparent: String },
    /// Only what is not on the edge any more.
    Retire { node: NodeName, id: InstanceId, drain: Millis, generation: u64, traceparent: String },
    /// Ask an instance how it is, because the monitor does not say.
    Check { node: NodeName, id: InstanceId, check: Check, timeout: Millis },
    /// Ask the monitor what it knows of this server.
    Observe { interval: Duration },
    /// Fetch what an instance wrote last.
    Evidence { node: NodeName, id: InstanceId },
    /// Have the builder keep these images, and none but these, for this server.
    Hold { images: BTreeSet<Digest> },
}

/// What is told to others when the decision is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Release(Box<Release>),
    Rollout(RolloutVerb, Box<Rollout>),
    /// As it was at that moment: one that is gone for good is not in the fleet any more.
    Instance(InstanceVerb, InstanceId, Box<Instance>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RolloutVerb {
    Started,
    Held,
    Resumed,
    RollingBack,
    Succeeded,
    RolledBack,
    Failed,
    Superseded,
}

impl RolloutVerb {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Held => "held",
            Self::Resumed => "resumed",
            Self::RollingBack => "rolling_back",
            Self::Succeeded => "succeeded",
            Self::RolledBack => "rolled_back",
            Self::Failed => "failed",
            Self::Superseded => "superseded",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InstanceVerb {
    Launched,
    Exited,
    Retired,
    Failed,
}

impl InstanceVerb {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Launched => "launched",
            Self::Exited => "exited",
            Self::Retired => "retired",
            Self::Failed => "failed",
        }
    }
}
