//! Checks of one instance: from the machine over its network, or inside it.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use kiln_model::check::{Check, CheckResult, FileCheck};
use kiln_model::name::InstanceId;
use kiln_probe::{CommandSeen, FileSeen, MAX_CONTENT, PresentFile, Verdict};
use kiln_service::error::ApiError;
use kiln_store::Store;
use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;

use crate::failure::{During, Failure};
use crate::node::{Node, blocking};
use crate::process::Process;
use crate::rootfs::{name_of, open_inside, open_root};

impl<S: Store> Node<S> {
    pub(crate) async fn check(
        &self,
        id: &InstanceId,
        check: Check,
        limit: Duration,
    ) -> Result<CheckResult, ApiError> {
        let started = Instant::now();
        let held = self.book.get(id).ok_or_else(|| ApiError::not_found("instance", id.to_string()))?;
        let record = held.value;
        let (Some(process), Some(plug)) = (record.process(), &record.plug) else {
            return Ok(Verdict::failed(format!("the instance is {}", record.state.word())).since(started));
        };
        let verdict = match check {
            Check::Command(check) => match self.runtime.exec(&id.to_string(), &check.run, limit).await {
                Ok(ran) => {
                    let seen = CommandSeen { status: ran.status, stdout: &ran.stdout, stderr: &ran.stderr };
                    kiln_probe::command(&check, seen)
                }
                Err(failure) => Verdict::failed(failure.to_string()),
            },
            Check::File(check) => {
                let process = process.clone();
                match blocking(move || look(&process, &check)).await? {
                    Ok(verdict) => verdict,
                    Err(failure) => Verdict::failed(failure.to_string()),
                }
            }
            over_network @ (Check::Http(_) | Check::Tcp(_)) => {
                return Ok(kiln_probe::probe(plug.address.into(), &over_network, limit).await);
            }
        };
        Ok(verdict.since(started))
    }
}

/// Looks at a file as the instance sees it: its own mounts, and no link that leads out of it.
fn look(process: &Process, check: &FileCheck) -> Result<Verdict, Failure> {
    let what = || format!("looking at {}", check.path);
    let root = open_root(format!("/proc/{}/root", process.pid).as_ref())?;
    // Asked after the root was opened: so it is this process's root.
    if process.open()?.is_none() {
        return Ok(Verdict::failed("the instance has just ended"));
    }
    let file = match open_inside(&root, &check.path, OFlags::PATH) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(kiln_probe::file(check, FileSeen::Absent)),
        Err(error) => return Err(Failure::new(what(), error)),
    };
    let stat = fstat(&file).during(what)?;
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let content = if regular && check.contains.is_some() { read(&file).during(what)? } else { Vec::new() };
    let owner = name_of(&root, stat.st_uid);
    let seen = PresentFile {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        owner: owner.as_deref(),
        content: &content,
    };
    Ok(kiln_probe::file(check, FileSeen::Present(seen)))
}

/// Opens what a path descriptor stands for, without going by its name again.
fn read(file: &OwnedFd) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    file.take(MAX_CONTENT as u64).read_to_end(&mut content)?;
    Ok(content)
}
