//! Fills memory with a copy of the image's content. The image is not trusted: links are copied, never followed, and what
//! is neither file, folder nor link has no place in memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    self as rfs, AtFlags, FileType, Gid, Mode, OFlags, RawDir, RawMode, Stat, Timespec, Timestamps, Uid,
};
use rustix::io::Errno;

use super::{User, open_inside};
use crate::failure::{During, Failure};

/// Folders in folders. Each level holds two descriptors.
const DEPTH: usize = 100;

/// Makes the folder `to` in memory as a copy of what the image has at `path`, or, where it has nothing, an empty one that
/// belongs to the instance's user.
pub(super) fn copy(image: &OwnedFd, path: &str, to: &Path, user: &User) -> Result<(), Failure> {
    let what = || format!("filling {path} with the image's content");
    std::fs::create_dir(to).during(what)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let target = rfs::open(to, flags, Mode::empty()).during(what)?;
    match open_inside(image, path, OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(source) => folder(&source, &target, DEPTH).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Failure::new(what(), "it is larger than the instance's memory; raise `run.limits.memory`")
            }
            _ => Failure::new(what(), error),
        }),
        Err(Errno::NOENT) => {
            // The well-known places for everybody's files, with everybody's mode.
            let shared = matches!(path, "/tmp" | "/var/tmp" | "/dev/shm");
            let (mode, uid, gid) = if shared { (0o1777, 0, 0) } else { (0o755, user.uid, user.gid) };
            rfs::fchown(&target, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).during(what)?;
            rfs::fchmod(&target, Mode::from_raw_mode(mode)).during(what)
        }
        Err(error) => Err(Failure::new(what(), error)),
    }
}

fn folder(source: &OwnedFd, target: &OwnedFd, depth: usize) -> io::Result<()> {
    let depth =
        depth.checked_sub(1).ok_or_else(|| io::Error::other(format!("more than {DEPTH} folders deep")))?;
    let mut buffer = Vec::with_capacity(8192);
    let mut entries = RawDir::new(source, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            one(source, target, name, depth)?;
        }
    }
    own(target, &rfs::fstat(source)?)
}

fn one(source: &OwnedFd, target: &OwnedFd, name: &std::ffi::CStr, depth: usize) -> io::Result<()> {
    let stat = rfs::statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let from = rfs::openat(source, name, read | OFlags::DIRECTORY, Mode::empty())?;
            rfs::mkdirat(target, name, Mode::RWXU)?;
            let to = rfs::openat(target, name, read | OFlags::DIRECTORY, Mode::empty())?;
            folder(&from, &to, depth)
        }
        FileType::RegularFile => {
            let from = rfs::openat(source, name, read, Mode::empty())?;
            let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let to = rfs::openat(target, name, write, Mode::RUSR | Mode::WUSR)?;
            let (mut from, mut to) = (File::from(from), File::from(to));
            io::copy(&mut from, &mut to)?;
            own(&to, &stat)
        }
        FileType::Symlink => {
            let to = rfs::readlinkat(source, name, Vec::new())?;
            rfs::symlinkat(&to, target, name)?;
            let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            Ok(rfs::chownat(target, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
        }
        _ => Ok(()),
    }
}

/// The owner first: changing it clears set-id bits.
fn own(target: impl AsFd, stat: &Stat) -> io::Result<()> {
    rfs::fchown(&target, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rfs::fchmod(&target, permissions(stat.st_mode))?;
    rfs::futimens(&target, &times(stat))?;
    Ok(())
}

pub(super) fn permissions(mode: RawMode) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

pub(super) fn times(stat: &Stat) -> Timestamps {
    let time = Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec.cast_signed() };
    Timestamps { last_access: time, last_modification: time }
}
