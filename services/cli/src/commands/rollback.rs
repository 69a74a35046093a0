//! `kiln rollback`

use clap::Args;
use kiln_api::deployer::RollbackRequest;

use crate::clients::{Services, actor, request_id};
use crate::failure::{During as _, Failure, Outcome};
use crate::screen::Screen;
use crate::{follow, json};

#[derive(Debug, Args)]
pub(crate) struct Rollback {
    /// The server to take back
    server: String,
    /// The release to go to, such as 3 or r3 [default: the last good one before the current]
    #[arg(long, value_name = "RELEASE", value_parser = parse_release)]
    to: Option<u64>,
    /// Why, for the record
    #[arg(long, default_value = "asked for by hand")]
    reason: String,
    /// Wait until the fleet is back
    #[arg(long)]
    wait: bool,
}

fn parse_release(text: &str) -> Result<u64, String> {
    let number = text.strip_prefix('r').unwrap_or(text).parse().unwrap_or_default();
    if number > 0 { Ok(number) } else { Err("a release is a number such as 3 or r3".to_owned()) }
}

pub(crate) async fn run(it: &Rollback, services: &Services, screen: Screen) -> Outcome {
    let server = &it.server;
    // What the person sees as current is what is left; if another release came meanwhile, the deployer refuses.
    let fleet = services.fleet(server).await?;
    let request = RollbackRequest {
        request_id: request_id(),
        server: server.clone(),
        expected_release: fleet.release,
        to_release: it.to.unwrap_or_default(),
        actor: actor(),
        reason: it.reason.clone(),
    };
    let answer = services
        .deployer()
        .rollback(request)
        .await
        .during(format_args!("rolling {server} back"))?
        .into_inner();
    let rollout = answer
        .rollout
        .ok_or_else(|| Failure::failed(format!("rolling {server} back"), "the deployer gave no rollout"))?;
    screen.line(format_args!(
        "{server} goes back from r{} to r{}; r{} is quarantined",
        rollout.from_release, rollout.to_release, rollout.from_release
    ))?;
    let rollout = if it.wait { follow::rollout(services, screen, &rollout).await? } else { rollout };
    screen.json(&json::of("kiln.deployer.v1.Rollout", &rollout)?)?;
    if it.wait {
        screen.line(format_args!("{server} runs r{}", rollout.to_release))
    } else {
        screen.next(&[format!("kiln status {server}")])
    }
}
