//! `kiln status`

use std::collections::BTreeMap;

use clap::Args;
use comfy_table::Cell;
use kiln_api::builder::{Build, BuildState, Server};
use kiln_api::deployer::{Fleet, RolloutState};
use kiln_api::monitor::{GetServerStatusRequest, GetServerStatusResponse};
use kiln_api::types::SignalState;
use serde_json::{Value, json};

use crate::clients::{Services, look, or_away};
use crate::commands::apply::answers;
use crate::commands::instances;
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::json;
use crate::screen::{Screen, plain};
use crate::words::{
    age, back, is_verdict, moment, or_dash, plural, release, rollout_is_under_way, rollout_state, short,
    signal_state,
};
use crate::words::{build_state, tinted, took, way, whole_way};

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// One server in full
    server: Option<String>,
}

pub(crate) async fn run(it: &Status, services: &Services, screen: Screen) -> Outcome {
    match &it.server {
        Some(server) => one(server, services, screen).await,
        None => all(services, screen).await,
    }
}

/// What two services know of one server.
#[derive(Default)]
struct Known {
    server: Option<Server>,
    fleet: Option<Fleet>,
    build: Option<Build>,
}

async fn all(services: &Services, screen: Screen) -> Outcome {
    let mut away = Vec::new();
    let servers = or_away(services.servers().await, "builder", &mut away)?;
    let builds = or_away(services.builds("").await, "builder", &mut away)?;
    let fleets = or_away(services.fleets().await, "deployer", &mut away)?;
    let signals = or_away(services.signals("").await, "monitor", &mut away)?;
    away.dedup();
    if away.len() == 3 {
        return Err(Failure::new(Code::Unavailable, "Kiln's services are not running", "").todo("kiln up"));
    }

    let mut known = BTreeMap::<String, Known>::new();
    for server in servers.into_iter().filter(|it| !it.removed) {
        let name = server.name.clone();
        known.entry(name).or_default().server = Some(server);
    }
    for fleet in fleets.into_iter().filter(|it| !it.removed || !it.instances.is_empty()) {
        let name = fleet.server.clone();
        known.entry(name).or_default().fleet = Some(fleet);
    }
    for build in builds {
        if let Some(known) = known.get_mut(&build.server) {
            known.build = Some(build);
        }
    }

    let mut documents = Vec::new();
    let mut rows = Vec::new();
    for (name, known) in &known {
        let state = state(known);
        let open: Vec<_> =
            signals.iter().filter(|it| it.server == *name && it.state() != SignalState::Resolved).collect();
        rows.push(row(name, known, &state, open.len()));
        documents.push(json!({
            "name": name,
            "state": state,
            "server": document("kiln.builder.v1.Server", known.server.as_ref())?,
            "fleet": document("kiln.deployer.v1.Fleet", known.fleet.as_ref())?,
            "last_build": document("kiln.builder.v1.Build", known.build.as_ref())?,
            "open_signals": json::list("kiln.types.v1.Signal", open)?,
        }));
    }
    screen.json(&json!({ "site": services.name().as_str(), "servers": documents, "away": away }))?;
    if rows.is_empty() && away.is_empty() {
        screen.line("No servers yet.")?;
        return screen.next(&["kiln init web", "kiln apply web --wait"]);
    }
    screen.table(&["SERVER", "STATE", "RELEASE", "HEALTHY", "PORTS", "IMAGE", "COMMIT", "NOTE"], rows)?;
    if !away.is_empty() {
        screen.line(format_args!("\nNot running: {}. What it knows is left out.", away.join(", ")))?;
        return screen.next(&["kiln up"]);
    }
    let noted = || known.iter().filter(|(_, known)| !notes(known, 0).is_empty());
    let troubled = noted().find(|(_, known)| state(known) != "stable").or_else(|| noted().next());
    if let Some((name, _)) = troubled { screen.next(&[format!("kiln why {name}")]) } else { Ok(()) }
}

/// Given up by a person.
fn is_removed(known: &Known) -> bool {
    match (&known.server, &known.fleet) {
        (Some(server), _) => server.removed,
        (None, Some(fleet)) => fleet.removed,
        (None, None) => false,
    }
}

fn document<M: prost::Message>(kind: &str, message: Option<&M>) -> Outcome<Value> {
    message.map_or(Ok(Value::Null), |message| json::of(kind, message))
}

