//! The programs of a site: where they are, how they are called, how a running one is known.

use std::path::{Path, PathBuf};

use kiln_model::event::Service;
use kiln_service::config::Site;
use kiln_service::machine::{STARTED_BY, started_by};

use super::broker;
use super::process::Process;
use crate::failure::{Code, During as _, Failure, Outcome};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Broker,
    Service(Service),
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Broker => "nats-server",
            Self::Service(service) => service.as_str(),
        }
    }
}

/// One program that the supervisor keeps running.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) kind: Kind,
    pub(crate) binary: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(&'static str, String)>,
    pub(crate) log: PathBuf,
    pid_file: PathBuf,
    /// An argument that no other process has.
    mark: String,
}

impl Program {
    pub(crate) fn running(&self) -> Option<Process> {
        Process::named(&self.pid_file, &self.mark)
    }

    /// Whether a command line is that of this program, as the supervisor calls it.
    pub(crate) fn is_called(&self, line: &[String]) -> bool {
        line.get(1..) == Some(self.arguments.as_slice())
            && (self.kind == Kind::Broker
                || line.first().is_some_and(|it| it.rsplit('/').next() == self.binary_name()))
    }

    fn binary_name(&self) -> Option<&str> {
        self.binary.file_name()?.to_str()
    }
}

/// In the order of their start: the broker carries the events, the node is asked by all others.
const ORDER: [Service; 4] = [Service::Node, Service::Builder, Service::Deployer, Service::Monitor];

/// The programs of a site, without a look at whether their binaries are there.
pub(crate) fn of(site: &Site) -> Outcome<Vec<Program>> {
    let home = site.home.display().to_string();
    let mut programs = Vec::new();
    if broker::is_own(site) {
        let config = broker::config_file(site).display().to_string();
        programs.push(Program {
            kind: Kind::Broker,
            binary: PathBuf::new(),
            arguments: vec!["--config".to_owned(), config.clone()],
            environment: Vec::new(),
            log: site.paths().logs().join("nats-server.log"),
            pid_file: broker::pid_file(site),
            mark: config,
        });
    }
    for service in ORDER {
        programs.push(Program {
            kind: Kind::Service(service),
            binary: sibling(&format!("kiln-{service}"))?,
            arguments: vec!["--home".to_owned(), home.clone()],
            environment: vec![(STARTED_BY, started_by(service, &site.id))],
            log: site.paths().log(service),
            pid_file: site.paths().pid(service),
            mark: home.clone(),
        });
    }
    Ok(programs)
}

/// The programs of a site, each with a binary that is there.
pub(crate) fn found(site: &Site) -> Outcome<Vec<Program>> {
    let mut programs = of(site)?;
    for program in &mut programs {
        match program.kind {
            Kind::Broker => program.binary = nats_server()?,
            Kind::Service(service) if !program.binary.is_file() => {
                return Err(Failure::new(
                    Code::Refused,
                    format!("there is no program {}", program.binary.display()),
                    format!("the {service} is started from there"),
                )
                .reason("no_binary")
                .todo("put Kiln's programs into one folder; in a checkout: cargo build --release --workspace --bins"));
            }
            Kind::Service(_) => {}
        }
    }
    Ok(programs)
}

/// A program in the folder of this one.
pub(crate) fn sibling(name: &str) -> Outcome<PathBuf> {
    let own = std::env::current_exe().during("finding this program's own file")?;
    Ok(own.with_file_name(name))
}

/// `KILN_NATS_SERVER`, the path, or what was installed beside Kiln.
pub(crate) fn nats_server() -> Outcome<PathBuf> {
    const NAME: &str = "nats-server";
    if let Some(named) = std::env::var_os("KILN_NATS_SERVER").map(PathBuf::from) {
        if is_program(&named) {
            return Ok(named);
        }
        let what = format!("KILN_NATS_SERVER names {}", named.display());
        return Err(Failure::new(Code::Refused, what, "which is no program").reason("no_broker"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.parent()?.join("lib/kiln")));
    let found =
        std::env::split_paths(&path).chain(beside).map(|folder| folder.join(NAME)).find(|it| is_program(it));
    found.ok_or_else(|| {
        Failure::new(Code::Refused, "there is no nats-server, which carries Kiln's events", "")
            .reason("no_broker")
            .todo(
                "deploy/prerequisites.sh installs one; or put nats-server 2.11 or newer on the PATH, name one with \
                 KILN_NATS_SERVER, or use a broker that runs with --nats-url",
            )
    })
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
}
