//! What the node remembers of an instance, and how it moves on.

use jiff::Timestamp;
use kiln_api::convert::{self, Invalid, to_timestamp};
use kiln_api::{engine, types};
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::run::RunSpec;
use kiln_model::time::Millis;
use serde::{Deserialize, Serialize};

use crate::network::Plug;
use crate::process::Process;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    Fleet,
    Test,
}

/// Everything an instance is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) id: InstanceId,
    pub(crate) role: Role,
    pub(crate) image: Digest,
    pub(crate) run: RunSpec,
}

impl Spec {
    pub(crate) fn server(&self) -> &ServerName {
        &self.id.server
    }

    /// Ports that users can be sent to.
    pub(crate) fn targets(&self) -> Vec<u16> {
        self.run.ports.iter().map(|port| port.target).collect()
    }
}

impl TryFrom<engine::InstanceSpec> for Spec {
    type Error = Invalid;

    fn try_from(spec: engine::InstanceSpec) -> Result<Self, Invalid> {
        let id: InstanceId = convert::text("id", &spec.id)?;
        let named = (spec.server.as_str(), spec.release, spec.ordinal, spec.attempt);
        if named != (id.server.as_str(), id.release, id.ordinal, id.attempt) {
            return Err(Invalid::new(
                "id",
                "names another server, release, ordinal or attempt than the other fields",
            ));
        }
        let role = match types::Role::try_from(spec.role) {
            Ok(types::Role::Fleet) => Role::Fleet,
            Ok(types::Role::Test) => Role::Test,
            _ => return Err(Invalid::new("role", format!("is {}, wanted fleet or test", spec.role))),
        };
        let image = convert::text("image_digest", &spec.image_digest)?;
        Ok(Self { id, role, image, run: convert::required("run", spec.run)? })
    }
}

