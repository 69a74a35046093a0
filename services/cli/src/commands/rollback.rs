//! `kiln rollback`

use clap::Args;
use kiln_api::deployer::RollbackRequest;

use crate::clients::{Services, request_id};
use crate::failure::{During as _, Failure, Outcome};
use crate::follow::{self, Patience};
use crate::json;
use crate::screen::Screen;
use crate::words::back;

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
    /// How long to wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = follow::LIMIT, requires = "wait")]
    timeout: u64,
}

fn parse_release(text: &str) -> Result<u64, String> {
    let number = text.strip_prefix('r').unwrap_or(text).parse().unwrap_or_default();
    if number > 0 { Ok(number) } else { Err("a release is a number such as 3 or r3".to_owned()) }
}

pub(crate) async fn run(it: &Rollback, services: &Services, screen: Screen) -> Outcome {
    let server = &it.server;
    // What the person sees as current is what is left; if another release came meanwhile, the deployer refuses.
    let fleet = services.released(server).await?;
    let request = RollbackRequest {
        request_id: request_id(),
        server: server.clone(),
        expected_release: fleet.release,
        to_release: it.to.unwrap_or_default(),
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
    let (left, back) = back(&rollout).unwrap_or((rollout.from_release, rollout.to_release));
    // A fleet whose way back failed is at the release already that it is to go back to.
    if left == back {
        screen.line(format_args!("{server} is brought back to r{back}"))?;
    } else {
        screen.line(format_args!("{server} goes back from r{left} to r{back}; r{left} is quarantined"))?;
    }
    let rollout = if it.wait {
        follow::until_back(services, screen, &rollout, Patience::of_seconds(it.timeout)).await?
    } else {
        rollout
    };
    screen.json(&json::of("kiln.deployer.v1.Rollout", &rollout)?)?;
    if it.wait {
        screen.line(format_args!("{server} runs r{back}"))
    } else {
        screen.next(&[format!("kiln status {server}")])
    }
}
