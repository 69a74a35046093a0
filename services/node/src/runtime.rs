//! runc under conmon. conmon holds an instance's output and takes its exit code; both go on when the node ends.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;

use crate::cgroup::Cgroup;
use crate::failure::{During, Failure};
use crate::helper::{Helpers, outcome, plain};
use crate::names::Names;
use crate::patience::within;

/// A start takes 50 ms; a machine that swaps may need seconds.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Of conmon's answer, which is one line.
const ANSWER: u64 = 64 << 10;
/// Marks the control group of an instance's conmon. No id has a dot.
const CONMON: &str = ".conmon";
/// Bytes of output that are kept; conmon begins anew beyond.
const LOG_SIZE: u64 = 16 << 20;

#[derive(Debug, Clone)]
pub(crate) struct Runtime {
    names: Names,
    helpers: Helpers,
    runc: PathBuf,
    conmon: PathBuf,
}

/// What conmon writes to its synchronisation pipe.
#[derive(Deserialize)]
struct Sync {
    data: i64,
    #[serde(default)]
    message: String,
}

/// How a command inside an instance ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// Where a program is that the node needs.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|dir| PathBuf::from(dir).join(name))
        .find(|path| path.is_file())
}

fn needed(name: &str) -> Result<PathBuf, Failure> {
    find_program(name).ok_or_else(|| {
        Failure::new(
            format!("looking for {name}"),
            format!("it is not installed (Debian: apt-get install {name})"),
        )
    })
}

impl Runtime {
    pub(crate) fn new(names: &Names, helpers: &Helpers) -> Result<Self, Failure> {
        for dir in [names.instances_dir(), names.logs_dir(), names.exits_dir(), names.runc_root()] {
            fs::create_dir_all(&dir).during(|| format!("making {}", dir.display()))?;
        }
        Ok(Self {
            names: names.clone(),
            helpers: helpers.clone(),
            runc: needed("runc")?,
            conmon: needed("conmon")?,
        })
    }

