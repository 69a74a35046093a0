//! `kiln remove`

use clap::Args;
use kiln_api::builder::RemoveRequest;
use serde_json::json;

use crate::clients::{Services, request_id};
use crate::failure::{During as _, Outcome};
use crate::follow::{self, Patience};
use crate::screen::Screen;

#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// The server to give up
    server: String,
    /// Wait until its last instance is retired
    #[arg(long)]
    wait: bool,
    /// How long to wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = follow::LIMIT, requires = "wait")]
    timeout: u64,
}

pub(crate) async fn run(it: &Remove, services: &Services, screen: Screen) -> Outcome {
    let server = &it.server;
    let request = RemoveRequest { request_id: request_id(), server: server.clone() };
    services.builder().remove(request).await.during(format_args!("removing {server}"))?;
    if it.wait {
        follow::until_retired(services, screen, server, Patience::of_seconds(it.timeout)).await?;
    }
    screen.json(&json!({ "server": server, "removed": true, "retired": it.wait }))?;
    if it.wait {
        screen.line(format_args!("{server} is removed; nothing of it runs any more"))
    } else {
        screen.line(format_args!("{server} is removed; its instances are being retired"))?;
        screen.next(&[format!("kiln instances {server}")])
    }
}
