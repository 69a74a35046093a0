//! Stopping a site's programs.

use std::time::{Duration, Instant};

use kiln_service::config::Site;

use super::process::{Process, command_line};
use super::programs::Program;
use super::{programs, supervisor};
use crate::failure::{During as _, Failure, Outcome};
use crate::screen::Screen;

/// Calls under way are finished within it.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(10);

/// Stops the supervisor first, which would start the others again, then those that ask before those that answer.
/// Gives the names of what was stopped.
pub(crate) async fn all(site: &Site, screen: Screen) -> Outcome<Vec<String>> {
    let mut stopped = Vec::new();
    if let Some(process) = supervisor::running(site) {
        one("supervisor", &process, screen).await?;
        stopped.push("supervisor".to_owned());
    }
    let programs = programs::of(site)?;
    for program in programs.iter().rev() {
        if let Some(process) = program.running() {
            one(program.kind.name(), &process, screen).await?;
            stopped.push(program.kind.name().to_owned());
        }
    }
    stopped.extend(unnamed(site, &programs, screen).await?);
    Ok(stopped)
}

/// What no pid file names: the supervisor may have started a program just before it was stopped. Between fork and exec
/// that one looks like the supervisor; it will be another program in a moment.
async fn unnamed(site: &Site, programs: &[Program], screen: Screen) -> Outcome<Vec<String>> {
    let mut stopped = Vec::new();
    let limit = Instant::now() + PATIENCE;
    loop {
        let is_ours = |line: &[String]| {
            supervisor::is_called(site, line) || programs.iter().any(|program| program.is_called(line))
        };
        let left = Process::all(is_ours).during("looking for the site's processes")?;
        let Some(first) = left.first() else { return Ok(stopped) };
        if Instant::now() > limit {
            return Err(Failure::failed(
                format!("stopping the site's process {}", first.pid()),
                "there are new ones again and again",
            )
            .todo("end what starts them, then: kiln down"));
        }
        for process in &left {
            let line = command_line(process.pid());
            if let Some(program) = programs.iter().find(|program| program.is_called(&line)) {
                one(program.kind.name(), process, screen).await?;
                stopped.push(program.kind.name().to_owned());
            }
        }
        tokio::time::sleep(LOOK).await;
    }
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