    /// Creates the instance of a bundle, up to the point where its own program would begin. Returns its first process.
    pub(crate) async fn create(&self, id: &str) -> Result<u32, Failure> {
        let what = || format!("creating instance {id}");
        let dir = self.names.instance_dir(id);
        let errors = dir.join("conmon.err");
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).during(what)?;
        // Not with the helpers, which do not outlive the node.
        let group = Cgroup::make(&self.names.cgroup(), &conmon_group(id))?;
        let mut command = plain(&self.conmon);
        group.join_before_exec(&mut command)?;
        command
            // When memory runs out it leaves a file there.
            .current_dir(&dir)
            .args(["--api-version", "1", "--cid", id, "--cuuid", id, "--name", id, "--runtime"])
            .arg(&self.runc)
            .args(["--runtime-arg", "--root", "--runtime-arg"])
            .arg(self.names.runc_root())
            .arg("--bundle")
            .arg(&dir)
            .arg("--container-pidfile")
            .arg(dir.join("pid"))
            .arg("--conmon-pidfile")
            .arg(dir.join("conmon.pid"))
            .arg("--exit-dir")
            .arg(self.names.exits_dir())
            .arg("--log-path")
            .arg(format!("k8s-file:{}", self.names.log_file(id).display()))
            .args(["--log-size-max", &LOG_SIZE.to_string(), "--log-level", "error"])
            .args(["--no-sync-log", "--no-new-keyring", "--full-attach"])
            .env("_OCI_SYNCPIPE", std::os::fd::AsRawFd::as_raw_fd(&writer).to_string())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&errors).during(what)?);
        let inherit = move || fcntl_setfd(&writer, FdFlags::empty()).map_err(io::Error::from);
        // SAFETY: the closure makes one fcntl(2) call, which is allowed between fork and exec; it does not allocate.
        unsafe { command.pre_exec(inherit) };
        let mut child = command.spawn().during(|| format!("starting {}", self.conmon.display()))?;
        // With the command goes our end for writing, so that the pipe ends when conmon does.
        drop(command);
        let answer = async {
            // The one that was started ends as soon as it has put itself into the background.
            child.wait().await?;
            let mut line = Vec::new();
            // Its end would not come: conmon keeps the pipe for as long as it runs.
            BufReader::new(pipe::Receiver::from_owned_fd(reader)?.take(ANSWER))
                .read_until(b'\n', &mut line)
                .await?;
            Ok::<_, io::Error>(line)
        };
        let line = within(START_LIMIT, answer)
            .await
            .ok_or_else(|| Failure::new(what(), format!("conmon did not answer within {START_LIMIT:?}")))?
            .during(what)?;
        let said =
            || fs::read_to_string(&errors).unwrap_or_default().trim().chars().take(600).collect::<String>();
        let sync: Sync = serde_json::from_slice(&line)
            .map_err(|_| Failure::new(what(), format!("conmon ended: {}", said())))?;
        let pid = u32::try_from(sync.data).ok().filter(|pid| *pid > 0);
        pid.ok_or_else(|| Failure::new(what(), format!("{} {}", sync.message.trim(), said()).trim()))
    }

    /// Lets the instance's program begin.
    pub(crate) async fn start(&self, id: &str) -> Result<(), Failure> {
        let mut command = self.helpers.command(&self.runc)?;
        command.arg("--root").arg(self.names.runc_root()).args(["start", id]);
        self.helpers.run(command, b"", START_LIMIT).await.map(drop)
    }

    /// Runs a shell command inside, as the instance's own process is: same user, environment and capabilities.
    pub(crate) async fn exec(&self, id: &str, run: &str, limit: Duration) -> Result<Ran, Failure> {
        let what = || format!("running a command in instance {id}");
        let bundle = self.names.instance_dir(id).join("config.json");
        let mut config: Value =
            fs::read(&bundle).during(what).and_then(|json| serde_json::from_slice(&json).during(what))?;
        let mut process = config["process"].take();
        process["args"] = serde_json::json!(["/bin/sh", "-c", run]);
        let spec = tempfile::NamedTempFile::new_in(self.names.instance_dir(id)).during(what)?;
        fs::write(spec.path(), process.to_string()).during(what)?;
        let mut command = self.helpers.command(&self.runc)?;
        let pid_file = spec.path().with_extension("pid");
        command.arg("--root").arg(self.names.runc_root()).arg("exec");
        command.arg("--process").arg(spec.path()).arg("--pid-file").arg(&pid_file).arg(id);
        let output = outcome(&mut command, b"", limit).await;
        let pid = fs::read_to_string(&pid_file).ok().and_then(|pid| pid.trim().parse().ok());
        // It is not there where runc failed before it had a process.
        let _ = fs::remove_file(&pid_file);
        let output = match (output, pid) {
            (Err(failure), Some(pid)) => {
                // With runc its command did not go: it runs inside, as a child of nobody.
                Cgroup::named(&self.names.cgroup(), id)?.kill_member(pid)?;
                return Err(failure);
            }
            (output, _) => output?,
        };
        let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
        let status = output.status.code().unwrap_or(128 + signal.unwrap_or_default());
        Ok(Ran { status, stdout: output.stdout, stderr: output.stderr })
    }

    /// The exit code that conmon left, waiting a little for it: conmon learns of the end when we do.
    pub(crate) async fn exit_code(&self, id: &str) -> Option<i32> {
        let path = self.names.exits_dir().join(id);
        for _ in 0..200 {
            if let Ok(text) = fs::read_to_string(&path)
                && let Ok(code) = text.trim().parse()
            {
                return Some(code);
            }
            let conmon =
                Cgroup::named(&self.names.cgroup(), &conmon_group(id)).and_then(|group| group.pids());
            if conmon.is_ok_and(|pids| pids.is_empty()) {
                // It wrote the code before it ended, or never will.
                return fs::read_to_string(&path).ok()?.trim().parse().ok();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        None
    }

    /// Ends whatever is left of an instance's processes, and forgets it; fine if there is nothing. Blocks.
    pub(crate) fn remove(&self, id: &str) -> Result<(), Failure> {
        let site = self.names.cgroup();
        // conmon first: it may be about to start the other.
        for group in [conmon_group(id), id.to_owned()] {
            Cgroup::named(&site, &group)?.empty()?;
            crate::cgroup::remove_everywhere(&format!("{site}/{group}"))?;
        }
        let state = self.names.runc_root().join(id);
        match fs::remove_dir_all(&state) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Failure::new(format!("removing {}", state.display()), error))
            }
            _ => Ok(()),
        }
    }
}

fn conmon_group(id: &str) -> String {
    format!("{id}{CONMON}")
}

/// The instance that a control group is of.
pub(crate) fn instance_of(group: &str) -> &str {
    group.strip_suffix(CONMON).unwrap_or(group)
}
