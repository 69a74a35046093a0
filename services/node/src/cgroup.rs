//! Control groups of a site: `/kiln-<site>/helpers`, `/kiln-<site>/<instance>` and `/kiln-<site>/<instance>.conmon`.
//!
//! runc places an instance in every hierarchy that limits something. The node itself looks at one hierarchy only, to
//! know which processes belong to what: the unified one where it is mounted, as runc joins it in hybrid mode too, else
//! systemd's own, else that of the `pids` controller. In the first two systemd sees what is no part of its unit: it
//! stops the node without its instances.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use crate::failure::{During, Failure};

/// How long processes may take to vanish after SIGKILL. One that hangs in the kernel is reported, not waited for.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    pub(crate) mount: PathBuf,
    unified: bool,
    controllers: String,
}

/// Every hierarchy that is mounted on this machine.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>, Failure> {
    let mounts =
        fs::read_to_string("/proc/self/mountinfo").during(|| "reading /proc/self/mountinfo".to_owned())?;
    Ok(parse_hierarchies(&mounts))
}

fn parse_hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let line = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let mount = PathBuf::from(place.split(' ').nth(4)?);
        let mut kind = kind.split(' ');
        let (fstype, _source, options) = (kind.next()?, kind.next()?, kind.next()?);
        let unified = match fstype {
            "cgroup2" => true,
            "cgroup" => false,
            _ => return None,
        };
        Some(Hierarchy { mount, unified, controllers: options.to_owned() })
    };
    mounts.lines().filter_map(line).collect()
}

/// The one hierarchy that the node looks at.
fn tracking() -> Result<PathBuf, Failure> {
    let all = hierarchies()?;
    let with = |name: &str| all.iter().find(|h| h.controllers.split(',').any(|c| c == name));
    let unified = all.iter().find(|h| h.unified);
    let found = unified.or_else(|| with("name=systemd")).or_else(|| with("pids"));
    found.map(|hierarchy| hierarchy.mount.clone()).ok_or_else(|| {
        let why = "neither cgroup2 nor the pids controller is mounted on this machine";
        Failure::new("looking for control groups", why)
    })
}

