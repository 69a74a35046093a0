//! `kiln logs`

use std::collections::VecDeque;
use std::io::Write as _;

use clap::Args;
use futures::StreamExt as _;
use futures::stream::SelectAll;
use kiln_api::builder::watch_build_response::Item;
use kiln_api::builder::{Build, BuildState, WatchBuildRequest};
use kiln_api::engine::{LogsRequest, LogsResponse};
use kiln_model::name::{BuildId, InstanceId};
use serde_json::json;

use crate::clients::Services;
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::screen::{Screen, print, write_all};
use crate::words::timestamp;

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// An instance, a server for all of its instances, or a build
    #[arg(value_name = "SERVER|INSTANCE|BUILD")]
    target: String,
    /// Go on with what is written from now on
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last lines of each instance, or of the build; 0 for all
    #[arg(long, value_name = "LINES", default_value = "100")]
    tail: u32,
}

pub(crate) async fn run(it: &Logs, services: &Services, screen: Screen) -> Outcome {
    if it.target.parse::<BuildId>().is_ok() {
        match build(it, services, screen).await {
            // A server may be called what looks like a build.
            Err(failure) if failure.is_not_found() => {
                let server = services.released(&it.target).await;
                server.map_err(|other| if other.is_not_found() { failure } else { other })?;
            }
            other => return other,
        }
    }
    let instances = instances(&it.target, services).await?;
    if instances.is_empty() {
        return Err(Failure::new(Code::NotFound, format!("{} has no instances", it.target), "")
            .todo(format!("kiln status {}", it.target)));
    }
    let width = instances.iter().map(|(id, _)| id.len()).max().unwrap_or_default();
    let many = instances.len() > 1;
    let mut lines = SelectAll::new();
    for (id, node) in instances {
        let request = LogsRequest { id: id.clone(), tail: it.tail, follow: it.follow };
        let what = format!("reading the log of {id}");
        let stream = services.engine(&node)?.logs(request).await.during(&what)?.into_inner();
        lines.push(stream.map(move |line| (id.clone(), line)));
    }
    if it.follow || screen.is_json() {
        while let Some((id, line)) = lines.next().await {
            let line = line.during(format_args!("reading the log of {id}"))?;
            show(&id, &line, many.then_some(width), screen)?;
        }
        return Ok(());
    }
    // Each instance's lines come in order; those of several are put into one by their time.
    let mut read = Vec::new();
    while let Some((id, line)) = lines.next().await {
        read.push((id.clone(), line.during(format_args!("reading the log of {id}"))?));
    }
    read.sort_by_key(|(_, line)| timestamp(line.time.as_ref()));
    for (id, line) in &read {
        show(id, line, many.then_some(width), screen)?;
    }
    Ok(())
}

/// The end of a build's log; with `--follow` until the build ends.
async fn build(it: &Logs, services: &Services, screen: Screen) -> Outcome {
    let id = it.target.as_str();
    let what = format!("reading the log of {id}");
    let is_over = |build: &Build| !matches!(build.state(), BuildState::Queued | BuildState::Running);
    let mut stream = services
        .builder()
        .watch_build(WatchBuildRequest { build: id.to_owned() })
        .await
        .during(&what)?
        .into_inner();
    let show = |line: &str| {
        if screen.is_json() { print(json!({ "build": id, "line": line })) } else { print(line.trim_end()) }
    };
    // What was written up to now comes before the first state: of that the last lines are shown.
    let mut past = Some(VecDeque::new());
    while let Some(item) = stream.message().await.during(&what)? {
        match (item.item, &mut past) {
            (Some(Item::Line(line)), Some(past)) if it.tail > 0 => {
                if past.len() >= it.tail as usize {
                    past.pop_front();
                }
                past.push_back(line);
            }
            (Some(Item::Line(line)), _) => show(&line)?,
            (Some(Item::Build(build)), _) => {
                past.take().into_iter().flatten().try_for_each(|line| show(&line))?;
                if !it.follow && !is_over(&build) {
                    screen.progress(format_args!("{id} goes on; -f shows what comes"));
                    return Ok(());
                }
            }
            (None, _) => {}
        }
    }
    Ok(())
}

/// Ids, each with its node.
async fn instances(target: &str, services: &Services) -> Outcome<Vec<(String, String)>> {
    if let Ok(id) = target.parse::<InstanceId>() {
        // Where the deployer is away, or knows it no longer, it is looked for on the site's own node.
        let known = services.instances(id.server.as_str(), true).await.unwrap_or_default();
        let node = known.into_iter().find(|it| it.id == target).map(|it| it.node).unwrap_or_default();
        return Ok(vec![(target.to_owned(), node)]);
    }
    services.released(target).await?;
    Ok(services.instances(target, false).await?.into_iter().map(|it| (it.id, it.node)).collect())
}

fn show(id: &str, line: &LogsResponse, width: Option<usize>, screen: Screen) -> Outcome {
    if screen.is_json() {
        // A log has no end to wait for: a document a line.
        return print(json!({
            "instance": id,
            "time": timestamp(line.time.as_ref()).map(|time| time.to_string()),
            "stream": line.stream,
            "line": String::from_utf8_lossy(&line.line),
        }));
    }
    let mut text = Vec::new();
    if let Some(width) = width {
        // Writing to memory does not fail.
        let _ = write!(text, "{id:<width$}  ");
    }
    text.extend_from_slice(line.line.trim_ascii_end());
    text.push(b'\n');
    write_all(&text)
}