fn state(known: &Known) -> String {
    let building = known
        .build
        .as_ref()
        .is_some_and(|build| matches!(build.state(), BuildState::Queued | BuildState::Running));
    let Some(fleet) = &known.fleet else {
        return match &known.build {
            _ if known.server.as_ref().is_some_and(|server| server.removed) => "removed",
            _ if building => "building",
            Some(build) if build.state() == BuildState::Failed => "failed",
            _ if known.server.as_ref().is_some_and(|server| !server.problem.is_empty()) => "failed",
            _ => "planned",
        }
        .to_owned();
    };
    if fleet.removed {
        return if fleet.instances.is_empty() { "removed" } else { "retiring" }.to_owned();
    }
    if let Some(rollout) = fleet.rollout.as_ref().filter(|it| rollout_is_under_way(it.state())) {
        return format!("{} {}/{}", rollout_state(rollout.state()), rollout.done, rollout.total);
    }
    if fleet.rollout.as_ref().is_some_and(|it| it.state() == RolloutState::Failed) {
        return "failed".to_owned();
    }
    if fleet.healthy < fleet.replicas {
        return "degraded".to_owned();
    }
    if building { "building".to_owned() } else { "stable".to_owned() }
}

fn notes(known: &Known, signals: usize) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(server) = &known.server {
        if server.orphaned {
            notes.push("orphaned: no longer in its source".to_owned());
        }
        let told = known.fleet.as_ref().is_some_and(|fleet| is_verdict(&fleet.problem, Some(fleet)));
        if server.quarantined && !told {
            notes.push("its definition was rolled back".to_owned());
        }
        // What was rolled back is told by the deployer as well, and said once; a commit that was refused since then is not.
        let fleet = known.fleet.as_ref();
        let said = server.quarantined && (fleet.is_none() || is_verdict(&server.problem, fleet));
        if !server.problem.is_empty() && !said {
            notes.push(first_line(&server.problem).to_owned());
        }
    }
    if let Some(fleet) = &known.fleet
        && !fleet.problem.is_empty()
    {
        notes.push(first_line(&fleet.problem).to_owned());
    }
    if signals > 0 {
        notes.push(plural(signals, "open signal"));
    }
    notes
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// What runs; where it is on its way to another release, both.
fn releases(fleet: &Fleet) -> String {
    match fleet.rollout.as_ref().filter(|it| rollout_is_under_way(it.state())) {
        Some(rollout) => {
            let (from, to) = back(rollout).unwrap_or((rollout.from_release, rollout.to_release));
            way(from, to)
        }
        None => release(fleet.release),
    }
}

fn row(name: &str, known: &Known, state: &str, signals: usize) -> Vec<Cell> {
    let server = known.server.as_ref();
    let fleet = known.fleet.as_ref();
    let ports: Vec<_> = fleet
        .into_iter()
        .flat_map(|it| &it.ports)
        .map(|it| format!("{}->{}", it.listen, it.target))
        .collect();
    vec![
        plain(name),
        tinted(state),
        plain(fleet.map_or_else(|| "-".to_owned(), releases)),
        plain(fleet.map_or_else(|| "-".to_owned(), |it| format!("{}/{}", it.healthy, it.replicas))),
        plain(or_dash(&ports.join(", "))),
        plain(or_dash(server.map_or("", |it| short(&it.image_digest)))),
        plain(or_dash(server.map_or("", |it| it.commit.get(..8).unwrap_or(&it.commit)))),
        plain(notes(known, signals).join("; ")),
    ]
}

async fn one(name: &str, services: &Services, screen: Screen) -> Outcome {
    let mut away = Vec::new();
    let server = or_away(services.server(name).await.map(Some), "builder", &mut away)?;
    // One that hangs is waited for once.
    let build = match away.contains(&"builder") {
        true => None,
        false => or_away(services.builds(name).await, "builder", &mut away)?.pop(),
    };
    let fleet = or_away(services.fleet_if_any(name).await, "deployer", &mut away)?;
    let instances = match away.contains(&"deployer") {
        true => Vec::new(),
        false => or_away(services.instances(name, false).await, "deployer", &mut away)?,
    };
    let seen = or_away(seen(name, services).await, "monitor", &mut away)?;
    if away.len() == 3 {
        return Err(Failure::new(Code::Unavailable, "Kiln's services are not running", "").todo("kiln up"));
    }
    if server.is_none() && fleet.is_none() {
        // Only the builder can tell whether there is such a server.
        return Err(Failure::new(
            Code::Unavailable,
            format!("asking for {name}"),
            "the builder is not running",
        )
        .todo("kiln up"));
    }
    let known = Known { server, fleet, build };
    let state = state(&known);
    screen.json(&json!({
        "name": name,
        "state": state,
        "server": document("kiln.builder.v1.Server", known.server.as_ref())?,
        "fleet": document("kiln.deployer.v1.Fleet", known.fleet.as_ref())?,
        "last_build": document("kiln.builder.v1.Build", known.build.as_ref())?,
        "instances": json::list("kiln.deployer.v1.Instance", &instances)?,
        "monitor": document("kiln.monitor.v1.GetServerStatusResponse", seen.as_ref())?,
        "away": away,
    }))?;
    show(name, &state, &known, seen.as_ref(), screen)?;
    if !instances.is_empty() {
        screen.line("")?;
        screen.table(&instances::HEAD, instances.iter().map(instances::row).collect())?;
    }
    if !away.is_empty() {
        screen.line(format_args!("\nNot running: {}. What it knows is left out.", away.join(", ")))?;
        return screen.next(&["kiln up"]);
    }
    if is_removed(&known) {
        return screen.next(&[format!("kiln history {name}")]);
    }
    screen.next(&[format!("kiln why {name}"), format!("kiln logs {name} -f"), format!("kiln history {name}")])
}

