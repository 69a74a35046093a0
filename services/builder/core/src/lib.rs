//! What the builder decides: when a server is planned, what a plan leads to, which build makes which image, and when
//! that becomes a revision. No I/O, no clock: time and ids are arguments, and what is to be done is data.
//!
//! The documents are [`source::Source`], [`definition::StoredDefinition`], [`server::Server`] and [`build::Build`].
//! Every transition takes a document and a fact, and gives the document that follows or says why the fact does not fit.

pub mod build;
pub mod collect;
pub mod definition;
pub mod graph;
pub mod head;
pub mod invariants;
pub mod next;
pub mod plan;
pub mod quarantine;
pub mod server;
pub mod signal;
pub mod source;
mod time;
pub mod wanted;

use kiln_model::cause::Cause;
use kiln_model::digest::Digest;
use kiln_model::name::ServerName;
use kiln_model::revision::Revision;

/// A fact that does not fit the state that it meets. The state stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    /// What the fact is about has changed since it was found; decide anew on what is there now.
    #[error("{what} changed meanwhile: {detail}")]
    Stale { what: String, detail: String },
    /// The fact can't follow on this state.
    #[error("{what} is {state}, so it can't be {wanted}")]
    State { what: String, state: &'static str, wanted: &'static str },
    /// Somebody else owns it by now.
    #[error("{what} is owned by {owner} with token {token}")]
    NotOwner { what: String, owner: String, token: u64 },
    /// Kiln does not do this as long as `reason` holds.
    #[error("{reason}")]
    Refused { reason: String },
}

/// What other services are told, in the order in which it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    DefinitionApplied,
    DefinitionOrphaned,
    DefinitionRemoved,
    DefinitionRefused {
        problem: String,
    },
    BuildQueued,
    BuildStarted,
    BuildSucceeded,
    BuildFailed,
    BuildCancelled,
    /// A cause was followed, and nothing had to be built.
    PlanUnchanged {
        server: ServerName,
        cause: Cause,
        lock_key: Digest,
    },
    RevisionCreated(Box<Revision>),
}
