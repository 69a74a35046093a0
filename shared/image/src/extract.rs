//! A layer's tar into a tree that overlayfs takes as a lower.
//!
//! Every step is relative to the handle of a directory that was opened without following symbolic links, so no entry can
//! reach outside, whatever the ones before it made.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use rustix::fs::{
    self as rfs, AtFlags, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::pack::join;
use crate::tar::{Entry, Kind, Problem, Reader, split_path};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// In the form of overlayfs mounted by root.
pub(crate) const OVERLAY_OPAQUE: &str = "trusted.overlay.opaque";
pub(crate) const CAPABILITY: &[u8] = b"security.capability";
/// Labels and hashes that the machine it was packed on put there, for itself.
const MACHINES_OWN: [&[u8]; 3] = [b"security.selinux", b"security.ima", b"security.evm"];

/// Bytes of the paths that a layer hides.
const HIDDEN_LIMIT: usize = 16 << 20;
/// As many as a user namespace maps.
const IDS: u32 = 65_536;

/// What one layer may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub entries: u64,
    /// Of all files together.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 1_000_000, bytes: 64 << 30 }
    }
}

/// What a tar is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Of an image: it can hide what lies below it.
    Layer,
    /// A whole root file system, as others pack it: with devices, which the runtime makes at launch, and attributes that
    /// belong to the machine it was packed on.
    Root,
    /// A layer as others pack it, on top of those below it in the same tree. What it hides of them was removed before.
    Above,
}

pub(crate) fn extract(tar: impl Read, root: &OwnedFd, limits: Limits) -> Result<(), Problem> {
    extract_as(Form::Layer, tar, root, limits).map(drop)
}

/// Unpacks a root file system into an empty folder, and gives the time of its youngest entry, in seconds.
///
/// # Errors
/// It is not one that can be taken, or the folder can't be written. What was unpacked until then stays.
pub fn unpack_root(tar: impl Read, root: &OwnedFd, limits: Limits) -> Result<i64, Problem> {
    extract_as(Form::Root, tar, root, limits)
}

/// Unpacks a layer as others pack it onto the tree of those below it, from which what it hides is gone already, and gives the
/// time of its youngest entry, in seconds. What is there under the name of an entry gives way, as where OCI has it.
///
/// # Errors
/// As for [`unpack_root`].
pub fn unpack_layer(tar: impl Read, root: &OwnedFd, limits: Limits) -> Result<i64, Problem> {
    extract_as(Form::Above, tar, root, limits)
}

/// What a layer hides of those below it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hidden {
    paths: Vec<Vec<u8>>,
    /// Folders of which nothing stays but themselves.
    emptied: Vec<Vec<u8>>,
}

impl Hidden {
    /// Reads a whole layer for its whiteouts.
    ///
    /// # Errors
    /// It is not one that can be taken.
    pub fn read(tar: impl Read, limits: Limits) -> Result<Self, Problem> {
        let mut reader = Reader::new(tar);
        let mut hidden = Self::default();
        let (mut entries, mut bytes) = (0, 0);
        while let Some(entry) = reader.next_entry()? {
            entries += 1;
            let (folder, name) = split_path(&entry.path);
            let Some(name) = name.strip_prefix(WHITEOUT) else { continue };
            bytes += entry.path.len();
            if entries > limits.entries || bytes > HIDDEN_LIMIT {
                return Err(Problem::refused(&entry.path, "more whiteouts than are taken"));
            }
            match name {
                _ if entry.path.ends_with(OPAQUE) => hidden.emptied.push(folder.to_vec()),
                b"" | b"." | b".." => return Err(Problem::refused(&entry.path, "a whiteout of nothing")),
                // What aufs wrote for itself.
                name if name.starts_with(WHITEOUT) => {}
                name => hidden.paths.push(join(folder, name)),
            }
        }
        Ok(hidden)
    }

    /// Whether nothing of the layers below shows at a path.
    pub fn hides(&self, path: &[u8]) -> bool {
        let is_below = |folder: &Vec<u8>| {
            folder.is_empty()
                || path.strip_prefix(folder.as_slice()).is_some_and(|rest| rest.starts_with(b"/"))
        };
        self.paths.iter().any(|hidden| hidden == path || is_below(hidden))
            || self.emptied.iter().any(is_below)
    }

