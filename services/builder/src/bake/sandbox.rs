//! Where maintainer scripts and `run` steps run: an OCI runtime's container with ids of its own, without network, without the
//! host's files, with no capability but those dpkg needs, and within bounds.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_model::name::{BuildId, SiteId};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::command::{self, Stdout};
use super::error::BakeError;
use super::tree::SHIFT;
use super::work::{IDS, Work, clear, site_folder};
use super::{BakeConfig, LogSink};
use super::{network, seccomp};

const RUNTIME_LIMIT: Duration = Duration::from_secs(30);
/// Without FSETID /var/mail loses its setgid bit, without SETFCAP ping becomes setuid root, both without a word.
const CAPABILITIES: [&str; 8] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SYS_CHROOT",
];
/// What containers.conf(5) gives a build's commands, and the right to mount for buildah, which makes their root file systems: in
/// a mount namespace of its own, as the root of a user namespace.
const OF_CONTAINERS: [&str; 12] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
];
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Clone, Copy)]
pub(crate) struct Sandbox<'a> {
    pub(crate) config: &'a BakeConfig,
    pub(crate) build: &'a BuildId,
    pub(crate) work: &'a Work,
    pub(crate) log: &'a LogSink,
    pub(crate) cancel: &'a CancellationToken,
}

/// One thing that runs in the sandbox.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    /// The step, for people.
    pub(crate) step: &'a str,
    /// Mounted with the sandbox's owners.
    pub(crate) root: &'a Path,
    pub(crate) script: &'a str,
    pub(crate) env: &'a BTreeMap<String, String>,
    pub(crate) folders: &'a [Folder],
    /// Inside there is a file to hide behind `true`.
    pub(crate) hide_ischroot: bool,
    /// /run is in memory and ends with the job.
    pub(crate) own_run: bool,
    /// The file with whom to ask for names, where it has a network.
    pub(crate) resolver: Option<&'a Path>,
    pub(crate) rights: Rights,
}

/// What a job may ask of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rights {
    /// What dpkg and scripts need.
    Step,
    /// To make containers inside.
    Containers,
}

impl Rights {
    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Step => &CAPABILITIES,
            Self::Containers => &OF_CONTAINERS,
        }
    }
}

/// A folder of the machine, with the sandbox's owners, that a job sees.
#[derive(Clone)]
pub(crate) struct Folder {
    pub(crate) outside: PathBuf,
    pub(crate) inside: &'static str,
    pub(crate) access: Access,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    ReadAndRun,
    Write,
}

impl Sandbox<'_> {
    /// Runs `/bin/sh -e` on the script, as the sandbox's root.
    pub(crate) fn run(&self, job: &Job<'_>) -> Result<(), BakeError> {
        let id = container_id(&self.config.site, self.build);
        let bundle = self.work.path().join("bundle");
        if !bundle.is_dir() {
            fs::create_dir(&bundle).map_err(BakeError::io("make folder", &bundle))?;
        }
        let spec = bundle.join("config.json");
        fs::write(&spec, self.spec(job, &id).to_string()).map_err(BakeError::io("write", &spec))?;

        let limit = self.config.limits.step;
        let mut command = runtime(self.config);
        command.args(["run", "--bundle"]).arg(&bundle);
        let outcome = if job.resolver.is_some() {
            let pid_file = bundle.join("pid");
            // Of an earlier step.
            match fs::remove_file(&pid_file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(BakeError::io("remove", &pid_file)(error));
                }
                _ => {}
            }
            command.arg("--pid-file").arg(&pid_file).arg(&id);
            let ended = self.cancel.child_token();
            std::thread::scope(|scope| {
                let carrying = scope.spawn(|| network::carry(&pid_file, self.log, &ended, limit));
                let outcome = command::run(&mut command, Stdout::Log, self.log, self.cancel, limit);
                ended.cancel();
                let carried = carrying.join().unwrap_or(Err(BakeError::Cancelled));
                // What failed first says more.
                carried.and(outcome)
            })
        } else {
            command.arg(&id);
            command::run(&mut command, Stdout::Log, self.log, self.cancel, limit)
        };
        if !matches!(&outcome, Ok(outcome) if outcome.code.is_some() && !outcome.timed_out) {
            // The runtime was killed, not what it had started.
            delete(self.config, &id)?;
        }
        let outcome = outcome?;
        if outcome.succeeded() {
            return Ok(());
        }
        Err(BakeError::Step {
            step: job.step.to_owned(),
            why: outcome.why(limit),
            last_lines: outcome.last_lines,
        })
    }

    fn spec(&self, job: &Job<'_>, id: &str) -> Value {
        let limits = &self.config.limits;
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                   "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
            json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                   "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}),
            json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                   "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
            // One of its own network namespace; the host's, bound, would show its cgroups.
            json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
                   "options": ["nosuid", "noexec", "nodev", "ro"]}),
            // What is left there is nobody's.
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmp",
                   "options": ["nosuid", "nodev", "mode=1777", format!("size={}", limits.tree)]}),
        ];
        if job.hide_ischroot {
            // libc6's scripts restart init, and sleep, where they do not see that they are in a chroot.
            mounts.push(json!({"destination": "/usr/bin/ischroot", "type": "none",
                // The flags that its mount has can't be taken away in there, so they are said again.
                "source": job.root.join("usr/bin/true"), "options": ["bind", "ro", "nosuid", "nodev"]}));
        }
        if job.rights == Rights::Containers {
            // Where they are made. It binds parts of it again with fewer restrictions, which the kernel allows for a mount of the
            // sandbox's own.
            mounts.push(json!({"destination": "/var", "type": "tmpfs", "source": "var",
                "options": ["mode=755", format!("size={}", limits.tree)]}));
        }
        if job.own_run {
            mounts.push(json!({"destination": "/run", "type": "tmpfs", "source": "run",
                "options": ["nosuid", "nodev", "mode=755", format!("size={}", limits.tree)]}));
        }
        for Folder { outside, inside, access } in job.folders {
            let (access, run) = match access {
                Access::Read => ("ro", "noexec"),
                Access::ReadAndRun => ("ro", "exec"),
                Access::Write => ("rw", "noexec"),
            };
            mounts.push(json!({"destination": inside, "type": "none", "source": outside,
                "options": ["rbind", access, run, "nosuid", "nodev"]}));
        }
        if let Some(file) = job.resolver {
            mounts.push(json!({"destination": network::RESOLV_CONF, "type": "none", "source": file,
                "options": ["bind", "ro", "noexec", "nosuid", "nodev"]}));
        }
        let script = match job.resolver {
            Some(_) => Cow::Owned(format!("{}{}", network::WAIT, job.script)),
            None => Cow::Borrowed(job.script),
        };
        let env: Vec<String> = job.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let capabilities = job.rights.capabilities();
        let mapping = json!([{"containerID": 0, "hostID": SHIFT, "size": IDS}]);
        let mut resources = json!({
            "memory": {"limit": i64::try_from(limits.memory).unwrap_or(i64::MAX)},
            "pids": {"limit": limits.pids},
        });
        let processors = std::thread::available_parallelism()
            .map_or(1.0, |n| f64::from(u32::try_from(n.get()).unwrap_or(u32::MAX)));
        if limits.cpus < processors {
            #[allow(clippy::cast_possible_truncation)]
            // Smaller than the machine's processors, times 100,000.
            let quota = (limits.cpus * 100_000.0) as i64;
            resources["cpu"] = json!({"quota": quota.max(1000), "period": 100_000});
        }
        json!({
            "ociVersion": "1.0.2",
            "hostname": "localhost",
            "root": {"path": job.root, "readonly": false},
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-e", "-c", script],
                "env": env,
                "cwd": "/",
                "noNewPrivileges": true,
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 1024},
                            {"type": "RLIMIT_CORE", "hard": 0, "soft": 0}],
                "oomScoreAdj": 500,
            },
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": "user"}, {"type": "pid"}, {"type": "mount"}, {"type": "ipc"},
                               {"type": "uts"}, {"type": "network"}, {"type": "cgroup"}],
                "uidMappings": mapping,
                "gidMappings": mapping,
                "cgroupsPath": format!("/{id}"),
                "resources": resources,
                // Of a network of its own, without a device: `nginx -t` opens its ports.
                "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
                "seccomp": seccomp::profile(job.rights),
                "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware",
                    "/sys/devices/virtual/powercap"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        })
    }
}

