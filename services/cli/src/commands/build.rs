//! `kiln build`

use std::ops::ControlFlow;

use clap::Args;
use kiln_api::builder::build_response::Item as Asked;
use kiln_api::builder::watch_build_response::Item;
use kiln_api::builder::{
    Build as BuildMessage, BuildOutcome, BuildRequest, BuildState, CancelBuildRequest, WatchBuildRequest,
};
use serde_json::json;

use crate::clients::{Services, request_id};
use crate::failure::{During as _, Failure, Outcome};
use crate::screen::{Screen, plain};
use crate::words::{build_phase, build_state, duration, or_dash, short, took};
use crate::{follow, json};

#[derive(Debug, Args)]
pub(crate) struct Build {
    /// The server to build
    #[arg(required_unless_present = "cancel")]
    server: Option<String>,
    /// Show the build's log until it ends
    #[arg(long)]
    wait: bool,
    /// Wait for it, and show where its time went
    #[arg(long)]
    timings: bool,
    /// Keep the package versions of the last build; resolve nothing anew
    #[arg(long)]
    pinned: bool,
    /// Build again without the layer cache, and compare the digests
    #[arg(long)]
    verify: bool,
    /// End this build
    #[arg(long, value_name = "BUILD", conflicts_with_all = ["server", "wait", "timings", "pinned", "verify"])]
    cancel: Option<String>,
}

pub(crate) async fn run(it: &Build, services: &Services, screen: Screen) -> Outcome {
    if let Some(build) = &it.cancel {
        return cancel(build, services, screen).await;
    }
    let server = it.server.as_deref().unwrap_or_default();
    let bar = screen.bar(0);
    let doing = format!("resolving {server}");
    bar.message(&doing);
    let request = BuildRequest {
        request_id: request_id(),
        server: server.to_owned(),
        pinned: it.pinned,
        verify: it.verify,
    };
    let what = format!("building {server}");
    let stream = services.builder().build(request).await.during(&what)?.into_inner();
    let answer = follow::outcome(stream, &bar, &doing, &what, |message| {
        Some(match message.item? {
            Asked::Line(line) => ControlFlow::Continue(line),
            Asked::Outcome(outcome) => ControlFlow::Break(outcome),
        })
    })
    .await?;
    drop(bar);
    let Some(build) = answer.build else {
        screen.json(&json!({
            "unchanged": answer.unchanged, "image_digest": answer.image_digest, "build": null,
        }))?;
        super::plan::tell_of_quarantine(server, services, screen).await?;
        screen.line(nothing_built(server, &answer))?;
        let next = if answer.unchanged {
            format!("kiln build {server} --verify --wait")
        } else {
            format!("kiln why {server}")
        };
        return screen.next(&[next, format!("kiln status {server}")]);
    };
    if !(it.wait || it.timings) {
        screen.json(&json!({
            "unchanged": false, "image_digest": "", "build": json::of("kiln.builder.v1.Build", &build)?,
        }))?;
        screen.line(format_args!("{} is {}", build.id, build_state(build.state())))?;
        return screen.next(&[format!("kiln why {}", build.id), format!("kiln build --cancel {}", build.id)]);
    }
    let build = watch(services, screen, &build.id).await?;
    screen.json(&json!({
        "unchanged": false,
        "image_digest": build.image_digest,
        "build": json::of("kiln.builder.v1.Build", &build)?,
    }))?;
    if build.state() != BuildState::Succeeded {
        return Err(follow::failed_build(&build));
    }
    show(&build, screen)?;
    if it.timings {
        show_timings(&build, screen)?;
    }
    if it.verify {
        // A digest that differs fails the build, so this one is equal.
        screen.line("baked again without the layer cache: the same image, bit for bit")?;
    }
    screen.next(&[format!("kiln status {server}"), format!("kiln image inspect {server}")])
}

fn nothing_built(server: &str, answer: &BuildOutcome) -> String {
    let image = or_dash(short(&answer.image_digest));
    if answer.unchanged {
        format!("{server} is up to date: its inputs are those of image {image}, nothing was built")
    } else {
        format!(
            "{server} goes on with image {image}, which was made before; how it runs changes, and is rolled out"
        )
    }
}

/// Shows a build's log until it ends.
async fn watch(services: &Services, screen: Screen, id: &str) -> Outcome<BuildMessage> {
    let what = format!("watching {id}");
    let mut stream = services
        .builder()
        .watch_build(WatchBuildRequest { build: id.to_owned() })
        .await
        .during(&what)?
        .into_inner();
    let bar = screen.bar(0);
    let mut last = None;
    let mut interrupt = follow::interrupts()?;
    loop {
        let message = tokio::select! {
            message = stream.message() => message.during(&what)?,
            _ = interrupt.recv() => {
                let see = format!("kiln why {id}; to end it: kiln build --cancel {id}");
                return Err(follow::interrupted(&what, &see));
            }
        };
        let Some(item) = message else { break };
        match item.item {
            Some(Item::Line(line)) => bar.line(screen, line.trim_end()),
            Some(Item::Build(build)) => {
                let done = build.steps.len() as u64;
                bar.set(done, u64::from(build.steps_total).max(done), build_state(build.state()));
                last = Some(build);
            }
            None => {}
        }
    }
    last.ok_or_else(|| Failure::failed(what, "the builder ended the stream without a result"))
}

fn show(build: &BuildMessage, screen: Screen) -> Outcome {
    let rows = build
        .steps
        .iter()
        .map(|step| {
            let time = if step.cached {
                "cached".to_owned()
            } else {
                format!("{:.1}s", step.millis as f64 / 1000.0)
            };
            vec![plain(&step.name), plain(time)]
        })
        .collect();
    screen.table(&["STEP", "TIME"], rows)?;
    if !build.tests.is_empty() {
        screen.line("")?;
        super::image::tests_table(&build.tests, screen)?;
    }
    screen.line(format_args!(
        "{} succeeded in {}: image {}, {} of {} tests passed",
        build.id,
        took(build.started.as_ref(), build.ended.as_ref()),
        short(&build.image_digest),
        build.tests.iter().filter(|test| test.passed).count(),
        build.tests.len(),
    ))
}

fn show_timings(build: &BuildMessage, screen: Screen) -> Outcome {
    let rows = build.timings.iter().map(|timing| {
        let seconds = duration(timing.took.as_ref()).as_secs_f64();
        vec![plain(build_phase(timing.phase())), plain(format!("{seconds:.3}s"))]
    });
    screen.line("")?;
    screen.table(&["PHASE", "TIME"], rows.collect())?;
    screen.line("phases go on beside each other, so all together can be longer than the build")
}

async fn cancel(id: &str, services: &Services, screen: Screen) -> Outcome {
    let request = CancelBuildRequest { request_id: request_id(), build: id.to_owned() };
    let answer = services.builder().cancel_build(request).await.during(format_args!("cancelling {id}"))?;
    let build =
        answer.into_inner().build.ok_or_else(|| Failure::failed(format!("cancelling {id}"), "no answer"))?;
    screen.json(&json::of("kiln.builder.v1.Build", &build)?)?;
    screen.line(format_args!("{id} is {}", build_state(build.state())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_without_a_build_is_not_called_up_to_date() {
        let answer = |unchanged| BuildOutcome {
            image_digest: "sha256:0123456789abcdef".to_owned(),
            unchanged,
            ..BuildOutcome::default()
        };
        assert!(nothing_built("web", &answer(true)).starts_with("web is up to date"));
        let revised = nothing_built("web", &answer(false));
        assert!(revised.contains("0123456789ab") && revised.contains("rolled out"), "{revised}");
    }
}