/// One group of the site in the tracking hierarchy.
#[derive(Debug)]
pub(crate) struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// Where programs that the node runs are.
    pub(crate) const HELPERS: &'static str = "helpers";

    /// Opens a group, and makes it where it is not there.
    pub(crate) fn make(site_group: &str, name: &str) -> Result<Self, Failure> {
        let dir = tracking()?.join(site_group).join(name);
        fs::create_dir_all(&dir).during(|| format!("making the cgroup {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// A group that may not be there.
    pub(crate) fn named(site_group: &str, name: &str) -> Result<Self, Failure> {
        Ok(Self { dir: tracking()?.join(site_group).join(name) })
    }

    /// The command's process moves itself here between fork and exec, so that no moment of it runs elsewhere.
    pub(crate) fn join_before_exec(&self, command: &mut Command) -> Result<(), Failure> {
        let procs = self.dir.join("cgroup.procs");
        let file = fs::OpenOptions::new()
            .write(true)
            .open(&procs)
            .during(|| format!("opening {}", procs.display()))?;
        let join = move || {
            // SAFETY: write(2) is async-signal-safe, the descriptor stays open as the closure owns its file, and the
            // buffer is static.
            let written = unsafe { libc::write(file.as_raw_fd(), c"0".as_ptr().cast(), 1) };
            if written == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // SAFETY: the closure calls write(2) only, which is allowed between fork and exec; it does not allocate.
        unsafe { command.pre_exec(join) };
        Ok(())
    }

    pub(crate) fn pids(&self) -> Result<Vec<u32>, Failure> {
        match fs::read_to_string(self.dir.join("cgroup.procs")) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            Err(error) if gone(&error) => Ok(Vec::new()),
            Err(error) => Err(Failure::new(format!("reading {}", self.dir.display()), error)),
        }
    }

    /// Kills one process, if it is in the group.
    pub(crate) fn kill_member(&self, pid: u32) -> Result<(), Failure> {
        if self.pids()?.contains(&pid) {
            kill(pid);
        }
        Ok(())
    }

    /// Kills everything in the group until it is empty. Blocks.
    pub(crate) fn empty(&self) -> Result<(), Failure> {
        let since = Instant::now();
        // One write kills the whole tree at once where the kernel has it (cgroup2 from 5.14), forks included.
        let whole = fs::write(self.dir.join("cgroup.kill"), "1").is_ok();
        loop {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            if since.elapsed() > GONE_WITHIN {
                return Err(Failure::new(
                    format!("emptying {}", self.dir.display()),
                    format!("processes {pids:?} do not end; see what they wait for in /proc/<pid>/stack"),
                ));
            }
            for pid in pids.iter().filter(|_| !whole) {
                kill(*pid);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // It may have ended since it was seen.
    let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
}

/// The groups below the site's own, in the tracking hierarchy.
pub(crate) fn groups(site_group: &str) -> Result<Vec<String>, Failure> {
    let dir = tracking()?.join(site_group);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(Failure::new(format!("listing {}", dir.display()), error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.during(|| format!("listing {}", dir.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// How the hierarchies are mounted, for people.
pub(crate) fn mode() -> Result<String, Failure> {
    let all = hierarchies()?;
    let has = |name: &str| {
        let unified = all.iter().filter(|h| h.unified).any(|h| {
            let list = fs::read_to_string(h.mount.join("cgroup.controllers")).unwrap_or_default();
            list.split_whitespace().any(|controller| controller == name)
        });
        unified
            || all.iter().any(|h| !h.unified && h.controllers.split(',').any(|controller| controller == name))
    };
    if let Some(missing) = ["memory", "cpu", "pids"].into_iter().find(|name| !has(name)) {
        return Err(Failure::new("looking at control groups", format!("there is no controller `{missing}`")));
    }
    let (unified, legacy) = (all.iter().any(|h| h.unified), all.iter().any(|h| !h.unified));
    let mode = match (unified, legacy) {
        (true, false) => "unified (v2)",
        (true, true) => "hybrid (v1 with v2 beside)",
        _ => "v1",
    };
    Ok(mode.to_owned())
}

/// Processes of the site, in whatever group.
pub(crate) fn processes(site_group: &str) -> Result<Vec<u32>, Failure> {
    let mut pids = Vec::new();
    for group in groups(site_group)? {
        pids.extend(Cgroup::named(site_group, &group)?.pids()?);
    }
    Ok(pids)
}

/// Removes a group from every hierarchy; the processes in it must have ended. Blocks.
pub(crate) fn remove_everywhere(group: &str) -> Result<(), Failure> {
    for hierarchy in hierarchies()? {
        remove_tree(&hierarchy.mount.join(group))?;
    }
    Ok(())
}

/// In which hierarchies a group is there.
pub(crate) fn places(group: &str) -> Result<Vec<PathBuf>, Failure> {
    Ok(hierarchies()?.into_iter().map(|h| h.mount.join(group)).filter(|dir| dir.is_dir()).collect())
}

fn remove_tree(dir: &Path) -> Result<(), Failure> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(Failure::new(format!("listing {}", dir.display()), error)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    remove_dir(dir)
}

fn remove_dir(dir: &Path) -> Result<(), Failure> {
    let since = Instant::now();
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if gone(&error) => return Ok(()),
            // A process that was killed leaves its group a moment after it is no longer listed.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && since.elapsed() < GONE_WITHIN => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(Failure::new(format!("removing the cgroup {}", dir.display()), error)),
        }
    }
}

/// The group vanished, before or while it was read.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_told_apart() {
        let mounts = "\
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/pids rw,relatime shared:9 - cgroup cgroup rw,pids
32 30 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
        let found = parse_hierarchies(mounts);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].mount, Path::new("/sys/fs/cgroup/pids"));
        assert!(!found[0].unified);
        assert!(found[1].unified);
    }
}
