//! A process that is remembered across restarts of the node, and of the machine.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::failure::{During, Failure};

/// A process by its number and what tells it from a later one with the same number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// In clock ticks since boot.
    started: u64,
    boot: String,
}

fn boot_id() -> Result<String, Failure> {
    let path = "/proc/sys/kernel/random/boot_id";
    fs::read_to_string(path).map(|id| id.trim().to_owned()).during(|| format!("reading {path}"))
}

/// The 22nd field of stat; the second one is a name that can hold spaces and parentheses.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

impl Process {
    /// A process that runs now.
    pub(crate) fn of(pid: u32) -> Result<Self, Failure> {
        let what = || format!("looking at process {pid}");
        let started = started(pid).ok_or_else(|| Failure::new(what(), "it has ended"))?;
        Ok(Self { pid, started, boot: boot_id()? })
    }

    /// A descriptor that becomes readable when it ends; none if it has ended.
    pub(crate) fn open(&self) -> Result<Option<OwnedFd>, Failure> {
        let what = || format!("opening process {}", self.pid);
        if boot_id()? != self.boot {
            return Ok(None);
        }
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(Failure::new(what(), error)),
        };
        // Looked at after the descriptor was opened: what it holds can't become another process any more.
        if started(self.pid) != Some(self.started) {
            return Ok(None);
        }
        // It keeps its number until its parent has asked how it ended.
        let mut ended = [PollFd::new(&fd, PollFlags::IN)];
        let ended =
            poll(&mut ended, Some(&Timespec::default())).map_err(|error| Failure::new(what(), error))?;
        Ok((ended == 0).then_some(fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_not_taken_for_another() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.open().unwrap().is_some());
        assert!(Process { started: own.started + 1, ..own.clone() }.open().unwrap().is_none());
        assert!(Process { boot: "another".to_owned(), ..own }.open().unwrap().is_none());
    }

    #[test]
    fn one_that_nobody_has_asked_how_it_ended_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.open().unwrap().is_some());
        child.kill().unwrap();
        // Readable at its end; not waited for, so it stays as it is.
        let fd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
        assert!(process.open().unwrap().is_none());
        child.wait().unwrap();
    }
}
