//! What is looked at inside an instance, as a process in it would see it: its own mounts, and no link that leads out.
//! All of it blocks.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kiln_model::check::{FileCheck, LogCheck, PackageCheck, PortCheck, ProcessCheck, Transport, UserCheck};
use kiln_probe::{FileSeen, LogSearch, MAX_CONTENT, PresentFile, ProcessSeen, UsersSeen, Verdict};
use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;

use crate::failure::{During, Failure};
use crate::logs::Reader;
use crate::process::Process;
use crate::rootfs::{name_of, open_inside, open_root};

/// Of dpkg's database: ten thousand packages.
const MAX_DATABASE: u64 = 32 << 20;
/// Of the users' and groups' files, and of a table of the kernel's.
const MAX_TABLE: u64 = 4 << 20;
/// Of a log, from its beginning.
const MAX_LOG: usize = 64 << 20;

pub(super) fn file(process: &Process, check: &FileCheck) -> Result<Verdict, Failure> {
    let what = || format!("looking at {}", check.path);
    let Some(root) = root(process)? else { return Ok(ended()) };
    let file = match open_inside(&root, &check.path, OFlags::PATH) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(kiln_probe::file(check, FileSeen::Absent)),
        Err(error) => return Err(Failure::new(what(), error)),
    };
    let stat = fstat(&file).during(what)?;
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let content = if regular && check.contains.is_some() {
        read(&file, MAX_CONTENT as u64).during(what)?
    } else {
        Vec::new()
    };
    let owner = name_of(&root, stat.st_uid);
    let seen = PresentFile {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        owner: owner.as_deref(),
        content: &content,
    };
    Ok(kiln_probe::file(check, FileSeen::Present(seen)))
}

pub(super) fn package(process: &Process, check: &PackageCheck) -> Result<Verdict, Failure> {
    let Some(root) = root(process)? else { return Ok(ended()) };
    Ok(kiln_probe::package(check, &text(&root, "var/lib/dpkg/status", MAX_DATABASE)?))
}

pub(super) fn user(process: &Process, check: &UserCheck) -> Result<Verdict, Failure> {
    let Some(root) = root(process)? else { return Ok(ended()) };
    let (passwd, group) = (text(&root, "etc/passwd", MAX_TABLE)?, text(&root, "etc/group", MAX_TABLE)?);
    Ok(kiln_probe::user(check, UsersSeen { passwd: &passwd, group: &group }))
}

pub(super) fn port(process: &Process, check: &PortCheck) -> Result<Verdict, Failure> {
    let tables = match check.protocol {
        Transport::Tcp => ["tcp", "tcp6"],
        Transport::Udp => ["udp", "udp6"],
    };
    let mut seen = String::new();
    for table in tables {
        let path = format!("/proc/{}/net/{table}", process.pid);
        match File::open(&path).and_then(|file| file.take(MAX_TABLE).read_to_string(&mut seen)) {
            Ok(_) => {}
            // A kernel without IPv6 has no such table.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::new(format!("reading {path}"), error)),
        }
    }
    // Asked after the tables were read: so they are of this process.
    if process.open()?.is_none() { Ok(ended()) } else { Ok(kiln_probe::port(check, &seen)) }
}

pub(super) fn process(process: &Process, check: &ProcessCheck) -> Result<Verdict, Failure> {
    let Some(root) = root(process)? else { return Ok(ended()) };
    let namespace = |pid: u32| fs::metadata(format!("/proc/{pid}/ns/pid")).map(|it| (it.dev(), it.ino()));
    let own = namespace(process.pid).during(|| format!("looking at process {}", process.pid))?;
    let mut seen = Vec::new();
    let listing = || "listing /proc".to_owned();
    for entry in fs::read_dir("/proc").during(listing)? {
        let entry = entry.during(listing)?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // One that has ended meanwhile is none of its processes any more.
        if namespace(pid).is_ok_and(|other| other == own)
            && let Some(found) = look_at(pid, &root)
        {
            seen.push(found);
        }
    }
    Ok(kiln_probe::process(check, &seen))
}

fn look_at(pid: u32, root: &OwnedFd) -> Option<ProcessSeen> {
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    // The folder itself belongs to root where the process has changed its user since it was begun.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let uid =
        status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().nth(1)?.parse().ok())?;
    let mut line = Vec::new();
    File::open(format!("/proc/{pid}/cmdline")).ok()?.take(4096).read_to_end(&mut line).ok()?;
    let first = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let program = first.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(ProcessSeen {
        name: text(name.trim_ascii_end()),
        program: text(program),
        uid,
        user: name_of(root, uid),
    })
}

pub(super) fn log(path: &Path, check: &LogCheck) -> Result<Verdict, Failure> {
    let what = || format!("reading {}", path.display());
    let mut search = LogSearch::new(check);
    let mut reader = Reader::open(path, 0).during(what)?;
    let mut searched = 0;
    // Bounded: an instance may write faster than is read here.
    while searched < MAX_LOG {
        let lines = reader.next().during(what)?;
        if lines.is_empty() || lines.iter().any(|line| search.line(&line.text)) {
            return Ok(search.verdict());
        }
        searched += lines.iter().map(|line| line.text.len()).sum::<usize>();
    }
    Ok(Verdict::failed(format!("the log has more than the {MAX_LOG} bytes that are searched")))
}

/// None where the process has ended.
fn root(process: &Process) -> Result<Option<OwnedFd>, Failure> {
    let root = open_root(format!("/proc/{}/root", process.pid).as_ref())?;
    // Asked after the root was opened: so it is this process's root.
    Ok(process.open()?.map(|_| root))
}

fn ended() -> Verdict {
    Verdict::failed("the instance has just ended")
}

/// What a file says; nothing where there is none.
fn text(root: &OwnedFd, path: &str, limit: u64) -> Result<String, Failure> {
    let what = || format!("reading /{path}");
    let file = match open_inside(root, path, OFlags::PATH) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(Failure::new(what(), error)),
    };
    let stat = fstat(&file).during(what)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Failure::new(what(), "it is no file"));
    }
    if u64::try_from(stat.st_size).is_ok_and(|size| size > limit) {
        return Err(Failure::new(what(), format!("it has {} bytes, read are at most {limit}", stat.st_size)));
    }
    Ok(String::from_utf8_lossy(&read(&file, limit).during(what)?).into_owned())
}

/// Opens what a path descriptor stands for, without going by its name again.
fn read(file: &OwnedFd, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    file.take(limit).read_to_end(&mut content)?;
    Ok(content)
}
