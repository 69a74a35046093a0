//! A Docker daemon of the test's own, for what other tools make of an image and for comparisons.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::Result;
use crate::command::run;

/// Bridges that the daemon makes and leaves.
const BRIDGES: [&str; 2] = ["docker0", "docker_gwbridge"];
/// For the daemon to end by itself, with its containers.
const STOP: Duration = Duration::from_secs(30);

/// Ends with this value; the machine's bridges and firewall rules are then as they were.
pub struct Docker {
    daemon: Child,
    folder: PathBuf,
    /// The firewall before, as `iptables-restore` takes it: the daemon drops what is forwarded for others, and leaves it so.
    /// None for a daemon that leaves them alone.
    rules: Option<String>,
    bridges: Vec<&'static str>,
}

impl Docker {
    /// # Errors
    /// Where the daemon does not answer within a minute, with its log's place.
    pub fn start(folder: &Path) -> Result<Self> {
        Self::start_with(folder, &[], Some(run(&mut Command::new("iptables-save"))?))
    }

    /// As [`Docker::start`], but for a daemon that leaves the machine's firewall alone: its containers are reached from
    /// the machine itself, and from nowhere else.
    ///
    /// # Errors
    /// Where the daemon does not answer within a minute, with its log's place.
    pub fn start_aside(folder: &Path) -> Result<Self> {
        Self::start_with(folder, &["--iptables=false", "--ip-forward=false", "--ip-masq=false"], None)
    }

    fn start_with(folder: &Path, options: &[&str], rules: Option<String>) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let bridges = BRIDGES.into_iter().filter(|name| !has_link(name)).collect();
        let log = std::fs::File::create(folder.join("log"))?;
        let daemon = Command::new("dockerd")
            .arg("--data-root")
            .arg(folder.join("data"))
            .arg("--exec-root")
            .arg(folder.join("exec"))
            .arg("--pidfile")
            .arg(folder.join("pid"))
            .arg("--host")
            .arg(format!("unix://{}", folder.join("sock").display()))
            .args(["--userland-proxy=false", "--shutdown-timeout=5"])
            .args(options)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        let docker = Self { daemon, folder: folder.to_path_buf(), rules, bridges };
        let start = Instant::now();
        while let Err(error) = docker.run(&["version"]) {
            if start.elapsed() > Duration::from_secs(60) {
                return Err(format!("dockerd does not answer, see {}/log: {error}", folder.display()).into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(docker)
    }

    /// A `docker` that talks to this daemon.
    pub fn command(&self) -> Command {
        let mut docker = Command::new("docker");
        docker.arg("--host").arg(format!("unix://{}", self.folder.join("sock").display()));
        docker
    }

    /// # Errors
    /// Where docker's exit status is not 0.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        run(self.command().args(arguments))
    }

    /// Gives the daemon the image of an OCI layout.
    ///
    /// # Errors
    /// Where skopeo or the daemon refuses it.
    pub fn load(&self, layout: &Path, name: &str) -> Result<()> {
        let socket = format!("unix://{}", self.folder.join("sock").display());
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--dest-daemon-host", &socket])
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker-daemon:{name}")))
        .map(drop)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let pid = i32::try_from(self.daemon.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let start = Instant::now();
        while matches!(self.daemon.try_wait(), Ok(None)) {
            if start.elapsed() > STOP {
                let _ = self.daemon.kill();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for bridge in self.bridges.iter().filter(|name| has_link(name)) {
            let _ = Command::new("ip").args(["link", "delete", bridge]).status();
        }
        let Some(rules) = &self.rules else { return };
        let restore = Command::new("iptables-restore").stdin(Stdio::piped()).spawn();
        if let Ok(mut restore) = restore {
            // Dropped at once, so that its input ends.
            if let Some(mut input) = restore.stdin.take() {
                let _ = input.write_all(rules.as_bytes());
            }
            let _ = restore.wait();
        }
    }
}

fn has_link(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}
