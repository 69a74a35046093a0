//! The main of every service: configuration first and as a whole, then telemetry, the lock, the work, and a clean end.

use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Arg, Command, value_parser};
use kiln_model::event::Service;
use tokio::sync::watch;

use crate::config::{EXIT_BAD_CONFIG, Site};
use crate::guard::Guard;
use crate::{error, shutdown, telemetry};

/// What a service is given.
#[derive(Debug)]
pub struct Start {
    pub site: Site,
    /// True from the word to stop on.
    pub stop: watch::Receiver<bool>,
}

pub type Failure = Box<dyn StdError + Send + Sync>;

/// Runs a service: `kiln-<service> --home <folder>`. The exit code is 64 for a wrong configuration, 1 for a failure.
pub fn main<W>(service: Service, work: impl FnOnce(Start) -> W) -> ExitCode
where
    W: Future<Output = Result<(), Failure>>,
{
    let home = Arg::new("home")
        .long("home")
        .env("KILN_HOME")
        .required(true)
        .value_parser(value_parser!(PathBuf))
        .help("The folder of the site");
    let name = format!("kiln-{service}");
    let command = Command::new(service.as_str()).display_name(&name).bin_name(name);
    let matches = command.version(env!("CARGO_PKG_VERSION")).arg(home).get_matches();
    let home = matches.get_one::<PathBuf>("home").cloned().unwrap_or_default();
    at_home(service, &home, work)
}

/// As [`main`], with the folder already known.
pub fn at_home<W>(service: Service, home: &Path, work: impl FnOnce(Start) -> W) -> ExitCode
where
    W: Future<Output = Result<(), Failure>>,
{
    let site = match Site::load(home) {
        Ok(site) => site,
        Err(error) => {
            eprintln!("kiln-{service}: {error}");
            return ExitCode::from(EXIT_BAD_CONFIG);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("kiln-{service}: can't start its threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(start(service, site, work)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kiln-{service}: {}", error::chain(&*failure));
            ExitCode::FAILURE
        }
    }
}

async fn start<W>(service: Service, site: Site, work: impl FnOnce(Start) -> W) -> Result<(), Failure>
where
    W: Future<Output = Result<(), Failure>>,
{
    let stop = shutdown::on_signal()?;
    let guard = Guard::take(site.paths(), service)?;
    let telemetry = telemetry::init(service, &site)?;
    let done = work(Start { site, stop }).await;
    match &done {
        Ok(()) => tracing::info!("stopped"),
        Err(failure) => tracing::error!(error = %error::chain(&**failure), "failed"),
    }
    // The lock goes before the wait for the collector: the next copy may start.
    drop(guard);
    tokio::task::spawn_blocking(move || drop(telemetry)).await?;
    done
}
