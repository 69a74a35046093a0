//! Waiting for what was asked for, and showing how far it is.

use std::time::{Duration, Instant};

use kiln_api::builder::{Build, BuildState, Server};
use kiln_api::deployer::{Fleet, Release, Rollout, RolloutState};
use kiln_api::types::CheckResult;

use crate::clients::Services;
use crate::failure::{Code, Failure, Outcome};
use crate::screen::{Bar, Screen};
use crate::words::{rollout_is_under_way, rollout_state};

/// Reading three lists takes a millisecond or two; this keeps a waiting command out of the way of what it waits for.
const PERIOD: Duration = Duration::from_millis(250);

/// A failure that is older than the command counts only when nothing new came after this time: a build that failed
/// before is tried again by an apply, but not at once.
const STALE: Duration = Duration::from_secs(5);

/// Shows each stage once where there is no terminal, and the present one where there is.
struct Stages {
    screen: Screen,
    bar: Bar,
    shown: String,
}

impl Stages {
    fn new(screen: Screen) -> Self {
        Self { screen, bar: screen.bar(0), shown: String::new() }
    }

    fn show(&mut self, stage: &str, done: u64, of: u64) {
        if self.bar.is_drawn() {
            self.bar.set(done, of, stage);
        } else if self.shown != stage {
            self.screen.progress(stage);
        }
        stage.clone_into(&mut self.shown);
    }
}

/// Waits until the fleet of `server` runs the definition with this digest, and each instance is healthy.
pub(crate) async fn until_running(
    services: &Services,
    screen: Screen,
    server: &str,
    digest: &str,
    limit: Duration,
) -> Outcome<Fleet> {
    let begun = Instant::now();
    let mut stages = Stages::new(screen);
    loop {
        match look(services, server, digest, begun.elapsed() > STALE).await {
            Ok(Look::There(fleet)) => return Ok(*fleet),
            Ok(Look::Underway { stage, done, of }) => stages.show(&format!("{server}: {stage}"), done, of),
            // A service that is being restarted is waited for; what it was told, it kept.
            Err(failure) if failure.is_unavailable() => stages.show(&failure.line(), 0, 0),
            Err(failure) => return Err(failure),
        }
        if begun.elapsed() > limit {
            return Err(Failure::failed(
                format!("waiting for {server}"),
                format!("after {} s it is still at: {}", limit.as_secs(), stages.shown),
            )
            .reason("timeout")
            .todo(format!("it goes on without this command: kiln status {server}")));
        }
        tokio::time::sleep(PERIOD).await;
    }
}

enum Look {
    There(Box<Fleet>),
    Underway { stage: String, done: u64, of: u64 },
}

impl Look {
    fn at(stage: impl Into<String>) -> Outcome<Self> {
        Ok(Self::Underway { stage: stage.into(), done: 0, of: 0 })
    }
}

