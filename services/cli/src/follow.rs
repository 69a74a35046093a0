//! Waiting for what was asked for, and showing how far it is.

mod running;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use kiln_api::builder::{Build, BuildState};
use kiln_api::deployer::{Rollout, RolloutState};
use kiln_api::types::CheckResult;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::Streaming;

use crate::clients::Services;
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::screen::{Bar, Screen};
use crate::words::{back, rollout_is_under_way, rollout_state, way};

pub(crate) use running::until_running;

/// Reading three lists takes a millisecond or two; this keeps a waiting command out of the way of what it waits for.
const PERIOD: Duration = Duration::from_millis(250);

/// Seconds that a command waits where nothing else is asked for: a cold bake on a slow line, and its rollout.
pub(crate) const LIMIT: u64 = 900;

/// How long a command may wait, for all that it waits for together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    begun: Instant,
    limit: Duration,
}

impl Patience {
    pub(crate) fn of_seconds(limit: u64) -> Self {
        Self { begun: Instant::now(), limit: Duration::from_secs(limit) }
    }
}

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

/// What one look at something that is waited for came to.
enum Look<T> {
    There(T),
    Underway { stage: String, done: u64, of: u64 },
}

impl<T> Look<T> {
    fn at(stage: impl Into<String>) -> Outcome<Self> {
        Ok(Self::Underway { stage: stage.into(), done: 0, of: 0 })
    }
}

/// Looks until it is there. A service that is being restarted is waited for: what it was told, it kept.
async fn wait<T>(
    screen: Screen,
    server: &str,
    patience: Patience,
    mut look: impl AsyncFnMut() -> Outcome<Look<T>>,
) -> Outcome<T> {
    let mut stages = Stages::new(screen);
    // One for all turns: what comes during a look counts as well.
    let mut interrupt = interrupts()?;
    loop {
        match look().await {
            Ok(Look::There(found)) => return Ok(found),
            Ok(Look::Underway { stage, done, of }) => stages.show(&format!("{server}: {stage}"), done, of),
            Err(failure) if failure.is_unavailable() => stages.show(&failure.line(), 0, 0),
            Err(failure) => return Err(failure),
        }
        if patience.begun.elapsed() > patience.limit {
            return Err(Failure::failed(
                format!("waiting for {server}"),
                format!("after {} s it is still at: {}", patience.limit.as_secs(), stages.shown),
            )
            .reason("timeout")
            .todo(format!("it goes on without this command: kiln status {server}")));
        }
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            _ = interrupt.recv() => {
                return Err(interrupted(&format!("waiting for {server}"), &format!("kiln status {server}")));
            }
        }
    }
}

/// Shows what a call says, each line in the place of the last, until it gives its outcome. `read` tells the two apart; a
/// message of a kind that is not known yet is none of them.
pub(crate) async fn outcome<M, T>(
    mut stream: Streaming<M>,
    bar: &Bar,
    doing: &str,
    what: &str,
    read: impl Fn(M) -> Option<ControlFlow<T, String>>,
) -> Outcome<T> {
    while let Some(message) = stream.message().await.during(what)? {
        match read(message) {
            Some(ControlFlow::Continue(line)) => bar.message(format_args!("{doing}: {}", line.trim_end())),
            Some(ControlFlow::Break(outcome)) => return Ok(outcome),
            None => {}
        }
    }
    Err(Failure::failed(what, "the builder ended the stream without an outcome"))
}

/// Ctrl-C, from now on.
pub(crate) fn interrupts() -> Outcome<Signal> {
    signal(SignalKind::interrupt()).during("listening for Ctrl-C")
}

/// The end of a wait by Ctrl-C, which ends nothing else; `see` shows how it goes on.
pub(crate) fn interrupted(what: &str, see: &str) -> Failure {
    Failure::new(Code::Interrupted, what, "interrupted")
        .todo(format!("it goes on without this command: {see}"))
}

fn under_way<T>(rollout: &Rollout) -> Look<T> {
    let (from, to) = back(rollout).unwrap_or((rollout.from_release, rollout.to_release));
    let mut stage = format!(
        "{} {}: {} of {} instances in place",
        rollout_state(rollout.state()),
        way(from, to),
        rollout.done,
        rollout.total
    );
    if rollout.state() != RolloutState::Running && !rollout.problem.is_empty() {
        stage.push_str(&format!(" ({})", rollout.problem));
    }
    Look::Underway { stage, done: rollout.done.into(), of: rollout.total.into() }
}

/// Waits for the end of a way back that was asked for.
pub(crate) async fn until_back(
    services: &Services,
    screen: Screen,
    begun: &Rollout,
    patience: Patience,
) -> Outcome<Rollout> {
    wait(screen, &begun.server, patience, async || {
        let rollouts = services.rollouts(&begun.server).await?;
        let now =
            rollouts.into_iter().rev().find(|it| it.id == begun.id && it.to_release == begun.to_release);
        match now {
            Some(now) if rollout_is_under_way(now.state()) => Ok(under_way(&now)),
            Some(now) if now.state() == RolloutState::RolledBack => Ok(Look::There(now)),
            Some(now) => Err(failed_rollout(&now)),
            None => Err(Failure::new(Code::NotFound, format!("there is no rollout {}", begun.id), "")),
        }
    })
    .await
}

/// Waits until nothing of a removed server runs.
pub(crate) async fn until_retired(
    services: &Services,
    screen: Screen,
    server: &str,
    patience: Patience,
) -> Outcome {
    wait(screen, server, patience, async || {
        let removed = services.fleet_if_any(server).await?.is_none_or(|fleet| fleet.removed);
        let left = services.instances(server, false).await?.len();
        if removed && left == 0 { Ok(Look::There(())) } else { Look::at(format!("{left} left to retire")) }
    })
    .await
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
