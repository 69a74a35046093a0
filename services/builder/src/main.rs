use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kiln_builder::{bake, bake_config};
use kiln_model::event::Service;
use kiln_service::config::{EXIT_BAD_CONFIG, Site};
use kiln_service::guard::Guard;
use kiln_service::run::Failure;

/// What the builder's program does besides running the builder.
#[derive(Debug, Parser)]
#[command(name = "kiln-builder", version)]
struct Other {
    /// The folder of the site
    #[arg(long, env = "KILN_HOME")]
    home: Option<PathBuf>,
    /// Remove what builds have left on this machine; the builder must not run
    #[arg(long, requires = "home")]
    sweep: bool,
    /// Print what builds of the site have on this machine
    #[arg(long, requires = "home", conflicts_with = "sweep")]
    leftovers: bool,
    /// Look at the machine and print the findings as JSON
    #[arg(long, conflicts_with_all = ["sweep", "leftovers"])]
    doctor: bool,
}

fn main() -> ExitCode {
    let asked = |name: &str| std::env::args().skip(1).any(|argument| argument == name);
    if !["--sweep", "--leftovers", "--doctor"].into_iter().any(asked) {
        return kiln_service::run::main(Service::Builder, kiln_builder::run);
    }
    act(&Other::parse()).unwrap_or_else(|failure| {
        eprintln!("kiln-builder: {failure}");
        ExitCode::FAILURE
    })
}

fn act(other: &Other) -> Result<ExitCode, Failure> {
    if other.doctor {
        let findings = bake::examine();
        println!("{}", serde_json::to_string_pretty(&findings)?);
        let fine = findings.iter().all(|finding| finding.ok);
        return Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let site = match Site::load(other.home.as_deref().unwrap_or("".as_ref())) {
        Ok(site) => site,
        Err(error) => {
            eprintln!("kiln-builder: {error}");
            return Ok(ExitCode::from(EXIT_BAD_CONFIG));
        }
    };
    let config = bake_config(&site);
    if other.sweep {
        // Keeps a builder of the site from starting.
        let _guard = Guard::take(site.paths(), Service::Builder)?;
        bake::sweep(&config)?;
    } else {
        let found = bake::leftovers(&config)?;
        let lines: String = found.iter().map(|left| format!("{left}\n")).collect();
        std::io::stdout().write_all(lines.as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}
