//! What the deployer decides: which release a fleet moves to, which instances come and go, what stands on the edge.
//!
//! No I/O and no clock. A fleet is one document; [`next`] takes it with what is known of the outside ([`View`]) and
//! gives the fleet as it is to be, the events that tell of the change, and every effect that is outstanding. Effects
//! are derived from the state, not remembered: after a crash the same state gives the same effects again, and each
//! of them done twice equals once. [`lint`] judges a decision by the invariants, with arithmetic of its own.

mod accept;
mod command;
mod effect;
mod fleet;
mod gate;
mod lint;
mod next;
mod nodes;
mod observe;
mod plan;
mod quarantine;
mod release;
mod rollout;
mod strangers;
mod view;

pub use accept::{Accepted, accept};
pub use command::{Commanded, Refused, RollbackAsk, abort, replace, rollback};
pub use effect::{Effect, Event, InstanceVerb, RolloutVerb};
pub use fleet::{Backend, Backoff, Fleet, Instance, InstanceState, Listener};
pub use lint::{Violation, lint};
pub use next::{Decision, next};
pub use observe::{COUNT_EVERY, MAX_TICK, freshness};
pub use quarantine::Quarantine;
pub use release::{Content, Release, Releases};
pub use rollout::{Failure, Rollout, RolloutState};
pub use view::{Evidence, OwnChecks, Seen, SeenState, Told, Verdict, View};
