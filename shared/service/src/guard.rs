//! One copy of each service in a site.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_model::event::Service;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::config::Paths;

/// A service that was killed while it started a child leaves the lock with it until that becomes another program.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two looks at a lock that is held.
const LOOK: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the {service} of this site runs already (lock {path} is held): stop it first")]
    Held { service: Service, path: PathBuf },
    #[error("can't lock {path}: {reason}")]
    Failed { path: PathBuf, reason: String },
}

/// Holds the service's lock, and shows its process id, until it is dropped. The kernel lets go of the lock however the
/// process ends.
#[derive(Debug)]
pub struct Guard {
    _lock: File,
    pid: PathBuf,
}

impl Guard {
    /// # Errors
    /// [`Error::Held`] where a copy of the service runs.
    pub fn take(paths: Paths<'_>, service: Service) -> Result<Self, Error> {
        let path = paths.lock(service);
        let failed = |path: &PathBuf, reason: String| Error::Failed { path: path.clone(), reason };
        let open = |path: &PathBuf| {
            let mut options = File::options();
            options.create(true).write(true).truncate(false).mode(0o600);
            options.open(path).map_err(|error| failed(path, error.to_string()))
        };
        let lock = open(&path)?;
        match lock_within(&lock, PATIENCE) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(Error::Held { service, path }),
            Err(error) => return Err(failed(&path, error.to_string())),
        }
        // Written aside and moved: a reader never sees half a number.
        let pid = paths.pid(service);
        let aside = pid.with_extension("pid.new");
        let written = open(&aside)?
            .write_all(format!("{}\n", std::process::id()).as_bytes())
            .and_then(|()| std::fs::rename(&aside, &pid));
        written.map_err(|error| failed(&pid, error.to_string()))?;
        Ok(Self { _lock: lock, pid })
    }
}

/// Locks a file, or waits for whoever has it. The lock ends with the file's last descriptor. Blocks.
///
/// # Errors
/// `WOULDBLOCK` where another one had it for all of `patience`, and what else the kernel says.
pub fn lock_within(file: &File, patience: Duration) -> Result<(), Errno> {
    let begin = Instant::now();
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK | Errno::INTR) if begin.elapsed() < patience => std::thread::sleep(LOOK),
            locked => return locked,
        }
    }
}

/// Whether somebody holds a lock: what runs, wherever its process is seen. One that can't be opened is not there.
pub fn is_held(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|lock| {
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    })
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.pid) {
            tracing::debug!(path = %self.pid.display(), %error, "could not remove the pid file");
        }
    }
}
