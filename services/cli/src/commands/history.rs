//! `kiln history`

use clap::Args;
use jiff::Timestamp;
use kiln_api::builder::{Build, BuildState};
use kiln_api::deployer::{Release, Rollout};
use kiln_api::types::Signal;
use serde_json::json;

use crate::clients::{Services, or_away};
use crate::failure::Outcome;
use crate::json;
use crate::screen::{Screen, plain};
use crate::words::{
    build_state, moment, plural, rollout_is_under_way, rollout_state, short, signal_state, timestamp,
};
use crate::words::{tinted, took, whole_way};

#[derive(Debug, Args)]
pub(crate) struct History {
    /// The server
    server: String,
    /// Show the last lines; 0 for all
    #[arg(short = 'n', long, value_name = "LINES", default_value = "30")]
    limit: usize,
}

struct Line {
    time: Option<Timestamp>,
    moment: String,
    what: String,
    state: &'static str,
    detail: String,
}

pub(crate) async fn run(it: &History, services: &Services, screen: Screen) -> Outcome {
    let server = it.server.as_str();
    let mut away = Vec::new();
    or_away(services.server(server).await, "builder", &mut away)?;
    let builds = or_away(services.builds(server).await, "builder", &mut away)?;
    let releases = or_away(services.releases(server).await, "deployer", &mut away)?;
    let rollouts = or_away(services.rollouts(server).await, "deployer", &mut away)?;
    let signals = or_away(services.signals(server).await, "monitor", &mut away)?;
    away.dedup();
    screen.json(&json!({
        "signals": json::list("kiln.types.v1.Signal", &signals)?,
        "builds": json::list("kiln.builder.v1.Build", &builds)?,
        "releases": json::list("kiln.deployer.v1.Release", &releases)?,
        "rollouts": json::list("kiln.deployer.v1.Rollout", &rollouts)?,
        "away": away,
    }))?;

    let mut lines: Vec<Line> = signals.iter().map(signal_line).collect();
    lines.extend(builds.iter().map(build_line));
    lines.extend(releases.iter().map(release_line));
    lines.extend(rollouts.iter().map(rollout_line));
    // A stable sort: what happened in the same instant stays in the order of its causes.
    lines.sort_by_key(|line| line.time);
    let skipped = if it.limit == 0 { 0 } else { lines.len().saturating_sub(it.limit) };
    let rows = lines
        .into_iter()
        .skip(skipped)
        .map(|line| vec![plain(line.moment), plain(line.what), tinted(line.state), plain(line.detail)])
        .collect();
    screen.table(&["TIME", "WHAT", "STATE", "DETAIL"], rows)?;
    if skipped > 0 {
        screen
            .line(format_args!("\n{} before these: kiln history {server} -n 0", plural(skipped, "line")))?;
    }
    if !away.is_empty() {
        screen.line(format_args!("\nNot running: {}. What it knows is left out.", away.join(", ")))?;
        return screen.next(&["kiln up"]);
    }
    Ok(())
}

fn line(time: Option<&prost_types::Timestamp>, what: String, state: &'static str, detail: String) -> Line {
    Line { time: timestamp(time), moment: moment(time), what, state, detail }
}

fn signal_line(it: &Signal) -> Line {
    let detail = format!("{}: {}", it.cause, it.evidence.join("; "));
    line(it.raised.as_ref(), format!("signal {}", short(&it.id)), signal_state(it.state()), detail)
}

fn build_line(it: &Build) -> Line {
    let detail = match it.state() {
        BuildState::Succeeded => {
            format!("image {} in {}", short(&it.image_digest), took(it.started.as_ref(), it.ended.as_ref()))
        }
        _ => it.problem.lines().next().unwrap_or_default().to_owned(),
    };
    line(it.created.as_ref(), format!("build {}", it.id), build_state(it.state()), detail)
}

fn release_line(it: &Release) -> Line {
    let state = match (it.quarantined, it.good) {
        (true, _) => "quarantined",
        (false, true) => "good",
        (false, false) => "-",
    };
    let detail = it.revision.as_ref().map_or_else(String::new, |revision| {
        let cause = revision.cause.as_ref().map_or("", |cause| cause.summary.as_str());
        format!("image {}: {cause}", short(&revision.image_digest))
    });
    line(it.created.as_ref(), format!("release r{}", it.number), state, detail)
}

fn rollout_line(it: &Rollout) -> Line {
    let mut detail = whole_way(it.from_release, it.to_release, it.back_to);
    if !rollout_is_under_way(it.state()) {
        detail.push_str(&format!(" in {}", took(it.started.as_ref(), it.ended.as_ref())));
    }
    if !it.problem.is_empty() {
        detail.push_str(&format!(": {}", it.problem.lines().next().unwrap_or_default()));
    }
    line(it.started.as_ref(), format!("rollout {}", it.id), rollout_state(it.state()), detail)
}
