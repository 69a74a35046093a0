//! `kiln`: the command that people and scripts use.

mod backup;
mod clients;
mod commands;
#[cfg(test)]
mod documented;
mod failure;
mod follow;
mod home;
mod json;
mod login;
mod pack;
mod screen;
mod site;
mod words;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::commands::Command;
use crate::failure::Outcome;
use crate::home::Home;
use crate::screen::{Format, Screen};

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  failed: what was asked for was tried and did not work (a build, a rollout, a leftover)
   2  usage: the command line is not understood
   3  not found
   4  refused: something must be so first, or changed meanwhile
   5  unavailable: a service, the broker, the whole site, a repository or an archive does not answer
  64  invalid: a definition or the configuration is wrong
 130  interrupted by Ctrl-C: what was waited for goes on

Try:  kiln up; kiln init web; kiln apply web --wait; kiln status";

/// Keeps fleets of servers fresh without ever changing a running one.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, after_help = EXIT_CODES, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    /// The site's folder [default: /var/lib/kiln/<site>]
    #[arg(long, global = true, env = "KILN_HOME", value_name = "FOLDER")]
    home: Option<PathBuf>,
    /// The site's name, where there is more than one on this machine
    #[arg(long, global = true, env = "KILN_SITE", value_name = "NAME", default_value = "local")]
    site: String,
    /// Tables for people, or one JSON document for programs
    #[arg(short, long, global = true, value_name = "FORMAT", default_value = "table")]
    output: Format,
    /// No colours; as does the environment variable NO_COLOR
    #[arg(long, global = true)]
    no_color: bool,
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.output == Format::Json;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(text) = failure.render(json) {
                // Standard error may be gone as well; the exit code still tells.
                let _ = writeln!(std::io::stderr(), "{text}");
            }
            failure.exit_code()
        }
    }
}

fn run(cli: Cli) -> Outcome {
    let home = Home::new(cli.home, &cli.site)?;
    let screen = Screen::new(cli.output, cli.no_color);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| failure::Failure::failed("starting", error))?;
    let outcome = runtime.block_on(commands::run(cli.command, &home, screen));
    // A blocking read of standard input or a stuck file system does not keep the command from ending.
    runtime.shutdown_background();
    outcome
}
