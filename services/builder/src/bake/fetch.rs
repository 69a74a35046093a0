//! Files from elsewhere, by apt's own transports: they know the machine's proxies, and compare the hash.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_model::digest::Digest;
use kiln_service::config::apt_credentials;
use tokio_util::sync::CancellationToken;

use super::LogSink;
use super::command::{self, Stdout};
use super::error::BakeError;

pub(crate) const APT_HELPER: &str = "/usr/lib/apt/apt-helper";
const TIME_LIMIT: Duration = Duration::from_secs(1800);

#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) url: String,
    pub(crate) to: PathBuf,
    /// Where it is known beforehand.
    pub(crate) sha256: Option<Digest>,
    /// Bytes that it may have; what has more is cut, and so is not what is wanted.
    pub(crate) largest: u64,
}

/// How archives are reached.
#[derive(Clone, Copy)]
pub(crate) struct Transport<'a> {
    /// As apt_auth.conf(5) has them.
    pub(crate) credentials: Option<&'a Path>,
    pub(crate) log: &'a LogSink,
    pub(crate) cancel: &'a CancellationToken,
}

impl Transport<'_> {
    /// All of them, or the reason why not. Their hashes are compared, which whoever keeps them does again. `options` are apt's.
    pub(crate) fn fetch(&self, wanted: &[Wanted], options: &[&str]) -> Result<Result<(), String>, BakeError> {
        // apt's transports take what comes, without end.
        let largest = wanted.iter().map(|it| it.largest).max().unwrap_or_default();
        let mut command = Command::new("prlimit");
        command.arg(format!("--fsize={largest}")).arg(APT_HELPER);
        command.env("LC_ALL", "C.UTF-8").args(["-q", "-o", "APT::Sandbox::User=root"]);
        let credentials = apt_credentials(self.credentials);
        let options = options.iter().copied().chain(credentials.as_deref());
        command.args(options.flat_map(|option| ["-o", option])).arg("download-file");
        for Wanted { url, to, sha256, .. } in wanted {
            // `file:` gives a link to the archive's own file, `copy:` a copy.
            let url = url.strip_prefix("file:").map_or(url.clone(), |path| format!("copy:{path}"));
            command.arg(url).arg(to);
            // Without one there is an empty word in its place, since the files come in threes.
            command.arg(sha256.as_ref().map(|it| format!("SHA256:{}", it.hex())).unwrap_or_default());
        }
        let outcome = command::run(&mut command, Stdout::Keep, self.log, self.cancel, TIME_LIMIT)?;
        Ok(match outcome.succeeded() {
            true => Ok(()),
            false => Err(format!("{}: {}", outcome.why(TIME_LIMIT), outcome.last_lines.join("; "))),
        })
    }
}
