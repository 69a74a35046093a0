//! The builder's documents as messages.

use jiff::Timestamp;
use kiln_api::builder as api;
use kiln_api::convert::{to_duration, to_timestamp};
use kiln_api::types;
use kiln_builder_core::build::{Build, PackageChange, Phase, State};
use kiln_builder_core::server::Server;
use kiln_builder_core::source::{Place, Source};
use kiln_model::revision::Revision;
use kiln_model::time::Millis;

pub fn server(server: &Server, version: u64) -> api::Server {
    let in_force = server.in_force.as_ref();
    let release_files = in_force.map(|in_force| in_force.release_files.as_slice()).unwrap_or_default();
    let effective = server.effective().unwrap_or(&server.head);
    api::Server {
        name: server.name.to_string(),
        source: server.source.to_string(),
        folder: server.folder.clone(),
        commit: server.head.commit.clone(),
        definition_digest: server.head.digest.to_string(),
        generation: server.generation,
        orphaned: server.orphaned,
        removed: server.removed,
        quarantined: server.is_quarantined(),
        last_good_definition: in_force
            .map(|in_force| in_force.definition.digest.to_string())
            .unwrap_or_default(),
        release_files: release_files
            .iter()
            .map(|file| api::ReleaseFile { url: file.url.clone(), digest: file.digest.to_string() })
            .collect(),
        update: Some(server.head.update.into()),
        problem: server.problem(),
        version,
        image_digest: in_force.map(|in_force| in_force.image.to_string()).unwrap_or_default(),
        replicas: effective.replicas,
        in_force_generation: in_force.map(|in_force| in_force.generation).unwrap_or_default(),
        pending: server.wanted.is_some() || server.building.is_some(),
    }
}

pub fn build(build: &Build, version: u64) -> api::Build {
    let time = |time: Option<Timestamp>| time.map(to_timestamp);
    let (state, image) = match &build.state {
        State::Queued { .. } => (api::BuildState::Queued, None),
        State::Running { .. } => (api::BuildState::Running, None),
        State::Succeeded { image } => (api::BuildState::Succeeded, Some(image)),
        State::Failed => (api::BuildState::Failed, None),
        State::Cancelled { .. } => (api::BuildState::Cancelled, None),
    };
    api::Build {
        id: build.id.to_string(),
        server: build.server().to_string(),
        lock_key: build.lock_key.to_string(),
        definition_digest: build.definition.to_string(),
        state: state.into(),
        cause: Some(build.cause.clone().into()),
        image_digest: image.map(ToString::to_string).unwrap_or_default(),
        problem: build.problem.clone(),
        last_log: build.last_log.clone(),
        created: Some(to_timestamp(build.created)),
        started: time(build.started),
        ended: time(build.ended),
        steps: build
            .progress
            .steps
            .iter()
            .map(|step| api::BuildStep { name: step.name.clone(), cached: step.cached, millis: step.millis })
            .collect(),
        tests: build
            .tests
            .iter()
            .map(|test| api::TestResult {
                name: test.name.clone(),
                passed: test.passed,
                detail: test.detail.clone(),
                took: Some(to_duration(test.took)),
            })
            .collect(),
        packages: package_changes(&build.packages),
        version,
        steps_total: build.progress.steps_total,
        security: build.security,
        timings: timings(build),
    }
}

fn timings(build: &Build) -> Vec<api::PhaseTiming> {
    let timing = |phase: api::BuildPhase, took: Millis| api::PhaseTiming {
        phase: phase.into(),
        took: Some(to_duration(took)),
    };
    let resolve = (build.resolving > Millis(0)).then(|| timing(api::BuildPhase::Resolve, build.resolving));
    let of_bake = build.progress.timings.iter().map(|it| {
        let phase = match it.phase {
            Phase::Wait => api::BuildPhase::Wait,
            Phase::Fetch => api::BuildPhase::Fetch,
            Phase::Unpack => api::BuildPhase::Unpack,
            Phase::Configure => api::BuildPhase::Configure,
            Phase::Run => api::BuildPhase::Run,
            Phase::Hash => api::BuildPhase::Hash,
            Phase::Write => api::BuildPhase::Write,
            Phase::Describe => api::BuildPhase::Describe,
            Phase::Sign => api::BuildPhase::Sign,
            Phase::Push => api::BuildPhase::Push,
            Phase::Test => api::BuildPhase::Test,
        };
        timing(phase, it.took)
    });
    resolve.into_iter().chain(of_bake).collect()
}

pub fn package_changes(changes: &[PackageChange]) -> Vec<api::PackageChange> {
    changes
        .iter()
        .map(|change| api::PackageChange {
            name: change.name.clone(),
            from: change.from.clone().unwrap_or_default(),
            to: change.to.clone().unwrap_or_default(),
        })
        .collect()
}

pub fn source(source: &Source, version: u64) -> api::Source {
    let git = match &source.place {
        Place::Git { url, branch } => Some(api::GitSource { url: url.clone(), branch: branch.clone() }),
        Place::Folder { .. } => None,
    };
    api::Source {
        id: source.id.to_string(),
        git,
        commit: source.commit.clone(),
        servers: source.servers.iter().map(ToString::to_string).collect(),
        version,
    }
}

pub fn revision(revision: &Revision, version: u64) -> types::Revision {
    types::Revision { version, ..revision.clone().into() }
}
