//! Stopping a site's programs.

use std::time::Duration;

use kiln_service::config::Site;

use super::process::Process;
use super::{programs, supervisor};
use crate::failure::{Failure, Outcome};
use crate::screen::Screen;

/// Calls under way are finished within it.
const PATIENCE: Duration = Duration::from_secs(15);

/// Stops the supervisor first, which would start the others again, then those that ask before those that answer.
/// Gives the names of what was stopped.
pub(crate) async fn all(site: &Site, screen: Screen) -> Outcome<Vec<String>> {
    let mut stopped = Vec::new();
    if let Some(process) = supervisor::running(site) {
        one("supervisor", &process, screen).await?;
        stopped.push("supervisor".to_owned());
    }
    for program in programs::of(site)?.iter().rev() {
        if let Some(process) = program.running() {
            one(program.kind.name(), &process, screen).await?;
            stopped.push(program.kind.name().to_owned());
        }
    }
    Ok(stopped)
}

async fn one(name: &str, process: &Process, screen: Screen) -> Outcome {
    let done = process.stop(PATIENCE).await;
    let clean = done
        .map_err(|error| Failure::failed(format!("stopping the {name}, process {}", process.pid()), error))?;
    if clean {
        screen.progress(format_args!("stopped {name}"));
    } else {
        screen.progress(format_args!("killed {name}: it did not end within {} s", PATIENCE.as_secs()));
    }
    Ok(())
}