impl From<Spec> for engine::InstanceSpec {
    fn from(spec: Spec) -> Self {
        let role = match spec.role {
            Role::Fleet => types::Role::Fleet,
            Role::Test => types::Role::Test,
        };
        Self {
            id: spec.id.to_string(),
            server: spec.id.server.to_string(),
            release: spec.id.release,
            ordinal: spec.id.ordinal,
            attempt: spec.id.attempt,
            role: role.into(),
            image_digest: spec.image.to_string(),
            run: Some(spec.run.into()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    Launching,
    Running {
        process: Process,
    },
    Exited,
    /// On its way out, for `drain` at most; `process` is set where it still ran.
    Retiring {
        process: Option<Process>,
        drain: Millis,
    },
    Retired,
    Failed,
}

/// What happened to an instance.
#[derive(Debug, Clone)]
pub(crate) enum Fact {
    Started {
        process: Process,
    },
    CouldNotLaunch {
        why: String,
    },
    /// The node ended in the middle of its launch, or could not write what became of it.
    CutOff,
    Ended {
        exit_code: Option<i32>,
        why: String,
        /// It ended while this node was away.
        cut_off: bool,
    },
    ToRetire {
        drain: Millis,
    },
    Gone {
        exit_code: Option<i32>,
    },
    /// Nothing of it is left on the machine.
    Cleared,
}

/// A fact that does not fit the state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an instance that is {state} can't be {fact}")]
pub(crate) struct Illegal {
    state: &'static str,
    fact: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) spec: Spec,
    /// Of the specification: the same id with another one is another instance.
    pub(crate) digest: Digest,
    pub(crate) state: State,
    /// Its place in the network, until it is cleared away.
    pub(crate) plug: Option<Plug>,
    pub(crate) launched: Timestamp,
    pub(crate) ended: Option<Timestamp>,
    pub(crate) exit_code: Option<i32>,
    pub(crate) detail: String,
    /// It failed or ended, and is not to blame.
    #[serde(default)]
    pub(crate) cut_off: bool,
    pub(crate) traceparent: String,
}

impl Record {
    pub(crate) fn launching(
        spec: Spec,
        digest: Digest,
        plug: Plug,
        traceparent: String,
        now: Timestamp,
    ) -> Self {
        let (state, detail) = (State::Launching, String::new());
        Self {
            spec,
            digest,
            state,
            plug: Some(plug),
            launched: now,
            ended: None,
            exit_code: None,
            detail,
            cut_off: false,
            traceparent,
        }
    }

    pub(crate) fn next(mut self, fact: Fact, now: Timestamp) -> Result<Self, Illegal> {
        let illegal = |state: &State, fact| Err(Illegal { state: state.word(), fact });
        match (&self.state, fact) {
            (State::Launching, Fact::Started { process }) => {
                self.state = State::Running { process };
                // Its start period begins with it, however long this node stood still on the way.
                self.launched = now;
            }
            (State::Launching, Fact::CouldNotLaunch { why }) => {
                self.state = State::Failed;
                self.detail = why;
                self.end(now);
            }
            (State::Launching, Fact::CutOff) => {
                self.state = State::Failed;
                self.detail = "its launch was cut off; launch a new attempt".to_owned();
                self.cut_off = true;
                self.end(now);
            }
            (State::Running { .. }, Fact::Ended { exit_code, why, cut_off }) => {
                self.state = State::Exited;
                self.cut_off = cut_off;
                self.exit_code = exit_code;
                self.detail = why;
                self.end(now);
            }
            (State::Running { process }, Fact::ToRetire { drain }) => {
                self.state = State::Retiring { process: Some(process.clone()), drain };
            }
            // Who holds its lock and finds it launching finds a launch that was cut off: what it has goes with it.
            (State::Launching | State::Exited | State::Failed, Fact::ToRetire { drain }) => {
                self.state = State::Retiring { process: None, drain };
            }
            (State::Retiring { .. }, Fact::Gone { exit_code }) => {
                self.state = State::Retired;
                self.exit_code = self.exit_code.or(exit_code);
                self.end(now);
                self.plug = None;
            }
            (State::Exited | State::Failed, Fact::Cleared) => self.plug = None,
            (state, Fact::Started { .. }) => return illegal(state, "started"),
            (state, Fact::CouldNotLaunch { .. }) => return illegal(state, "a failed launch"),
            (state, Fact::CutOff) => return illegal(state, "cut off"),
            (state, Fact::Ended { .. }) => return illegal(state, "ended"),
            (state, Fact::ToRetire { .. }) => return illegal(state, "retired"),
            (state, Fact::Gone { .. }) => return illegal(state, "gone"),
            (state, Fact::Cleared) => return illegal(state, "cleared away"),
        }
        Ok(self)
    }

    fn end(&mut self, now: Timestamp) {
        self.ended.get_or_insert(now);
    }

    /// The process that runs, or ran when this was written.
    pub(crate) fn process(&self) -> Option<&Process> {
        match &self.state {
            State::Running { process } | State::Retiring { process: Some(process), .. } => Some(process),
            _ => None,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// It has ended for good.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, State::Exited | State::Retired | State::Failed)
    }

    /// It has ended for good, and still has something on the machine.
    pub(crate) fn is_left_over(&self) -> bool {
        self.is_over() && self.plug.is_some()
    }

    pub(crate) fn to_message(&self, version: u64) -> engine::Instance {
        let state = match self.state {
            State::Launching => engine::InstanceState::Launching,
            State::Running { .. } => engine::InstanceState::Running,
            State::Exited => engine::InstanceState::Exited,
            State::Retiring { .. } => engine::InstanceState::Retiring,
            State::Retired => engine::InstanceState::Retired,
            State::Failed => engine::InstanceState::Failed,
        };
        let place = self.plug.as_ref().filter(|_| !self.is_over());
        engine::Instance {
            spec: Some(self.spec.clone().into()),
            state: state.into(),
            address: place.map(|plug| plug.address.to_string()).unwrap_or_default(),
            launched: Some(to_timestamp(self.launched)),
            ended: self.ended.map(to_timestamp),
            exit_code: self.exit_code,
            detail: self.detail.clone(),
            pid: self.process().map_or(0, |process| process.pid),
            version,
            cut_off: self.cut_off,
        }
    }
}

impl State {
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Launching => "launching",
            Self::Running { .. } => "running",
            Self::Exited => "exited",
            Self::Retiring { .. } => "retiring",
            Self::Retired => "retired",
            Self::Failed => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launching() -> Record {
        let run = serde_json::json!({
            "replicas": 1, "ports": [], "writable": [], "env": {}, "capabilities": [], "health": null, "drain": 0,
            "limits": { "memory_bytes": null, "cpu_millis": null, "pids": null },
            "rollout": { "strategy": { "rolling": { "max_surge": 1, "max_unavailable": 0 } }, "soak": 0, "deadline": 0 },
        });
        let spec = Spec {
            id: "web-r1-0-a1".parse().unwrap(),
            role: Role::Fleet,
            image: Digest::of(b"image"),
            run: serde_json::from_value(run).unwrap(),
        };
        let plug = Plug { namespace: "n".to_owned(), address: [10, 0, 0, 9].into() };
        Record::launching(spec, Digest::of(b"spec"), plug, String::new(), Timestamp::UNIX_EPOCH)
    }

    fn after(facts: &[Fact]) -> Result<Record, Illegal> {
        facts.iter().try_fold(launching(), |record, fact| record.next(fact.clone(), Timestamp::UNIX_EPOCH))
    }

    fn started() -> Fact {
        Fact::Started { process: Process::of(std::process::id()).unwrap() }
    }

    #[test]
    fn an_instance_runs_once() {
        let ended = Fact::Ended { exit_code: Some(3), why: "it ended".to_owned(), cut_off: false };
        let retire = Fact::ToRetire { drain: Millis(0) };
        let exited = after(&[started(), ended.clone()]).unwrap();
        assert_eq!(exited.exit_code, Some(3));
        assert!(after(&[started(), ended.clone(), started()]).is_err());
        assert!(after(&[started(), ended.clone(), ended.clone()]).is_err());
        let gone = Fact::Gone { exit_code: None };
        let retired = after(&[started(), ended, retire.clone(), gone.clone()]).unwrap();
        assert_eq!((retired.state, retired.exit_code), (State::Retired, Some(3)));
        assert!(after(&[started(), retire.clone(), gone, retire]).is_err());
        assert!(after(&[started(), Fact::CouldNotLaunch { why: String::new() }]).is_err());
    }

    #[test]
    fn a_launch_that_was_cut_off_can_be_retired_before_anybody_noted_its_end() {
        let retiring = after(&[Fact::ToRetire { drain: Millis(0) }]).unwrap();
        assert!(retiring.plug.is_some() && retiring.process().is_none(), "{retiring:?}");
        let gone = retiring.next(Fact::Gone { exit_code: None }, Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!((gone.state, gone.plug), (State::Retired, None));
    }

    #[test]
    fn it_is_launched_when_it_starts_and_not_when_that_was_asked_for() {
        let later = Timestamp::from_second(32).unwrap();
        let running = launching().next(started(), later).unwrap();
        assert_eq!(running.launched, later);
        let ended = Fact::Ended { exit_code: None, why: String::new(), cut_off: true };
        assert_eq!(running.next(ended, Timestamp::from_second(40).unwrap()).unwrap().launched, later);
    }

    #[test]
    fn what_it_has_on_the_machine_is_known_until_it_is_cleared_away() {
        let ended = Fact::Ended { exit_code: None, why: String::new(), cut_off: true };
        let failed = Fact::CouldNotLaunch { why: String::new() };
        for facts in [vec![started(), ended], vec![failed], vec![Fact::CutOff]] {
            let over = after(&facts).unwrap();
            assert!(over.is_over() && over.is_left_over());
            assert_eq!(over.to_message(1).address, "", "nobody answers there");
            let retiring =
                after(&[facts.clone(), vec![Fact::ToRetire { drain: Millis(0) }]].concat()).unwrap();
            assert!(retiring.plug.is_some());
            let cleared = after(&[facts, vec![Fact::Cleared]].concat()).unwrap();
            assert!(cleared.is_over() && !cleared.is_left_over());
        }
        assert!(after(&[started(), Fact::Cleared]).is_err());
    }
}
