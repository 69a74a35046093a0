//! Between messages and the core's types.

use std::net::IpAddr;

use kiln_api::convert::{self, Invalid, from_optional_timestamp, to_timestamp};
use kiln_api::{deployer, engine, types};
use kiln_deployer_core::{
    Backend, Fleet, InstanceState, Listener, Quarantine, Release, Rollout, RolloutState, Seen, SeenState,
};
use kiln_model::name::{InstanceId, NodeName, ServerName};
use kiln_model::revision::{Revision, RevisionContent};

use crate::record::InstanceRecord;

pub(crate) fn listener(listener: &Listener) -> engine::Listener {
    let backend = |backend: &Backend| engine::Backend {
        instance: backend.instance.to_string(),
        target: backend.target.into(),
    };
    engine::Listener {
        listen: listener.listen.into(),
        backends: listener.backends.iter().map(backend).collect(),
    }
}

/// What the node has on the edge, as far as it can be understood.
pub(crate) fn edge(listeners: Vec<engine::Listener>) -> Vec<Listener> {
    let backend = |backend: engine::Backend| {
        Some(Backend { instance: backend.instance.parse().ok()?, target: backend.target.try_into().ok()? })
    };
    let listener = |listener: engine::Listener| {
        let backends = listener.backends.into_iter().filter_map(backend).collect();
        Some(Listener { listen: listener.listen.try_into().ok()?, backends })
    };
    listeners.into_iter().filter_map(listener).collect()
}

/// An instance of a fleet as the node has it. `None` for one of an image's tests: those are the builder's.
///
/// # Errors
/// [`Invalid`] where the message makes no sense.
pub(crate) fn seen(
    node: &NodeName,
    instance: engine::Instance,
) -> Result<Option<(InstanceId, Seen)>, Invalid> {
    let spec = instance.spec.ok_or_else(|| Invalid::new("spec", "is missing"))?;
    let id: InstanceId = convert::text("spec.id", &spec.id)?;
    if spec.role == i32::from(types::Role::Test) || id.release == 0 {
        return Ok(None);
    }
    let state = engine::InstanceState::try_from(instance.state).unwrap_or_default();
    let state = match state {
        engine::InstanceState::Launching => SeenState::Launching,
        engine::InstanceState::Running => SeenState::Running,
        engine::InstanceState::Exited => SeenState::Exited,
        engine::InstanceState::Retiring => SeenState::Retiring,
        engine::InstanceState::Retired => SeenState::Retired,
        engine::InstanceState::Failed => SeenState::Failed,
        engine::InstanceState::Unspecified => {
            return Err(Invalid::new("state", "is one that this version does not know"));
        }
    };
    let address = instance.address;
    if state == SeenState::Running && address.parse::<IpAddr>().is_err() {
        return Err(Invalid::new("address", format!("`{address}` is none")));
    }
    let seen = Seen {
        node: node.clone(),
        state,
        address,
        launched: from_optional_timestamp("launched", instance.launched)?,
        ended: from_optional_timestamp("ended", instance.ended)?,
        exit_code: instance.exit_code,
        detail: instance.detail,
        cut_off: instance.cut_off,
    };
    Ok(Some((id, seen)))
}

pub(crate) fn release(server: &ServerName, release: &Release, version: u64) -> deployer::Release {
    let revision = Revision {
        server: server.clone(),
        generation: release.generation,
        content: RevisionContent::Image(Box::new(release.revision.clone())),
        created: release.revised,
    };
    deployer::Release {
        server: server.to_string(),
        number: release.number,
        revision: Some(revision.into()),
        quarantined: release.quarantined,
        good: release.good,
        created: Some(to_timestamp(release.created)),
        version,
    }
}

fn rollout_state(state: RolloutState) -> deployer::RolloutState {
    match state {
        RolloutState::Running => deployer::RolloutState::Running,
        RolloutState::Held => deployer::RolloutState::Held,
        RolloutState::RollingBack => deployer::RolloutState::RollingBack,
        RolloutState::Succeeded => deployer::RolloutState::Succeeded,
        RolloutState::RolledBack => deployer::RolloutState::RolledBack,
        RolloutState::Failed => deployer::RolloutState::Failed,
        RolloutState::Superseded => deployer::RolloutState::Superseded,
    }
}

