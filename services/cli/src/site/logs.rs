//! Keeps the programs' logs bounded while they write.
//!
//! A program holds its log open and appends to it, whatever name it has by now, and it does so without the supervisor:
//! so the oldest part is taken out of the file itself. The kernel does that between two writes, so nothing is lost but
//! what is taken out.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// In bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    /// A log that takes more of the disk is cut.
    most: u64,
    /// What stays of it: the newest.
    kept: u64,
}

impl Default for Limit {
    fn default() -> Self {
        Self { most: 64 << 20, kept: 32 << 20 }
    }
}

/// What is read of a log's end.
const END: u64 = 64 << 10;

/// Takes the oldest part out of a log that has become too large.
pub(crate) fn bound(log: &Path, limit: Limit) -> io::Result<()> {
    let file = match OpenOptions::new().write(true).open(log) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let seen = file.metadata()?;
    // Counted in half kilobytes, whatever the file system's own blocks are.
    if seen.blocks() * 512 <= limit.most {
        return Ok(());
    }
    // Only whole blocks can be taken out.
    let cut = seen.len().saturating_sub(limit.kept) / seen.blksize() * seen.blksize();
    match fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, cut) {
        // ext4 and XFS can do it. Elsewhere the blocks are given back, and zeros are read in their place until the log
        // is put aside.
        Err(Errno::OPNOTSUPP | Errno::INVAL) => {
            fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, cut)?;
        }
        done => done?,
    }
    Ok(())
}

/// Puts a log that is over its limit in the place of the one before. For a program that does not write yet.
pub(crate) fn put_aside(log: &Path) -> io::Result<()> {
    match log.metadata() {
        Ok(it) if it.len() > Limit::default().most => std::fs::rename(log, log.with_extension("log.old")),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The newest lines.
pub(crate) fn end(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
    let mut bytes = Vec::new();
    file.take(END).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// On a file system that can collapse a range, and on one that can only punch holes.
    #[test]
    fn the_newest_lines_stay_while_a_program_writes() {
        for folder in ["/var/tmp", "/dev/shm"] {
            let folder = tempfile::tempdir_in(folder).unwrap();
            let path = folder.path().join("x.log");
            let limit = Limit { most: 256 << 10, kept: 64 << 10 };
            let mut log = OpenOptions::new().create(true).append(true).open(&path).unwrap();
            let done = AtomicBool::new(false);
            let lines = std::thread::scope(|scope| {
                let cutter = scope.spawn(|| {
                    let mut cuts = 0;
                    while !done.load(Ordering::Relaxed) {
                        let before = path.metadata().unwrap().blocks();
                        bound(&path, limit).unwrap();
                        cuts += u32::from(path.metadata().unwrap().blocks() < before);
                    }
                    cuts
                });
                let mut lines = 0_u64;
                // 2 MiB: eight times the limit.
                while lines < 1 << 17 {
                    writeln!(log, "line {lines:010}").unwrap();
                    lines += 1;
                }
                done.store(true, Ordering::Relaxed);
                assert!(cutter.join().unwrap() > 3);
                lines
            });
            bound(&path, limit).unwrap();
            assert!(path.metadata().unwrap().blocks() * 512 <= limit.most + (8 << 10));
            let text = std::fs::read_to_string(&path).unwrap();
            // The first is cut in two.
            let kept: Vec<_> = text.trim_start_matches('\0').lines().skip(1).collect();
            assert!(kept.len() as u64 * 16 >= limit.kept / 2, "{}", kept.len());
            let first = lines - kept.len() as u64;
            for (number, line) in (first..).zip(&kept) {
                assert_eq!(*line, format!("line {number:010}"), "in {}", folder.path().display());
            }
            assert!(end(&path).unwrap().ends_with(&format!("line {:010}\n", lines - 1)));
        }
    }

    #[test]
    fn a_log_that_is_not_there_is_bounded() {
        bound(Path::new("/nowhere/x.log"), Limit::default()).unwrap();
        put_aside(Path::new("/nowhere/x.log")).unwrap();
    }
}