    /// Removes it from the tree of the layers below.
    ///
    /// # Errors
    /// Something can't be removed.
    pub fn remove_from(&self, root: &OwnedFd) -> Result<(), Problem> {
        let tree = Tree { form: Form::Above, root, open: Vec::new(), times: Vec::new() };
        for path in &self.paths {
            let (folder, name) = split_path(path);
            // What is not there, or lies behind a link, shows nowhere.
            if let Ok(folder) = tree.folder(folder) {
                remove(folder.as_fd(), name, path)?;
            }
        }
        for path in &self.emptied {
            let Ok(folder) = tree.folder(path) else { continue };
            let failed = |errno: Errno| Problem::refused(path, format!("list: {errno}"));
            for item in Dir::read_from(&folder).map_err(failed)? {
                let item = item.map_err(failed)?;
                let name = item.file_name().to_bytes();
                if name != b"." && name != b".." {
                    remove(folder.as_fd(), name, path)?;
                }
            }
        }
        Ok(())
    }
}

/// Whatever it is, with all that is in it.
fn remove(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<(), Problem> {
    let removed = match rfs::unlinkat(parent, name, AtFlags::empty()) {
        // By the handle of its parent, and without following a link anywhere below.
        Err(Errno::ISDIR) => {
            let parent = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd()));
            std::fs::remove_dir_all(parent.join(OsStr::from_bytes(name)))
        }
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    };
    removed.map_err(|error| Problem::refused(path, format!("remove what it takes the place of: {error}")))
}

fn extract_as(form: Form, tar: impl Read, root: &OwnedFd, limits: Limits) -> Result<i64, Problem> {
    let mut reader = Reader::new(tar);
    let mut tree = Tree { form, root, open: Vec::new(), times: Vec::new() };
    let mut newest = 0;
    let (mut entries, mut bytes) = (0, 0_u64);
    while let Some(entry) = reader.next_entry()? {
        entries += 1;
        bytes = bytes.saturating_add(entry.size);
        if entries > limits.entries {
            return Err(Problem::refused(&entry.path, format!("more than {} entries", limits.entries)));
        }
        if bytes > limits.bytes {
            return Err(Problem::refused(&entry.path, format!("more than {} bytes", limits.bytes)));
        }
        newest = newest.max(entry.mtime);
        let entry = if form == Form::Layer { entry } else { packed_by_others(entry)? };
        tree.put(&entry, &mut reader)?;
    }
    tree.finish()?;
    Ok(newest)
}

/// Without what belongs to the machine that it was packed on.
fn packed_by_others(mut entry: Entry) -> Result<Entry, Problem> {
    if entry.uid >= IDS || entry.gid >= IDS {
        let why =
            format!("it belongs to {}:{}, and an image has {IDS} users and groups", entry.uid, entry.gid);
        return Err(Problem::refused(&entry.path, why));
    }
    entry.xattrs.retain(|name, _| !MACHINES_OWN.contains(&name.as_slice()));
    Ok(entry)
}

struct Tree<'a> {
    form: Form,
    root: &'a OwnedFd,
    /// The folders from below the root to the last entry's; entries come sorted, so most have the same as the one before.
    open: Vec<(Vec<u8>, OwnedFd)>,
    /// Directories get their times at the end, as each entry put into them changes it.
    times: Vec<(Vec<u8>, i64)>,
}

