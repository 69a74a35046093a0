use kiln_model::cause::Cause;

use super::{Invalid, from_timestamp, text, to_timestamp};
use crate::types;

impl From<Cause> for types::Cause {
    fn from(cause: Cause) -> Self {
        Self {
            kind: cause.kind.as_str().to_owned(),
            id: cause.id,
            summary: cause.summary,
            actor: cause.actor,
            time: Some(to_timestamp(cause.time)),
            traceparent: cause.traceparent,
        }
    }
}

impl TryFrom<types::Cause> for Cause {
    type Error = Invalid;

    fn try_from(cause: types::Cause) -> Result<Self, Invalid> {
        Ok(Self {
            kind: text("kind", &cause.kind)?,
            id: cause.id,
            summary: cause.summary,
            actor: cause.actor,
            time: from_timestamp("time", cause.time)?,
            traceparent: cause.traceparent,
        })
    }
}