pub(crate) fn rollout(server: &ServerName, rollout: &Rollout, version: u64) -> deployer::Rollout {
    let failure = rollout.failure.as_ref();
    deployer::Rollout {
        id: rollout.id.clone(),
        server: server.to_string(),
        from_release: rollout.from,
        to_release: rollout.to,
        state: rollout_state(rollout.state).into(),
        cause: Some(rollout.cause.clone().into()),
        problem: rollout.problem.clone(),
        failed_instance: failure.map(|f| f.instance.to_string()).unwrap_or_default(),
        last_log: failure.and_then(|f| f.last_log.clone()).unwrap_or_default(),
        last_checks: failure
            .map(|f| f.last_checks.iter().cloned().map(Into::into).collect())
            .unwrap_or_default(),
        exit_code: failure.and_then(|f| f.exit_code),
        started: Some(to_timestamp(rollout.started)),
        ended: rollout.ended.map(to_timestamp),
        done: rollout.done,
        total: rollout.total,
        version,
        back_to: rollout.back_to.unwrap_or_default(),
    }
}

pub(crate) fn quarantine(server: &ServerName, quarantine: &Quarantine) -> deployer::Quarantine {
    let digest =
        |digest: Option<kiln_model::digest::Digest>| digest.map(|d| d.to_string()).unwrap_or_default();
    deployer::Quarantine {
        server: server.to_string(),
        definition_digest: digest(quarantine.definition),
        run_digest: digest(quarantine.run),
        packages: quarantine.packages.clone(),
        release: quarantine.release,
        reason: quarantine.reason.clone(),
        time: Some(to_timestamp(quarantine.time)),
    }
}

fn instance_state(state: InstanceState) -> deployer::InstanceState {
    match state {
        InstanceState::Launching => deployer::InstanceState::Launching,
        InstanceState::Running => deployer::InstanceState::Running,
        InstanceState::Exited => deployer::InstanceState::Exited,
        InstanceState::Draining => deployer::InstanceState::Draining,
        InstanceState::Retired => deployer::InstanceState::Retired,
        InstanceState::Failed => deployer::InstanceState::Failed,
    }
}

pub(crate) fn instance(id: &InstanceId, record: &InstanceRecord, version: u64) -> deployer::Instance {
    let InstanceRecord { instance, on_edge, policy, .. } = record;
    deployer::Instance {
        id: id.to_string(),
        server: id.server.to_string(),
        release: id.release,
        ordinal: id.ordinal,
        attempt: id.attempt,
        state: instance_state(instance.state).into(),
        health: types::HealthState::from(instance.health).into(),
        on_edge: *on_edge,
        address: instance.address.clone(),
        health_policy: policy.clone().map(Into::into),
        launched: instance.launched.map(to_timestamp),
        ended: instance.ended.map(to_timestamp),
        exit_code: instance.exit_code,
        cause: Some(instance.cause.clone().into()),
        detail: instance.detail.clone(),
        version,
        node: instance.node.to_string(),
        image_digest: instance.content.image.to_string(),
        last_checks: instance.last_checks.iter().cloned().map(Into::into).collect(),
        cut_off: instance.cut_off,
    }
}

/// A fleet with the instances that it means to have. `current` is the release that runs, or is being moved to.
pub(crate) fn fleet(
    fleet: &Fleet,
    version: u64,
    current: Option<&Release>,
    rollout: Option<deployer::Rollout>,
    instances: Vec<deployer::Instance>,
) -> deployer::Fleet {
    let server = &fleet.server;
    let run = current.map(|release| &release.revision.run);
    let healthy = fleet.instances.values().filter(|instance| instance.is_up()).count();
    deployer::Fleet {
        server: server.to_string(),
        release: fleet.release,
        last_good: fleet.last_good,
        rollout,
        replicas: run.map_or(0, |run| run.replicas),
        healthy: u32::try_from(healthy).unwrap_or(u32::MAX),
        quarantine: fleet.quarantine.iter().map(|q| quarantine(server, q)).collect(),
        removed: fleet.removed,
        version,
        instances,
        ports: run.map(|run| run.ports.iter().map(|port| (*port).into()).collect()).unwrap_or_default(),
        problem: fleet.problem.clone(),
    }
}
