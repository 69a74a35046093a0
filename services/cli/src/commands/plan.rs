//! `kiln plan`

use std::ops::ControlFlow;

use clap::Args;
use kiln_api::builder::PlanRequest;
use kiln_api::builder::plan_response::Item;

use crate::clients::Services;
use crate::failure::{During as _, Outcome};
use crate::screen::{Screen, plain};
use crate::words::{or_dash, plural, short};
use crate::{follow, json};

#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// The server to plan for
    server: String,
}

/// What is planned and built then is not what was applied last.
pub(crate) async fn tell_of_quarantine(server: &str, services: &Services, screen: Screen) -> Outcome {
    if screen.is_json() || !services.server(server).await?.quarantined {
        return Ok(());
    }
    screen.line(format_args!(
        "The definition that was applied last was rolled back, and stays out until it changes. This is about the last good \
         one: kiln why {server}"
    ))
}

pub(crate) async fn run(it: &Plan, services: &Services, screen: Screen) -> Outcome {
    let server = &it.server;
    let bar = screen.bar(0);
    let (doing, what) = (format!("resolving {server}"), format!("planning {server}"));
    bar.message(&doing);
    let request = PlanRequest { server: server.clone() };
    let stream = services.builder().plan(request).await.during(&what)?.into_inner();
    let plan = follow::outcome(stream, &bar, &doing, &what, |message| {
        Some(match message.item? {
            Item::Line(line) => ControlFlow::Continue(line),
            Item::Plan(plan) => ControlFlow::Break(plan),
        })
    })
    .await?;
    drop(bar);
    screen.json(&json::of("kiln.builder.v1.Plan", &plan)?)?;
    tell_of_quarantine(server, services, screen).await?;

    if !plan.needs_build && !plan.needs_revision {
        return screen.line(format_args!(
            "{server} is up to date: resolved anew, its inputs are those of image {}",
            or_dash(short(&plan.current_image))
        ));
    }
    match (plan.needs_build, plan.current_image.is_empty()) {
        (true, true) => screen.line(format_args!("{server} would be built for the first time"))?,
        (true, false) => screen.line(format_args!(
            "{server} would be built anew, in the place of image {}",
            short(&plan.current_image)
        ))?,
        (false, _) => screen.line(format_args!("{server} keeps its image; how it runs would change"))?,
    }
    for change in &plan.changes {
        screen.line(format_args!("  {change}"))?;
    }
    if plan.current_image.is_empty() {
        screen.line(format_args!("  packages: {} in all", plan.packages.len()))?;
    } else if !plan.packages.is_empty() {
        screen.line(format_args!("  packages: {}", plural(plan.packages.len(), "change")))?;
        let rows = plan
            .packages
            .iter()
            .map(|it| {
                vec![plain(format!("    {}", it.name)), plain(or_dash(&it.from)), plain(or_dash(&it.to))]
            })
            .collect();
        screen.table(&["    PACKAGE", "FROM", "TO"], rows)?;
    }
    let done = if plan.current_image.is_empty() { "launched" } else { "replaced" };
    screen.line(format_args!("  {} would be {done}", plural(plan.replicas as usize, "instance")))?;
    screen.next(&[format!("kiln build {server} --wait")])
}
