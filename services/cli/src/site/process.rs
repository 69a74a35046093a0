//! A process by its id, held so that the id can't come to mean another one.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    handle: Arc<OwnedFd>,
}

impl Process {
    /// The process that a pid file names, if it runs and its command line holds `mark`. A file outlives its process,
    /// and the id may have been given to another one since.
    pub(crate) fn named(pid_file: &Path, mark: &str) -> Option<Self> {
        let pid: i32 = fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
        Self::held(pid, |line| line.iter().any(|argument| argument == mark))
    }

    /// Every process with a command line that is wanted.
    pub(crate) fn all(is_wanted: impl Fn(&[String]) -> bool) -> io::Result<Vec<Self>> {
        Ok(pids()?.into_iter().filter_map(|pid| Self::held(pid, &is_wanted)).collect())
    }

    fn held(pid: i32, is_wanted: impl Fn(&[String]) -> bool) -> Option<Self> {
        let handle = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // Looked at after it is held: what is held now is what has this command line.
        is_wanted(&command_line(pid)).then(|| Self { pid, handle: Arc::new(handle) })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) async fn ended(&self) {
        let handle = Arc::clone(&self.handle);
        // A handle of a process becomes readable when it ends. An interrupted wait is begun anew; no other error is
        // possible for a handle that is open. A thread that nobody waits for any more ends with the process.
        let wait =
            move || while poll(&mut [PollFd::new(&*handle, PollFlags::IN)], None) == Err(Errno::INTR) {};
        let _ = tokio::task::spawn_blocking(wait).await;
    }

    fn signal(&self, signal: Signal) -> Result<(), Errno> {
        match pidfd_send_signal(&self.handle, signal) {
            Err(Errno::SRCH) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// HUP: it reads its settings anew.
    pub(crate) fn reload(&self) -> Result<(), Errno> {
        self.signal(Signal::HUP)
    }

    /// TERM, and KILL when the patience is over. False where it had to be killed.
    pub(crate) async fn stop(&self, patience: Duration) -> Result<bool, Errno> {
        self.signal(Signal::TERM)?;
        if tokio::time::timeout(patience, self.ended()).await.is_ok() {
            return Ok(true);
        }
        self.signal(Signal::KILL)?;
        self.ended().await;
        Ok(false)
    }
}

/// Of all processes.
pub(crate) fn pids() -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(pids)
}

/// Empty for a process that ended, and for a thread of the kernel.
pub(crate) fn command_line(pid: i32) -> Vec<String> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    raw.split(|byte| *byte == 0)
        .filter(|part| !part.is_empty())
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[tokio::test]
    async fn a_process_is_known_by_its_command_line_and_ends() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let mut child = Command::new("sleep").arg("1000.25").stdin(Stdio::null()).spawn().unwrap();
        fs::write(&file, format!("{}\n", child.id())).unwrap();
        assert!(Process::named(&file, "another").is_none());
        // Just after the start the kernel may show no command line yet.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let process = loop {
            if let Some(process) = Process::named(&file, "1000.25") {
                break process;
            }
            assert!(std::time::Instant::now() < deadline, "it never shows its command line");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert_eq!(process.stop(Duration::from_secs(5)).await, Ok(true));
        // Not reaped yet, so the id is still its own; its command line is gone.
        assert!(Process::named(&file, "1000.25").is_none());
        child.wait().unwrap();
        assert!(Process::named(&file, "1000.25").is_none());
    }

    #[tokio::test]
    async fn what_does_not_listen_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
        let mut command = Command::new("sh");
        let mut child = command.args(["-c", script, "mark-7"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 5];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        fs::write(&file, child.id().to_string()).unwrap();
        let process = Process::named(&file, "mark-7").unwrap();
        assert_eq!(process.stop(Duration::from_millis(200)).await, Ok(false));
        child.wait().unwrap();
    }
}
