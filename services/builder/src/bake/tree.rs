//! A root file system in the making, changed from outside: every path is taken as it would be inside, so that a link in it
//! can't lead out.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kiln_image::tar::split_path;
use rustix::fs::{self as rfs, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::io::Errno;

/// How high the sandbox's user ids are on the machine.
pub(crate) const SHIFT: u32 = 200_000;
/// Folders that are kept open.
const OPEN_LIMIT: usize = 256;

pub(crate) struct Tree {
    path: PathBuf,
    root: OwnedFd,
    /// Owners on disk are this much higher than inside: `SHIFT` in the upper of an overlay, 0 in a whole tree.
    pub(crate) shift: u32,
}

/// The folder itself: no link in its place.
pub(crate) fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rfs::open(path, flags, Mode::empty())?)
}

impl Tree {
    pub(crate) fn open(path: &Path, shift: u32) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), root: open_root(path)?, shift })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn open_at(&self, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        loop {
            // A rename elsewhere at the same moment makes the kernel give up once.
            match rfs::openat2(&self.root, path, flags | OFlags::CLOEXEC, mode, ResolveFlags::IN_ROOT) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    pub(crate) fn own(&self, fd: &OwnedFd, uid: u32, gid: u32) -> Result<(), Errno> {
        rfs::fchown(fd, Some(Uid::from_raw(uid + self.shift)), Some(Gid::from_raw(gid + self.shift)))
    }

    pub(crate) fn own_link(&self, folder: &OwnedFd, name: &[u8], uid: u32, gid: u32) -> Result<(), Errno> {
        let (uid, gid) = (Uid::from_raw(uid + self.shift), Gid::from_raw(gid + self.shift));
        rfs::chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Opens a folder; those on the way that are not there are made with the usual mode.
    pub(crate) fn folder(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        match self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) if !path.is_empty() => {
                let (above, name) = split_path(path);
                let parent = self.folder(above)?;
                match rfs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) => {
                        let folder = self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
                        self.own(&folder, 0, 0)?;
                        rfs::fchmod(&folder, Mode::from_raw_mode(0o755))?;
                        Ok(folder)
                    }
                    // Another thread was first.
                    Err(Errno::EXIST) => {
                        self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
                    }
                    Err(errno) => Err(errno),
                }
            }
            other => other,
        }
    }

    /// What is there, a link at the end followed.
    pub(crate) fn stat(&self, path: &[u8]) -> Result<Option<Stat>, Errno> {
        match self.open_at(path, OFlags::PATH, Mode::empty()) {
            Ok(fd) => rfs::fstat(&fd).map(Some),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// What is there itself, be it a link.
    pub(crate) fn stat_itself(&self, path: &[u8]) -> Result<Option<Stat>, Errno> {
        match self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(fd) => rfs::fstat(&fd).map(Some),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn read(&self, path: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let fd = match self.open_at(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        if FileType::from_raw_mode(rfs::fstat(&fd)?.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let mut content = Vec::new();
        File::from(fd).read_to_end(&mut content)?;
        Ok(Some(content))
    }

    /// Writes a file in the place of what is there; a link there is replaced and not followed.
    pub(crate) fn write(&self, path: &[u8], mode: u32, content: &[u8]) -> io::Result<()> {
        self.put(path, mode, (0, 0), &mut &*content)
    }

    pub(crate) fn put(
        &self,
        path: &[u8],
        mode: u32,
        (uid, gid): (u32, u32),
        content: &mut impl Read,
    ) -> io::Result<()> {
        let (above, name) = split_path(path);
        let folder = self.folder(above)?;
        match rfs::unlinkat(&folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut file = File::from(create(&folder, name)?);
        io::copy(content, &mut file)?;
        file.flush()?;
        let fd = OwnedFd::from(file);
        self.own(&fd, uid, gid)?;
        rfs::fchmod(&fd, Mode::from_raw_mode(mode))?;
        Ok(())
    }

    /// Removes a file, link or folder with what is in it.
    pub(crate) fn remove(&self, path: &[u8]) -> io::Result<()> {
        let (above, name) = split_path(path);
        let folder = match self.open_at(above, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        remove_at(&folder, name)
    }

    /// The names in a folder; none where it is not there.
    pub(crate) fn names(&self, path: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let folder = match self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        };
        names_in(&folder)
    }
}

/// A new file in an open folder, for its owner alone until it is whole.
pub(crate) fn create(folder: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rfs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR)
}

pub(crate) fn names_in(folder: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for item in rfs::Dir::read_from(folder)? {
        let item = item?;
        let name = item.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

fn remove_at(folder: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match rfs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let below = rfs::openat(folder, name, flags, Mode::empty())?;
    for name in names_in(&below)? {
        remove_at(&below, &name)?;
    }
    rfs::unlinkat(folder, name, AtFlags::REMOVEDIR)?;
    Ok(())
}

/// Folders of a tree that are used again and again, kept open.
pub(crate) struct Folders<'a> {
    tree: &'a Tree,
    open: HashMap<Vec<u8>, OwnedFd>,
}

impl<'a> Folders<'a> {
    pub(crate) fn of(tree: &'a Tree) -> Self {
        Self { tree, open: HashMap::new() }
    }

    pub(crate) fn get(&mut self, path: &[u8]) -> Result<&OwnedFd, Errno> {
        if !self.open.contains_key(path) {
            if self.open.len() >= OPEN_LIMIT {
                self.open.clear();
            }
            self.open.insert(path.to_vec(), self.tree.folder(path)?);
        }
        self.open.get(path).ok_or(Errno::NOENT)
    }
}
