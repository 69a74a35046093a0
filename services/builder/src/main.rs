use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use kiln_builder::store::Documents;
use kiln_builder::{bake, bake_config};
use kiln_model::digest::Digest;
use kiln_model::event::Service;
use kiln_service::config::{EXIT_BAD_CONFIG, Site};
use kiln_service::guard::Guard;
use kiln_service::run::Failure;
use kiln_store::{Place, SqlStore};

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
    /// Print the digests of the images that this copy of the builder's store needs
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sweep", "leftovers", "doctor"])]
    images_of: Option<PathBuf>,
    /// Look at the machine and print the findings as JSON
    #[arg(long, conflicts_with_all = ["sweep", "leftovers"])]
    doctor: bool,
}

fn main() -> ExitCode {
    let asked = |name: &str| {
        let is_it = |argument: String| argument.split('=').next() == Some(name);
        std::env::args().skip(1).any(is_it)
    };
    if !["--sweep", "--leftovers", "--images-of", "--doctor"].into_iter().any(asked) {
        return kiln_service::run::main(Service::Builder, kiln_builder::run);
    }
    act(&Other::parse()).unwrap_or_else(|failure| {
        eprintln!("kiln-builder: {failure}");
        ExitCode::FAILURE
    })
}

/// Read in a copy of the copy, which stays as it is.
fn images_of(copy: &Path) -> Result<BTreeSet<Digest>, Failure> {
    let folder = tempfile::tempdir_in(copy.parent().unwrap_or(Path::new("/")))?;
    let own = folder.path().join("store.db");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        kiln_store::copy_out(&Place::File(copy.to_owned()), &own).await?;
        let store = SqlStore::open(&Place::File(own)).await?;
        Ok(Documents::new(store).needed_images().await?)
    })
}

fn act(other: &Other) -> Result<ExitCode, Failure> {
    if other.doctor {
        let findings = bake::examine();
        println!("{}", serde_json::to_string_pretty(&findings)?);
        let fine = findings.iter().all(|finding| finding.ok);
        return Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if let Some(copy) = &other.images_of {
        let needed = images_of(copy)?;
        let lines: String = needed.iter().map(|image| format!("{image}\n")).collect();
        std::io::stdout().write_all(lines.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
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
