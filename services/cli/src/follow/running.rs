//! Waiting until a fleet runs a definition that was applied.

use kiln_api::builder::{Build, BuildState, Server};
use kiln_api::deployer::{Fleet, Release, RolloutState};

use super::{Look, Patience, failed_build, failed_rollout, under_way, wait};
use crate::clients::Services;
use crate::failure::{Failure, Outcome};
use crate::screen::Screen;
use crate::words::{rollout_is_under_way, short, went_back_by_hand};

/// Waits until the fleet of `server` runs the definition with this digest, and each instance is healthy.
pub(crate) async fn until_running(
    services: &Services,
    screen: Screen,
    server: &str,
    digest: &str,
    patience: Patience,
) -> Outcome<Fleet> {
    wait(screen, server, patience, async || look(services, server, digest).await).await
}

async fn look(services: &Services, server: &str, digest: &str) -> Outcome<Look<Fleet>> {
    let known = services.server(server).await?;
    if known.removed {
        return Err(Failure::failed(format!("waiting for {server}"), "it was removed meanwhile")
            .reason("removed")
            .todo("apply its definition again"));
    }
    if known.definition_digest != digest {
        let (applied, newer) = (short(digest), short(&known.definition_digest));
        return Err(Failure::failed(
            format!("waiting for {server}"),
            format!("superseded: definition {newer} took the place of {applied}"),
        )
        .reason("superseded")
        .todo(format!("kiln status {server}")));
    }
    let fleet = services.fleet_if_any(server).await?;
    let moving = fleet.as_ref().and_then(|fleet| fleet.rollout.as_ref());
    let moving = moving.filter(|it| rollout_is_under_way(it.state()));
    if known.quarantined {
        return match moving.filter(|it| it.state() == RolloutState::RollingBack) {
            Some(rollout) => Ok(under_way(rollout)),
            None => Err(convicted(services, &known, fleet.as_ref()).await?),
        };
    }
    // A definition that changes nothing of image and `run` comes in force without a revision.
    if known.last_good_definition != digest {
        return look_at_build(&known, &services.builds(server).await?);
    }
    let releases = services.releases(server).await?;
    let made = releases.iter().find(|it| generation(it) == known.in_force_generation);
    let (Some(release), Some(fleet)) = (made, &fleet) else {
        return Look::at("the deployer makes a release");
    };
    if let Some(rollout) = moving {
        return Ok(under_way(rollout));
    }
    if release.quarantined {
        return Err(convicted(services, &known, Some(fleet)).await?);
    }
    if !release.good
        && let Some(failure) = failed(services, release).await?
    {
        return Err(failure);
    }
    if fleet.release != release.number || !release.good {
        return Look::at(format!("r{} is next", release.number));
    }
    if fleet.healthy < fleet.replicas {
        return Ok(Look::Underway {
            stage: format!("r{}: {} of {} healthy", fleet.release, fleet.healthy, fleet.replicas),
            done: fleet.healthy.into(),
            of: fleet.replicas.into(),
        });
    }
    Ok(Look::There(fleet.clone()))
}

/// Why the newest definition is not to be had: its release's rollout that failed, or a person's word.
async fn convicted(services: &Services, known: &Server, fleet: Option<&Fleet>) -> Outcome<Failure> {
    let digest = &known.definition_digest;
    let releases = services.releases(&known.name).await?;
    let is_of_it = |it: &&Release| it.revision.as_ref().is_some_and(|of| of.definition_digest == *digest);
    let release = releases.iter().rev().filter(|it| it.quarantined).find(is_of_it);
    if let Some(release) = release
        && let Some(failure) = failed(services, release).await?
    {
        return Ok(failure);
    }
    let verdicts = fleet.map(|fleet| fleet.quarantine.as_slice()).unwrap_or_default();
    let verdict = verdicts.iter().rev().find(|it| {
        it.definition_digest == *digest || release.is_some_and(|release| release.number == it.release)
    });
    let why = verdict.map_or("it was rolled back before", |it| &it.reason);
    Ok(Failure::failed(
        format!("deploying {}", known.name),
        format!("definition {} is quarantined: {why}", short(digest)),
    )
    .reason("quarantined")
    .todo(format!("change the definition and apply it again; kiln why {} tells more", known.name)))
}