async fn seen(name: &str, services: &Services) -> Outcome<Option<GetServerStatusResponse>> {
    let request = GetServerStatusRequest { server: name.to_owned(), own: false };
    let answer = look(services.monitor().get_server_status(request)).await.during("asking the monitor");
    match answer {
        Ok(answer) => Ok(Some(answer.into_inner())),
        Err(failure) if failure.is_not_found() => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn show(
    name: &str,
    state: &str,
    known: &Known,
    seen: Option<&GetServerStatusResponse>,
    screen: Screen,
) -> Outcome {
    let fact = |label: &str, text: String| screen.line(format_args!("  {label:<12} {text}"));
    screen.line(format_args!("{name}: {state}"))?;
    if is_removed(known) {
        // What it was convicted for, and what was wrong with it, is over.
        return fact("removed", "apply its definition to bring it back".to_owned());
    }
    if let Some(fleet) = &known.fleet {
        let good = if fleet.last_good == fleet.release {
            String::new()
        } else {
            format!(", last good {}", release(fleet.last_good))
        };
        fact("release", format!("{}{good}", release(fleet.release)))?;
        fact("healthy", format!("{} of {}{}", fleet.healthy, fleet.replicas, answers(&fleet.ports)))?;
        if let Some(rollout) = &fleet.rollout {
            let way = whole_way(rollout.from_release, rollout.to_release, rollout.back_to);
            fact(
                "rollout",
                format!("{way}: {} ({} of {})", rollout_state(rollout.state()), rollout.done, rollout.total),
            )?;
            if !rollout.problem.is_empty() {
                fact("", rollout.problem.clone())?;
            }
        }
        for it in &fleet.quarantine {
            fact("quarantined", format!("{}: {}", release(it.release), it.reason))?;
        }
        if !fleet.problem.is_empty() && !is_verdict(&fleet.problem, Some(fleet)) {
            fact("problem", fleet.problem.clone())?;
        }
    }
    if let Some(server) = &known.server {
        fact(
            "definition",
            format!("{} of {}", or_dash(short(&server.definition_digest)), or_dash(&server.source)),
        )?;
        if !server.commit.is_empty() {
            fact("commit", server.commit.clone())?;
        }
        fact("image", or_dash(short(&server.image_digest)).to_owned())?;
        if server.orphaned {
            fact("orphaned", format!("no longer in its source; `kiln remove {name}` retires it"))?;
        }
        if server.quarantined {
            fact(
                "quarantined",
                "its definition was rolled back; package updates go on from the last good one".to_owned(),
            )?;
        }
        if !server.problem.is_empty() && !is_verdict(&server.problem, known.fleet.as_ref()) {
            fact("problem", server.problem.clone())?;
        }
    }
    if let Some(build) = &known.build {
        let time = took(build.started.as_ref(), build.ended.as_ref());
        fact(
            "last build",
            format!(
                "{} {} after {time}, {} ago",
                build.id,
                build_state(build.state()),
                age(build.ended.as_ref())
            ),
        )?;
    }
    let Some(seen) = seen else { return Ok(()) };
    for signal in seen.signals.iter().filter(|it| it.state() != SignalState::Resolved) {
        let evidence = signal.evidence.join("; ");
        fact("signal", format!("{} {}: {evidence}", signal.cause, signal_state(signal.state())))?;
    }
    if seen.source_polled.is_some() {
        fact("source", polled(seen.source_polled.as_ref(), &seen.source_problem))?;
    }
    if seen.archive_polled.is_some() {
        fact("archive", polled(seen.archive_polled.as_ref(), &seen.archive_problem))?;
    }
    Ok(())
}

fn polled(time: Option<&prost_types::Timestamp>, problem: &str) -> String {
    let text = format!("looked at {} ago ({})", age(time), moment(time));
    if problem.is_empty() { text } else { format!("{text}: {problem}") }
}
