//! Keeps a site's programs running, its certificates fresh and the broker's streams as they must be. It starts what does
//! not run, takes over what does, and starts again what ends.
//!
//! It holds nothing that a program needs: when it dies they run on, and the next one takes them over.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_bus::{NatsBus, User};
use kiln_service::config::Site;
use rustix::fs::FlockOperation;
use tokio::task::JoinSet;

use super::process::Process;
use super::programs::Program;
use super::{broker, logs, pki};
use crate::failure::{Code, During as _, Failure, Outcome};

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// What ran that long is not in a crash loop.
const SETTLED: Duration = Duration::from_secs(30);

/// A broker whose data was wiped has no streams; nothing else would make them again.
const STREAMS_PERIOD: Duration = Duration::from_secs(15);

/// How often the logs are looked at: what is written in between is over the limit.
const LOGS_PERIOD: Duration = Duration::from_secs(5);

pub(crate) fn log(site: &Site) -> PathBuf {
    site.paths().logs().join("supervisor.log")
}

pub(crate) fn pid_file(site: &Site) -> PathBuf {
    site.paths().run().join("supervisor.pid")
}

/// Held while one runs.
pub(crate) fn lock_file(site: &Site) -> PathBuf {
    site.paths().run().join("supervisor.lock")
}

/// An argument that makes the supervisor known, beside its pid file.
pub(crate) const MARK: &str = "supervise";

/// Its arguments.
pub(crate) fn arguments(site: &Site) -> [OsString; 3] {
    ["--home".into(), site.home.clone().into(), MARK.into()]
}

/// Whether a command line is that of the site's supervisor.
pub(crate) fn is_called(site: &Site, line: &[String]) -> bool {
    line.get(1..).is_some_and(|rest| rest.iter().map(OsStr::new).eq(arguments(site).iter()))
}

pub(crate) fn running(site: &Site) -> Option<Process> {
    Process::named(&pid_file(site), MARK)
}

/// Runs until it is told to stop. The programs run on: stopping them is another's decision. Where there are none, something
/// else keeps the site's running.
pub(crate) async fn run(site: Site, programs: Vec<Program>) -> Outcome {
    let path = lock_file(&site);
    let lock = File::options().create(true).write(true).truncate(false).mode(0o600).open(&path);
    let lock = lock.during(format_args!("opening {}", path.display()))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
        Failure::new(Code::Refused, format!("the lock {}", path.display()), error)
            .reason("held")
            .todo("another supervisor of this site runs; `kiln down` stops it")
    })?;
    super::keys::write(&pid_file(&site), &format!("{}\n", std::process::id()))?;
    note(format_args!("supervisor of the site {} starts, process {}", site.name, std::process::id()));

    let mut tasks = JoinSet::new();
    let mut logs: Vec<_> = programs.iter().map(|program| program.log.clone()).collect();
    logs.push(log(&site));
    for program in programs {
        tasks.spawn(keep(program));
    }
    tasks.spawn(bound(logs));
    tasks.spawn(streams(site.clone()));
    tasks.spawn(certificates(site.clone()));
    let mut stop = kiln_service::shutdown::on_signal().during("listening for signals")?;
    // An error means that nobody can send any more, which ends it as well.
    let _ = stop.wait_for(|stop| *stop).await;
    note("supervisor stops; the programs run on");
    // Its file goes with it, for a process that gets its id must not be taken for it.
    let _ = std::fs::remove_file(pid_file(&site));
    drop(lock);
    Ok(())
}

/// A line of the supervisor's own log.
fn note(text: impl std::fmt::Display) {
    use std::io::Write as _;
    // A full disk must not end what keeps everything else running.
    let _ = writeln!(std::io::stderr(), "{} {text}", jiff::Timestamp::now());
}

