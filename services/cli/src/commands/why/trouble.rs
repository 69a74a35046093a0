//! What was last seen of what failed: logs, exit code, probe answers, and what was convicted for it.

use kiln_api::builder::{Build, BuildState};
use kiln_api::deployer::{Instance, InstanceState, Quarantine, Rollout, RolloutState};
use kiln_api::engine::LogsRequest;
use kiln_api::types::{CheckResult, HealthState};
use serde_json::{Value, json};

use super::chain::{Facts, build_headline, instance_headline};
use crate::clients::Services;
use crate::follow::check_line;
use crate::words::{is_verdict, release, rollout_state, short, went_back_by_hand};

const LOG_LINES: u32 = 20;

/// What a screen shows of the last probe answers and log lines; programs are given all that is known.
const SHOWN_CHECKS: usize = 3;
const SHOWN_LINES: usize = 12;

pub(super) struct Trouble {
    pub(super) headline: String,
    pub(super) lines: Vec<String>,
    pub(super) todo: String,
    exit_code: Option<i32>,
    checks: Vec<CheckResult>,
    log: Vec<String>,
}

impl Trouble {
    fn new(headline: String) -> Self {
        Self {
            headline,
            lines: Vec::new(),
            todo: String::new(),
            exit_code: None,
            checks: Vec::new(),
            log: Vec::new(),
        }
    }

    fn seen(mut self, exit_code: Option<i32>, checks: &[CheckResult], log: &[String]) -> Self {
        self.lines.extend(exit_code.map(|code| format!("exit code {code}")));
        self.lines.extend(checks.iter().skip(checks.len().saturating_sub(SHOWN_CHECKS)).map(check_line));
        let shown = log.iter().skip(log.len().saturating_sub(SHOWN_LINES));
        self.lines.extend(shown.map(|line| format!("| {line}")));
        self.exit_code = exit_code;
        self.checks = checks.to_vec();
        self.log = log.to_vec();
        self
    }

    pub(super) fn document(&self) -> Value {
        let checks: Vec<_> =
            self.checks.iter().map(|it| json!({ "passed": it.passed, "detail": it.detail })).collect();
        json!({
            "headline": self.headline,
            "lines": self.lines,
            "exit_code": self.exit_code,
            "last_checks": checks,
            "last_log": self.log,
            "what_to_do": self.todo,
        })
    }
}

pub(super) fn of_build(build: &Build) -> Option<Trouble> {
    if build.state() != BuildState::Failed {
        return None;
    }
    let mut trouble = Trouble::new(build_headline(build));
    trouble.lines.extend(build.problem.lines().map(ToOwned::to_owned));
    let failed = build.tests.iter().filter(|test| !test.passed);
    trouble.lines.extend(failed.map(|test| format!("test {}: {}", test.name, test.detail)));
    trouble.todo =
        format!("correct the definition and apply it, or try again: kiln build {} --wait", build.server);
    Some(trouble.seen(None, &[], &build.last_log))
}

pub(super) fn of_release(number: u64, facts: &Facts) -> Vec<Trouble> {
    let mut troubles: Vec<_> = facts.rollouts_to(number).filter_map(of_rollout).collect();
    let quarantine = facts.fleet.iter().flat_map(|fleet| &fleet.quarantine);
    troubles.extend(quarantine.filter(|it| it.release == number).map(of_quarantine));
    troubles
}

pub(super) fn of_rollout(it: &Rollout) -> Option<Trouble> {
    let wrong = match it.state() {
        RolloutState::Failed => true,
        RolloutState::RolledBack | RolloutState::RollingBack => !went_back_by_hand(it),
        _ => false,
    };
    if !wrong {
        return None;
    }
    let mut trouble = Trouble::new(format!("rollout {} {}", it.id, rollout_state(it.state())));
    trouble.lines.extend(it.problem.lines().map(ToOwned::to_owned));
    if !it.failed_instance.is_empty() {
        trouble.lines.push(format!("instance {}", it.failed_instance));
        trouble.todo = format!("kiln why {}", it.failed_instance);
    }
    Some(trouble.seen(it.exit_code, &it.last_checks, &it.last_log))
}

fn of_quarantine(it: &Quarantine) -> Trouble {
    let mut trouble = Trouble::new(format!("{} is quarantined: {}", release(it.release), it.reason));
    if !it.definition_digest.is_empty() {
        trouble.lines.push(format!("definition {} is not built again", short(&it.definition_digest)));
    }
    if !it.run_digest.is_empty() {
        trouble.lines.push(format!("run settings {} are not taken again", short(&it.run_digest)));
    }
    trouble.lines.extend(it.packages.iter().map(|(name, version)| format!("package {name} {version}")));
    "commit a correction: a new definition is tried at once".clone_into(&mut trouble.todo);
    trouble
}

