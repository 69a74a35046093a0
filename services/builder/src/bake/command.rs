//! Child processes of a bake: their output goes to the log line by line, and they end with the bake.

use std::io::{BufRead as _, BufReader, Read};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::time::Timespec;
use tokio_util::sync::CancellationToken;

use super::LogSink;
use super::error::BakeError;

/// Output that is kept for the error; more is in the log.
const LAST_LINES: usize = 20;
/// A line without an end must not take all memory.
const LINE_LIMIT: u64 = 64 << 10;
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

#[derive(Debug)]
pub(crate) struct Outcome {
    /// `None` where a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) last_lines: Vec<String>,
    pub(crate) timed_out: bool,
}

impl Outcome {
    pub(crate) fn succeeded(&self) -> bool {
        self.code == Some(0) && !self.timed_out
    }

    pub(crate) fn why(&self, limit: Duration) -> String {
        match self.code {
            _ if self.timed_out => format!("it did not end within {} s", limit.as_secs()),
            Some(code) => format!("it ended with status {code}"),
            None => "a signal ended it".to_owned(),
        }
    }
}

/// Where a command's standard output goes; its errors always go to the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stdout {
    Log,
    Keep,
}

/// Runs a command in a process group of its own, until it ends, the bake is cancelled, or the time is over.
pub(crate) fn run(
    command: &mut Command,
    stdout: Stdout,
    log: &LogSink,
    cancel: &CancellationToken,
    limit: Duration,
) -> Result<Outcome, BakeError> {
    if cancel.is_cancelled() {
        return Err(BakeError::Cancelled);
    }
    let name = command.get_program().to_owned();
    let failed = |doing| BakeError::io(doing, &name);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(failed("start"))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let lines = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (kept, outcome) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| match (stdout, out) {
            (Stdout::Keep, Some(mut out)) => {
                let mut kept = Vec::new();
                // What can't be read is missing in what is kept, and that is checked.
                let _ = out.read_to_end(&mut kept);
                kept
            }
            (Stdout::Log, Some(out)) => {
                forward(out, log, &lines);
                Vec::new()
            }
            (_, None) => Vec::new(),
        });
        scope.spawn(|| {
            if let Some(err) = err {
                forward(err, log, &lines);
            }
        });
        let outcome = wait(&mut child, cancel, limit);
        (reader.join().unwrap_or_default(), outcome)
    });
    let (status, timed_out) = outcome.map_err(failed("wait for"))?;
    if cancel.is_cancelled() {
        return Err(BakeError::Cancelled);
    }
    let last_lines = lines.lock().map(|lines| lines.clone()).unwrap_or_default();
    Ok(Outcome { code: status.code(), stdout: kept, last_lines, timed_out })
}

fn wait(
    child: &mut std::process::Child,
    cancel: &CancellationToken,
    limit: Duration,
) -> std::io::Result<(std::process::ExitStatus, bool)> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let end = Instant::now() + limit;
    let mut timed_out = false;
    loop {
        let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&TICK)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok((child.wait()?, timed_out)),
            Err(errno) => return Err(errno.into()),
        }
        timed_out = timed_out || Instant::now() >= end;
        if timed_out || cancel.is_cancelled() {
            // The group lives as long as its leader has not been waited for, so it is no other one's. Killed on every tick:
            // a member may have forked between two.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

fn forward(stream: impl Read, log: &LogSink, lines: &std::sync::Mutex<Vec<String>>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    while matches!((&mut stream).take(LINE_LIMIT).read_until(b'\n', &mut line), Ok(n) if n > 0) {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        log(text);
        if !text.is_empty()
            && let Ok(mut lines) = lines.lock()
        {
            if lines.len() == LAST_LINES {
                lines.remove(0);
            }
            lines.push(text.to_owned());
        }
        line.clear();
    }
}
