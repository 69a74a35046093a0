//! `kiln instances`

use clap::Args;
use comfy_table::Cell;
use kiln_api::deployer::Instance;
use serde_json::json;

use crate::clients::{Services, is_own};
use crate::failure::Outcome;
use crate::json;
use crate::screen::{Screen, plain};
use crate::words::{age, health, instance_state, or_dash, release, tinted};

#[derive(Debug, Args)]
pub(crate) struct Instances {
    /// Those of one server
    server: Option<String>,
    /// Also what was retired or ended
    #[arg(short, long)]
    all: bool,
}

pub(crate) const HEAD: [&str; 8] =
    ["INSTANCE", "RELEASE", "STATE", "HEALTH", "EDGE", "ADDRESS", "AGE", "DETAIL"];

pub(crate) async fn run(it: &Instances, services: &Services, screen: Screen) -> Outcome {
    let server = it.server.as_deref().unwrap_or_default();
    if !server.is_empty() {
        // A name that does not exist is told apart from a server that has no release yet.
        if services.fleet_if_any(server).await?.is_none() {
            services.server(server).await?;
        }
    }
    let instances = services.instances(server, it.all).await?;
    screen.json(&json!({ "instances": json::list("kiln.deployer.v1.Instance", &instances)? }))?;
    if instances.is_empty() {
        let of = if server.is_empty() { String::new() } else { format!(" of {server}") };
        screen.line(format_args!("No instances{of}."))?;
        return screen.next(&[format!("kiln status {server}").trim_end()]);
    }
    screen.table(&HEAD, instances.iter().map(row).collect())
}

pub(crate) fn row(it: &Instance) -> Vec<Cell> {
    let detail = match it.exit_code {
        Some(code) if it.detail.is_empty() => format!("exit code {code}"),
        Some(code) => format!("exit code {code}: {}", it.detail),
        None => it.detail.clone(),
    };
    vec![
        plain(&it.id),
        plain(release(it.release)),
        tinted(instance_state(it.state())),
        tinted(health(it.health())),
        plain(if it.on_edge { "yes" } else { "no" }),
        plain(place(it)),
        plain(age(it.launched.as_ref())),
        plain(detail),
    ]
}

/// Where it answers, with the machine where that is not the site's own.
fn place(it: &Instance) -> String {
    let address = or_dash(&it.address);
    if is_own(&it.node) { address.to_owned() } else { format!("{address} on {}", it.node) }
}
