//! Single paths of an image, looked up through its layers.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_model::digest::Digest;
use rustix::fs::{self as rfs, AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::Error;
use crate::extract::OVERLAY_OPAQUE;
use crate::pack::{attribute, join};
use crate::store::ImageStore;
use crate::tar::split_path;

/// As many as Linux follows.
const LINKS: usize = 40;

pub(crate) struct LayerTree {
    pub(crate) diff_id: Digest,
    pub(crate) path: PathBuf,
    pub(crate) root: OwnedFd,
}

/// The trees of an image's layers. Paths are relative to the image's root, without a `/` in front; no link is followed.
pub struct Stack {
    /// The lowest first.
    pub(crate) layers: Vec<Arc<LayerTree>>,
}

/// What one layer says of a path.
enum Said {
    Here(Stat),
    /// Not there, whatever the layers below have.
    Hidden,
    Nothing,
}

impl ImageStore {
    /// The layers' trees of an image, to look up what lies in it.
    ///
    /// # Errors
    /// The image is not in the store, or a layer is not one that can be extracted.
    pub fn stack(&self, image: &Digest) -> Result<Stack, Error> {
        let layers = self.image(image)?.layers.into_iter().map(|layer| {
            let path = self.layer_tree(&layer.diff_id)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let root = rfs::open(&path, flags, Mode::empty());
            let root = root.map_err(|errno| Error::io("open", &path)(errno.into()))?;
            Ok(Arc::new(LayerTree { diff_id: layer.diff_id, path, root }))
        });
        Ok(Stack { layers: layers.collect::<Result<_, Error>>()? })
    }
}

impl Stack {
    /// How many layers it has.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// What the lowest of its layers show without those above them.
    #[must_use]
    pub fn lowest(&self, count: usize) -> Self {
        Self { layers: self.layers.iter().take(count).map(Arc::clone).collect() }
    }

    /// A regular file's bytes; none where there is no such file.
    ///
    /// # Errors
    /// It can't be read, or has more than `limit` bytes.
    pub fn read(&self, path: &[u8], limit: u64) -> Result<Option<Vec<u8>>, Error> {
        match self.find(path)? {
            Some((layer, stat)) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                self.read_in(layer, path, limit).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Where a link points to; none where there is no such link.
    ///
    /// # Errors
    /// It can't be read.
    pub fn link(&self, path: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        match self.find(path)? {
            Some((layer, stat)) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => {
                let tree = &self.layers[layer];
                let target = rfs::readlinkat(&tree.root, path, Vec::new());
                target.map(|target| Some(target.into_bytes())).map_err(tree.failed("read link", path))
            }
            _ => Ok(None),
        }
    }

    /// As [`Stack::read`], as a process in the image would: links are followed, and end at its root.
    ///
    /// # Errors
    /// As for [`Stack::read`].
    pub fn read_through_links(&self, path: &[u8], limit: u64) -> Result<Option<Vec<u8>>, Error> {
        // Nearly always no link is on the way, and a look at each part goes through all layers.
        let is_plain = path.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b".."));
        if is_plain && let Some(content) = self.read(path, limit)? {
            return Ok(Some(content));
        }
        let mut links = LINKS;
        let mut reached: Vec<u8> = Vec::new();
        let parts =
            |path: &[u8]| path.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect::<Vec<_>>();
        let mut left = parts(path);
        while let Some(part) = left.pop() {
            match part.as_slice() {
                b"" | b"." => {}
                b".." => reached.truncate(split_path(&reached).0.len()),
                name => {
                    let next = join(&reached, name);
                    match self.link(&next)? {
                        None => reached = next,
                        Some(_) if links == 0 => return Ok(None),
                        Some(target) => {
                            links -= 1;
                            if target.starts_with(b"/") {
                                reached.clear();
                            }
                            left.extend(parts(&target));
                        }
                    }
                }
            }
        }
        self.read(&reached, limit)
    }

    /// The layer that has it, counted from the lowest.
    fn find(&self, path: &[u8]) -> Result<Option<(usize, Stat)>, Error> {
        for (at, tree) in self.layers.iter().enumerate().rev() {
            match tree.look(path).map_err(tree.failed("look up", path))? {
                Said::Here(stat) => return Ok(Some((at, stat))),
                Said::Hidden => return Ok(None),
                Said::Nothing => {}
            }
        }
        Ok(None)
    }

    /// A file of one layer.
    pub(crate) fn open_in(&self, layer: usize, path: &[u8]) -> Result<File, Error> {
        let tree = &self.layers[layer];
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rfs::openat2(&tree.root, path, flags, Mode::empty(), resolve)
            .map(File::from)
            .map_err(tree.failed("open", path))
    }

    /// Of what one layer has there, be it a link.
    pub(crate) fn stat_in(&self, layer: usize, path: &[u8]) -> Result<Stat, Error> {
        let tree = &self.layers[layer];
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rfs::openat2(&tree.root, path, flags, Mode::empty(), resolve)
            .and_then(rfs::fstat)
            .map_err(tree.failed("look at", path))
    }

    pub(crate) fn read_in(&self, layer: usize, path: &[u8], limit: u64) -> Result<Vec<u8>, Error> {
        let mut content = Vec::new();
        let shown = Path::new("/").join(OsStr::from_bytes(path));
        // One more, to tell a file of the limit's size from a longer one.
        let mut file = self.open_in(layer, path)?.take(limit.saturating_add(1));
        file.read_to_end(&mut content).map_err(Error::io("read", &shown))?;
        if content.len() as u64 > limit {
            let why = format!("more than the {limit} bytes that are read of it");
            return Err(Error::malformed(shown.display().to_string(), why));
        }
        Ok(content)
    }
}

impl LayerTree {
    fn failed(&self, doing: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> Error {
        let path = self.path.join(OsStr::from_bytes(path));
        move |errno| Error::io(doing, path)(io::Error::from(errno))
    }

    fn look(&self, path: &[u8]) -> Result<Said, Errno> {
        let mut entered: Option<OwnedFd> = None;
        let mut parts = path.split(|byte| *byte == b'/').peekable();
        let mut opaque = false;
        while let Some(part) = parts.next() {
            let folder = entered.as_ref().map_or(self.root.as_fd(), OwnedFd::as_fd);
            opaque |= attribute(&folder, OsStr::new(OVERLAY_OPAQUE)).is_ok_and(|value| value.is_some());
            let stat = match rfs::statat(folder, part, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) if opaque => return Ok(Said::Hidden),
                Err(Errno::NOENT) => return Ok(Said::Nothing),
                Err(errno) => return Err(errno),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                // A whiteout; no layer holds another device.
                FileType::CharacterDevice => return Ok(Said::Hidden),
                _ if parts.peek().is_none() => return Ok(Said::Here(stat)),
                FileType::Directory => {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    entered = Some(rfs::openat(folder, part, flags, Mode::empty())?);
                }
                _ => return Ok(Said::Hidden),
            }
        }
        Ok(Said::Nothing)
    }
}
