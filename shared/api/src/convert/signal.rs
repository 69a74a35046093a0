use kiln_model::signal::{HealthState, Remedy, Signal, SignalId, SignalState};

use super::{Invalid, enumeration, from_timestamp, optional_text, text, to_timestamp};
use crate::types;

impl From<Remedy> for types::Remedy {
    fn from(remedy: Remedy) -> Self {
        match remedy {
            Remedy::Rebuild => Self::Rebuild,
            Remedy::Replace => Self::Replace,
        }
    }
}

impl TryFrom<types::Remedy> for Remedy {
    type Error = Invalid;

    fn try_from(remedy: types::Remedy) -> Result<Self, Invalid> {
        match remedy {
            types::Remedy::Unspecified => Err(Invalid::new("remedy", "is missing")),
            types::Remedy::Rebuild => Ok(Self::Rebuild),
            types::Remedy::Replace => Ok(Self::Replace),
        }
    }
}

impl From<SignalState> for types::SignalState {
    fn from(state: SignalState) -> Self {
        match state {
            SignalState::Open => Self::Open,
            SignalState::Waiting => Self::Waiting,
            SignalState::Resolved => Self::Resolved,
        }
    }
}

impl TryFrom<types::SignalState> for SignalState {
    type Error = Invalid;

    fn try_from(state: types::SignalState) -> Result<Self, Invalid> {
        match state {
            types::SignalState::Unspecified => Err(Invalid::new("state", "is missing")),
            types::SignalState::Open => Ok(Self::Open),
            types::SignalState::Waiting => Ok(Self::Waiting),
            types::SignalState::Resolved => Ok(Self::Resolved),
        }
    }
}

impl From<HealthState> for types::HealthState {
    fn from(state: HealthState) -> Self {
        match state {
            HealthState::Starting => Self::Starting,
            HealthState::Healthy => Self::Healthy,
            HealthState::Unhealthy => Self::Unhealthy,
            HealthState::Gone => Self::Gone,
        }
    }
}

impl TryFrom<types::HealthState> for HealthState {
    type Error = Invalid;

    fn try_from(state: types::HealthState) -> Result<Self, Invalid> {
        match state {
            types::HealthState::Unspecified => Err(Invalid::new("state", "is missing")),
            types::HealthState::Starting => Ok(Self::Starting),
            types::HealthState::Healthy => Ok(Self::Healthy),
            types::HealthState::Unhealthy => Ok(Self::Unhealthy),
            types::HealthState::Gone => Ok(Self::Gone),
        }
    }
}

/// `version` is that of the document which holds the signal: the caller sets it.
impl From<Signal> for types::Signal {
    fn from(signal: Signal) -> Self {
        Self {
            id: signal.id.to_string(),
            server: signal.server.to_string(),
            cause: signal.cause.as_str().to_owned(),
            fingerprint: signal.fingerprint,
            remedy: types::Remedy::from(signal.remedy).into(),
            evidence: signal.evidence,
            instance: signal.instance.map(|id| id.to_string()).unwrap_or_default(),
            state: types::SignalState::from(signal.state).into(),
            since: Some(to_timestamp(signal.since)),
            raised: Some(to_timestamp(signal.raised)),
            reporter: signal.reporter,
            traceparent: signal.traceparent,
            version: 0,
        }
    }
}

impl TryFrom<types::Signal> for Signal {
    type Error = Invalid;

    fn try_from(signal: types::Signal) -> Result<Self, Invalid> {
        Ok(Self {
            id: text::<SignalId>("id", &signal.id)?,
            server: text("server", &signal.server)?,
            cause: text("cause", &signal.cause)?,
            fingerprint: signal.fingerprint,
            remedy: enumeration::<types::Remedy, _>("remedy", signal.remedy)?,
            evidence: signal.evidence,
            instance: optional_text("instance", &signal.instance)?,
            state: enumeration::<types::SignalState, _>("state", signal.state)?,
            since: from_timestamp("since", signal.since)?,
            raised: from_timestamp("raised", signal.raised)?,
            reporter: signal.reporter,
            traceparent: signal.traceparent,
        })
    }
}