pub(super) fn of_server(facts: &Facts) -> Vec<Trouble> {
    let mut troubles: Vec<_> = facts.builds.last().and_then(of_build).into_iter().collect();
    troubles.extend(facts.rollouts.last().and_then(of_rollout));
    troubles.extend(facts.fleet.iter().flat_map(|fleet| &fleet.quarantine).map(of_quarantine));
    let mut problems = Vec::new();
    if let Some(server) = &facts.server {
        if server.orphaned {
            let mut trouble =
                Trouble::new(format!("{} is orphaned: it is no longer in its source", server.name));
            trouble.lines.push("its instances run on until it is removed, or comes back".to_owned());
            trouble.todo = format!("kiln remove {}", server.name);
            troubles.push(trouble);
        }
        problems.push((&server.problem, "builder"));
    }
    if let Some(fleet) = &facts.fleet {
        problems.push((&fleet.problem, "deployer"));
    }
    for (problem, service) in problems {
        // A failed build or rollout says the same with more around it.
        let told = troubles.iter().any(|it| it.lines.iter().any(|line| problem.contains(line.as_str())))
            || is_verdict(problem, facts.fleet.as_ref());
        if !problem.is_empty() && !told {
            let mut trouble = Trouble::new(format!("the {service} says"));
            trouble.lines.extend(problem.lines().map(ToOwned::to_owned));
            troubles.push(trouble);
        }
    }
    troubles
}

pub(super) async fn of_instance(it: &Instance, facts: &Facts, services: &Services) -> Vec<Trouble> {
    let blamed = facts.rollouts.iter().find(|rollout| rollout.failed_instance == it.id);
    if !is_in_trouble(it) && blamed.is_none() {
        return Vec::new();
    }
    let mut trouble = Trouble::new(instance_headline(it));
    trouble.lines.extend(it.detail.lines().map(ToOwned::to_owned));
    if let Some(rollout) = blamed {
        trouble.lines.push(format!("it failed rollout {}: {}", rollout.id, rollout.problem));
    }
    // What the monitor says now; once it has forgotten the instance, what was kept of it.
    let observed =
        facts.health.iter().find(|health| health.instance == it.id).map(|health| &health.last_checks);
    let known = [observed, Some(&it.last_checks), blamed.map(|rollout| &rollout.last_checks)];
    let checks = known.into_iter().flatten().find(|checks| !checks.is_empty()).cloned().unwrap_or_default();
    let mut log = last_lines(it, services).await;
    if log.is_empty() {
        log = blamed.map(|rollout| rollout.last_log.clone()).unwrap_or_default();
    }
    trouble.todo = match blamed {
        Some(_) => format!("kiln why {}-r{}", it.server, it.release),
        None => format!("kiln logs {}", it.id),
    };
    vec![trouble.seen(it.exit_code, &checks, &log)]
}

/// It ended by itself, is unhealthy, or was when it left. Each instance that is retired is gone in the end: that alone says
/// nothing against it.
fn is_in_trouble(it: &Instance) -> bool {
    match (it.state(), it.health()) {
        (InstanceState::Exited | InstanceState::Failed, _) | (_, HealthState::Unhealthy) => true,
        (InstanceState::Draining | InstanceState::Retired, _) => !it.last_checks.is_empty(),
        (_, health) => health == HealthState::Gone,
    }
}

/// What an instance wrote last; nothing where the node is away or keeps it no longer.
async fn last_lines(it: &Instance, services: &Services) -> Vec<String> {
    let request = LogsRequest { id: it.id.clone(), tail: LOG_LINES, follow: false };
    let Ok(mut engine) = services.engine(&it.node) else { return Vec::new() };
    let Ok(answer) = engine.logs(request).await else { return Vec::new() };
    let mut stream = answer.into_inner();
    let mut lines = Vec::new();
    while let Ok(Some(line)) = stream.message().await {
        lines.push(String::from_utf8_lossy(&line.line).trim_end().to_owned());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rollout(to: u64, state: RolloutState, back_to: u64) -> Rollout {
        Rollout { to_release: to, state: state.into(), back_to, ..Rollout::default() }
    }

    #[test]
    fn a_rollback_by_hand_is_no_failure_of_the_release_that_it_goes_to() {
        assert!(of_rollout(&rollout(1, RolloutState::RolledBack, 1)).is_none());
        assert!(of_rollout(&rollout(1, RolloutState::RollingBack, 1)).is_none());
        assert!(of_rollout(&rollout(1, RolloutState::Failed, 1)).is_some());
        assert!(of_rollout(&rollout(2, RolloutState::RolledBack, 1)).is_some());
    }

    #[test]
    fn an_instance_that_was_replaced_as_a_whole_fleet_is_has_not_failed() {
        let instance = |state: InstanceState, health: HealthState, checks: usize| Instance {
            state: state.into(),
            health: health.into(),
            last_checks: vec![CheckResult::default(); checks],
            ..Instance::default()
        };
        assert!(!is_in_trouble(&instance(InstanceState::Running, HealthState::Healthy, 0)));
        assert!(!is_in_trouble(&instance(InstanceState::Retired, HealthState::Gone, 0)));
        assert!(is_in_trouble(&instance(InstanceState::Retired, HealthState::Gone, 3)));
        assert!(is_in_trouble(&instance(InstanceState::Running, HealthState::Gone, 0)));
        assert!(is_in_trouble(&instance(InstanceState::Running, HealthState::Unhealthy, 0)));
        assert!(is_in_trouble(&instance(InstanceState::Exited, HealthState::Gone, 0)));
    }
}
