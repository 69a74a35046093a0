//! Programs that look at the outside: bounded in time and output, and never left behind.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// How a program ended.
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    /// Its last line, for people.
    pub(crate) complaint: String,
}

/// Kills a program with all that it started, where it is dropped before its end was seen.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended a moment ago: there is nobody left to be told.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Runs a program to its end, at most `timeout`, keeping at most `most` bytes of each output.
pub(crate) async fn run(mut command: Command, timeout: Duration, most: usize) -> Result<Output, String> {
    // A group of its own: transport helpers that it starts end with it.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().map_err(|error| format!("{program} can't be started: {error}"))?;
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let whole = async {
        let (stdout, stderr) = tokio::join!(read(stdout, most), read(stderr, most));
        (child.wait().await, stdout, stderr)
    };
    let Ok((status, stdout, stderr)) = tokio::time::timeout(timeout, whole).await else {
        return Err(format!("{program} did not end within {timeout:?}"));
    };
    let status = status.map_err(|error| format!("{program} was lost: {error}"))?;
    // The leader was reaped, and its number may be another's soon.
    group.0 = None;
    let stderr = String::from_utf8_lossy(&stderr);
    let complaint = stderr.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    let complaint = complaint.chars().filter(|c| !c.is_control()).take(300).collect();
    Ok(Output { status, stdout, complaint })
}

/// Reads to the end, keeps the first `most` bytes: a writer that is not listened to would never end.
async fn read(stream: Option<impl AsyncRead + Unpin>, most: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else { return kept };
    let mut buffer = [0; 4096];
    while let Ok(n) = stream.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        let room = most.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..n.min(room)]);
    }
    kept
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn output_is_bounded_and_the_complaint_is_one_line() {
        let script = "head -c 100000 /dev/zero | tr '\\0' a; echo one >&2; echo two >&2; exit 3";
        let output = run(shell(script), Duration::from_secs(20), 1000).await.unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(3), 1000));
        assert_eq!(output.complaint, "two");
    }

    #[tokio::test]
    async fn what_hangs_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let pid_file = folder.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", pid_file.display());
        let started = Instant::now();
        let limit = Duration::from_secs(2);
        assert!(run(shell(&script), limit, 1000).await.is_err());
        assert!(started.elapsed() < limit * 5);
        let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
        let pid = Pid::from_raw(pid).unwrap();
        // A killed process is there until its parent, now init, has reaped it.
        let ended = || match std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        while !ended() {
            assert!(started.elapsed() < Duration::from_secs(20), "the grandchild lives on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let missing = run(Command::new("/nonexistent/git"), Duration::from_secs(1), 10).await;
        assert!(missing.is_err_and(|why| why.starts_with("/nonexistent/git can't be started")));
    }
}
