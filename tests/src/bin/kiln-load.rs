//! A client that asks for one page over and over, with a new connection for each request, and counts every error.
//!
//! Prints one JSON line when its time is over, or on SIGINT or SIGTERM.

use std::process::ExitCode;
use std::time::Duration;

use kiln_tests::load::{Load, Options};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

const USAGE: &str = "usage: kiln-load --to ADDRESS:PORT [--path /] [--clients 8] [--rate 300] [--seconds N] [--text T]

--rate     requests a second in all; above 400 the ports of this machine run out
--seconds  without it: until SIGINT or SIGTERM
--text     a text that each answer must contain

Exit code 0 where every request was answered with status 200, in full; 1 where not; 2 for a wrong command line.";

fn options() -> Result<(Options, Option<f64>), String> {
    let (mut to, mut path, mut clients, mut rate) = (None, "/".to_owned(), 8, 300.0);
    let (mut seconds, mut wanted) = (None, String::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        let wrong = |error: &dyn std::fmt::Display| format!("{name} {value}: {error}");
        match name.as_str() {
            "--to" => to = Some(value.parse().map_err(|error| wrong(&error))?),
            "--path" => path.clone_from(&value),
            "--text" => wanted.clone_from(&value),
            "--clients" => clients = value.parse().map_err(|error| wrong(&error))?,
            "--rate" => rate = value.parse().map_err(|error| wrong(&error))?,
            "--seconds" => seconds = Some(value.parse().map_err(|error| wrong(&error))?),
            _ => return Err(format!("no option {name}")),
        }
    }
    let target = to.ok_or("--to is missing")?;
    if clients > 0 && rate > 0.0 && seconds.is_none_or(|seconds: f64| seconds > 0.0) {
        Ok((Options { target, path, clients, rate, wanted }, seconds))
    } else {
        Err("numbers must be above zero".into())
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let (options, seconds) = match options() {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let load = Load::start(options);
    wait(seconds).await;
    let summary = load.stop().await;
    match serde_json::to_string(&summary) {
        Ok(line) => println!("{line}"),
        Err(error) => {
            eprintln!("kiln-load: what was seen can't be printed: {error}");
            return ExitCode::FAILURE;
        }
    }
    // Nothing asked is nothing shown.
    if summary.unfailing(1).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn wait(seconds: Option<f64>) {
    let interrupted = async {
        let (Ok(mut interrupt), Ok(mut terminate)) =
            (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            return std::future::pending().await;
        };
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
    };
    match seconds {
        Some(seconds) => {
            let _ = timeout(Duration::from_secs_f64(seconds), interrupted).await;
        }
        None => interrupted.await,
    }
}
