//! Programs that the node runs: nft, runc, CNI plugins. All of them run in one cgroup, which is emptied at
//! boot: nothing that an earlier node began goes on behind this one's back.

use std::ffi::OsStr;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::cgroup::Cgroup;
use crate::failure::{During, Failure};
use crate::patience::within;

/// What an error message shows of a program's output.
const SHOWN: usize = 600;
/// A list of every element of the edge takes 30 bytes for each: enough for a thousand ports.
const OUTPUT_LIMIT: u64 = 8 << 20;

/// Starts helper programs. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Helpers {
    /// None for a short look, outside of the node's own life.
    cgroup: Option<Arc<Cgroup>>,
}

impl Helpers {
    pub(crate) fn new(cgroup: Cgroup) -> Self {
        Self { cgroup: Some(Arc::new(cgroup)) }
    }

    /// Programs that only look, in whatever group the caller is.
    pub(crate) fn outside() -> Self {
        Self { cgroup: None }
    }

    /// A command that will run as a helper.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Result<Command, Failure> {
        let mut command = plain(program);
        if let Some(cgroup) = &self.cgroup {
            cgroup.join_before_exec(&mut command)?;
        }
        Ok(command)
    }

    /// Runs a command to its end and returns its standard output.
    pub(crate) async fn run(
        &self,
        mut command: Command,
        input: &[u8],
        limit: Duration,
    ) -> Result<Vec<u8>, Failure> {
        let what = format!("running {}", shown(&command));
        let output = outcome(&mut command, input, limit).await.map_err(|why| Failure::new(&what, why))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        // CNI plugins say on standard output why they failed, all others on standard error.
        let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
        let said = String::from_utf8_lossy(said);
        let said: String = said.trim().chars().take(SHOWN).collect();
        Err(Failure::new(what, format!("{}: {said}", output.status)))
    }
}

/// A command whose environment is only what a program needs to find others.
pub(crate) fn plain(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Runs a command to its end, whatever the end is.
pub(crate) async fn outcome(command: &mut Command, input: &[u8], limit: Duration) -> Result<Output, Failure> {
    let what = shown(command);
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .during(|| format!("starting {what}"))?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A program that ends without reading its input says why by its status.
            let _ = stdin.write_all(input).await;
        }
    };
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let finish = async {
        let ((), stdout, stderr, status) = tokio::join!(feed, bounded(stdout), bounded(stderr), child.wait());
        Ok::<_, std::io::Error>(Output { status: status?, stdout: stdout?, stderr: stderr? })
    };
    within(limit, finish)
        .await
        .ok_or_else(|| Failure::new(&what, format!("did not end within {limit:?} and was killed")))?
        .during(|| format!("waiting for {what}"))
}

/// The beginning of what a program writes. The rest is read too, else the program would wait for us for ever.
async fn bounded(from: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    if let Some(mut from) = from {
        (&mut from).take(OUTPUT_LIMIT).read_to_end(&mut kept).await?;
        tokio::io::copy(&mut from, &mut tokio::io::sink()).await?;
    }
    Ok(kept)
}

fn shown(command: &Command) -> String {
    let command = command.as_std();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let text: Vec<_> = words.map(OsStr::to_string_lossy).collect();
    text.join(" ").chars().take(SHOWN).collect()
}
