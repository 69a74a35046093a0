use kiln_model::definition::{Mode, UpdatePolicy};
use kiln_model::run::{HealthPolicy, Limits, Port, RolloutPolicy, RunSpec, Strategy};

use super::{Invalid, enumeration, from_duration, optional, optional_text, port, required, to_duration};
use crate::types;

impl From<HealthPolicy> for types::HealthPolicy {
    fn from(policy: HealthPolicy) -> Self {
        Self {
            check: Some(policy.check.into()),
            interval: Some(to_duration(policy.interval)),
            timeout: Some(to_duration(policy.timeout)),
            healthy: policy.healthy,
            unhealthy: policy.unhealthy,
            start: Some(to_duration(policy.start)),
        }
    }
}

impl TryFrom<types::HealthPolicy> for HealthPolicy {
    type Error = Invalid;

    fn try_from(policy: types::HealthPolicy) -> Result<Self, Invalid> {
        Ok(Self {
            check: required("check", policy.check)?,
            interval: from_duration("interval", policy.interval)?,
            timeout: from_duration("timeout", policy.timeout)?,
            healthy: at_least_one("healthy", policy.healthy)?,
            unhealthy: at_least_one("unhealthy", policy.unhealthy)?,
            start: from_duration("start", policy.start)?,
        })
    }
}

impl From<RolloutPolicy> for types::RolloutPolicy {
    fn from(policy: RolloutPolicy) -> Self {
        let Strategy::Rolling { max_surge, max_unavailable } = policy.strategy;
        let rolling = types::RollingPolicy { max_surge, max_unavailable };
        Self {
            strategy: Some(types::rollout_policy::Strategy::Rolling(rolling)),
            soak: Some(to_duration(policy.soak)),
            deadline: Some(to_duration(policy.deadline)),
        }
    }
}

impl TryFrom<types::RolloutPolicy> for RolloutPolicy {
    type Error = Invalid;

    fn try_from(policy: types::RolloutPolicy) -> Result<Self, Invalid> {
        let strategy = policy.strategy.ok_or_else(|| Invalid::new("strategy", "is missing"))?;
        let types::rollout_policy::Strategy::Rolling(rolling) = strategy;
        let types::RollingPolicy { max_surge, max_unavailable } = rolling;
        if max_surge == 0 && max_unavailable == 0 {
            let reason = "max_surge and max_unavailable are both 0, so no instance could ever be replaced";
            return Err(Invalid::new("rolling", reason));
        }
        Ok(Self {
            strategy: Strategy::Rolling { max_surge, max_unavailable },
            soak: from_duration("soak", policy.soak)?,
            deadline: from_duration("deadline", policy.deadline)?,
        })
    }
}

impl From<Port> for types::Port {
    fn from(port: Port) -> Self {
        Self { listen: port.listen.into(), target: port.target.into() }
    }
}

impl TryFrom<types::Port> for Port {
    type Error = Invalid;

    fn try_from(given: types::Port) -> Result<Self, Invalid> {
        Ok(Self { listen: port("listen", given.listen)?, target: port("target", given.target)? })
    }
}

impl From<Limits> for types::Limits {
    fn from(limits: Limits) -> Self {
        Self {
            memory_bytes: limits.memory_bytes.unwrap_or_default(),
            cpu_millis: limits.cpu_millis.unwrap_or_default(),
            pids: limits.pids.unwrap_or_default(),
        }
    }
}

impl From<types::Limits> for Limits {
    fn from(limits: types::Limits) -> Self {
        Self {
            memory_bytes: (limits.memory_bytes != 0).then_some(limits.memory_bytes),
            cpu_millis: (limits.cpu_millis != 0).then_some(limits.cpu_millis),
            pids: (limits.pids != 0).then_some(limits.pids),
        }
    }
}

impl From<RunSpec> for types::RunSpec {
    fn from(run: RunSpec) -> Self {
        Self {
            replicas: run.replicas,
            ports: run.ports.into_iter().map(Into::into).collect(),
            writable: run.writable,
            env: run.env,
            limits: Some(run.limits.into()),
            capabilities: run.capabilities,
            health: run.health.map(Into::into),
            rollout: Some(run.rollout.into()),
            drain: Some(to_duration(run.drain)),
            node: run.node.map(|node| node.to_string()).unwrap_or_default(),
        }
    }
}

impl TryFrom<types::RunSpec> for RunSpec {
    type Error = Invalid;

    fn try_from(run: types::RunSpec) -> Result<Self, Invalid> {
        let ports = run.ports.into_iter().enumerate().map(|(index, port)| {
            Port::try_from(port).map_err(|invalid| invalid.within(&format!("ports[{index}]")))
        });
        Ok(Self {
            replicas: run.replicas,
            ports: ports.collect::<Result<_, _>>()?,
            writable: run.writable,
            env: run.env,
            limits: run.limits.unwrap_or_default().into(),
            capabilities: run.capabilities,
            health: optional("health", run.health)?,
            rollout: required("rollout", run.rollout)?,
            drain: from_duration("drain", run.drain)?,
            node: optional_text("node", &run.node)?,
        })
    }
}

fn at_least_one(field: &str, number: u32) -> Result<u32, Invalid> {
    if number == 0 { Err(Invalid::new(field, "is 0, wanted at least 1")) } else { Ok(number) }
}

impl From<Mode> for types::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Auto,
            Mode::Approve => Self::Approve,
            Mode::Never => Self::Never,
        }
    }
}

impl TryFrom<types::Mode> for Mode {
    type Error = Invalid;

    fn try_from(mode: types::Mode) -> Result<Self, Invalid> {
        match mode {
            types::Mode::Unspecified => Err(Invalid::new("mode", "is missing")),
            types::Mode::Auto => Ok(Self::Auto),
            types::Mode::Approve => Ok(Self::Approve),
            types::Mode::Never => Ok(Self::Never),
        }
    }
}

impl From<UpdatePolicy> for types::UpdatePolicy {
    fn from(policy: UpdatePolicy) -> Self {
        let number = |mode: Mode| types::Mode::from(mode).into();
        Self {
            definition: number(policy.definition),
            packages: number(policy.packages),
            unhealthy: number(policy.unhealthy),
            debounce: Some(to_duration(policy.debounce)),
        }
    }
}

impl TryFrom<types::UpdatePolicy> for UpdatePolicy {
    type Error = Invalid;

    fn try_from(policy: types::UpdatePolicy) -> Result<Self, Invalid> {
        let mode = enumeration::<types::Mode, Mode>;
        Ok(Self {
            definition: mode("definition", policy.definition)?,
            packages: mode("packages", policy.packages)?,
            unhealthy: mode("unhealthy", policy.unhealthy)?,
            debounce: from_duration("debounce", policy.debounce)?,
        })
    }
}