async fn keep(program: Program) {
    let name = program.kind.name();
    let mut wait = FIRST_WAIT;
    loop {
        let begun = Instant::now();
        if let Some(process) = program.running() {
            note(format_args!("{name}: process {} runs", process.pid()));
            process.ended().await;
            note(format_args!("{name}: process {} ended", process.pid()));
        } else {
            match start(&program) {
                Ok(mut child) => {
                    note(format_args!("{name}: started as process {}", child.id().unwrap_or_default()));
                    match child.wait().await {
                        Ok(status) => note(format_args!("{name}: ended, {status}")),
                        Err(error) => note(format_args!("{name}: waiting for it failed: {error}")),
                    }
                }
                Err(failure) => note(format_args!("{name}: {}", failure.line())),
            }
        }
        if begun.elapsed() > SETTLED {
            wait = FIRST_WAIT;
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// In a session of its own: it outlives the terminal, and this process.
fn start(program: &Program) -> Outcome<tokio::process::Child> {
    let mut command = Command::new(&program.binary);
    command.args(&program.arguments).envs(program.environment.iter().cloned());
    detach(&mut command, &program.log)?;
    tokio::process::Command::from(command)
        .kill_on_drop(false)
        .spawn()
        .during(format_args!("starting {}", program.binary.display()))
}

/// Output to a log, no input, the root as working directory, a session of its own.
pub(crate) fn detach(command: &mut Command, log: &Path) -> Outcome {
    let what = format!("opening {}", log.display());
    logs::put_aside(log).during(&what)?;
    let output = OpenOptions::new().create(true).append(true).mode(0o600).open(log).during(&what)?;
    let errors = output.try_clone().during(&what)?;
    command.current_dir("/").stdin(Stdio::null()).stdout(output).stderr(errors);
    // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(Into::into));
    }
    Ok(())
}

async fn bound(logs: Vec<PathBuf>) {
    let mut told = String::new();
    loop {
        let failed = logs.iter().find_map(|log| Some((log, logs::bound(log, logs::Limit::default()).err()?)));
        let text =
            failed.map_or_else(String::new, |(log, error)| format!("bounding {}: {error}", log.display()));
        if text != told && !text.is_empty() {
            note(&text);
        }
        told = text;
        tokio::time::sleep(LOGS_PERIOD).await;
    }
}

/// Renews certificates in the last third of their life. The services see that by themselves, the broker is told.
async fn certificates(site: Site) {
    let mut complaints = String::new();
    let mut broker = broker::Told::default();
    loop {
        let renewed = pki::ensure(&site).map(|renewed| {
            if !renewed.is_empty() {
                let names = renewed.iter().map(|holder| holder.as_str()).collect::<Vec<_>>().join(", ");
                note(format_args!("new certificates: {names}"));
            }
        });
        // Also what `kiln pki` renewed, or a person brought.
        let told = broker.tell(&site).map(|told| {
            if let Some(process) = told {
                note(format_args!("nats-server: process {process} reads its files anew"));
            }
        });
        let failed = [renewed, told].into_iter().filter_map(Result::err);
        let text = failed.map(|failure| failure.line()).collect::<Vec<_>>().join("; ");
        if text != complaints && !text.is_empty() {
            note(&text);
        }
        complaints = text;
        tokio::time::sleep(pki::period(&site)).await;
    }
}

async fn streams(site: Site) {
    let mut told = String::new();
    loop {
        let result = ensure_streams(&site).await;
        let text = result.as_ref().map_or_else(Failure::line, |()| String::new());
        if text != told {
            note(if text.is_empty() { "the broker's streams are as they must be" } else { text.as_str() });
            told = text;
        }
        tokio::time::sleep(if result.is_ok() { STREAMS_PERIOD } else { FIRST_WAIT * 10 }).await;
    }
}

/// Makes the site's streams at the broker, or brings them to the wanted settings.
pub(crate) async fn ensure_streams(site: &Site) -> Outcome {
    let options = site
        .nats(User::Admin)
        .map_err(|error| Failure::new(Code::Invalid, "the key of the broker's user admin", error))?;
    NatsBus::ensure_streams(options).await.map_err(|error| {
        let code = match error {
            kiln_bus::Error::Unavailable { .. } => Code::Unavailable,
            _ => Code::Refused,
        };
        Failure::new(code, format!("making the streams at {}", site.nats_url), error).reason("broker")
    })
}
