//! What bakes leave on the machine when their builder is killed: programs that it had started, sandboxes with their
//! cgroups, and work trees with their mounts. Each is found by the kernel's own lists.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_model::event::Service;
use kiln_model::name::SiteId;
use kiln_service::machine::{Leftover, STARTED_BY, is_over, started_by};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::BakeConfig;
use super::error::BakeError;
use super::sandbox;
use super::work::{mounts_below, site_folder};

/// Until a process that was killed is gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(5);

/// Ends and removes all of it. No bake of the site may run.
pub(crate) fn sweep(config: &BakeConfig) -> Result<(), BakeError> {
    // First, for a runtime that is still starting would make its cgroup after those that are there were removed.
    end_programs(config)?;
    sandbox::sweep(config)
}

pub(crate) fn find(config: &BakeConfig) -> Result<Vec<Leftover>, BakeError> {
    let mut found: Vec<_> = programs(config)?.into_iter().map(Leftover::process).collect();
    for cgroup in sandbox::cgroups(&sandbox::prefix(&config.site)) {
        let procs = cgroup.join("cgroup.procs");
        let members = fs::read_to_string(&procs).map_err(BakeError::io("read", &procs))?;
        found.extend(members.lines().map(Leftover::process));
        found.push(Leftover::new("cgroup", cgroup.display()));
    }
    let folder = site_folder(&config.site);
    let mounts = mounts_below(&folder).map_err(BakeError::io("look for mounts below", &folder))?;
    found.extend(mounts.iter().map(|at| Leftover::new("mount", at.display())));
    if folder.exists() {
        found.push(Leftover::new("folder", folder.display()));
    }
    // Each process is in the same group of every hierarchy.
    found.sort();
    found.dedup();
    Ok(found)
}

/// apt, git and the runtime are in no cgroup of the site's, but in the environment that they were started with.
fn programs(config: &BakeConfig) -> Result<Vec<i32>, BakeError> {
    let processes = fs::read_dir("/proc").map_err(BakeError::io("list", "/proc"))?;
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    Ok(pids.filter(|pid| *pid != own && is_ours(*pid, config)).collect())
}

fn is_ours(pid: i32, config: &BakeConfig) -> bool {
    // Empty for one that has ended, and for the kernel's own.
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    carries(&environment, &mark(&config.site), &config.home) && !is_over(pid)
}

fn mark(site: &SiteId) -> String {
    format!("{STARTED_BY}={}", started_by(Service::Builder, site))
}

/// The builder's own mark, or git's home, which is given no other environment.
fn carries(environment: &[u8], mark: &str, home: &Path) -> bool {
    let home = format!("HOME={}/", home.display());
    environment.split(|byte| *byte == 0).any(|it| it == mark.as_bytes() || it.starts_with(home.as_bytes()))
}

fn end_programs(config: &BakeConfig) -> Result<(), BakeError> {
    let since = Instant::now();
    loop {
        let left = programs(config)?;
        let Some(first) = left.first() else { return Ok(()) };
        if since.elapsed() > GONE_WITHIN {
            let why = io::Error::from(io::ErrorKind::TimedOut);
            return Err(BakeError::io("end the process", format!("/proc/{first}"))(why));
        }
        for pid in left {
            kill(pid, config).map_err(BakeError::io("end the process", format!("/proc/{pid}")))?;
        }
        std::thread::sleep(LOOK);
    }
}

fn kill(pid: i32, config: &BakeConfig) -> io::Result<()> {
    let Some(id) = Pid::from_raw(pid) else { return Ok(()) };
    let gone = |errno: rustix::io::Errno| {
        if errno == rustix::io::Errno::SRCH { Ok(()) } else { Err(errno.into()) }
    };
    let held = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(held) => held,
        Err(errno) => return gone(errno),
    };
    // Looked at again now that it is held: the number may have gone to another one since it was listed.
    if is_ours(pid, config) { pidfd_send_signal(&held, Signal::KILL).or_else(gone) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_known_by_what_they_were_started_with() {
        let site = "0a1b2c3d".parse().unwrap();
        let mark = mark(&site);
        let is_ours =
            |environment: &str| carries(environment.as_bytes(), &mark, Path::new("/var/lib/kiln/a/builder"));
        assert!(is_ours(&format!("PATH=/bin\0{mark}\0")));
        assert!(is_ours("HOME=/var/lib/kiln/a/builder/contexts\0PATH=/bin\0"));
        assert!(!is_ours("HOME=/var/lib/kiln/a/builder2\0KILN_HOME=/var/lib/kiln/a\0"));
        assert!(!is_ours(&format!("X={mark}\0{mark}e\0")));
        assert!(!is_ours(&mark.replace("builder", "node")));
    }
}