/// Also the name of its cgroup, in every hierarchy.
fn container_id(site: &SiteId, build: &BuildId) -> String {
    format!("{}{build}", prefix(site))
}

pub(crate) fn prefix(site: &SiteId) -> String {
    format!("kiln-{site}-bake-")
}

fn runtime(config: &BakeConfig) -> Command {
    let mut command = Command::new(&config.runtime);
    command.arg("--root").arg(site_folder(&config.site).join("runc"));
    command
}

fn delete(config: &BakeConfig, id: &str) -> Result<(), BakeError> {
    let log: LogSink = std::sync::Arc::new(|_: &str| {});
    let mut command = runtime(config);
    command.args(["delete", "--force", id]);
    // Without the bake's own token, which may be what brought us here. Of a container that is not there it says so, which
    // is as good; what is really left over keeps its mounts, and is seen there.
    command::run(&mut command, Stdout::Keep, &log, &CancellationToken::new(), RUNTIME_LIMIT)?;
    Ok(())
}

/// Ends and removes every sandbox of this site, and the folder that their trees were in.
pub(crate) fn sweep(config: &BakeConfig) -> Result<(), BakeError> {
    let folder = site_folder(&config.site);
    let state = folder.join("runc");
    if let Ok(containers) = fs::read_dir(&state) {
        for container in containers.filter_map(Result::ok) {
            delete(config, &container.file_name().to_string_lossy())?;
        }
    }
    for cgroup in cgroups(&prefix(&config.site)) {
        remove_cgroup(&cgroup).map_err(BakeError::io("remove cgroup", &cgroup))?;
    }
    clear(&folder).map_err(BakeError::io("clear", &folder))
}

/// Of all hierarchies: below /sys/fs/cgroup itself with version 2, one folder deeper with version 1.
pub(crate) fn cgroups(prefix: &str) -> Vec<PathBuf> {
    let folders = |path: &Path| -> Vec<PathBuf> {
        let found = fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
        found.filter(|item| item.file_type().is_ok_and(|t| t.is_dir())).map(|item| item.path()).collect()
    };
    let top = folders(Path::new("/sys/fs/cgroup"));
    let below: Vec<PathBuf> = top.iter().flat_map(|path| folders(path)).collect();
    top.into_iter()
        .chain(below)
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect()
}

fn remove_cgroup(path: &Path) -> std::io::Result<()> {
    // The processes need a moment to be gone after they were killed; the bound is for those that can't be.
    for _ in 0..200 {
        for process in fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines() {
            if let Some(pid) = process.parse().ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error),
        }
    }
    Err(std::io::Error::from(std::io::ErrorKind::ResourceBusy))
}