impl Tree<'_> {
    fn put(&mut self, entry: &Entry, content: &mut impl Read) -> Result<(), Problem> {
        let refused = |why: &str| Problem::refused(&entry.path, why);
        let failed = |doing: &str, errno: Errno| match errno {
            Errno::EXIST => refused("it is there twice"),
            _ => Problem::refused(&entry.path, format!("{doing}: {errno}")),
        };
        let (folder, name) = split_path(&entry.path);
        self.enter(folder, &entry.path)?;
        let parent = self.open.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd());

        if name.starts_with(WHITEOUT) {
            match self.form {
                Form::Layer => {}
                Form::Root => return Err(refused("a whiteout, where nothing lies below")),
                Form::Above => return Ok(()),
            }
            if entry.kind != Kind::File || entry.size != 0 {
                return Err(refused("a whiteout that is not an empty file"));
            }
            return whiteout(parent, name, &entry.path);
        }
        if self.form == Form::Above && !name.is_empty() {
            let there = rfs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
            let is_folder =
                there.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
            if !(is_folder && entry.kind == Kind::Directory) {
                remove(parent, name, &entry.path)?;
            }
        }
        let mode = Mode::from_raw_mode(entry.mode);
        match entry.kind {
            Kind::Directory => {
                let directory = if name.is_empty() {
                    self.root.try_clone().map_err(Problem::Io)?
                } else {
                    match rfs::mkdirat(parent, name, Mode::RWXU) {
                        // Made for an entry below it, or given twice; a link or a file in its place is refused by the open.
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(failed("make folder", errno)),
                    }
                    open_folder(parent, name).map_err(|errno| match errno {
                        Errno::NOTDIR | Errno::LOOP => refused("a directory in the place of something else"),
                        _ => failed("open", errno),
                    })?
                };
                self.own(&directory, entry, mode)?;
                self.times.push((entry.path.clone(), entry.mtime));
            }
            Kind::File => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rfs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(|errno| failed("make file", errno))?;
                let mut file = File::from(fd);
                if entry.size > 0 && io::copy(content, &mut file)? != entry.size {
                    return Err(refused("its content ends too early"));
                }
                let fd = OwnedFd::from(file);
                self.own(&fd, entry, mode)?;
                rfs::futimens(&fd, &times(entry.mtime)).map_err(|errno| failed("set times", errno))?;
            }
            Kind::Symlink => {
                rfs::symlinkat(OsStr::from_bytes(&entry.link), parent, name)
                    .map_err(|errno| failed("make link", errno))?;
                self.own_by_name(parent, name, entry)?;
            }
            Kind::Fifo => {
                rfs::mknodat(parent, name, FileType::Fifo, mode, 0)
                    .map_err(|errno| failed("make fifo", errno))?;
                self.own_by_name(parent, name, entry)?;
                rfs::chmodat(parent, name, mode, AtFlags::empty())
                    .map_err(|errno| failed("set mode", errno))?;
            }
            Kind::Hardlink => {
                let (folder, target) = split_path(&entry.link);
                let folder = self.folder(folder).map_err(|_| refused("a hard link to what is not there"))?;
                let parent = self.open.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd());
                let kind = rfs::statat(&folder, target, AtFlags::SYMLINK_NOFOLLOW)
                    .map(|stat| FileType::from_raw_mode(stat.st_mode))
                    .map_err(|_| refused("a hard link to what is not there"))?;
                if kind != FileType::RegularFile && kind != FileType::Symlink {
                    return Err(refused("a hard link to what is not a file"));
                }
                rfs::linkat(&folder, target, parent, name, AtFlags::empty())
                    .map_err(|errno| failed("make hard link", errno))?;
            }
            Kind::CharDevice | Kind::BlockDevice
                if self.form != Form::Layer && entry.path.starts_with(b"dev/") => {}
            Kind::CharDevice | Kind::BlockDevice => return Err(refused("devices are not taken")),
        }
        Ok(())
    }

    /// Owner first: chown(2) takes setuid, setgid and file capabilities away.
    fn own(&self, fd: &OwnedFd, entry: &Entry, mode: Mode) -> Result<(), Problem> {
        let failed = |doing: &str, errno: Errno| Problem::refused(&entry.path, format!("{doing}: {errno}"));
        rfs::fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
            .map_err(|errno| failed("set owner", errno))?;
        rfs::fchmod(fd, mode).map_err(|errno| failed("set mode", errno))?;
        for (name, value) in &entry.xattrs {
            // No other: `trusted.overlay.*` of a lower would make overlayfs show what is not in this layer.
            if name != CAPABILITY && !name.starts_with(b"user.") {
                return Err(Problem::refused(
                    &entry.path,
                    format!("extended attribute {}", String::from_utf8_lossy(name).escape_default()),
                ));
            }
            rfs::fsetxattr(fd, OsStr::from_bytes(name), value, XattrFlags::empty())
                .map_err(|errno| failed("set extended attribute", errno))?;
        }
        Ok(())
    }

    fn own_by_name(&self, parent: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<(), Problem> {
        let failed = |doing: &str, errno: Errno| Problem::refused(&entry.path, format!("{doing}: {errno}"));
        if !entry.xattrs.is_empty() {
            return Err(Problem::refused(&entry.path, "extended attributes on a link or a fifo"));
        }
        let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
        rfs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| failed("set owner", errno))?;
        rfs::utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| failed("set times", errno))
    }

    /// Opens the folders down to `path`, and makes those that have no entry of their own.
    fn enter(&mut self, path: &[u8], entry: &[u8]) -> Result<(), Problem> {
        let parts: Vec<&[u8]> = path.split(|b| *b == b'/').filter(|part| !part.is_empty()).collect();
        let common = self.open.iter().zip(&parts).take_while(|((name, _), part)| name == *part).count();
        self.open.truncate(common);
        for part in &parts[common..] {
            let parent = self.open.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd());
            if part.starts_with(WHITEOUT) {
                return Err(Problem::refused(entry, "a whiteout in the place of a folder"));
            }
            let fd = match open_folder(parent, part) {
                Err(Errno::NOENT) => rfs::mkdirat(parent, *part, Mode::from_raw_mode(0o755))
                    .and_then(|()| rfs::chmodat(parent, *part, Mode::from_raw_mode(0o755), AtFlags::empty()))
                    .and_then(|()| open_folder(parent, part)),
                other => other,
            }
            .map_err(|errno| match errno {
                Errno::NOTDIR | Errno::LOOP => {
                    Problem::refused(entry, "it goes through something that is not a directory")
                }
                _ => Problem::refused(entry, format!("open folder: {errno}")),
            })?;
            self.open.push((part.to_vec(), fd));
        }
        Ok(())
    }

    /// A folder that is there, without a link on the way.
    fn folder(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let mut fd: Option<OwnedFd> = None;
        for part in path.split(|b| *b == b'/').filter(|part| !part.is_empty()) {
            fd = Some(open_folder(fd.as_ref().map_or(self.root.as_fd(), AsFd::as_fd), part)?);
        }
        fd.map_or_else(|| rfs::openat(self.root, ".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()), Ok)
    }

    fn finish(self) -> Result<(), Problem> {
        for (path, mtime) in self.times.iter().rev() {
            let failed = |errno: Errno| Problem::refused(path, format!("set times: {errno}"));
            let folder = match self.folder(path) {
                // Something later in the layer took its place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if self.form == Form::Above => continue,
                other => other.map_err(failed)?,
            };
            rfs::futimens(&folder, &times(*mtime)).map_err(failed)?;
        }
        Ok(())
    }
}

fn whiteout(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<(), Problem> {
    let failed = |errno: Errno| match errno {
        Errno::EXIST => Problem::refused(path, "a whiteout of what the same layer holds"),
        _ => Problem::refused(path, format!("make whiteout: {errno}")),
    };
    if name == OPAQUE {
        return rfs::fsetxattr(parent, OVERLAY_OPAQUE, b"y", XattrFlags::empty()).map_err(failed);
    }
    match &name[WHITEOUT.len()..] {
        b"" | b"." | b".." => Err(Problem::refused(path, "a whiteout of nothing")),
        hidden if hidden.starts_with(WHITEOUT) => {
            Err(Problem::refused(path, "a whiteout of an unknown kind"))
        }
        hidden => rfs::mknodat(parent, hidden, FileType::CharacterDevice, Mode::empty(), 0).map_err(failed),
    }
}

fn open_folder(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rfs::openat(parent, name, flags, Mode::empty())
}

pub(crate) fn times(mtime: i64) -> Timestamps {
    let time = Timespec { tv_sec: mtime, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

#[cfg(test)]
mod tests;
