//! A tree on disk into a layer's tar: the same tree gives the same bytes.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::Duration;

use kiln_model::digest::Digest;
use rustix::fs::{self as rfs, AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::Error;
use crate::extract::{CAPABILITY, OVERLAY_OPAQUE};
use crate::store::{BlobWriter, ImageStore};
use crate::tar::{Entry, Kind, Writer};

/// XATTR_SIZE_MAX of the kernel's limits.h.
const LARGEST_ATTRIBUTE: usize = 1 << 16;

/// How the tree says that something of the layers below is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// A whole tree: a device is an error.
    None,
    /// The upper of an overlay: 0:0 devices and opaque directories become OCI whiteouts.
    Overlay,
}

/// How a tree is packed.
pub struct Packer {
    pub whiteouts: Whiteouts,
    /// Seconds; what is younger gets this time.
    pub newest: i64,
    /// Owners in the tree are this much higher than in the layer.
    pub shift: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    pub diff_id: Digest,
    pub size: u64,
    pub entries: u64,
}

struct Walk<'a, W: Write> {
    packer: &'a Packer,
    writer: Writer<BufWriter<Both<W>>>,
    /// First path of each file with several names.
    linked: HashMap<(u64, u64), Vec<u8>>,
    entries: u64,
}

impl Packer {
    /// Packs the tree into a blob of the store. Without an entry it is the empty tar.
    ///
    /// # Errors
    /// The tree can't be read, holds what a layer can't, or the blob can't be written.
    pub fn pack(&self, store: &ImageStore, tree: &Path) -> Result<Packed, Error> {
        self.pack_and_copy(store, tree, io::sink()).map(|(packed, _)| packed)
    }

    /// The same, and the blob's bytes to `other` as well. Says how long hashing took.
    pub(crate) fn pack_and_copy(
        &self,
        store: &ImageStore,
        tree: &Path,
        other: impl Write,
    ) -> Result<(Packed, Duration), Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rfs::open(tree, flags, Mode::empty()).map_err(|e| Error::io("open", tree)(e.into()))?;
        let both = Both { blob: store.blob_writer()?, other };
        let writer = Writer::new(BufWriter::with_capacity(1 << 18, both));
        let mut walk = Walk { packer: self, writer, linked: HashMap::new(), entries: 0 };
        walk.folder(&root, b"").map_err(Error::io("pack", tree))?;
        let entries = walk.entries;
        let Both { blob, other } = walk
            .writer
            .finish()
            .and_then(|buffer| buffer.into_inner().map_err(io::IntoInnerError::into_error))
            .map_err(Error::io("pack", tree))?;
        // Whoever reads it is done while the blob is synced.
        drop(other);
        let hashing = blob.hashing();
        let (diff_id, size) = blob.finish()?;
        Ok((Packed { diff_id, size, entries }, hashing))
    }
}

struct Both<W> {
    blob: BlobWriter,
    other: W,
}

impl<W: Write> Write for Both<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.blob.write(bytes)?;
        self.other.write_all(&bytes[..n])?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.blob.flush()?;
        self.other.flush()
    }
}

