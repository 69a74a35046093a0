//! A network for a step that asks for one: by slirp4netns, which takes part in the sandbox's own and carries its connections out
//! as its own, but for those to this machine's loopback.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use rustix::fs::FileType;
use tokio_util::sync::CancellationToken;

use super::LogSink;
use super::command::{self, Stdout};
use super::error::BakeError;
use super::tree::Tree;

/// What answers questions for names in there.
const RESOLVER: &str = "nameserver 10.0.2.3\n";
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";
const UP_WITHIN: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(20);

/// Waits in the shell until there is a way out; for ten seconds.
pub(crate) const WAIT: &str = "kiln_tries=200
while :; do
while read -r kiln_device kiln_to kiln_rest; do if [ \"$kiln_to\" = 00000000 ]; then break 2; fi; done </proc/net/route
[ $kiln_tries -gt 0 ] || { echo 'the network did not come up' >&2; exit 1; }
kiln_tries=$((kiln_tries - 1))
sleep 0.05
done
unset kiln_tries kiln_device kiln_to kiln_rest
";

/// Carries connections for the process whose number comes to stand in `pid_file`, until `ended` is cancelled.
pub(crate) fn carry(
    pid_file: &Path,
    log: &LogSink,
    ended: &CancellationToken,
    limit: Duration,
) -> Result<(), BakeError> {
    let end = Instant::now() + UP_WITHIN;
    let pid = loop {
        match fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<u32>().ok()) {
            Some(pid) => break pid,
            None if ended.is_cancelled() || Instant::now() > end => return Ok(()),
            None => thread::sleep(TICK),
        }
    };
    let mut command = Command::new("slirp4netns");
    command.args(["--configure", "--mtu=65520", "--disable-host-loopback"]).arg(pid.to_string()).arg("tap0");
    let quiet: LogSink = std::sync::Arc::new(|line: &str| tracing::debug!(line, "slirp4netns"));
    match command::run(&mut command, Stdout::Log, &quiet, ended, limit) {
        // Ended with the step, which is what says how that went.
        Err(BakeError::Cancelled) => Ok(()),
        Ok(outcome) => {
            log(&format!("the network ended: {}", outcome.last_lines.join("; ")));
            Ok(())
        }
        Err(BakeError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(BakeError::Machine {
                what: "slirp4netns".to_owned(),
                why: "steps with a network need it, and it is not there".to_owned(),
                remedy: "run `apt install slirp4netns` on the builder's machine".to_owned(),
            })
        }
        Err(error) => Err(error),
    }
}

/// A file that says whom to ask for names, in the place of the image's while a step runs.
pub(crate) struct Resolver {
    file: PathBuf,
    /// The runtime makes a file to mount it on, which the image does not get.
    is_made: bool,
}

impl Resolver {
    pub(crate) fn new(folder: &Path, tree: &Tree) -> Result<Self, BakeError> {
        let file = folder.join("resolv.conf");
        fs::write(&file, RESOLVER).map_err(BakeError::io("write", &file))?;
        let found = tree.stat_itself(&RESOLV_CONF.as_bytes()[1..]);
        let found = found.map_err(|errno| BakeError::io("look at", RESOLV_CONF)(errno.into()))?;
        // A link leads to /run, as a rule, which is in memory.
        let is_made = found.is_none();
        if found.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory) {
            return Err(BakeError::Definition {
                what: RESOLV_CONF.to_owned(),
                why: "it is a folder in the image, so that no name can be looked up".to_owned(),
                remedy: "make it a file in a step before".to_owned(),
            });
        }
        Ok(Self { file, is_made })
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    pub(crate) fn leave(&self, tree: &Tree) -> Result<(), BakeError> {
        if self.is_made {
            tree.remove(&RESOLV_CONF.as_bytes()[1..]).map_err(BakeError::io("remove", RESOLV_CONF))?;
        }
        Ok(())
    }
}
