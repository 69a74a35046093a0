//! What is taken out of a tree before it becomes a layer, so that the same lock gives the same bytes, and no image carries
//! what belongs to one machine.

use std::io;
use std::path::Path;

use rustix::fs::{self as rfs, AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps};

use super::tree::{Tree, open_root};

/// Each with its reason. A `/` at the end empties the folder; a `*` in the last part stands for any letters.
pub(crate) const REMOVED: [(&str, &str); 26] = [
    ("proc/", "made by the runtime at launch"),
    ("sys/", "made by the runtime at launch"),
    ("tmp/", "nobody's"),
    ("var/tmp/", "nobody's"),
    ("usr/sbin/policy-rc.d", "keeps services from starting while the image is made"),
    ("etc/machine-id", "of one machine"),
    ("var/lib/dbus/machine-id", "of one machine"),
    ("etc/ssh/ssh_host_*", "private keys of one machine"),
    ("var/lib/systemd/random-seed", "random"),
    ("var/lib/systemd/credential.secret", "random, and a secret"),
    ("var/lib/systemd/catalog/database", "holds times; made anew when missing"),
    ("var/cache/ldconfig/aux-cache", "holds inode numbers; made anew when missing"),
    ("var/cache/apt/*.bin", "a cache that depends on the time"),
    ("var/cache/apt/archives/*", "packages and locks of one run"),
    ("var/lib/apt/lists/", "of the archive at one moment"),
    ("var/cache/debconf/*-old", "a backup of the state before"),
    ("var/lib/dpkg/*-old", "a backup of the state before"),
    ("etc/passwd-", "a backup of the state before"),
    ("etc/group-", "a backup of the state before"),
    ("etc/shadow-", "a backup of the state before"),
    ("etc/gshadow-", "a backup of the state before"),
    ("etc/sub*id-", "a backup of the state before"),
    ("var/log/dpkg.log", "holds times"),
    ("var/log/alternatives.log", "holds times"),
    ("var/log/bootstrap.log", "holds times"),
    ("var/log/apt/*", "holds times"),
];

/// Removes what `REMOVED` names, empties what is left of the logs, and clamps every time to `newest`.
///
/// The tree itself is changed, not only the layer, so that the next step sees what it would see on the layer.
pub(crate) fn seal(path: &Path, newest: i64, with_content: bool) -> io::Result<()> {
    let tree = Tree::open(path, 0)?;
    if with_content {
        for (pattern, _) in REMOVED {
            remove(&tree, pattern)?;
        }
    }
    walk(&open_root(path)?, &[], newest, with_content)
}

fn remove(tree: &Tree, pattern: &str) -> io::Result<()> {
    let (folder, name) = pattern.rsplit_once('/').unwrap_or(("", pattern));
    let (before, after) = match name.split_once('*') {
        Some(parts) => parts,
        None if name.is_empty() => ("", ""),
        None => return remove_plain(tree, folder, name.as_bytes()),
    };
    for found in tree.names(folder.as_bytes())? {
        let long_enough = found.len() >= before.len() + after.len();
        if long_enough && found.starts_with(before.as_bytes()) && found.ends_with(after.as_bytes()) {
            remove_plain(tree, folder, &found)?;
        }
    }
    Ok(())
}

fn remove_plain(tree: &Tree, folder: &str, name: &[u8]) -> io::Result<()> {
    let path = [folder.as_bytes(), b"/", name].concat();
    let is_folder = tree
        .stat_itself(&path)?
        .is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
    // Folders are a package's own, such as apt's `lists/partial` and `archives/partial`.
    if is_folder && (folder.starts_with("var/lib/apt") || folder.starts_with("var/cache/apt")) {
        return Ok(());
    }
    tree.remove(&path)
}

fn walk(folder: &std::os::fd::OwnedFd, path: &[u8], newest: i64, with_content: bool) -> io::Result<()> {
    for name in super::tree::names_in(folder)? {
        let stat = rfs::statat(folder, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let below = if path.is_empty() { name.clone() } else { [path, b"/", name.as_slice()].concat() };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if kind == FileType::Directory {
            let fd = rfs::openat(folder, name.as_slice(), flags | OFlags::DIRECTORY, Mode::empty())?;
            walk(&fd, &below, newest, with_content)?;
        } else if with_content
            && kind == FileType::RegularFile
            && stat.st_size > 0
            && below.starts_with(b"var/log/")
        {
            let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rfs::openat(folder, name.as_slice(), flags, Mode::empty())?;
            rfs::ftruncate(&fd, 0)?;
            clamp(folder, &name, &rfs::fstat(&fd)?, newest)?;
            continue;
        }
        clamp(folder, &name, &stat, newest)?;
    }
    Ok(())
}

fn clamp(folder: &std::os::fd::OwnedFd, name: &[u8], stat: &Stat, newest: i64) -> io::Result<()> {
    if stat.st_mtime < newest || (stat.st_mtime == newest && stat.st_mtime_nsec == 0) {
        return Ok(());
    }
    let time = Timespec { tv_sec: newest, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rfs::utimensat(folder, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}