impl<W: Write> Walk<'_, W> {
    fn folder(&mut self, folder: &OwnedFd, path: &[u8]) -> io::Result<()> {
        let mut names = Vec::new();
        for item in Dir::read_from(folder)? {
            let item = item?;
            let name = item.file_name();
            if name != c"." && name != c".." {
                names.push(name.to_owned());
            }
        }
        names.sort();
        if self.packer.whiteouts == Whiteouts::Overlay
            && attribute(folder, OsStr::new(OVERLAY_OPAQUE))?.is_some()
        {
            self.append(whiteout(join(path, b".wh..wh..opq"), self.packer.newest), &mut io::empty())?;
        }
        for name in &names {
            let below = join(path, name.to_bytes());
            let shown = String::from_utf8_lossy(&below).into_owned();
            self.item(folder, name, below).map_err(|error| match error.raw_os_error() {
                Some(_) => io::Error::new(error.kind(), format!("/{shown}: {error}")),
                // Named where it happened, not again on the way up.
                None => error,
            })?;
        }
        Ok(())
    }

    fn item(&mut self, folder: &OwnedFd, name: &CStr, path: Vec<u8>) -> io::Result<()> {
        let stat = rfs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::Fifo => Kind::Fifo,
            // A socket is nothing without the process that listens on it; tar leaves it out too.
            FileType::Socket => return Ok(()),
            FileType::CharacterDevice if stat.st_rdev == 0 && self.packer.whiteouts == Whiteouts::Overlay => {
                let (parent, name) = crate::tar::split_path(&path);
                let hidden = join(parent, &[b".wh.", name].concat());
                return self.append(whiteout(hidden, self.packer.newest), &mut io::empty());
            }
            _ => return Err(io::Error::other("a device can't be part of an image")),
        };
        let mut entry = self.entry(&stat, kind, path)?;
        if stat.st_nlink > 1 && kind != Kind::Directory {
            match self.linked.get(&(stat.st_dev, stat.st_ino)) {
                Some(first) => {
                    entry.kind = Kind::Hardlink;
                    entry.link.clone_from(first);
                    entry.size = 0;
                    return self.append(entry, &mut io::empty());
                }
                None => {
                    self.linked.insert((stat.st_dev, stat.st_ino), entry.path.clone());
                }
            }
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match kind {
            Kind::File => {
                let fd = rfs::openat(folder, name, flags | OFlags::NONBLOCK, Mode::empty())?;
                entry.xattrs = attributes(&fd)?;
                self.append(entry, &mut File::from(fd))
            }
            Kind::Directory => {
                let fd = rfs::openat(folder, name, flags | OFlags::DIRECTORY, Mode::empty())?;
                entry.xattrs = attributes(&fd)?;
                let path = entry.path.clone();
                self.append(entry, &mut io::empty())?;
                self.folder(&fd, &path)
            }
            Kind::Symlink => {
                entry.link = rfs::readlinkat(folder, name, Vec::new())?.into_bytes();
                self.append(entry, &mut io::empty())
            }
            _ => self.append(entry, &mut io::empty()),
        }
    }

    fn entry(&self, stat: &Stat, kind: Kind, path: Vec<u8>) -> io::Result<Entry> {
        let owner = |id: u32| {
            id.checked_sub(self.packer.shift)
                .ok_or_else(|| io::Error::other(format!("its owner {id} is not one of the sandbox's")))
        };
        Ok(Entry {
            path,
            kind,
            size: if kind == Kind::File { u64::try_from(stat.st_size).unwrap_or(0) } else { 0 },
            mode: if kind == Kind::Symlink { 0o777 } else { stat.st_mode & 0o7777 },
            uid: owner(stat.st_uid)?,
            gid: owner(stat.st_gid)?,
            mtime: stat.st_mtime.clamp(0, self.packer.newest),
            link: Vec::new(),
            xattrs: BTreeMap::new(),
        })
    }

    fn append(&mut self, entry: Entry, content: &mut impl io::Read) -> io::Result<()> {
        self.entries += 1;
        self.writer.append(&entry, content)
    }
}

fn whiteout(path: Vec<u8>, mtime: i64) -> Entry {
    Entry {
        path,
        kind: Kind::File,
        size: 0,
        mode: 0,
        uid: 0,
        gid: 0,
        mtime,
        link: Vec::new(),
        xattrs: BTreeMap::new(),
    }
}

pub(crate) fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() }
}

/// The attributes that a layer keeps: file capabilities, and users' own.
fn attributes(fd: &impl AsFd) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = [0; 1 << 12];
    let length = match rfs::flistxattr(fd, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(errno.into()),
    };
    let mut found = BTreeMap::new();
    for name in names[..length].split(|b| *b == 0) {
        if name == CAPABILITY {
            if let Some(value) = attribute(fd, OsStr::from_bytes(name))? {
                found.insert(name.to_vec(), without_namespace(value)?);
            }
        } else if name.starts_with(b"user.")
            && let Some(value) = attribute(fd, OsStr::from_bytes(name))?
        {
            found.insert(name.to_vec(), value);
        }
    }
    Ok(found)
}

pub(crate) fn attribute(fd: &impl AsFd, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    // The kernel clears as many bytes as it is given room for, and nearly all files have no attribute.
    let mut room = [0; 1 << 8];
    match rfs::fgetxattr(fd, name, &mut room[..]) {
        Ok(length) => Ok(Some(room[..length].to_vec())),
        Err(Errno::RANGE) => {
            let mut value = vec![0; LARGEST_ATTRIBUTE];
            let length = rfs::fgetxattr(fd, name, &mut value[..])?;
            value.truncate(length);
            Ok(Some(value))
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Revision 3 of file capabilities names the root of the sandbox's namespace in its last four bytes; revision 2, which
/// counts for every root, is the same without them.
fn without_namespace(mut value: Vec<u8>) -> io::Result<Vec<u8>> {
    match (value.len(), value.get(3)) {
        (20, Some(2)) => Ok(value),
        (24, Some(3)) => {
            value.truncate(20);
            value[3] = 2;
            Ok(value)
        }
        _ => Err(io::Error::other("its file capabilities are of an unknown revision")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rustix::fs::XattrFlags;

    use super::*;

    #[test]
    fn an_attribute_is_read_whole_however_long_it_is() {
        let file = tempfile::tempfile().unwrap();
        let name = OsStr::new("user.x");
        assert_eq!(attribute(&file, name).unwrap(), None);
        for length in [0, 1, 255, 256, 257, 3000] {
            let value = vec![b'v'; length];
            rfs::fsetxattr(&file, name, &value, XattrFlags::empty()).unwrap();
            assert_eq!(attribute(&file, name).unwrap(), Some(value));
        }
    }
}