/// The rollout to a release that came to nothing.
async fn failed(services: &Services, release: &Release) -> Outcome<Option<Failure>> {
    let rollouts = services.rollouts(&release.server).await?;
    let last = rollouts.iter().rev().find(|it| it.to_release == release.number && !went_back_by_hand(it));
    let failed = last.filter(|it| matches!(it.state(), RolloutState::RolledBack | RolloutState::Failed));
    Ok(failed.map(failed_rollout))
}

fn look_at_build(known: &Server, builds: &[Build]) -> Outcome<Look<Fleet>> {
    let last = builds.iter().rev().find(|it| it.definition_digest == known.definition_digest);
    match last {
        Some(build) if matches!(build.state(), BuildState::Queued | BuildState::Running) => {
            Ok(build_stage(build))
        }
        _ if known.pending && known.problem.is_empty() => Look::at("resolving what the image is made from"),
        _ if known.pending => Look::at(format!("trying again after: {}", known.problem)),
        Some(build) if matches!(build.state(), BuildState::Failed | BuildState::Cancelled) => {
            Err(failed_build(build))
        }
        _ => {
            let why = if known.problem.is_empty() { "nothing is under way for it" } else { &known.problem };
            Err(Failure::failed(format!("building {}", known.name), why)
                .todo(format!("kiln why {0}; kiln build {0} --wait", known.name)))
        }
    }
}

fn generation(release: &Release) -> u64 {
    release.revision.as_ref().map_or(0, |revision| revision.generation)
}

fn build_stage(build: &Build) -> Look<Fleet> {
    let done = build.steps.len() as u64;
    let of = u64::from(build.steps_total).max(done);
    let last = build.steps.last().map_or("", |step| step.name.as_str());
    let stage = match build.state() {
        BuildState::Queued => format!("{} waits for a worker", build.id),
        _ if last.is_empty() => format!("building {}", build.id),
        _ => format!("building {}: {done} of {of} steps done ({last})", build.id),
    };
    Look::Underway { stage, done, of }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(pending: bool, problem: &str) -> Server {
        Server {
            name: "web".to_owned(),
            definition_digest: "sha256:new".to_owned(),
            pending,
            problem: problem.to_owned(),
            ..Server::default()
        }
    }

    fn build(definition: &str, state: BuildState) -> Build {
        Build {
            id: "web-b1".to_owned(),
            definition_digest: definition.to_owned(),
            state: state.into(),
            ..Build::default()
        }
    }

    fn stage(known: &Server, builds: &[Build]) -> Result<String, String> {
        match look_at_build(known, builds) {
            Ok(Look::Underway { stage, .. }) => Ok(stage),
            Ok(Look::There(_)) => Err("there".to_owned()),
            Err(failure) => Err(failure.line()),
        }
    }

    #[test]
    fn a_build_that_failed_before_says_nothing_while_another_try_is_to_come() {
        let failed = [build("sha256:new", BuildState::Failed)];
        let again = stage(&server(true, "web-b1 failed: no nginx"), &failed);
        assert_eq!(again.unwrap(), "trying again after: web-b1 failed: no nginx");
        assert!(stage(&server(false, "web-b1 failed"), &failed).unwrap_err().starts_with("building web-b1"));
        let other = [build("sha256:old", BuildState::Failed)];
        assert_eq!(stage(&server(true, ""), &other).unwrap(), "resolving what the image is made from");
        assert!(stage(&server(false, "not built: held"), &other).unwrap_err().ends_with("not built: held"));
        assert!(stage(&server(false, ""), &[]).unwrap_err().ends_with("nothing is under way for it"));
        let running = [build("sha256:new", BuildState::Running)];
        assert_eq!(stage(&server(true, ""), &running).unwrap(), "building web-b1");
    }
}