async fn look(services: &Services, server: &str, digest: &str, settled: bool) -> Outcome<Look> {
    let revisions = services.revisions(server).await?;
    let newest = revisions.iter().rev().find(|it| !it.removed);
    let Some(revision) = newest.filter(|it| it.definition_digest == digest) else {
        return look_at_build(services, &services.server(server).await?, digest, settled).await;
    };
    let releases = services.releases(server).await?;
    let made = releases.iter().find(|it| generation(it) == revision.generation);
    let Some(release) = made else { return Look::at("the deployer makes a release") };
    let Some(fleet) = services.fleet_if_any(server).await? else {
        return Look::at("the deployer makes a release");
    };
    if let Some(rollout) = fleet.rollout.as_ref().filter(|it| rollout_is_under_way(it.state())) {
        return Ok(under_way(rollout));
    }
    if release.quarantined {
        return Err(convicted(services, server, release, &fleet).await?);
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
    Ok(Look::There(Box::new(fleet)))
}

/// Why a release is not to be had: the rollout that failed, or a person's word.
async fn convicted(services: &Services, server: &str, release: &Release, fleet: &Fleet) -> Outcome<Failure> {
    let rollouts = services.rollouts(server).await?;
    let failed = rollouts.iter().rev().find(|it| {
        it.to_release == release.number
            && matches!(it.state(), RolloutState::RolledBack | RolloutState::Failed)
    });
    Ok(failed.map_or_else(
        || {
            let verdict = fleet.quarantine.iter().rev().find(|it| it.release == release.number);
            let why = verdict.map_or("it is quarantined", |it| &it.reason);
            Failure::failed(format!("deploying {server} r{}", release.number), why)
                .reason("quarantined")
                .todo("change the definition and apply it again")
        },
        failed_rollout,
    ))
}

async fn look_at_build(services: &Services, known: &Server, digest: &str, settled: bool) -> Outcome<Look> {
    let builds = services.builds(&known.name).await?;
    let last = builds.iter().rev().find(|it| it.definition_digest == digest);
    match last {
        Some(build) if matches!(build.state(), BuildState::Queued | BuildState::Running) => {
            Ok(build_stage(build))
        }
        Some(build) if matches!(build.state(), BuildState::Failed | BuildState::Cancelled) && settled => {
            Err(failed_build(build))
        }
        Some(build) if build.state() == BuildState::Succeeded => Look::at(format!("{} is built", build.id)),
        _ if settled && !known.problem.is_empty() => {
            Err(Failure::failed(format!("building {}", known.name), &known.problem)
                .todo(format!("kiln why {}", known.name)))
        }
        _ => Look::at("resolving what the image is made from"),
    }
}

fn generation(release: &Release) -> u64 {
    release.revision.as_ref().map_or(0, |revision| revision.generation)
}

fn build_stage(build: &Build) -> Look {
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

fn under_way(rollout: &Rollout) -> Look {
    let mut stage = format!(
        "{} r{}: {} of {} instances in place",
        rollout_state(rollout.state()),
        rollout.to_release,
        rollout.done,
        rollout.total
    );
    if rollout.state() != RolloutState::Running && !rollout.problem.is_empty() {
        stage.push_str(&format!(" ({})", rollout.problem));
    }
    Look::Underway { stage, done: rollout.done.into(), of: rollout.total.into() }
}

/// Waits for the end of a rollout that the deployer began.
pub(crate) async fn rollout(services: &Services, screen: Screen, begun: &Rollout) -> Outcome<Rollout> {
    let mut stages = Stages::new(screen);
    loop {
        match services.rollouts(&begun.server).await {
            Ok(rollouts) => {
                let now = rollouts
                    .into_iter()
                    .rev()
                    .find(|it| it.id == begun.id && it.to_release == begun.to_release);
                match now {
                    Some(now) if rollout_is_under_way(now.state()) => {
                        if let Look::Underway { stage, done, of } = under_way(&now) {
                            stages.show(&format!("{}: {stage}", now.server), done, of);
                        }
                    }
                    Some(now) if now.state() == RolloutState::Succeeded => return Ok(now),
                    Some(now) => return Err(failed_rollout(&now)),
                    None => {
                        return Err(Failure::new(
                            Code::NotFound,
                            format!("there is no rollout {}", begun.id),
                            "",
                        ));
                    }
                }
            }
            Err(failure) if failure.is_unavailable() => stages.show(&failure.line(), 0, 0),
            Err(failure) => return Err(failure),
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Waits until nothing of a removed server runs.
pub(crate) async fn until_retired(services: &Services, screen: Screen, server: &str) -> Outcome {
    let mut stages = Stages::new(screen);
    loop {
        let removed = services.fleet_if_any(server).await?.is_none_or(|fleet| fleet.removed);
        let left = services.instances(server, false).await?.len();
        if removed && left == 0 {
            return Ok(());
        }
        stages.show(&format!("{server}: {left} left to retire"), 0, 0);
        tokio::time::sleep(PERIOD).await;
    }
}

pub(crate) fn failed_build(build: &Build) -> Failure {
    let mut why = build.problem.clone();
    if build.state() == BuildState::Cancelled && why.is_empty() {
        "it was cancelled".clone_into(&mut why);
    }
    for test in build.tests.iter().filter(|test| !test.passed) {
        why.push_str(&format!("\n  test {}: {}", test.name, test.detail));
    }
    append_log(&mut why, &build.last_log);
    Failure::failed(format!("building {}", build.id), why)
        .reason("build_failed")
        .todo(format!("kiln why {}", build.id))
}

pub(crate) fn failed_rollout(rollout: &Rollout) -> Failure {
    let mut why = format!("{}: {}", rollout_state(rollout.state()), rollout.problem);
    if !rollout.failed_instance.is_empty() {
        why.push_str(&format!("\n  instance {}", rollout.failed_instance));
        if let Some(code) = rollout.exit_code {
            why.push_str(&format!(", exit code {code}"));
        }
    }
    for check in rollout.last_checks.iter().rev().take(3) {
        why.push_str(&format!("\n  {}", check_line(check)));
    }
    append_log(&mut why, &rollout.last_log);
    Failure::failed(format!("rollout of {} r{}", rollout.server, rollout.to_release), why)
        .reason(match rollout.state() {
            RolloutState::RolledBack => "rolled_back",
            RolloutState::Superseded => "superseded",
            _ => "rollout_failed",
        })
        .todo(format!("kiln why {}-r{}", rollout.server, rollout.to_release))
}

pub(crate) fn check_line(check: &CheckResult) -> String {
    format!("probe {}: {}", if check.passed { "passed" } else { "failed" }, check.detail)
}

fn append_log(why: &mut String, lines: &[String]) {
    for line in lines.iter().rev().take(10).rev() {
        why.push_str(&format!("\n  | {line}"));
    }
}
